"""From pixels to tiles and slots: what the encoder sees of an image, and where its features go among the tokens.

    square   shorter side -> S (bicubic), then the centre S x S                      HF CLIPImageProcessor
    pad      centred on a square of the mean colour, then as above                   LLaVA expand2square
    keep     longer side -> S, then centred on S x S of the mean colour              NeVA's keep, on a square
    squash   squeezed into S x S, whatever its proportions                           HF SiglipImageProcessor
    anyres   the whole image squeezed into S x S; then, on the best of the grids, S x S crops of the image,
             resized with its proportions and centred on black                       HF LlavaNextImageProcessor

All but the last make one tile, whose P features take the slots 0 … P-1. Feature p of tile k has slot k*P + p. Drawn
here: `anyres` with P = 4 (2 x 2) for an image twice as high as wide, on a grid of 2 x 2 tiles. Tile 0 is the whole
image; the features of the padding (`.`) are left out, and each row ends with the learned newline (`n`, slot -2):

    crops         their features          without padding      and with newlines
    +---+---+      4  5 |  8  9            .  5 |  8  .         5  8 n
    | 1 | 2 |      6  7 | 10 11            .  7 | 10  .         7 10 n
    +---+---+     ------+------     ->    ------+------   ->
    | 3 | 4 |     12 13 | 16 17            . 13 | 16  .        13 16 n
    +---+---+     14 15 | 18 19            . 15 | 18  .        15 18 n

    slots         0 1 2 3  5 8 -2  7 10 -2  13 16 -2  15 18 -2
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from neva_jax.config import Config, DataConfig
from neva_jax.data.resize import resize
from neva_jax.data.rows import BadRow
from neva_jax.derived import image_tokens, token_grid

TEXT, NEWLINE = -1, -2  # the slots that are no feature


@dataclass(frozen=True)
class ImageSpan:
    """Where the features of one image stand among the tokens.

    slots: [L] i32, feature k*P + p counted from the image's first tile, or NEWLINE.
    features: tiles x P, what the slots of the next image begin after.
    """

    slots: np.ndarray
    features: int


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it: tiles [N, S, S, 3] uint8 and their span."""

    tiles: np.ndarray
    span: ImageSpan


def picture(image: Image.Image, config: Config, frame: bool = False) -> Picture:
    """An RGB image -> tiles and slots; `frame`: of a video, which is always one tile (`square` instead of `anyres`).

    Raises:
      BadRow: `pad` would need more than `data.max_pixels` pixels.
    """
    data, vision = config.data, config.model.vision
    if data.image_mode == "anyres" and not frame:
        tiles = cut(image, vision.image_size, data.image_grids)
        return Picture(tiles, image_span(image.width, image.height, config))
    mode = "square" if data.image_mode == "anyres" else data.image_mode
    tile = fit(image, vision.image_size, mode, vision.image_mean, data.max_pixels)
    return Picture(tile[None], _one_tile(config))


