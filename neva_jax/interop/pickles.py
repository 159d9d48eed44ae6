"""PyTorch's `.bin` files without PyTorch, and without running anything that is in them.

The file is a zip archive: `data.pkl` describes the tensors, and `data/KEY` holds the bytes of one storage each, stored
and not compressed. The description is a pickle; it is read by an unpickler that knows five names and refuses all
others. Files from before PyTorch 1.6 are no archives: for those PyTorch is needed, and loads them weights-only.
"""

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neva_jax.errors import UserError
from neva_jax.interop.tensors import Tensor, Tensors

STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "BoolStorage": "BOOL",
}
ITEM = {"F32": 4, "F16": 2, "BF16": 2}


def read_pickle(path: Path) -> Tensors:
    """The tensors of a `.bin` file by name; only their description is read.

    Raises:
      UserError: no such file, something else than tensors in it, or an old file and no PyTorch.
    """
    if not zipfile.is_zipfile(path):
        return _read_with_torch(path)
    try:
        with zipfile.ZipFile(path) as archive:
            described = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
            if not described:
                raise UserError(f"{path}: is no PyTorch file (an archive without data.pkl)")
            root = described[0].split("/")[0]
            loaded = _Unpickler(io.BytesIO(archive.read(described[0]))).load()
            offsets = {name: _data_offset(path, archive.getinfo(name)) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is broken, or holds more than tensors ({error})") from None
    return {name: _tensor(path, name, value, root, offsets) for name, value in _flat(path, loaded).items()}


def _flat(path: Path, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict) or not all(isinstance(value, _Described) for value in loaded.values()):
        raise UserError(f"{path}: is no dictionary from names to tensors")
    return loaded


class _Described(tuple):
    """(storage key, dtype, numel of the storage), offset, shape, strides."""


def _rebuild_tensor(storage: tuple, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Described:
    return _Described((storage, offset, tuple(shape), tuple(strides)))


def _rebuild_parameter(data: _Described, *_: Any) -> _Described:
    return data


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors in dictionaries; any other name in the pickle ends it."""

    KNOWN = {  # noqa: RUF012
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only the names above and PyTorch's storage types, which stand for themselves."""
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, described: tuple) -> tuple:
        """('storage', type, key, device, numel) -> (key, dtype)."""
        kind, dtype, key, _, _ = described
        if kind != "storage":
            raise pickle.UnpicklingError(f"it holds a {kind}")
        return key, dtype


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's member begin: behind its local header, whose two lengths are its own."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed")
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _tensor(path: Path, name: str, value: _Described, root: str, offsets: dict[str, int]) -> Tensor:
    (key, dtype), offset, shape, strides = value
    if f"{root}/data/{key}" not in offsets:
        raise UserError(f"{path}: tensor {name}: its storage {key} is missing")
    expected = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if any(n > 1 and s != e for n, s, e in zip(shape, strides, expected, strict=True)):
        raise UserError(f"{path}: tensor {name}: is not stored row after row; convert it to safetensors")
    return Tensor(path, name, dtype, shape, offsets[f"{root}/data/{key}"] + offset * ITEM.get(dtype, 1))


class _Held(Tensor):
    """A tensor that PyTorch has loaded."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows from `start` to `stop`."""
        return self.array[start:stop] if self.shape else self.array


def _read_with_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: is a pickle from before PyTorch 1.6 (or broken), which only PyTorch reads: pip install torch, or "
            "convert it to safetensors elsewhere"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its unpickler raises nearly anything
        raise UserError(f"{path}: PyTorch cannot read it weights-only ({str(error).splitlines()[0]})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{path}: is no dictionary from names to tensors")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {}
    for name, value in loaded.items():
        held = _Held(path, name, names.get(value.dtype, str(value.dtype)), tuple(value.shape), 0)
        if value.dtype in names:
            array = value.detach().contiguous()
            bits = array.view(torch.int16).numpy() if value.dtype == torch.bfloat16 else array.numpy()
            array = bits.view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else bits
            object.__setattr__(held, "array", array)
        tensors[name] = held
    return tensors
