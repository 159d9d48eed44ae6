"""Checkpoints: written asynchronously by Orbax, complete or absent, and self-describing.

    RUN/checkpoints/STEP/
      state/    params (by component), optimizer, step: arrays, each process writes its shards
      data/     JSON: samples consumed, bad rows met
      meta/     meta.json (format, step, configuration, components, base, tokenizer, versions) and the tokenizer's
                file as it was: tokenizer.model or tokenizer.json (meta.json then tells its bos_token and eos_token)

`params` holds the trained components, and the frozen ones too unless they can be read from `base`, the checkpoint
that the run started from. Reading parameters follows that chain.
"""

import dataclasses
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from neva_jax.config import Config
from neva_jax.configfile import config_from_dict, to_dict
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import head_dim, kv_heads
from neva_jax.errors import UserError

FORMAT = 1
CHUNK_BYTES = 64 * 2**20
VERSIONED = ("neva_jax", "jax", "flax", "optax", "orbax-checkpoint")


class FilesHandler(ocp.CheckpointHandler):
    """Small files as one item of a checkpoint, committed together with its arrays."""

    def save(self, directory: epath.Path, args: "SaveFiles") -> None:
        """Writes the files into the item's directory: one process for all."""
        if jax.process_index():
            return
        for name, content in args.files.items():
            (directory / name).write_bytes(content)

    def restore(self, directory: epath.Path, args: "RestoreFiles | None" = None) -> dict[str, bytes]:
        """Reads all files of the item's directory."""
        return {path.name: path.read_bytes() for path in directory.iterdir()}


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclass
class SaveFiles(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler.save`: file name -> content."""

    files: dict[str, bytes]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclass
class RestoreFiles(ocp.args.CheckpointArgs):
    """Arguments of `FilesHandler.restore`."""


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says, and the tokenizer that lies beside it."""

    step: int
    config: Config
    components: tuple[str, ...]
    base: str | None
    tokenizer: Tokenizer

    def files(self) -> dict[str, bytes]:
        """The files of the item `meta`."""
        described = {
            "format": FORMAT,
            "step": self.step,
            "components": list(self.components),
            "base": self.base,
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
    """The newest checkpoint in a folder of steps, or None. (One that was being written has another name until then.)

    Raises:
      UserError: the newest is damaged.
    """
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)
    if steps and not (folder / str(steps[0]) / "meta" / "meta.json").is_file():
        raise UserError(
            f"{folder / str(steps[0])}: is damaged, it has no meta/meta.json; move it away to go back to "
            f"{f'step {steps[1]}' if steps[1:] else 'the start'}"
        )
    return steps[0] if steps else None


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
      UserError: unreadable, written by a newer format, or a tokenizer that is not the one it was saved with.
    """
    path = step_dir / "meta" / "meta.json"
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT:
            raise UserError(f"{path}: is of format {described['format']}; this version reads {FORMAT}")
        tokenizer = _read_tokenizer(step_dir / "meta", described)
        config = config_from_dict(described["config"])
        return Meta(described["step"], config, tuple(described["components"]), described["base"], tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is broken ({error!r})") from None


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
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if tokenizer.sha256 != described["tokenizer"]["sha256"]:
        raise UserError(f"{path}: is not the file that the checkpoint was saved with")
    return tokenizer


def _chunks(path: tuple, array: jax.Array) -> ocp.SaveArgs:
    """A large parameter is stored in pieces of a layer or less: what reads it piece by piece never holds it whole."""
    stacked = any(part.key == "layers" for part in path)
    if array.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save when it is left."""

    def __init__(self, run_dir: str | Path, keep: int | None):
        self.directory = Path(run_dir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def save(self, step: int, params: dict, optimizer: Any, data: dict, meta: Meta) -> None:
        """Starts to save; returns once the arrays are copied, and they are written while training goes on."""
        state = {"params": params, "optimizer": optimizer, "step": step}
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(), state)
        chunks["params"] = jax.tree_util.tree_map_with_path(_chunks, params)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state, save_args=chunks),
                data=ocp.args.JsonSave(data),
                meta=SaveFiles(meta.files()),
            ),
        )
        if not saved:
            raise RuntimeError(f"{self.directory}: Orbax did not save step {step}; a later step is there")

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, params: dict, optimizer: Any) -> tuple[dict, Any, dict]:
        """The checkpoint of a step: (params, optimizer state, data), straight onto the shardings of the arguments.

        Args:
          params, optimizer: trees of `jax.ShapeDtypeStruct` with shardings; parts of the saved params may be left out.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=_restore_args({"params": params, "optimizer": optimizer}), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"]["params"], restored["state"]["optimizer"], restored["data"]


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )


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


def load_components(abstract: dict, sources: dict[str, Path]) -> dict:
    """Reads components straight onto their shards.

    Args:
      abstract: component -> tree of `jax.ShapeDtypeStruct` with shardings; dtypes are converted.
      sources: component -> checkpoint step, as `available_components` says.

    Raises:
      UserError: a parameter that the checkpoint lacks or has in another shape.
    """
    params = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for step_dir in sorted({sources[name] for name in abstract}):
            wanted = {name: tree for name, tree in abstract.items() if sources[name] == step_dir}
            state_dir = (step_dir / "state").resolve()
            saved = checkpointer.metadata(state_dir).item_metadata if state_dir.is_dir() else None
            if saved is None:
                raise UserError(f"{step_dir}: is damaged, its state/ cannot be read; take another step")
            _check_shapes(wanted, saved.tree["params"], step_dir)
            params |= checkpointer.restore(state_dir, args=_restore_args({"params": wanted}))["params"]
    return {name: params[name] for name in abstract}


def _check_shapes(wanted: dict, saved: dict, step_dir: Path) -> None:
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = ".".join(str(part.key) for part in path)
        if path not in shapes:
            raise UserError(f"{step_dir}: has no parameter {name}, which the configured model needs")
        if tuple(shapes[path]) != tuple(leaf.shape):
            raise UserError(f"{step_dir}: {name} has shape {tuple(shapes[path])}, the configured model {leaf.shape}")


MAY_DIFFER = (
    *("freeze", "init_std", "scaled_output_init", "position_init_std"),
    *("hidden_dropout", "attention_dropout", "ffn_dropout"),
)
RESOLVED = {"num_kv_heads": kv_heads, "head_dim": head_dim}  # keys that may be left to a rule


def check_compatible(config: Config, saved: Config, components: Sequence[str], origin: str | Path) -> None:
    """Compares the architecture of `components` in two configurations.

    Raises:
      UserError: a key that describes the weights differs, with both values.
    """
    for component in components:
        ours, theirs = getattr(config.model, component), getattr(saved.model, component)
        for item in dataclasses.fields(ours):
            read = RESOLVED.get(item.name, operator.attrgetter(item.name))
            mine, other = read(ours), read(theirs)
            if item.name not in MAY_DIFFER and mine != other:
                raise UserError(f"model.{component}.{item.name}={mine}, but the weights in {origin} have {other}")
