"""Rows with their images in the same file, by row number: ArrayRecord (ours), TFDS directories, Parquet.

Whatever a file calls its columns, a row comes out as an element of LLaVA JSON, whose images have names; the bytes of
each are in the `Store` that comes with the row. Nothing is decoded here, and TensorFlow is never needed.
"""

import itertools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neva_jax.data.archives import ParquetColumns, clean_name
from neva_jax.data.cache import file_key
from neva_jax.data.json_index import parse_json
from neva_jax.data.row_files import RowFile
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import Store
from neva_jax.errors import UserError

MANIFEST = "records.json"


class MemoryStore(Store):
    """The images that came with one row."""

    def __init__(self, path: str, content: Mapping[str, bytes]):
        super().__init__(path)
        self.content = content

    def __contains__(self, name: str) -> bool:
        folder = f"{name}/"
        return bool(self.content.get(name)) or any(key.startswith(folder) for key in self.content)

    def _read(self, name: str, field: str, limit: int) -> bytes:
        if not self.content.get(name):
            raise BadRow(f"field {field}: {name} did not come with its row in {self.path}")
        return self.content[name]

    def _files(self, name: str) -> list[str] | None:
        files = [key[len(name) + 1 :] for key in self.content if key.startswith(f"{name}/")]
        if not files and name not in self.content:
            raise BadRow(f"field video: {name} did not come with its row in {self.path}")
        return [file for file in files if "/" not in file and not file.startswith(".")] or None


