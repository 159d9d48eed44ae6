"""What `convert from-hf` is given: folders of several layouts, sorted into components with their configuration.

LLM folder                      llm                      with --vision and --projector: those too
CLIP or SigLIP folder           vision
LLaVA, LLaVA-NeXT (HF classes)  vision, projector, llm
LLaVA's own layout              projector, llm; the encoder's configuration (and its weights) come from --vision
mm_projector.bin, .safetensors  projector
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neva_jax.config import ModelConfig, ProjectorConfig
from neva_jax.errors import UserError
from neva_jax.interop.hf_config import LLM_TYPES, VISION_TYPES, read_llm, read_vision
from neva_jax.interop.hf_llava import is_original_llava, read_llava, read_original_llava, read_preprocessor
from neva_jax.interop.names import projector_kind, sort_names
from neva_jax.interop.tensors import Tensors, open_weights, read_json

PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
DEFAULT_LENGTH = 2048


@dataclass
class Source:
    """Components with their tensors, and the configuration that describes them.

    origins: component -> the file or folder that stands in messages.
    data: keys of DataConfig that the source sets.
    notes: what a user should know.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    tensors: dict[str, Tensors] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    max_length: int = DEFAULT_LENGTH
    notes: list[str] = field(default_factory=list)
    folders: tuple[Path, ...] = ()

    def add(self, component: str, config: Any, tensors: Tensors, origin: Path) -> None:
        """Takes a component's section and tensors; they are compared later, all at once."""
        self.model = dataclasses.replace(self.model, **{component: config})
        self.tensors[component], self.origins[component] = tensors, str(origin)


def gather(
    src: Path, vision: Path | None, projector: Path | None, allow_pickle: bool, select: tuple[int, str]
) -> Source:
    """Reads the configurations and headers of everything that is given.

    Args:
      select: layer and feature of a vision encoder whose folder does not say them (`--vision`, or alone).

    Raises:
      UserError: a folder of no known layout, a field or file that does not fit, or a part that is given twice.
    """
    for flag, path in (("--src", src), ("--vision", vision), ("--projector", projector)):
        if path is not None and not path.exists():
            raise UserError(f"{flag} {path}: no such file or directory")
    source = Source(folders=tuple(path for path in (src, vision, projector) if path is not None))
    if src.is_file() or not (src / "config.json").is_file():
        _add_projector(source, _projector_file(src, "--src"), allow_pickle)
        _refuse(vision, "--vision", f"{src} is a projector alone")
        _refuse(projector, "--projector", f"{src} is one itself")
        return source
    raw, where = read_json(src / "config.json"), str(src / "config.json")
    kind = raw.get("model_type")
    if is_original_llava(raw):
        _add_original(source, raw, src, vision, projector, allow_pickle)
        return source
    if kind in ("llava", "llava_next"):
        _refuse(vision, "--vision", f"{src} has a vision encoder of its own")
        _refuse(projector, "--projector", f"{src} has a projector of its own")
        described = read_llava(raw, where)
        prepared = read_preprocessor(src, described.vision)
        source.notes += prepared.notes
        found = sort_names(open_weights(src, allow_pickle))
        sections = (("vision", prepared.vision), ("projector", described.projector), ("llm", described.llm))
        for component, config in sections:
            source.add(component, config, found[component], src)
        source.max_length, source.data = described.max_length, prepared.data | described.data
        return source
    if kind in ("clip", "siglip", *VISION_TYPES):
        _refuse(vision, "--vision", f"{src} is a vision encoder itself")
        _refuse(projector, "--projector", f"{src} is a vision encoder alone; give a language model as --src")
        _add_vision(source, src, allow_pickle, select)
        return source
    if kind not in LLM_TYPES:
        known = (*LLM_TYPES, "clip", "siglip", *VISION_TYPES, "llava", "llava_next")
        raise UserError(f"{where}: field model_type={kind} is not supported; only {', '.join(known)} are")
    described = read_llm(raw, where)
    source.max_length = described.max_length
    found = sort_names(open_weights(src, allow_pickle))
    _refuse_tensors(found["vision"] | found["projector"], src)
    source.add("llm", described.llm, found["llm"], src)
    if vision is not None:
        _add_vision(source, vision, allow_pickle, select)
    if projector is not None:
        _add_projector(source, _projector_file(projector, "--projector"), allow_pickle)
    return source


