"""Images in one file: a .tar, or a Parquet file with Hugging Face's `image` column.

Both are read through once, to index their names; the index lies in the cache folder as plain arrays that processes map
into memory, so a lookup among a million names is a binary search in pages they share.
"""

import bisect
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neva_jax.data.cache import cached_array, file_key, locked, open_regular
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import Store
from neva_jax.errors import UserError

INDEX_VERSION = 1


def clean_name(name: str) -> str | None:
    """A name in an archive, as it is looked up: without `.`, empty parts and a leading slash; None: it leads out."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


class NameIndex:
    """Names, sorted as bytes, each with two numbers."""

    def __init__(self, table: np.ndarray, names: np.ndarray):
        """table: [n + 1, 3] int64, where a name begins and its two numbers; names: their bytes, one after the other."""
        self.table, self.names = table, names

    @staticmethod
    def arrays(entries: Iterable[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The two arrays of an index. Of entries with the same name the last one counts, as when a tar is unpacked."""
        found = {name.encode("utf-8", "surrogatepass"): (a, b) for name, a, b in entries}
        names = sorted(found)
        table = np.zeros((len(names) + 1, 3), np.int64)
        np.cumsum([len(name) for name in names], out=table[1:, 0])
        table[:-1, 1:] = np.array([found[name] for name in names], np.int64).reshape(-1, 2)
        return table, np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.table) - 1

    def __getitem__(self, place: int) -> bytes:
        return self.names[self.table[place, 0] : self.table[place + 1, 0]].tobytes()

    def find(self, name: str) -> tuple[int, int] | None:
        """The two numbers of a name."""
        key = name.encode("utf-8", "surrogatepass")
        place = bisect.bisect_left(self, key)
        if place == len(self) or self[place] != key:
            return None
        return int(self.table[place, 1]), int(self.table[place, 2])

    def inside(self, folder: str) -> list[str]:
        """The names directly below a folder, without it."""
        prefix = f"{folder}/".encode("utf-8", "surrogatepass") if folder else b""
        place, found = bisect.bisect_left(self, prefix), []
        while place < len(self) and (name := self[place]).startswith(prefix):
            found.append(name[len(prefix) :].decode("utf-8", "surrogatepass"))
            place += 1
        return [name for name in found if "/" not in name]


class _Archive(Store):
    """A store that is one file with an index of names."""

    kind: str

    def __init__(self, path: str | Path, cache: Path):
        super().__init__(str(path))
        self.cache, self.key = cache, file_key(path)
        self._open()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if file_key(self.path) != self.key:
            raise UserError(f"{self.path}: has changed since it was opened; start again, it is then read anew")
        self._open()

    def _open(self) -> None:
        name = f"{self.kind}-{INDEX_VERSION}-{self.key}"
        made: list[tuple[np.ndarray, np.ndarray]] = []

        def make(which: int) -> np.ndarray:
            if not made:
                made.append(NameIndex.arrays(self._entries()))
            return made[0][which]

        with locked(self.cache / "images.lock"):
            table = cached_array(self.cache, f"{name}-table", lambda: make(0))
            names = cached_array(self.cache, f"{name}-names", lambda: make(1)) if len(table) > 1 else np.zeros(0, "u1")
        self._index = NameIndex(table, names)

    def _entries(self) -> Iterable[tuple[str, int, int]]:
        raise NotImplementedError

    def _find(self, name: str, field: str) -> tuple[int, int]:
        clean = None if name.startswith("/") else clean_name(name)
        if clean is None:
            raise BadRow(f"field {field}: {name} leads out of {self.path}")
        if (found := self._index.find(clean)) is None:
            raise BadRow(f"field {field}: {name} is not in {self.path}")
        return found

    def _check(self, name: str, field: str) -> None:
        self._find(name, field)

    def _files(self, name: str) -> list[str] | None:
        clean = None if name.startswith("/") else clean_name(name)
        if clean is None:
            raise BadRow(f"field video: {name} leads out of {self.path}")
        files = [file for file in self._index.inside(clean) if not file.startswith(".")]
        if not files:
            self._find(name, "video")  # a file, or nothing at all
            return None
        return files


