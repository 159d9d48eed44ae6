"""The conversions as functions, and what they leave behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from neva_jax.convert import main
from neva_jax.models.neva import abstract_model
from neva_jax.parallel.mesh import make_mesh, shardings
from neva_jax.training.checkpoint_meta import available_components, locate, read_meta
from neva_jax.training.weights import load_components


def flags(options: dict[str, Any]) -> list[str]:
    """`select_layer=-1, force=True` as the flags of a command."""
    given = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        given += [flag] if value is True else [f"{flag}={value}"]
    return given


@pytest.fixture
def from_hf(tmp_path, tokenizer_path) -> Callable[..., Path]:
    """Runs from-hf with the tests' tokenizer; returns the checkpoint."""

    def run(src: Path, out: Path = tmp_path / "checkpoint", **options: Any) -> Path:
        options = {"tokenizer": tokenizer_path} | options
        assert main(["from-hf", f"--src={src}", f"--out={out}", *flags(options)]) == 0
        return out

    return run


@pytest.fixture
def to_hf(tmp_path) -> Callable[..., Path]:
    """Runs to-hf; returns the folder."""

    def run(checkpoint: Path, out: Path = tmp_path / "exported", **options: Any) -> Path:
        assert main(["to-hf", f"--checkpoint={checkpoint}", f"--out={out}", *flags(options)]) == 0
        return out

    return run


def load(checkpoint: Path, mesh: dict[str, int] | None = None, dtype: Any = np.float32) -> dict:
    """The components of a checkpoint as training and generation load them, onto one device or a mesh of 8."""
    sources = available_components(checkpoint)
    meta = read_meta(locate(checkpoint))
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} if mesh is None else mesh
    devices = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    _, state = abstract_model(meta.config.model, meta.config.precision)
    layout = shardings(devices, state)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nnx.to_pure_dict(state),
        layout,
    )
    return load_components({name: abstract[name] for name in sources}, sources)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal trees, value for value."""
    ours, theirs = (nnx.traversals.flatten_mapping(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[path]), expected, err_msg=str(path))


def written(folder: Path) -> set[str]:
    """Names of what lies in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}
