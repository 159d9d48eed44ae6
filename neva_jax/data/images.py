"""Image files and folders of video frames: found inside their images folder, opened whatever they hold, or refused.

Transparency is dropped, as LLaVA's loader does. What becomes of the pixels is `tiles.py`'s.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from neva_jax.config import Config
from neva_jax.data.rows import BadRow
from neva_jax.data.tiles import MAX_PIXELS, Picture, picture


def find_image(folder: str | Path | None, name: str, field: str = "image") -> Path:
    """The file `name` inside `folder`; `field` stands in messages.

    Raises:
      BadRow: no folder is given, the file is missing or no regular file, or it lies outside the folder.
    """
    path = _find(folder, name, field)
    if not path.is_file():
        raise BadRow(f"field {field}: {name} in {folder} is no regular file")
    return path


def find_frames(folder: str | Path | None, name: str) -> list[Path]:
    """The frames of the video `name` inside `folder`: a folder's files, sorted by name; hidden ones do not count.

    Raises:
      BadRow: as `find_image`, or it is no folder, or one without files.
    """
    path = _find(folder, name, "video")
    if not path.is_dir():
        raise BadRow(f"field video: {name} in {folder} is no folder; a video is given as a folder of its frames")
    frames = sorted(frame.name for frame in path.iterdir() if not frame.name.startswith("."))
    if not frames:
        raise BadRow(f"field video: {name} in {folder} holds no frames")
    return [find_image(folder, f"{name}/{frame}", "video") for frame in frames]


def _find(folder: str | Path | None, name: str, field: str) -> Path:
    if folder is None:
        raise BadRow(f"field {field} names {name}, but its source has no images folder")
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise BadRow(f"field {field}: {name} is not in {folder}") from None
    if not path.is_relative_to(root):
        raise BadRow(f"field {field}: {name} leads out of {folder}")
    return path


def sample_frames(frames: list[Path], count: int, splice_single_frame: str) -> list[Path]:
    """`count` frames, evenly from the first to the last; a shorter video repeats its last one.

    `splice_single_frame`: `first`, `middle` or `last` takes that one alone, `none` does not.
    """
    if splice_single_frame != "none":
        return [frames[{"first": 0, "middle": len(frames) // 2, "last": -1}[splice_single_frame]]]
    spread = np.linspace(0, len(frames) - 1, min(count, len(frames)), dtype=int)
    return [frames[i] for i in spread] + [frames[-1]] * (count - len(spread))


@contextmanager
def open_image(path: str | Path, field: str = "image") -> Iterator[Image.Image]:
    """The RGB image in a file. What goes wrong with it inside the `with` block becomes a BadRow that names the file.

    `field` stands in messages.

    Raises:
      BadRow: no image, truncated, or more than 40 million pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadRow(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                yield image.convert("RGB")
    except UnidentifiedImageError:
        raise BadRow(f"field {field}: {path} is no image that can be read") from None
    except BadRow as error:
        raise BadRow(f"field {field}: {path} {error}") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything, MemoryError included
        raise BadRow(f"field {field}: {path} is broken ({error})") from None


def load_image(path: str | Path, config: Config, frame: bool = False) -> Picture:
    """Reads an image file as the model takes it; `frame`: of a video. Raises BadRow as `open_image` and `picture`."""
    with open_image(path, "video" if frame else "image") as image:
        return picture(image, config, frame)


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself; width and height in pixels, as the image is shown (after `exif_rotate`)."""

    format: str
    mode: str
    width: int
    height: int


def decode_image(data: bytes, name: str, config: Config, field: str = "image", frame: bool = False) -> Picture:
    """The content of an image file as the model takes it; raises BadRow."""
    try:
        with _opened(data, name, config, field) as image:
            if image.format in ("JPEG", "MPO") and not jpeg_is_complete(data):
                raise BadRow("is incomplete: it has no end marker, so its lower part is missing, or zeros")
            rgb = image.convert("RGB")
        return picture(rgb, config, frame)
    except BadRow as error:
        raise BadRow(str(error)) from None


def image_header(data: bytes, name: str, config: Config, field: str = "image") -> ImageHeader:
    """Reads the header alone, no pixels; raises BadRow as `decode_image` for what the header shows."""
    with _opened(data, name, config, field) as image:
        return ImageHeader(image.format, image.mode, *image.size)


@contextmanager
def _opened(data: bytes, name: str, config: Config, field: str) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > config.data.max_pixels:
                    raise BadRow(f"has {width} x {height} pixels, more than data.max_pixels={config.data.max_pixels:,}")
                yield image
    except UnidentifiedImageError:
        raise BadRow(f"field {field}: {name} is no image that can be read") from None
    except BadRow as error:
        raise BadRow(f"field {field}: {name} {error}") from None
    except Exception as error:
        raise BadRow(f"field {field}: {name} is broken ({error})") from None


def jpeg_is_complete(data: bytes) -> bool:
    """Whether a JPEG's pixels end with its end marker."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9", at) >= 0
