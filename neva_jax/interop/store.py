"""Orbax checkpoints, written and read piece by piece.

Orbax takes whole arrays; a stacked parameter of a 7B model has gigabytes. `LazyArray` stands for an array that does not
exist yet: its handler opens the array on disk and writes one block after the other. What comes out is an ordinary
checkpoint (each parameter a zarr folder, chunked by layer) that Orbax restores onto any mesh.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from neva_jax.errors import UserError
from neva_jax.training.checkpoint import FilesHandler, SaveFiles
from neva_jax.training.disk import reason
from neva_jax.training.retention import WRITING, seal

CHUNK_BYTES = 16 * 2**20  # of one file: small enough that a device reads little more than its shard
Block = tuple[tuple[slice | int, ...], np.ndarray]


@dataclass(frozen=True)
class LazyArray:
    """An array to write: `blocks()` yields (index, values) that together cover it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    blocks: Callable[[], Iterator[Block]]


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> tuple[int, ...]:
    """One layer, and its longest dimension halved until a chunk has at most CHUNK_BYTES."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


class LazyArrayHandler(ocp.type_handlers.TypeHandler):
    """Writes `LazyArray`s as Orbax writes numpy arrays, which is how they are read back."""

    def typestr(self) -> str:
        """The type that reads them."""
        return "np.ndarray"

    async def serialize(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Any = None) -> list:
        """Writes all arrays; while a block is written, the next one is made."""
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            store = await tensorstore.open(
                {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": f"{info.path}/"},
                    "metadata": {
                        "shape": value.shape,
                        "chunks": chunk_shape(value.shape, value.dtype, value.stacked),
                        "dtype": "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str,
                        "compressor": {"id": "zstd", "level": 1},
                    },
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
            )
            writing = None
            for index, block in value.blocks():
                if writing is not None:
                    await writing
                writing = store[index].write(block)
            if writing is not None:
                await writing
        return []

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> list:
        """Never called: Orbax reads with its own handlers."""
        raise NotImplementedError

    async def metadata(self, infos: Sequence[Any]) -> list:
        """Never called: Orbax reads with its own handlers."""
        raise NotImplementedError


def save(step_dir: Path, params: dict, files: dict[str, bytes]) -> None:
    """Writes a checkpoint step with trees of `LazyArray` as its parameters; complete, or not there.

    Args:
      files: those of the item `meta`.

    Raises:
      UserError: the disk is full, or what the arrays' blocks raise.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, LazyArrayHandler()), (int, ocp.type_handlers.ScalarHandler())
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns that no jax.Array can be saved, which is meant
    try:
        step_dir.parent.mkdir(parents=True, exist_ok=True)
        writing = step_dir.with_name(step_dir.name + WRITING).resolve()
        state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        items = ocp.CompositeCheckpointHandler(state=state, meta=FilesHandler())
        with ocp.Checkpointer(items) as checkpointer:
            checkpointer.save(
                writing,
                ocp.args.Composite(state=ocp.args.PyTreeSave({"params": params, "step": 0}), meta=SaveFiles(files)),
            )
        seal(writing, step_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{step_dir}: cannot be written ({reason(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


class SavedArrays:
    """The arrays of a checkpoint step, opened one at a time and read by index."""

    def __init__(self, step_dir: Path, item: str = "params"):
        """`item`: `params`, or `ema` (averages). Raises UserError if the step holds no arrays that can be read."""
        self._folder, self._item = step_dir / "state", item
        try:
            described = json.loads((self._folder / "_METADATA").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self._folder}: its _METADATA cannot be read ({error})") from None
        self._ocdbt = described.get("use_ocdbt", True)
        self._driver = "zarr3" if described.get("use_zarr3") else "zarr"

    def open(self, path: Sequence[str]) -> tensorstore.TensorStore:
        """The parameter at `path` (component first); raises UserError if it cannot be read."""
        name = ".".join((self._item, *path))
        if self._ocdbt:
            base = {"driver": "file", "path": f"{self._folder}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{self._folder / name}/"}
        try:
            return tensorstore.open({"driver": self._driver, "kvstore": kvstore}, open=True, read=True).result()
        except ValueError as error:
            raise UserError(
                f"{self._folder}: parameter {name} cannot be read ({' '.join(str(error).split())})"
            ) from None
