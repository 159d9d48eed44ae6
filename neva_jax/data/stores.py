"""Where the images of a source lie (a folder, a .tar, a Parquet file): found by name, and never outside of it.

Names come from rows, so from strangers. One that leads out of its store is refused, and so is whatever is no regular
file of a bearable size; nothing is opened that could block. A store is pickled as its path, and opened again.
"""

import os
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from neva_jax.data.cache import NOT_REGULAR, open_regular
from neva_jax.data.rows import BadRow
from neva_jax.errors import UserError

MAX_IMAGE_BYTES = 2**28  # 40 million pixels of three bytes, not compressed, are less than half of it
MAX_VIDEO_BYTES = 2**31 - 2**20  # Linux reads less than 2 GiB at once
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


class Store:
    """Files by name. `field` is the row's field that gave a name, for messages."""

    def __init__(self, path: str):
        self.path = path
        self._last = threading.local()  # the video that a thread takes frames of

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._last = threading.local()

    def read(self, name: str, field: str = "image") -> bytes:
        """The bytes of an image file; of a frame of a video file (`frames` names it), as a BMP file of its pixels.

        Raises:
          BadRow: there is none, it is no regular file, too large, or lies outside of the store.
        """
        _refuse_address(name, field)
        video, _, number = name.rpartition("#")
        if field == "video" and is_video(video) and number.isdecimal():
            return self._video(video).frame(int(number))
        return self._read(name, field, MAX_IMAGE_BYTES)

    def check(self, name: str, field: str = "image") -> None:
        """Raises BadRow where `read` would, as far as that can be told without reading the file."""
        _refuse_address(name, field)
        self._check(name, field)

    def frames(self, name: str) -> list[str]:
        """The names of the frames of a video, which `read` takes: the files of a folder, sorted by name; hidden ones do
        not count. A video file has frames `name#0`, `name#1`, ….

        Raises:
          BadRow: it is neither, there are no frames, or the name leads out of the store.
        """
        files = self._files(name)
        if files is None and is_video(name):
            return [f"{name}#{i}" for i in range(self._video(name).count)]
        if files is None:
            raise BadRow(f"field video: {name} in {self.path} is neither a folder of frames nor a video file")
        if not files:
            raise BadRow(f"field video: {name} in {self.path} holds no frames")
        return [f"{name}/{file}" for file in sorted(files)]

    def _video(self, name: str) -> Any:
        from neva_jax.data.video import Video

        if getattr(self._last, "name", None) != name:
            self._last.name = None
            self._last.video = Video(name, self._read(name, "video", MAX_VIDEO_BYTES))
            self._last.name = name
        return self._last.video

    def _read(self, name: str, field: str, limit: int) -> bytes:
        raise NotImplementedError

    def _check(self, name: str, field: str) -> None:
        self._read(name, field, MAX_IMAGE_BYTES)

    def _files(self, name: str) -> list[str] | None:
        """The names of the files in a folder, hidden ones left out; None: it is no folder. Raises BadRow."""
        raise NotImplementedError

    def _too_large(self, name: str, field: str, size: int, limit: int) -> BadRow:
        return _too_large(f"{name} in {self.path}", field, size, limit)


class NoStore(Store):
    """The store of a source that has none."""

    def __init__(self) -> None:
        super().__init__("")

    def _read(self, name: str, field: str, limit: int) -> bytes:
        raise BadRow(f"field {field} names {name}, but its source has no images folder")

    def _files(self, name: str) -> list[str] | None:
        raise BadRow(f"field video names {name}, but its source has no images folder")


class FolderStore(Store):
    """A folder, with folders in it. Links are followed as long as they end inside."""

    def __init__(self, path: str | Path):
        super().__init__(str(path))
        self.root = os.path.realpath(path)

    def find(self, name: str, field: str) -> str:
        """The path of what is called `name`, all links followed. Raises BadRow: nothing, or outside of the folder."""
        try:
            path = os.path.realpath(os.path.join(self.root, name), strict=True)
        except (OSError, ValueError, RuntimeError):
            raise BadRow(f"field {field}: {name} is not in {self.path}") from None
        if path != self.root and not path.startswith(self.root.rstrip("/") + "/"):
            raise BadRow(f"field {field}: {name} leads out of {self.path}")
        return path

    def _check(self, name: str, field: str) -> None:
        if not os.path.isfile(self.find(name, field)):
            raise BadRow(f"field {field}: {name} in {self.path} is no regular file")

    def _read(self, name: str, field: str, limit: int) -> bytes:
        return read_regular(self.find(name, field), f"{name} in {self.path}", field, limit)

    def _files(self, name: str) -> list[str] | None:
        path = self.find(name, "video")
        if not os.path.isdir(path):
            return None
        return [file for file in os.listdir(path) if not file.startswith(".")]


def read_regular(path: str | Path, name: str, field: str, limit: int) -> bytes:
    """The bytes of a file, which `name` stands for in messages; nothing is waited for.

    Raises:
      BadRow: it cannot be read, is no regular file, or has more than `limit` bytes.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise _too_large(name, field, size, limit)
            return file.read(size)  # not `limit`: Python takes as much memory as it is asked for
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        known = reason == NOT_REGULAR
        raise BadRow(f"field {field}: {name} {f'is {reason}' if known else f'cannot be read ({reason})'}") from None


def _too_large(name: str, field: str, size: int, limit: int) -> BadRow:
    return BadRow(f"field {field}: {name} has {size:,} bytes, more than {limit:,}")


def _refuse_address(name: str, field: str) -> None:
    if "://" in name:
        raise BadRow(f"field {field}: {name} is an address; nothing is fetched, give the name of a file")


def find_image(folder: str | Path | None, name: str, field: str = "image") -> Path:
    """The file `name` inside `folder`. Raises BadRow: no folder is given, or there is no such regular file in it."""
    if folder is None:
        raise BadRow(f"field {field} names {name}, but its source has no images folder")
    path = Path(FolderStore(folder).find(name, field))
    if not path.is_file():
        raise BadRow(f"field {field}: {name} in {folder} is no regular file")
    return path


def open_store(path: str | Path | None, cache: Path) -> Store:
    """The images of `path`: a folder, a `.tar`, a Parquet file, or none; indexes are kept in the folder `cache`.

    Raises:
      UserError: it cannot be read, or is another kind of file.
    """
    if path is None:
        return NoStore()
    if os.path.isdir(path):
        return FolderStore(path)
    try:
        with open_regular(path) as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{path}: is compressed, so no image in it can be reached alone; unpack it to a plain .tar")
    from neva_jax.data.archives import ParquetStore, TarStore

    if head.startswith(b"PAR1"):
        return ParquetStore(path, cache)
    if head[257:262] == b"ustar" or str(path).endswith(".tar"):
        return TarStore(path, cache)
    raise UserError(f"{path}: is neither a folder, nor a .tar, nor a Parquet file of images")


def is_video(name: str) -> bool:
    """Whether a name ends as a video file's."""
    return PurePosixPath(name).suffix.lower() in _VIDEOS
