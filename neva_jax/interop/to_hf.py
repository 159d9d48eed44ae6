"""Our checkpoint -> a folder that Hugging Face's `from_pretrained` and vLLM load.

The headers of the safetensors files are written first; they say where each tensor goes, so that the parameters are read
once, in our order, and layer by layer where they are stored so.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
from tqdm import tqdm

from neva_jax.config import COMPONENTS, Config
from neva_jax.data.encoding import conversation_encoder
from neva_jax.derived import trained_components
from neva_jax.errors import UserError
from neva_jax.files import readable
from neva_jax.interop.export_config import llava_config, special_ids, text_config
from neva_jax.interop.export_files import image_token_id, write_processor, write_tokenizer
from neva_jax.interop.export_template import chat_template, obstacle, starts_with_bos
from neva_jax.interop.names import Parameter, parameters
from neva_jax.interop.output import check_folder, replacing_folder
from neva_jax.interop.store import SavedArrays
from neva_jax.interop.tensors import DTYPE_NAMES, SafetensorsWriter
from neva_jax.training.checkpoint_meta import Meta, available_components, locate, read_meta
from neva_jax.training.weights import check_averaged

BLOCK_BYTES = 64 * 2**20
ROW_MULTIPLE = 64  # of the embedding, where it must grow for <image>, as in llava-hf's models
PREFIXES = {"vision": "vision_tower.vision_model.", "projector": "multi_modal_projector.", "llm": "language_model."}
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Options:
    """The flags of `convert to-hf`."""

    checkpoint: Path
    out: Path
    text_only: bool = False
    dtype: str = "keep"
    shard_gib: float = 4.0
    max_length: int | None = None
    force: bool = False
    ema: bool = False


@dataclass(frozen=True)
class Entry:
    """A parameter of the checkpoint, open, and the tensors that it becomes."""

    parameter: Parameter
    store: tensorstore.TensorStore
    names: list[str]
    dtype: np.dtype

    def tensors(self) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of each tensor."""
        return [(name, self.dtype, self.parameter.shape) for name in self.names]