def tiles_per_image(config: Config) -> int:
    """Most tiles of one image."""
    if config.data.image_mode != "anyres":
        return 1
    size = config.model.vision.image_size
    return 1 + max((height // size) * (width // size) for height, width in config.data.image_grids)


def frames_per_video(data: DataConfig) -> int:
    """Frames, of one tile each, that stand for a video; 0: videos are refused."""
    return data.video_frames if data.splice_single_frame == "none" else min(data.video_frames, 1)


def tiles_per_row(config: Config) -> int:
    """K, the most tiles of one row: a row has images or a video."""
    return max(config.data.images_per_row * tiles_per_image(config), frames_per_video(config.data))


# --- slots -----------------------------------------------------------------------------------------------------------


def image_span(width: int, height: int, config: Config) -> ImageSpan:
    """The slots of an image of `width` x `height` pixels, before anything is resized; see the drawing above.

    A class token that is kept (`select_feature: cls_patch`) comes first among the features of its tile; those of the
    crops are left out.
    """
    if config.data.image_mode != "anyres":
        return _one_tile(config)
    tokens, side, size = image_tokens(config.model), token_grid(config.model), config.model.vision.image_size
    rows, columns = (pixels // size for pixels in best_grid(width, height, config.data.image_grids))
    y, x = np.arange(rows * side)[:, None], np.arange(columns * side)
    tile = 1 + (y // side) * columns + x // side
    grid = tile * tokens + (tokens - side**2) + (y % side) * side + x % side
    grid = _unpadded(grid, width, height)
    if config.model.projector.newline:
        grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
    slots = np.concatenate([np.arange(tokens), grid.ravel()]).astype(np.int32)
    return ImageSpan(slots, (1 + rows * columns) * tokens)


def _one_tile(config: Config) -> ImageSpan:
    tokens = image_tokens(config.model)
    return ImageSpan(np.arange(tokens, dtype=np.int32), tokens)


def _unpadded(grid: np.ndarray, width: int, height: int) -> np.ndarray:
    """The features [H, W] without those that lie in the padding alone; Hugging Face's rounding, to the bit.

    A very thin image keeps nothing: its line lies between the two middle rows.
    """
    rows, columns = grid.shape
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, padding : columns - padding]


# --- pixels ----------------------------------------------------------------------------------------------------------


def best_grid(width: int, height: int, grids: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The [height, width] that keeps most of the image's pixels; of several, the smallest, then the first."""

    def kept(grid: Sequence[int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        return min(int(width * scale) * int(height * scale), width * height), -grid[0] * grid[1]

    best = max(grids, key=kept)
    return best[0], best[1]


def cut(image: Image.Image, size: int, grids: Sequence[Sequence[int]]) -> np.ndarray:
    """An RGB image -> [1 + crops, S, S, 3] uint8: the whole squeezed into a square, then the crops row by row."""
    grid_height, grid_width = best_grid(image.width, image.height, grids)
    by_width, by_height = grid_width / image.width, grid_height / image.height
    if by_width < by_height:
        width, height = grid_width, min(math.ceil(image.height * by_width), grid_height)
    else:
        width, height = min(math.ceil(image.width * by_height), grid_width), grid_height
    canvas = np.zeros((grid_height, grid_width, 3), np.uint8)
    left, top = (grid_width - width) // 2, (grid_height - height) // 2
    canvas[top : top + height, left : left + width] = resize(image, width, height)
    crops = canvas.reshape(grid_height // size, size, grid_width // size, size, 3)
    whole = resize(image, size, size)
    return np.concatenate([whole[None], crops.swapaxes(1, 2).reshape(-1, size, size, 3)])


def fit(image: Image.Image, size: int, mode: str, mean: Sequence[float], max_pixels: int = 40_000_000) -> np.ndarray:
    """An RGB image -> [S, S, 3] uint8.

    Args:
      size: S, the side in pixels.
      mode: `square`, `pad`, `keep` or `squash`.
      mean: mean of each channel in 0..1; the colour of the padding, rounded down as LLaVA's.
      max_pixels: bound on the square that `pad` makes of a long, thin image.

    Raises:
      BadRow: that square would have more.
    """
    width, height = image.size
    color = tuple(int(m * 255) for m in mean)
    if mode == "squash":
        return resize(image, size, size)
    if mode == "keep":
        width, height = (max(size * side // max(width, height), 1) for side in (width, height))
        square = np.full((size, size, 3), color, np.uint8)
        left, top = (size - width) // 2, (size - height) // 2
        square[top : top + height, left : left + width] = resize(image, width, height)
        return square
    if mode == "pad" and width != height:
        side = max(width, height)
        if side**2 > max_pixels:
            raise BadRow(
                f"has {width} x {height} pixels, and padded {side} x {side}: more than data.max_pixels={max_pixels:,}"
            )
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return resize(square, size, size)
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    left, top = (width - size) // 2, (height - size) // 2
    return resize(image, width, height, (left, top, left + size, top + size))
