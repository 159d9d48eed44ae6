"""Files of rows by row number, without ever holding their text: one index of byte offsets, and one short read a row.

A JSON list, JSON lines (NeVA's SteerLM lines are such), either of them packed by gzip; `record_files.py` has the files
that hold rows and images together. What a row file is sent to a worker process as is its name: the worker opens it
again, refuses it if it has changed, and maps the index that the main process made into memory.
"""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from tqdm import tqdm

from neva_jax.config import SourceConfig
from neva_jax.data.cache import cached, cached_array, file_key, locked, open_regular
from neva_jax.data.json_index import MAX_ROW_BYTES, byte_of, index_lines, index_list, no_json, parse_json
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import Store
from neva_jax.errors import UserError

INDEX_VERSION = 1
# Below this, finding the rows again in each worker takes less time than looking for the index.
SMALL = 4 * 2**20
# JSON packs 3 to 20 times; what packs far better is made to fill the disk.
_MOST_UNPACKED = 200


class RowFile(Protocol):
    """Rows by number; thread-safe, and picklable without its rows."""

    path: str  # for messages
    key: str  # of what the file holds
    lines: bool  # of JSON: rows may be SteerLM's

    def __len__(self) -> int:
        """Rows."""

    def raw(self, row: int) -> Any:
        """An element of LLaVA JSON, unchecked. Raises BadRow."""

    def images(self, row: int) -> Store | None:
        """The images that came with the row (also `name in` it); None: this kind of file has none. Raises BadRow."""


def open_rows(config: SourceConfig, cache: Path) -> RowFile:
    """The rows of a source.

    Raises:
      UserError: a file that cannot be read, or holds no rows; line, column and byte say where it is broken.
    """
    if config.records is None:
        return JsonRows(config.json, cache)
    from neva_jax.data.record_files import open_records

    return open_records(config.records)


class JsonRows:
    """Rows of a JSON list or of JSON lines."""

    def __init__(self, path: str | Path, cache: Path):
        """Finds the rows, or their index in the folder `cache`. Raises UserError as `open_rows`."""
        self.path, self.cache = str(path), cache
        self.key = file_key(path)
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache": self.cache, "key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if file_key(self.path) != self.key:
            raise self._changed()
        self._open()

    def _open(self) -> None:
        try:
            file = open_regular(self.path)
            if file.read(2) == b"\x1f\x8b":
                file = self._unpacked().open("rb")
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self.file, self.size = file, size
        self.lines, start = _kind(self.path, file)
        if size <= SMALL:
            self.bounds = self._index(file, start)
        else:
            with locked(self.cache / "rows.lock"):  # other processes of this machine need the same index now
                self.bounds = cached_array(
                    self.cache, f"rows-{INDEX_VERSION}-{self.key}", lambda: self._index(file, start)
                )
        if not len(self.bounds):
            raise UserError(f"{self.path}: holds no rows")

    def _index(self, file: BinaryIO, start: int) -> np.ndarray:
        name = Path(self.path).name
        with tqdm(
            total=self.size, unit="B", unit_scale=True, desc=f"indexing {name}", delay=2, leave=False, disable=None
        ) as bar:
            if self.lines:
                return index_lines(file, start, self.size, bar.update)
            return index_list(self.path, file, start, self.size, bar.update)

    def _unpacked(self) -> Path:
        packed_size = os.stat(self.path).st_size
        limit, total = _MOST_UNPACKED * packed_size + MAX_ROW_BYTES, 0

        def write(fresh: Path) -> None:
            nonlocal total
            bar = tqdm(
                unit="B", unit_scale=True, desc=f"unpacking {Path(self.path).name}", delay=2, leave=False, disable=None
            )
            with bar, gzip.open(open_regular(self.path)) as packed, fresh.open("wb") as out:
                while piece := _unpack(self.path, packed, total):
                    total += len(piece)
                    if total > limit:
                        raise UserError(
                            f"{self.path}: unpacks to more than {_MOST_UNPACKED} times its {packed_size:,} bytes, "
                            "which no text does"
                        )
                    out.write(piece)
                    bar.update(len(piece))

        with locked(self.cache / "rows.lock"):
            return cached(self.cache, f"unpacked-{self.key}", write)

    def __len__(self) -> int:
        return len(self.bounds)

    def raw(self, row: int) -> Any:
        """See `RowFile`."""
        first, end = (int(bound) for bound in self.bounds[row])
        if end - first > MAX_ROW_BYTES:
            raise BadRow(f"has {end - first:,} bytes, more than {MAX_ROW_BYTES:,}")
        data = os.pread(self.file.fileno(), end - first, first)
        if len(data) != end - first:
            raise self._changed()
        try:
            text = data.decode("utf-8")
            return parse_json(text)
        except UnicodeDecodeError as error:
            raise BadRow(f"byte {first + error.start} of the file is no UTF-8 ({error.reason})") from None
        except json.JSONDecodeError as error:
            where = first + len(text[: error.pos].encode("utf-8"))
            raise BadRow(f"byte {where} of the file is no JSON ({error.msg})") from None
        except ValueError as error:
            raise BadRow(f"is no JSON ({error})") from None
        except RecursionError:
            raise BadRow("is nested too deeply") from None

    def images(self, row: int) -> None:
        """None: the images of JSON lie elsewhere."""
        return None

    def _changed(self) -> UserError:
        return UserError(f"{self.path}: has changed since it was opened; start again, it is then read anew")


def _unpack(path: str, packed: BinaryIO, done: int) -> bytes:
    try:
        return packed.read(2**20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked after byte {done} of its content ({error})") from None


def _kind(path: str, file: BinaryIO) -> tuple[bool, int]:
    """Whether a file holds lines, and the byte where its list or its lines begin: told by the content, not the name."""
    file.seek(0)
    head = file.read(2**16)
    start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    text = head[start:].lstrip(b" \t\r\n")
    at = len(head) - len(text)
    if not text:
        raise UserError(f"{path}: holds no rows")
    if text.startswith(b"["):
        return False, at
    if path.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return True, start
    if not text.startswith(b"{"):
        try:
            parse_json(text.decode("utf-8", "replace"))
        except json.JSONDecodeError as error:
            if error.pos < len(text) // 2 or len(head) < 2**16:
                raise no_json(path, file, at + byte_of(text, error.pos), error.msg) from None
        except (ValueError, RecursionError):
            pass
        raise UserError(f"{path}: must hold a list of rows, or one row a line")
    # Lines under another name: the first must be a row by itself, not the beginning of an object over several lines,
    # and not the only one if it is no row (other tools' JSON is often one object on one line).
    no_list = UserError(f"{path}: holds an object; it must hold a list of rows, or one row a line")
    file.seek(at)
    line = file.readline(MAX_ROW_BYTES)
    try:
        row = parse_json(line.decode("utf-8", "replace"))
    except json.JSONDecodeError as error:
        if len(line) == MAX_ROW_BYTES or error.pos >= len(line.decode("utf-8", "replace").rstrip()):
            raise no_list from None
        raise no_json(path, file, at + byte_of(line, error.pos), error.msg) from None
    except (ValueError, RecursionError):
        return True, start
    if isinstance(row, dict) and "conversations" not in row and not file.read(2**16).strip():
        raise no_list
    return True, start
