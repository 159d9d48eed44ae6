"""Image files and folders of video frames: found inside their images folder, opened whatever they hold, or refused.

Transparency is dropped, as LLaVA's loader does. What becomes of the pixels is `tiles.py`'s.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from neva_jax.config import Config
from neva_jax.data.rows import BadRow
from neva_jax.data.tiles import MAX_PIXELS, Picture, picture


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
