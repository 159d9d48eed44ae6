"""Parameters out of checkpoints: onto any mesh, along the chain of bases, whole or in part.

sources     component -> the checkpoint step that has it (`checkpoint_meta.available_components`)
averaged    the step whose moving average (`optimizer.ema_decay`) is read instead of its parameters
"""

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from neva_jax.config import COMPONENTS, Config
from neva_jax.derived import head_dim, kv_heads
from neva_jax.errors import UserError
from neva_jax.training.checkpoint import read_state
from neva_jax.training.checkpoint_meta import read_meta
from neva_jax.training.disk import reason
from neva_jax.training.manifest import DamagedCheckpoint

Shapes = dict[tuple[str, ...], tuple[int, ...]]  # path of a parameter, its component first -> shape


def load_components(abstract: dict, sources: dict[str, Path], averaged: Path | None = None) -> dict:
    """Reads components straight onto their shards.

    Args:
      abstract: component -> tree of `jax.ShapeDtypeStruct` with shardings; dtypes are converted.
      sources: component -> checkpoint step, as `available_components` says.

    Raises:
      DamagedCheckpoint: it cannot be read.
      UserError: a parameter that the checkpoint lacks or has in another shape; no average there.
    """
    if averaged is not None:
        check_averaged(averaged)
    params = {}
    for step_dir in sorted({sources[name] for name in abstract}):
        wanted = {name: tree for name, tree in abstract.items() if sources[name] == step_dir}
        for item, held in _items(step_dir, averaged).items():
            part = {name: tree for name, tree in wanted.items() if name in held}
            if part:
                _check_shapes(part, held, step_dir)
                params |= _read(step_dir, {item: part})[item]
    return {name: params[name] for name in abstract}


def saved_shapes(step_dir: Path, averaged: Path | None = None) -> Shapes:
    """The shape of every parameter that a checkpoint step itself has.

    Raises:
      DamagedCheckpoint: it cannot be read.
    """
    return {
        (*_keys(path),): tuple(leaf.shape)
        for held in _items(step_dir, averaged).values()
        for path, leaf in jax.tree_util.tree_leaves_with_path(held)
    }


def check_averaged(step_dir: Path) -> None:
    """Raises UserError where a checkpoint has no averaged weights."""
    if not read_meta(step_dir).ema:
        raise UserError(
            f"{step_dir}: has no averaged weights (it was trained without optimizer.ema_decay); take its weights as "
            "they are: without --ema, model.init_ema=false"
        )


def _items(step_dir: Path, averaged: Path | None) -> dict[str, dict]:
    """Which part of a saved state each component is read from: `params` or `ema` -> component -> saved shapes."""
    state_dir = (step_dir / "state").resolve()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            described = checkpointer.metadata(state_dir).item_metadata if state_dir.is_dir() else None
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{step_dir}: its state/ cannot be read ({reason(error)})") from None
    if described is None:  # Orbax has then only logged what it found
        raise DamagedCheckpoint(f"{step_dir}: its state/ cannot be read (no metadata); take another step")
    saved = described.tree
    ema = saved.get("ema", {}) if averaged is not None and averaged.resolve() == step_dir.resolve() else {}
    return {"params": {name: tree for name, tree in saved["params"].items() if name not in ema}, "ema": ema}


def _read(step_dir: Path, abstract: dict) -> dict:
    try:
        return read_state(step_dir, abstract)
    except Exception as error:  # TensorStore raises a bare one
        raise DamagedCheckpoint(f"{step_dir}: its state/ cannot be read ({reason(error)})") from None


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in path)


def _check_shapes(wanted: dict, saved: dict, step_dir: Path) -> None:
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = ".".join(_keys(path))
        if path not in shapes:
            raise UserError(f"{step_dir}: has no parameter {name}, which the configured model needs")
        if tuple(shapes[path]) != tuple(leaf.shape):
            raise UserError(f"{step_dir}: {name} has shape {tuple(shapes[path])}, the configured model {leaf.shape}")