class TarStore(_Archive):
    """A .tar: regular files only. Links, devices and names that lead out are not there."""

    kind = "tar"

    def _open(self) -> None:
        self._file = open_regular(self.path)
        super()._open()

    def _entries(self) -> Iterable[tuple[str, int, int]]:
        size = os.fstat(self._file.fileno()).st_size
        bar = tqdm(
            total=size,
            unit="B",
            unit_scale=True,
            desc=f"indexing {Path(self.path).name}",
            delay=2,
            leave=False,
            disable=None,
        )
        with bar, open_regular(self.path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # else all of them stay in memory
                        regular = member.isreg() and not member.issparse()
                        if regular and member.offset_data + member.size > size:
                            raise UserError(
                                f"{self.path}: is cut off: {member.name} ends at byte "
                                f"{member.offset_data + member.size}, the file at {size}"
                            )
                        name = clean_name(member.name)
                        if regular and name:
                            yield name, member.offset_data, member.size
                        bar.update(tar.offset - bar.n)
                    end = tar.offset
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                raise UserError(f"{self.path}: is no .tar that can be read ({error})") from None
            # tarfile takes a damaged header for the end; the end is a block of zeros, or the file's own.
            file.seek(end)
            if any(file.read(512)):
                raise UserError(f"{self.path}: is no .tar from byte {end} on")

    def _read(self, name: str, field: str, limit: int) -> bytes:
        offset, size = self._find(name, field)
        if size > limit:
            raise self._too_large(name, field, size, limit)
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) < size:
            raise BadRow(f"field {field}: {name} in {self.path} is cut off")
        return content


class ParquetColumns:
    """Columns of a Parquet file by row; the row groups that were read last are kept, up to `room` bytes."""

    def __init__(self, path: str | Path, room: int = 256 * 2**20):
        """Raises UserError: no Parquet file."""
        import pyarrow
        import pyarrow.parquet

        self.path, self.room = str(path), room
        self.lock = threading.Lock()  # pyarrow's files are not for several threads
        self.groups: OrderedDict[tuple[int, tuple[str, ...]], Any] = OrderedDict()
        self.errors = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self.file = pyarrow.parquet.ParquetFile(open_regular(path), memory_map=False)
        except self.errors as error:
            raise UserError(f"{path}: is no Parquet file that can be read ({error})") from None
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.schema = self.file.schema_arrow

    def __len__(self) -> int:
        return int(self.starts[-1])

    def group(self, number: int, columns: tuple[str, ...]) -> Any:
        """A row group's table of these columns. Raises BadRow: it is broken."""
        with self.lock:
            key = (number, columns)
            if key not in self.groups:
                try:
                    self.groups[key] = self.file.read_row_group(number, columns=list(columns), use_threads=False)
                except self.errors as error:
                    raise BadRow(f"row group {number} of {self.path} cannot be read ({error})") from None
                while len(self.groups) > 1 and sum(table.nbytes for table in self.groups.values()) > self.room:
                    self.groups.popitem(last=False)
            self.groups.move_to_end(key)
            return self.groups[key]

    def row(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """The values of one row. Raises BadRow."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.group(number, columns).slice(row - int(self.starts[number]), 1).to_pylist()[0]


class ParquetStore(_Archive):
    """A Parquet file with a column `image`, a struct of `bytes` and `path`: the paths are the names.

    Reading one image decodes the row group around it, so a file of large row groups is slow when read in any order.
    """

    kind = "parquet"

    def _open(self) -> None:
        self._columns = ParquetColumns(self.path)
        field = self._columns.schema.field("image") if "image" in self._columns.schema.names else None
        if field is None or not {"bytes", "path"} <= {child.name for child in _children(field.type)}:
            raise UserError(
                f"{self.path}: has no column image with bytes and path; its columns are "
                f"{', '.join(self._columns.schema.names)}"
            )
        super()._open()

    def _entries(self) -> Iterable[tuple[str, int, int]]:
        for group in range(len(self._columns.starts) - 1):
            try:
                paths = self._columns.group(group, ("image.path",)).column("image").to_pylist()
            except BadRow as error:
                raise UserError(str(error)) from None
            for place, image in enumerate(paths):
                name = clean_name(image["path"]) if image and image["path"] else None
                if name:
                    yield name, int(self._columns.starts[group]) + place, 0

    def _read(self, name: str, field: str, limit: int) -> bytes:
        row, _ = self._find(name, field)
        content = self._columns.row(row, ("image.bytes",))["image"]["bytes"]
        if not content:
            raise BadRow(f"field {field}: {name} in {self.path} has no bytes")
        if len(content) > limit:
            raise self._too_large(name, field, len(content), limit)
        return content


def _children(kind: Any) -> list[Any]:
    return [kind.field(i) for i in range(kind.num_fields)]