def to_hf(options: Options, say: Callable[[str], None] = print) -> None:
    """Converts; `say` gets what a user should know about choices that were made.

    Raises:
      UserError: no checkpoint, one that lacks a component, or a model that Hugging Face's classes cannot express.
    """
    step_dir = locate(options.checkpoint)
    meta, sources = read_meta(step_dir), available_components(step_dir)
    if options.ema:
        check_averaged(step_dir)
    wanted = ("llm",) if options.text_only else COMPONENTS
    if lacking := [name for name in wanted if name not in sources]:
        hint = "; --text-only exports the language model" if "llm" not in lacking else ""
        raise UserError(f"{step_dir}: has no {' and no '.join(lacking)}{hint}")
    check_folder(options.out, options.force, (Path(options.checkpoint), step_dir))
    config, max_length = meta.config, options.max_length or meta.config.data.max_length
    rows, described = _describe(meta, max_length, options.text_only)
    if rows > config.model.llm.vocab_size:
        say(f"note: the embedding grows from {config.model.llm.vocab_size} to {rows} rows, for <image>")
    entries = [entry for name in wanted for entry in _entries(name, config, rows, sources[name], options)]
    shards = _shards(entries, options.shard_gib)
    size = sum(_bytes(tensor) for shard in shards for tensor in shard)
    check_folder(options.out, options.force, (Path(options.checkpoint), step_dir), size)
    described["dtype"] = TORCH_NAMES[DTYPE_NAMES[entries[-1].dtype]]
    say(f"{', '.join(wanted)}: {readable(size)} in {len(shards)} file{'s' * (len(shards) > 1)}")
    with replacing_folder(options.out) as fresh:
        _write_json(fresh / "config.json", described)
        _write_json(fresh / "generation_config.json", _generation(meta, described))
        with_images = not options.text_only
        with_bos = starts_with_bos(config.data, meta.tokenizer)
        adds_bos = write_tokenizer(fresh, meta.tokenizer, with_images, max_length, with_bos)
        if reason := obstacle(config.data, meta.tokenizer, with_images, adds_bos):
            say(f"note: no chat_template.jinja, since {reason}")
        else:
            template = chat_template(
                config.data, meta.tokenizer, with_images, with_bos=options.text_only or not adds_bos
            )
            (fresh / "chat_template.jinja").write_text(template, encoding="utf-8")
        if not options.text_only:
            write_processor(fresh, config)
        with tqdm(total=size, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
            _write_weights(fresh, entries, shards, config.model.llm.vocab_size, bar.update)
    say(f"{options.out}: written, {described['architectures'][0]}, max_position_embeddings={max_length}")


def _describe(meta: Meta, max_length: int, text_only: bool) -> tuple[int, dict]:
    """Rows of the exported embedding (padding of ours is dropped; `<image>` needs one), and config.json."""
    llm, ids = meta.config.model.llm, special_ids(meta.tokenizer)
    if text_only:
        return llm.vocab_size, text_config(llm, llm.vocab_size, max_length, ids)
    image, rows = image_token_id(meta.tokenizer), llm.vocab_size
    if image >= rows:
        rows = -(-(image + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows, llava_config(meta.config, rows, max_length, ids, image)


def _generation(meta: Meta, described: dict) -> dict:
    """generation_config.json; an answer ends at the template's token too, where that is not the tokenizer's eos."""
    ids: dict[str, Any] = {name: i for name, i in special_ids(meta.tokenizer).items() if i is not None}
    ends = sorted(conversation_encoder(meta.config.data, meta.tokenizer).ending.ids)
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids | {"transformers_version": described["transformers_version"]}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- tensors ---------------------------------------------------------------------------------------------------------


def _entries(component: str, config: Config, rows: int, step_dir: Path, options: Options) -> Iterator[Entry]:
    averaged = options.ema and step_dir == locate(options.checkpoint) and component in trained_components(config.model)
    saved = SavedArrays(step_dir, "ema" if averaged else "params")
    prefix = "" if options.text_only else PREFIXES[component]
    for parameter in parameters(component, config.model, rows):
        store = saved.open((component, *parameter.path))
        names = [name if name == "image_newline" else prefix + name for name in parameter.names()]
        dtype = DTYPES.get(options.dtype, np.dtype(store.dtype.numpy_dtype))
        if dtype not in DTYPE_NAMES:
            raise UserError(f"{step_dir}: {component}.{'.'.join(parameter.path)} is {dtype}; give --dtype bf16 or fp32")
        yield Entry(parameter, store, names, dtype)


def _bytes(tensor: tuple[str, np.dtype, tuple[int, ...]]) -> int:
    return math.prod(tensor[2]) * tensor[1].itemsize


def _shards(entries: list[Entry], gib: float) -> list[list[tuple[str, np.dtype, tuple[int, ...]]]]:
    """Tensors in the order of their names, layer by layer, in files of at most `gib` (or one tensor)."""
    tensors = [entry.tensors() for entry in entries]
    shards, size = [[]], 0
    for layer in range(max(len(of_one) for of_one in tensors)):
        for tensor in (of_one[layer] for of_one in tensors if layer < len(of_one)):
            if shards[-1] and size + _bytes(tensor) > gib * 2**30:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += _bytes(tensor)
    return shards


def _write_weights(
    folder: Path, entries: list[Entry], shards: list[list], vocabulary: int, progress: Callable[[int], object]
) -> None:
    count = len(shards)
    files = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    writers = [SafetensorsWriter(folder / file, shard) for file, shard in zip(files, shards, strict=True)]
    place = {tensor[0]: i for i, shard in enumerate(shards) for tensor in shard}
    try:
        for entry in entries:
            for name, block, start in _vocabulary(entry, vocabulary) if entry.parameter.vocabulary else _layers(entry):
                writers[place[name]].write(name, block, start)
                progress(block.nbytes)
    finally:
        for writer in writers:
            writer.close()
    if count > 1:
        total = sum(_bytes(tensor) for shard in shards for tensor in shard)
        names = {tensor[0]: files[i] for i, shard in enumerate(shards) for tensor in shard}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))},
        )


def _layers(entry: Entry) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each layer's tensor. As many layers are read at a time as lie in a chunk: the first of them would read it all."""
    parameter, store = entry.parameter, entry.store
    step = 1 if parameter.layers is None else store.chunk_layout.read_chunk.shape[0]
    for start in range(0, len(entry.names), step):
        names = entry.names[start : start + step]
        block = [_read(store)] if parameter.layers is None else _read(store[start : start + step])
        for name, ours in zip(names, block, strict=True):
            yield name, parameter.to_theirs(ours).astype(entry.dtype, copy=False), 0


def _vocabulary(entry: Entry, vocabulary: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """The rows of the vocabulary, then copies of their mean: its logit is the mean of all, so it never wins."""
    parameter, store = entry.parameter, entry.store
    axis = parameter.axes.index(0)
    width = parameter.shape[1]
    step = store.chunk_layout.read_chunk.shape[axis]
    step *= max(1, BLOCK_BYTES // (step * width * entry.dtype.itemsize))
    total = np.zeros(width, np.float64)
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        index = tuple(slice(start, stop) if i == axis else slice(None) for i in range(2))
        block = np.ascontiguousarray(_read(store[index]).transpose(parameter.axes)).astype(entry.dtype, copy=False)
        total += block.astype(np.float32).sum(axis=0, dtype=np.float64)
        yield entry.names[0], block, start
    if (more := parameter.shape[0] - vocabulary) > 0:
        mean = (total / vocabulary).astype(entry.dtype)
        yield entry.names[0], np.broadcast_to(mean, (more, width)), vocabulary


def _read(store: tensorstore.TensorStore) -> np.ndarray:
    try:
        return store.read().result()
    except ValueError as error:
        raise UserError(f"{' '.join(str(error).split())[:400]}") from None
