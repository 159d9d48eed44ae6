"""What a checkpoint says of itself, and which one is meant: found, described, verified, followed to its bases.

    STEP/meta/      meta.json (format, step, configuration, components, base, tokenizer, versions) and the tokenizer's
                    file as it was: tokenizer.model or tokenizer.json (meta.json then tells its bos_token, eos_token)

Nothing here reads an array. What is written where, and how: `training/checkpoint.py`.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from neva_jax.config import COMPONENTS, Config
from neva_jax.configfile import config_from_dict, to_dict
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.training.disk import reason
from neva_jax.training.manifest import NAME as MANIFEST
from neva_jax.training.manifest import DamagedCheckpoint, Level, Progress, check_manifest
from neva_jax.training.retention import steps_in

FORMAT = 2  # 1 had neither a manifest nor averaged weights
VERSIONED = ("neva_jax", "jax", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says, and the tokenizer that lies beside it.

    ema: the checkpoint has the moving average of its trained components too.
    """

    step: int
    config: Config
    components: tuple[str, ...]
    base: str | None
    tokenizer: Tokenizer
    ema: bool = False

    def files(self) -> dict[str, bytes]:
        """The files of the item `meta`."""
        described = {
            "format": FORMAT,
            "step": self.step,
            "components": list(self.components),
            "base": self.base,
            "ema": self.ema,
            "template": self.config.data.template,
            "tokenizer": {
                "file": self.tokenizer.file,
                "sha256": self.tokenizer.sha256,
                "size": self.tokenizer.size,
                **self.tokenizer.settings,
            },
            "versions": {name: _version(name) for name in VERSIONED},
            "config": to_dict(self.config),
        }
        return {
            "meta.json": json.dumps(described, indent=1).encode(),
            self.tokenizer.file: self.tokenizer.serialized,
        }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except Exception:
        return None


def newest_step(folder: Path) -> int | None:
    """The newest checkpoint in a folder of steps, or None. (One that is being written has another name until then.)

    Raises:
      DamagedCheckpoint: the newest is damaged.
    """
    steps = steps_in(folder)
    if steps and not (folder / str(steps[-1]) / "meta" / "meta.json").is_file():
        raise DamagedCheckpoint(
            f"{folder / str(steps[-1])}: is damaged, it has no meta/meta.json; move it away to go back to "
            f"{f'step {steps[-2]}' if steps[1:] else 'the start'}"
        )
    return steps[-1] if steps else None


def locate(path: str | Path) -> Path:
    """The directory of one checkpoint step: `path` is that, a run, or its `checkpoints` (the newest step is taken).

    Raises:
      UserError: there is no checkpoint.
    """
    path = Path(path)
    if (path / "meta" / "meta.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if (step := newest_step(folder)) is not None:
            return folder / str(step)
    raise UserError(f"{path}: holds no checkpoint; name a run's directory, or a step in its checkpoints/")


def read_meta(step_dir: Path) -> Meta:
    """Reads the item `meta` of a checkpoint step.

    Raises:
      DamagedCheckpoint: unreadable, or a tokenizer that is not the one it was saved with.
      UserError: written by a newer format, or another step than the folder's name says.
    """
    path = step_dir / "meta" / "meta.json"
    try:
        described = _migrated(json.loads(path.read_text()), path)
        tokenizer = _read_tokenizer(step_dir / "meta", described)
        config = config_from_dict(described["config"])
        components = tuple(described["components"])
        if unknown := sorted(set(components) - set(COMPONENTS)):
            raise ValueError(f"unknown components {unknown}")
        meta = Meta(described["step"], config, components, described["base"], tokenizer, described["ema"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is broken ({error!r})") from None
    if step_dir.name.isdecimal() and int(step_dir.name) != meta.step:
        raise UserError(f"{step_dir}: is the checkpoint of step {meta.step}; give the folder that name back")
    return meta


def read_data(step_dir: Path) -> dict:
    """The item `data` of a checkpoint step; empty where there is none (it was converted, not trained).

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    path = step_dir / "data" / "metadata"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: is broken ({error!r})") from None


def _migrated(described: dict, path: Path) -> dict:
    """meta.json in today's format.

    Raises:
      UserError: a format that this version does not know.
    """
    written = described["format"]
    if written == 1:
        described = {**described, "ema": False}
    elif written != FORMAT:
        newer = isinstance(written, int) and written > FORMAT
        hint = "was written by a newer neva_jax; install that one" if newer else "no version of neva_jax wrote that"
        raise UserError(f"{path}: is of format {written}, this version reads 1 to {FORMAT}: {hint}")
    return described


def verify(step_dir: Path, level: Level, progress: Progress | None = None) -> str | None:
    """Holds a checkpoint against its manifest; one of format 1 has none, and its structure is looked at instead.

    Returns:
      What should be said of it: that it has no manifest. None: it is what was saved.

    Raises:
      DamagedCheckpoint: a file differs (which, and how), or the manifest is missing.
    """
    if level == "off":
        return None
    if not (step_dir / MANIFEST).exists() and _format(step_dir) == 1:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                count = len(jax.tree.leaves(checkpointer.metadata((step_dir / "state").resolve()).item_metadata.tree))
        except Exception as error:
            raise DamagedCheckpoint(f"{step_dir}: its state/ cannot be read ({reason(error)})") from None
        read_data(step_dir)
        return f"{step_dir}: is of format 1, which had no digests: its {count} arrays are there, their contents unknown"
    check_manifest(step_dir, level, progress)
    return None


def _format(step_dir: Path) -> int:
    path = step_dir / "meta" / "meta.json"
    try:
        return json.loads(path.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: is broken ({error!r})") from None


def _read_tokenizer(folder: Path, described: dict) -> Tokenizer:
    """The tokenizer that lies in `folder`, with the bos and eos that meta.json (`described`) tells."""
    kept = described.get("tokenizer", {})
    path = folder / kept.get("file", "tokenizer.model")
    if path.name not in ("tokenizer.model", "tokenizer.json") or path.parent != folder:
        raise UserError(
            f"{folder / 'meta.json'}: tokenizer.file={kept['file']} is neither tokenizer.model nor tokenizer.json"
        )
    try:
        tokenizer = Tokenizer(path.read_bytes(), str(path), kept)
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
    if tokenizer.sha256 != described["tokenizer"]["sha256"]:
        raise DamagedCheckpoint(f"{path}: is not the file that the checkpoint was saved with")
    return tokenizer


def available_components(path: str | Path) -> dict[str, Path]:
    """Component -> the checkpoint step that holds it, following the chain of bases from `path`.

    Raises:
      UserError: a checkpoint of the chain is missing or broken.
    """
    step_dir = locate(path)
    meta = read_meta(step_dir)
    found = dict.fromkeys(meta.components, step_dir)
    if meta.base is not None:
        try:
            base = available_components(meta.base)
        except UserError as error:
            raise UserError(f"{step_dir}: its base cannot be read: {error}") from None
        found = {**base, **found}
    return found
