"""Weight files, read tensor by tensor: only headers are read at first, and a tensor's bytes when they are asked for.

    model.safetensors                    8 bytes: length n of the header; n bytes of JSON; the tensors' bytes
    model.safetensors.index.json         tensor name -> file of the same folder
    *.bin                                PyTorch's pickles, only on request: see pickles.py

Files are read, never mapped into memory, so that what is resident is what is being converted.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from neva_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDTHS = {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1} | {f"{s}{8 * n}": n for s in "IU" for n in (1, 2, 4, 8)}
MAX_HEADER = 100_000_000  # of the safetensors format


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its name there, its dtype as safetensors calls it, its shape, and where its bytes begin."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows from `start` to `stop`.

        Raises:
          UserError: the file cannot be read, or ends before the tensor does.
        """
        shape, item = self.shape, DTYPES[self.dtype].itemsize
        row = math.prod(shape[1:]) * item
        if shape and (start or stop is not None):
            shape = (min(shape[0], shape[0] if stop is None else stop) - start, *shape[1:])
        buffer = np.empty(math.prod(shape) * item, np.uint8)
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset + start * row)
                count = file.readinto(memoryview(buffer))
        except OSError as error:
            raise UserError(f"{self}: cannot be read ({error.strerror})") from None
        if count != buffer.nbytes:
            raise UserError(f"{self}: the file ends {buffer.nbytes - count} bytes too early; download it again")
        return buffer.view(DTYPES[self.dtype]).reshape(shape)


Tensors = dict[str, Tensor]


def open_weights(path: Path, allow_pickle: bool) -> Tensors:
    """The tensors of a folder (or of one file) by name; only headers are read.

    A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`, or the same as
    `pytorch_model.bin`.

    Raises:
      UserError: no weights, broken or incomplete files, or pickles without `allow_pickle`.
    """
    if path.is_file():
        return _open_file(path, allow_pickle)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _open_file(path / name, allow_pickle)
        if (path / f"{name}.index.json").is_file():
            return _open_index(path / f"{name}.index.json", allow_pickle)
    raise UserError(f"{path}: holds no weights (model.safetensors or pytorch_model.bin, or an index of their shards)")


def read_json(path: Path) -> dict:
    """A JSON file that holds an object; raises UserError where it does not."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _open_file(path: Path, allow_pickle: bool) -> Tensors:
    if path.suffix == ".safetensors":
        return read_header(path)
    if not allow_pickle:
        raise UserError(
            f"{path}: is a pickle; add --allow-pickle to read its tensors (nothing in it is executed), or convert it "
            "to safetensors"
        )
    from neva_jax.interop.pickles import read_pickle

    return read_pickle(path)


def _open_index(index: Path, allow_pickle: bool) -> Tensors:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    found: Tensors = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{index}: names the file {file}, which is not in its folder")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: names the file {file}, which is missing; download it again")
        tensors = _open_file(index.parent / file, allow_pickle)
        if missing := [name for name, where in names.items() if where == file and name not in tensors]:
            raise UserError(
                f"{index.parent / file}: has no tensor {missing[0]}{_more(missing)}, which {index.name} names"
            )
        if extra := [name for name in tensors if names.get(name) != file]:
            raise UserError(
                f"{index.parent / file}: tensor {extra[0]}{_more(extra)} is of no file in {index.name}, or of another"
            )
        found |= tensors
    return found


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_header(path: Path) -> Tensors:
    """The tensors of one safetensors file.

    Raises:
      UserError: truncated (in the header or in the data), or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length > MAX_HEADER:
                raise UserError(f"{path}: is no safetensors file (its header would take {length} bytes)")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(start) < 8 or len(text) < length:
        raise UserError(f"{path}: is truncated within its header ({size} bytes); download it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its header is broken ({error!r})") from None
    ends = [8 + length + entry["data_offsets"][1] for entry in entries.values()]
    if (end := max(ends, default=8 + length)) > size:
        raise UserError(f"{path}: is truncated: {size} bytes, but its tensors end at {end}; download it again")
    return tensors


def _tensor(path: Path, name: str, entry: dict, base: int) -> Tensor:
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise UserError(f"{path}: tensor {name}: shape {shape} or offsets {start}, {stop} are no sizes")
    width = DTYPES[dtype].itemsize if dtype in DTYPES else WIDTHS.get(dtype)
    if width is not None and stop - start != math.prod(shape) * width:
        raise UserError(
            f"{path}: tensor {name}: {stop - start} bytes for {dtype} of shape {shape}; the header is broken"
        )
    return Tensor(path, name, dtype, shape, base + start)


class SafetensorsWriter:
    """A safetensors file whose tensors are written in any order: the header, which says where, is written first."""

    def __init__(self, path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]):
        """`tensors`: (name, dtype, shape) of all tensors that will be written."""
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.path, self._header, self._base = path, header, 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(self._file.fileno(), self._base + end)

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes a tensor, or its rows from `start` on."""
        entry = self._header[name]
        row = math.prod(entry["shape"][1:]) * array.dtype.itemsize
        self._file.seek(self._base + entry["data_offsets"][0] + start * row)
        self._file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))

    def close(self) -> None:
        """Everything is on disk after it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