def _refuse(path: Path | None, flag: str, reason: str) -> None:
    if path is not None:
        raise UserError(f"{flag} {path}: {reason}")


def _refuse_tensors(tensors: Tensors, folder: Path) -> None:
    for tensor in tensors.values():
        raise UserError(f"{tensor}: is not part of the model that {folder / 'config.json'} describes")


def _add_vision(source: Source, folder: Path, allow_pickle: bool, select: tuple[int, str]) -> None:
    where = folder / "config.json"
    tower = read_vision(read_json(where), str(where), *select)
    prepared = read_preprocessor(folder, tower)
    source.notes += prepared.notes
    source.data = prepared.data
    found = sort_names(open_weights(folder, allow_pickle))
    _refuse_tensors(found["projector"], folder)
    source.add("vision", prepared.vision, found["vision"], folder)


def _projector_file(path: Path, flag: str) -> Path:
    if path.is_file():
        return path
    for name in PROJECTOR_FILES:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{flag} {path}: has no config.json and no {' or '.join(PROJECTOR_FILES)}")


def _read_projector(path: Path, allow_pickle: bool) -> tuple[ProjectorConfig, Tensors]:
    found = sort_names(open_weights(path, allow_pickle))
    _refuse_tensors(found["vision"] | found["llm"], path.parent)
    return _describe(found["projector"], path)


def _describe(tensors: Tensors, origin: Path) -> tuple[ProjectorConfig, Tensors]:
    return ProjectorConfig(projector_kind(tensors, origin), "image_newline" in tensors), tensors


def _add_projector(source: Source, file: Path, allow_pickle: bool) -> None:
    """A projector that no config.json describes: its kind follows from the names, its widths from the shapes."""
    config, tensors = _read_projector(file, allow_pickle)
    first = tensors.get("linear_1.weight")
    if "llm" not in source.tensors and first is not None and len(first.shape) == 2:
        width, inputs = first.shape
        inputs //= 4 if config.kind == "mlp_downsample" else 1
        source.model = dataclasses.replace(
            source.model,
            vision=dataclasses.replace(source.model.vision, hidden_size=inputs),
            llm=dataclasses.replace(source.model.llm, hidden_size=width),
        )
    elif "vision" not in source.tensors:
        raise UserError(f"--projector {file}: needs --vision, whose features it projects")
    source.add("projector", config, tensors, file)


def _add_original(
    source: Source, raw: dict, src: Path, vision: Path | None, projector: Path | None, allow_pickle: bool
) -> None:
    """LLaVA's own layout. A tuned encoder's weights are in SRC; a pretrained projector is a file beside config.json."""
    where = str(src / "config.json")
    beside = next((src / name for name in PROJECTOR_FILES if (src / name).is_file()), None)
    names = ("model.safetensors", "pytorch_model.bin")
    if beside is not None and not any((src / f"{n}{end}").is_file() for n in names for end in ("", ".index.json")):
        config, tensors = _read_projector(beside, allow_pickle)
        described = read_original_llava(raw, where, config)
        _add_projector(source, beside, allow_pickle)
        source.max_length, source.data = described.max_length, described.data
        return
    found = sort_names(open_weights(src, allow_pickle))
    if found["projector"]:
        _refuse(projector, "--projector", f"{src} has a projector of its own")
        config, tensors = _describe(found["projector"], src)
        origin = src
    else:
        if projector is None and beside is None:
            raise UserError(f"{src}: has no tensor model.mm_projector.*; name the projector's file with --projector")
        origin = beside if projector is None else _projector_file(projector, "--projector")
        config, tensors = _read_projector(origin, allow_pickle)
    described = read_original_llava(raw, where, config)
    if vision is None:
        raise UserError(
            f"{where}: only names its vision encoder ({described.vision_name}); give its folder as --vision"
        )
    _add_vision(source, vision, allow_pickle, described.select)
    if found["vision"]:
        source.notes.append(f"the vision encoder's weights are those in {src}, {vision} only describes it")
        source.add("vision", source.model.vision, found["vision"], src)
    if described.vision_width not in (None, source.model.vision.hidden_size):
        raise UserError(
            f"{where}: field mm_hidden_size={described.vision_width}, but the encoder in {vision} has width "
            f"{source.model.vision.hidden_size}"
        )
    source.add("projector", config, tensors, origin)
    source.add("llm", described.llm, found["llm"], src)
    source.max_length, source.data = described.max_length, source.data | described.data
