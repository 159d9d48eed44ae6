"""Image files, as bytes: opened whatever they hold, or refused. What becomes of the pixels is `tiles.py`'s.

    bytes -> header: format, size          more than `data.max_pixels`, or no format of FORMATS: refused
          -> pixels (Pillow, simplejpeg)   damaged or incomplete: refused
          -> upright, RGB                  `data.exif_rotate`; `to_rgb` says what becomes of each mode
          -> tiles and slots               `data.image_mode`

No row may take more memory than its pixels need: what a file says of itself is checked before it is believed.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from neva_jax.config import Config
from neva_jax.data.resize import MAX_SIDE
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import MAX_IMAGE_BYTES, read_regular
from neva_jax.data.tiles import Picture, picture

# Pillow knows 30 more, which no data set uses, and some of which start other programs (EPS) or unpack a second image
# of a size that the header does not tell (ICO).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def sample_frames(frames: list[str], count: int, splice_single_frame: str) -> list[str]:
    """`count` frames, evenly from the first to the last; a shorter video repeats its last one.

    `splice_single_frame`: `first`, `middle` or `last` takes that one alone, `none` does not.
    """
    if splice_single_frame != "none":
        return [frames[{"first": 0, "middle": len(frames) // 2, "last": -1}[splice_single_frame]]]
    spread = np.linspace(0, len(frames) - 1, min(count, len(frames)), dtype=int)
    return [frames[i] for i in spread] + [frames[-1]] * (count - len(spread))


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself; width and height in pixels, as the image is shown (after `exif_rotate`)."""

    format: str
    mode: str
    width: int
    height: int


def decode_image(data: bytes, name: str, config: Config, field: str = "image", frame: bool = False) -> Picture:
    """The content of an image file as the model takes it.

    Args:
      name, field: stand in messages.
      frame: of a video, which is always one tile.

    Raises:
      BadRow: no image, damaged, incomplete, or more than `data.max_pixels` pixels.
    """
    image = open_image(data, name, config, field)
    try:
        return picture(image, config, frame)
    except BadRow as error:
        raise BadRow(f"field {field}: {name} {error}") from None


def open_image(data: bytes, name: str, config: Config, field: str = "image") -> Image.Image:
    """The content of an image file as an upright image of mode RGB or RGBX; raises BadRow as `decode_image`."""
    with _opened(data, name, config, field) as image:
        if image.format in ("JPEG", "MPO") and not jpeg_is_complete(data):
            raise BadRow("is incomplete: it has no end marker, so its lower part is missing, or zeros")
        turn = _turn(image, config)  # before the pixels: Pillow forgets the orientation of a TIFF with them
        rgb = _plain_jpeg(data, image) or to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def image_header(data: bytes, name: str, config: Config, field: str = "image") -> ImageHeader:
    """Reads the header alone, no pixels; raises BadRow as `decode_image` for what the header shows."""
    with _opened(data, name, config, field) as image:
        width, height = image.size
        if _turn(image, config) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8]):
            width, height = height, width
        return ImageHeader(image.format, image.mode, width, height)


def image_size(data: bytes, name: str, config: Config, field: str = "image") -> tuple[int, int]:
    """(width, height) of the image that `decode_image` would cut into tiles, from the header; raises as that."""
    header = image_header(data, name, config, field)
    return header.width, header.height


def load_image(path: str | Path, config: Config, frame: bool = False) -> Picture:
    """Reads an image file as the model takes it; raises BadRow as `decode_image`, or that there is no such file."""
    field = "video" if frame else "image"
    return decode_image(read_regular(path, str(path), field, MAX_IMAGE_BYTES), str(path), config, field, frame)


@contextmanager
def _opened(data: bytes, name: str, config: Config, field: str) -> Iterator[Image.Image]:
    """Pillow's image, not decoded yet, of an acceptable size; all that goes wrong within becomes a BadRow."""
    try:
        if len(data) > MAX_IMAGE_BYTES:
            raise BadRow(f"has {len(data):,} bytes, more than {MAX_IMAGE_BYTES:,}")
        _check_size(*_webp_canvas(data), config)  # Pillow takes memory for it on opening
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(*image.size, config)
                if image.format == "TIFF":  # whose tiles may be larger than the image
                    _check_size(image.tag_v2.get(322, 0), image.tag_v2.get(323, 0), config)
                yield image
    except UnidentifiedImageError:
        raise BadRow(f"field {field}: {name} is no image that can be read") from None
    except BadRow as error:
        raise BadRow(f"field {field}: {name} {error}") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything, MemoryError included
        raise BadRow(f"field {field}: {name} is broken ({error})") from None


def _check_size(width: int, height: int, config: Config) -> None:
    if width * height > config.data.max_pixels:
        raise BadRow(f"has {width} x {height} pixels, more than data.max_pixels={config.data.max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise BadRow(f"has {width} x {height} pixels, a side longer than {MAX_SIDE:,}")


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP file; 0, 0: it is none, or one that Pillow will refuse."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _turn(image: Image.Image, config: Config) -> Image.Transpose | None:
    """What makes the image upright; None: nothing, or nothing that is left to do.

    Of the header alone: what stands behind the pixels (PNG allows it) does not count, and a damaged EXIF block turns
    nothing. Pillow turns TIFF files itself, whatever the configuration says.
    """
    if not config.data.exif_rotate or image.format == "TIFF":
        return None
    try:
        # Of the base class: PNG's own would decode the image to find what stands behind it.
        return TURNS.get(Image.Image.getexif(image).get(ORIENTATION))
    except Exception:
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode of Pillow's; an animation's first frame.

    L, 1             grey                       CMYK, YCCK, YCbCr, LAB     Pillow's conversion, without ICC profiles
    P                its palette                I;16…, I                   16 bits: 0 … 65535 -> 0 … 255, rounded
    LA, RGBA, PA     transparency is dropped,   F                          0 … 255, clipped and rounded down
                     as by LLaVA's loader
    """
    if image.mode.startswith("I"):
        # Pillow alone would clip at 255, which makes a 16-bit photograph white.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB") if image.mode != "RGB" else _loaded(image)


def _plain_jpeg(data: bytes, image: Image.Image) -> Image.Image | None:
    """Pixels of a JPEG in colour, RGBX, as Pillow's; None: another image, or one that is for Pillow to judge.

    Both are libjpeg-turbo with its exact methods. Pillow fills the image with zeros first and copies each line, which
    takes a tenth of the time here, and a quarter where memory is slow.
    """
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGBX")
    except ValueError:  # strict: of damage too that Pillow puts up with
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    return Image.frombuffer("RGBX", image.size, pixels, "raw", "RGBX", 0, 1)  # without a copy


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def jpeg_is_complete(data: bytes) -> bool:
    """Whether a JPEG's pixels end with its end marker.

    A download that broke off may be as long as it should be, with zeros where the rest was to come; decoders make
    grey of them without a word. The marker cannot stand in compressed pixels, where each 0xFF is followed by 0, but in
    the thumbnail of the header, so it is looked for behind the start of the pixels. Zeros behind it do no harm.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        # A marker and the length of its segment; or one more 0xFF, which may stand before a marker.
        at += 1 if data[at + 1 : at + 2] == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9", at) >= 0
