"""From an image file to uint8 pixels [S, S, 3], exactly as CLIP's preprocessing does it (normalisation comes later,
on the device). Transparency is dropped, as LLaVA's loader does.

    square   shorter side -> S (bicubic), then the centre S x S        HF CLIPImageProcessor
    pad      centred on a square of the mean colour, then as above     LLaVA expand2square
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from neva_jax.data.rows import BadRow

MAX_PIXELS = 40_000_000


def find_image(folder: str | Path | None, name: str) -> Path:
    """The file `name` inside `folder`.

    Raises:
      BadRow: no folder is given, the file is missing or no regular file, or it lies outside the folder.
    """
    if folder is None:
        raise BadRow(f"field image names {name}, but its source has no images folder")
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise BadRow(f"field image: {name} is not in {folder}") from None
    if not path.is_relative_to(root):
        raise BadRow(f"field image: {name} leads out of {folder}")
    if not path.is_file():
        raise BadRow(f"field image: {name} in {folder} is no regular file")
    return path


def load_image(path: str | Path, size: int, mode: str, mean: Sequence[float]) -> np.ndarray:
    """Reads an image file.

    Args:
      size: S, the side in pixels.
      mode: `square` or `pad`.
      mean: mean of each channel in 0..1; the colour of the padding.

    Returns:
      [S, S, 3] uint8, RGB.

    Raises:
      BadRow: no image, truncated, or more than 40 million pixels, in the file or on the way to the result.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadRow(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                return fit(image.convert("RGB"), size, mode, mean)
    except UnidentifiedImageError:
        raise BadRow(f"field image: {path} is no image that can be read") from None
    except BadRow as error:
        raise BadRow(f"field image: {path} {error}") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything, MemoryError included
        raise BadRow(f"field image: {path} is broken ({error})") from None


def fit(image: Image.Image, size: int, mode: str, mean: Sequence[float]) -> np.ndarray:
    """An RGB image -> [S, S, 3] uint8; see the drawing above for the modes."""
    if mode == "pad" and image.width != image.height:
        side = max(image.size)
        _check_area(image, side, side, "padded")
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    _check_area(image, width, height, "resized")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def _check_area(image: Image.Image, width: int, height: int, made: str) -> None:
    """A few bytes of a 1 x 20000 picture would become gigabytes on their way to a square."""
    if width * height > MAX_PIXELS:
        raise BadRow(
            f"has {image.width} x {image.height} pixels, and {made} {width} x {height}: more than {MAX_PIXELS:,}"
        )