# --- a part of the parameters ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What of one component comes from a checkpoint, what starts at random, and what the checkpoint has in excess.

    loaded, random, skipped: path -> shape; random has the shape that the checkpoint has instead, or None.
    """

    component: str
    source: Path | None
    loaded: Shapes
    random: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...] | None]]
    skipped: Shapes

    def row(self) -> tuple[str, ...]:
        """A row of the table: component, how many arrays are loaded, random and skipped, and where they come from."""
        origin = "-" if self.source is None else str(self.source)
        return (self.component, *(str(len(x)) for x in (self.loaded, self.random, self.skipped)), origin)

    def details(self) -> list[str]:
        """A line for each parameter that is not simply loaded, where the component has a source."""
        if self.source is None:
            return []
        lines = [
            f"  {'.'.join(path)} {list(shape)}: random, "
            + ("the checkpoint lacks it" if other is None else f"the checkpoint has {list(other)}")
            for path, (shape, other) in self.random.items()
        ]
        return lines + [
            f"  {'.'.join(path)} {list(shape)}: skipped, the configured model has none"
            for path, shape in self.skipped.items()
        ]


def plan_transfer(abstract: dict, sources: dict[str, Path], averaged: Path | None = None) -> list[Transfer]:
    """For each component of `abstract`, which parameters the checkpoints have as the model needs them."""
    shapes = {step_dir: saved_shapes(step_dir, averaged) for step_dir in set(sources.values())}
    transfers = []
    for name in (component for component in COMPONENTS if component in abstract):
        tree = abstract[name]
        needed = {(name, *_keys(path)): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        source = sources.get(name)
        held = {} if source is None else {path: s for path, s in shapes[source].items() if path[0] == name}
        loaded = {path: shape for path, shape in needed.items() if held.get(path) == tuple(shape)}
        random = {path: (shape, held.get(path)) for path, shape in needed.items() if path not in loaded}
        skipped = {path: shape for path, shape in held.items() if path not in needed}
        transfers.append(Transfer(name, source, loaded, random, skipped))
    return transfers


def table(transfers: Sequence[Transfer]) -> list[str]:
    """What is loaded, random and skipped, as lines of a table and of what is not simply loaded."""
    head = ("weights", "loaded", "random", "skipped", "from")
    rows = [head, *(transfer.row() for transfer in transfers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [line for transfer in transfers for line in transfer.details()]


def subtree(tree: dict, paths: Any, prefix: tuple[str, ...] = ()) -> dict:
    """The nested dictionary of the leaves of `tree` whose path is in `paths`."""
    kept = {}
    for name, value in tree.items():
        path = (*prefix, name)
        if not isinstance(value, dict):
            if path in paths:
                kept[name] = value
        elif below := subtree(value, paths, path):
            kept[name] = below
    return kept


def merged(first: dict, second: dict) -> dict:
    """Two nested dictionaries with different leaves as one."""
    both = {
        name: merged(first[name], second[name]) if name in first and name in second else {**second, **first}[name]
        for name in {**first, **second}
    }
    return dict(sorted(both.items()))


# --- architectures ---------------------------------------------------------------------------------------------------

MAY_DIFFER = (
    *("freeze", "init_std", "scaled_output_init", "position_init_std"),
    *("hidden_dropout", "attention_dropout", "ffn_dropout"),
)
# Another model, but of the same shapes.
SHAPELESS = (
    *("activation", "norm_eps", "select_layer", "select_feature", "image_mean", "image_std", "sliding_window"),
    *("rope_base", "rope_fraction", "rope_scaling", "rope_factor", "rope_original_length"),
    *("rope_low_freq_factor", "rope_high_freq_factor"),
)
RESOLVED = {"num_kv_heads": kv_heads, "head_dim": head_dim}  # keys that may be left to a rule


def differences(config: Config, saved: Config, components: Sequence[str] = COMPONENTS) -> dict[str, tuple[Any, Any]]:
    """Keys that describe the weights of `components` and differ -> (saved value, configured value)."""
    found = {}
    for component in components:
        ours, theirs = getattr(config.model, component), getattr(saved.model, component)
        for item in dataclasses.fields(ours):
            read = RESOLVED.get(item.name, operator.attrgetter(item.name))
            mine, other = read(ours), read(theirs)
            if item.name not in MAY_DIFFER and mine != other:
                found[f"model.{component}.{item.name}"] = (other, mine)
    return found


def check_compatible(config: Config, saved: Config, components: Sequence[str], origin: str | Path) -> None:
    """Compares the architecture of `components` in two configurations.

    Raises:
      UserError: a key that describes the weights differs, with both values.
    """
    for name, (other, mine) in differences(config, saved, components).items():
        raise UserError(f"{name}={mine}, but the weights in {origin} have {other}")