def open_records(path: str | Path) -> RowFile:
    """The rows of a TFDS directory, an ArrayRecord file, a Parquet file, or a folder of files of the last two kinds.

    Raises:
      UserError: it is none of them, or broken.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{path}: no such file or directory")
    if folder.is_file():
        return (ParquetRows if folder.suffix == ".parquet" else ArrayRecordRows)(str(path), [folder])
    infos = [info for depth in ("", "*/", "*/*/") for info in folder.glob(f"{depth}dataset_info.json")]
    if found := sorted({info.parent for info in infos}):
        if len(found) > 1:
            raise UserError(f"{path}: holds {len(found)} TFDS versions; name one, as {found[-1]}")
        return TfdsRows(str(path), found[0])
    if files := sorted(folder.glob("*.array_record*")):
        return ArrayRecordRows(str(path), files)
    if files := sorted(folder.glob("*.parquet")):
        return ParquetRows(str(path), files)
    raise UserError(f"{path}: holds neither a TFDS data set, nor .array_record files, nor .parquet files")


class _Records:
    """Rows of a list of files; a thread remembers its last one, whose images are asked for right after its text."""

    lines = False

    def __init__(self, path: str, files: Sequence[Path]):
        self.path, self.files = path, list(files)
        self.key = file_key(*self.files)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files, "key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if file_key(*self.files) != self.key:
            raise UserError(f"{self.path}: has changed since it was opened; start again, it is then read anew")
        self._start()

    def _start(self) -> None:
        self._last = threading.local()
        self._open()
        if not len(self):
            raise UserError(f"{self.path}: holds no rows")

    def _open(self) -> None:
        raise NotImplementedError

    def _record(self, row: int) -> tuple[Any, dict[str, bytes]]:
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def _both(self, row: int) -> tuple[Any, MemoryStore]:
        if getattr(self._last, "row", None) != row:
            raw, images = self._record(row)
            self._last.both = (raw, MemoryStore(self.path, images))
            self._last.row = row
        return self._last.both

    def raw(self, row: int) -> Any:
        """See `RowFile`."""
        return self._both(row)[0]

    def images(self, row: int) -> MemoryStore:
        """See `RowFile`."""
        return self._both(row)[1]


class ArrayRecordRows(_Records):
    """Files that `prepare records --format array_record` wrote."""

    def _open(self) -> None:
        self._source = _array_records(self.path, [str(file) for file in self.files])
        self._count = len(self._source)
        manifest = self.files[0].parent / MANIFEST
        if Path(self.path).is_dir() and manifest.is_file():
            try:
                wanted = json.loads(manifest.read_text())["rows"]
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{manifest}: cannot be read ({error})") from None
            if wanted != self._count:
                raise UserError(
                    f"{self.path}: holds {self._count} rows, but its {MANIFEST} says {wanted}; copy it again"
                )

    def _record(self, row: int) -> tuple[Any, dict[str, bytes]]:
        import msgpack

        try:
            record = msgpack.unpackb(self._source[row])
            return parse_json(record["row"]), dict(record["images"])
        except Exception as error:  # readers of damaged files raise nearly anything
            raise BadRow(f"cannot be read ({error})") from None


class TfdsRows(_Records):
    """A TFDS directory in ArrayRecord format: of `prepare records`, or with LLaVA's fields as features.

    Its split is the only one, or `train`.
    """

    def __init__(self, path: str, folder: Path):
        self.folder = folder
        super().__init__(path, [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.array_record*"))])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "folder": self.folder}

    def _open(self) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.example_parser import ExampleParserNp

        try:
            info = tfds.builder_from_directory(str(self.folder)).info
            splits, kind = info.splits, info.file_format
        except Exception as error:
            raise UserError(f"{self.path}: is no TFDS directory that can be read ({error})") from None
        if kind is None or kind.value != "array_record":
            raise UserError(
                f"{self.path}: is written as {kind.value if kind else 'an unknown format'}, which needs TensorFlow; "
                "build it again with file_format='array_record'"
            )
        split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
        if split is None:
            raise UserError(f"{self.path}: has the splits {', '.join(splits)}, and none is called train")
        try:
            files, wanted = [file.filename for file in splits[split].file_instructions], splits[split].num_examples
            if missing := [file for file in files if not Path(file).is_file()]:
                raise UserError(f"{self.path}: lacks {Path(missing[0]).name}; copy it again")
            self._source = _array_records(self.path, files)
            self._parser = ExampleParserNp(info.features.get_serialized_info())
        except (ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None
        self._count = len(self._source)
        if wanted != self._count:
            raise UserError(f"{self.path}: holds {self._count} rows, dataset_info.json says {wanted}; copy it again")

    def _record(self, row: int) -> tuple[Any, dict[str, bytes]]:
        try:
            example = dict(self._parser.parse_example(self._source[row]))
        except Exception as error:
            raise BadRow(f"cannot be read ({error})") from None
        images = _several(example.pop("images", None)) + _several(example.pop("image", None))
        names = [_text(name) for name in _several(example.pop("image_names", None))]
        names = names if len(names) == len(images) else _names([None] * len(images))
        return _llava(_text(example), names), dict(zip(names, images, strict=True))


class ParquetRows(_Records):
    """Parquet files with a column `conversations` (a list of `from` and `value`, or JSON) and an optional `image` or
    `images`, structs of `bytes` and `path` as Hugging Face's data sets have them.

    Reading one row decodes the row group around it: slow in any order; `prepare records` makes a file that is fast.
    """

    def _open(self) -> None:
        self._tables = [ParquetColumns(file) for file in self.files]
        self._starts = np.array([0, *itertools.accumulate(len(table) for table in self._tables)], np.int64)
        self._count = int(self._starts[-1])
        schema = self._tables[0].schema
        if "conversations" not in schema.names:
            raise UserError(f"{self.path}: has no column conversations; its columns are {', '.join(schema.names)}")
        columns = self._tables[0].file.schema
        paths = [columns.column(i).path for i in range(len(columns))]
        # Parquet calls the values of a list `images.list.element.bytes`, or `.item.`
        leaves = {re.sub(r"\.list\.(element|item)", "", path): path for path in paths}
        # The names of images are read without their bytes.
        self._image = next((name for name in ("image", "images") if f"{name}.bytes" in leaves), None)
        known = [name for name in ("id", "system", "video", "conversations") if name in schema.names]
        self._text = tuple(known + ([leaves[f"{self._image}.path"]] if self._image else []))
        self._bytes = (self._image,) if self._image else ()

    def _row(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._tables[file].row(row - int(self._starts[file]), columns)

    def raw(self, row: int) -> Any:
        """See `RowFile`."""
        found = self._row(row, self._text)
        images = _several(found.pop(self._image, None)) if self._image else []
        return _llava(found, _names([image and image.get("path") for image in images]))

    def images(self, row: int) -> MemoryStore:
        """See `RowFile`."""
        images = _several(self._row(row, self._bytes)[self._image]) if self._image else []
        names = _names([image and image.get("path") for image in images])
        content = {name: (image or {}).get("bytes") for name, image in zip(names, images, strict=True)}
        return MemoryStore(self.path, content)


def _array_records(path: str, files: Sequence[str]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource(list(files))
    except Exception as error:
        raise UserError(f"{path}: is no ArrayRecord that can be read ({error})") from None


def _llava(found: dict[str, Any], names: list[str]) -> Any:
    """An element of LLaVA JSON from the columns of a row, without its images, and from their names."""
    if isinstance(found.get("row"), str):  # `prepare records` keeps the row as it was
        return _parsed("row", found["row"])
    turns = found.get("conversations")
    if isinstance(turns, str):
        turns = _parsed("conversations", turns)
    if isinstance(turns, dict):  # TFDS: a sequence of dictionaries is a dictionary of sequences
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return {**found, "conversations": turns, **({"image": names} if names else {})}


def _parsed(field: str, text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"field {field} is no JSON ({error})") from None


def _names(paths: list[str | None]) -> list[str]:
    """A name for each image of a row: its path, or `image-0`, `image-1`, … where it has none of its own."""
    clean = [clean_name(path) if path else None for path in paths]
    return [name if name and clean.count(name) == 1 else f"image-{i}" for i, name in enumerate(clean)]


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _text(value: Any) -> Any:
    """Bytes and arrays of TFDS as text, lists and numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _text(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_text(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
