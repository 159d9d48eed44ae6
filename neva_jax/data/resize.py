"""Pillow's bicubic resize, bit for bit, several times as fast, and only for the pixels that are kept.

Pillow resizes in two passes, one per axis, and rounds to bytes between them. Each output pixel is a sum over the input
pixels under the (antialiased) cubic kernel, in integers: weights are rounded to multiples of 2^-22. Integer sums do
not depend on their order, so other loops than Pillow's give the same bytes, if three things are kept: the weights, the
rounding between the passes, and which pass comes first (since Pillow 13 that depends on the sizes, `_rows_first`).

What is faster here: only the window that the caller keeps is computed (a centre crop drops a quarter of a photograph),
and the inner loops run over neighbouring bytes with one weight for all, so that LLVM makes vector instructions of
them. Down the columns, neighbouring bytes are a row of the image. Along the rows they are a tile of 32 rows, turned:

    image rows      y0   A0 A1 A2 A3 …            turned     A0 B0 C0 …      weight k of output x times one line,
                    y0+1 B0 B1 B2 B3 …     ->                A1 B1 C1 …      the next weight times the next line
                    y0+2 C0 C1 C2 C3 …                       A2 B2 C2 …

Pixels are 4 bytes, RGB and one that is ignored: so Pillow holds them, and so they are read without a copy.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import numba
import numpy as np
import PIL
import pyarrow
from PIL import Image

BITS = 22  # of the fraction of a weight: 32 less 8 of the pixel and 2 for weights that sum to more than 1 in between
HALF = 1 << (BITS - 1)
TILE = 32  # rows that are turned at a time; a multiple of 4
# It dies where an image that borrows its memory is exported (Pillow's issue 9896).
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
MAX_SIDE = 65_535  # JPEG's own bound; weights take memory in proportion to the side


def _compiled(function: Callable) -> Callable:
    """`function` as machine code, which the next process finds on disk unless there is nowhere to write it."""
    try:
        return numba.njit(function, cache=True, nogil=True, boundscheck=False)
    except RuntimeError:
        return numba.njit(function, nogil=True, boundscheck=False)


def resize(image: Image.Image, width: int, height: int, window: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """`image.resize((width, height), BICUBIC).crop(window)` of an RGB or RGBX image, as [h, w, 3] uint8.

    Args:
      width, height: of the whole resized image, of which nothing but the window is computed.
      window: left, top, right, bottom inside it; None: all of it.

    Raises:
      ValueError: a side of the image is longer than MAX_SIDE.
    """
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"a side of {max(image.size)} pixels is more than {MAX_SIDE}")
    left, top, right, bottom = window or (0, 0, width, height)
    pixels = rgbx(image)
    across = _weights(image.width, width, left, right)
    down = _weights(image.height, height, top, bottom)
    if _rows_first(image.width, image.height, width, height):
        first, last = int(down[0][0]), int(down[0][-1] + down[1][-1])
        pixels = _resize_down(_resize_across(pixels[first:last], *across), down[0] - first, *down[1:])
    else:
        pixels = _resize_across(_resize_down(pixels, *down), *across)
    return _rgb(pixels)


def rgbx(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB or RGBX image, [H, W] of 4 bytes each; a copy where Pillow cannot give its own away."""
    flat = None
    if not (image.readonly and OLD_PILLOW):
        with suppress(ValueError):  # large images (16 MB) are held in several blocks
            flat = pyarrow.array(image).flatten().to_numpy(zero_copy_only=True)
    if flat is None:
        flat = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
    return flat.view(np.uint32).reshape(image.height, image.width)


def _rows_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether Pillow resizes along the rows first, as it always did before version 13."""
    shrunk = height - new_height
    return shrunk <= 0 or shrunk <= 2 * (width - new_width)


@lru_cache(maxsize=256)
def _weights(old: int, new: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which inputs the outputs `start` … `stop` - 1 of an axis are made of, when `old` pixels become `new`.

    Returns:
      first [n] i32, count [n] i32: inputs `first` … `first + count - 1`.
      weights [n, k] i32: theirs, in units of 2^-BITS; 0 past the count.
    """
    first, count, weights = _compute_weights(old, new, start, stop)
    for array in (first, count, weights):
        array.flags.writeable = False  # they are shared by all callers
    return first, count, weights


@_compiled
def _cubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5, as Pillow evaluates it."""
    a = -0.5
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@_compiled
def _compute_weights(old, new, start, stop):  # -> as `_weights`
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    taps = int(np.ceil(support)) * 2 + 1
    first = np.zeros(stop - start, np.int32)
    count = np.zeros(stop - start, np.int32)
    weights = np.zeros((stop - start, taps), np.int32)
    exact = np.empty(taps, np.float64)
    for i in range(stop - start):
        center = (start + i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        n = min(int(center + support + 0.5), old) - low
        total = 0.0
        for k in range(n):
            exact[k] = _cubic((k + low - center + 0.5) * (1.0 / stretch))
            total += exact[k]
        for k in range(n):
            weight = exact[k] / total * (1 << BITS)
            weights[i, k] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
        first[i], count[i] = low, n
    return first, count, weights


@_compiled
def _resize_across(pixels, first, count, weights):
    """[H, W] u32 -> [H, n] u32, along the rows."""
    height = len(pixels)
    outputs, taps = weights.shape
    start, stop = first[0], first[-1] + count[-1]
    out = np.empty((height, outputs), np.uint32)
    turned = np.zeros((stop - start + taps, TILE), np.uint32)
    turned_bytes = turned.view(np.uint8)
    done = np.empty((outputs, TILE), np.uint32)
    done_bytes = done.view(np.uint8)
    sums = np.empty(TILE * 4, np.int32)
    for y in range(0, height, TILE):
        for r in range(0, TILE, 4):
            # The last rows are repeated where the tile is higher than what is left of the image. By squares of 4 x 4:
            # what is written lies together, and what is read too.
            row0, row1 = pixels[min(y + r, height - 1)], pixels[min(y + r + 1, height - 1)]
            row2, row3 = pixels[min(y + r + 2, height - 1)], pixels[min(y + r + 3, height - 1)]
            for x in range(start, stop - 3, 4):
                a0, a1, a2, a3 = row0[x], row0[x + 1], row0[x + 2], row0[x + 3]
                b0, b1, b2, b3 = row1[x], row1[x + 1], row1[x + 2], row1[x + 3]
                c0, c1, c2, c3 = row2[x], row2[x + 1], row2[x + 2], row2[x + 3]
                d0, d1, d2, d3 = row3[x], row3[x + 1], row3[x + 2], row3[x + 3]
                line0, line1 = turned[x - start], turned[x - start + 1]
                line2, line3 = turned[x - start + 2], turned[x - start + 3]
                line0[r], line0[r + 1], line0[r + 2], line0[r + 3] = a0, b0, c0, d0
                line1[r], line1[r + 1], line1[r + 2], line1[r + 3] = a1, b1, c1, d1
                line2[r], line2[r + 1], line2[r + 2], line2[r + 3] = a2, b2, c2, d2
                line3[r], line3[r + 1], line3[r + 2], line3[r + 3] = a3, b3, c3, d3
            for x in range(stop - (stop - start) % 4, stop):
                line = turned[x - start]
                line[r], line[r + 1], line[r + 2], line[r + 3] = row0[x], row1[x], row2[x], row3[x]
        for x in range(outputs):
            for j in range(TILE * 4):
                sums[j] = np.int32(HALF)
            fours = count[x] // 4 * 4
            for k in range(0, fours, 4):
                at = first[x] - start + k
                a, b, c, d = weights[x, k], weights[x, k + 1], weights[x, k + 2], weights[x, k + 3]
                p, q = turned_bytes[at], turned_bytes[at + 1]
                s, t = turned_bytes[at + 2], turned_bytes[at + 3]
                for j in range(TILE * 4):
                    sums[j] += a * np.int32(p[j]) + b * np.int32(q[j]) + c * np.int32(s[j]) + d * np.int32(t[j])
            for k in range(fours, count[x]):
                a, p = weights[x, k], turned_bytes[first[x] - start + k]
                for j in range(TILE * 4):
                    sums[j] += a * np.int32(p[j])
            line = done_bytes[x]
            for j in range(TILE * 4):
                line[j] = np.uint8(min(max(sums[j] >> BITS, 0), 255))
        for r in range(min(TILE, height - y)):
            for x in range(outputs):
                out[y + r, x] = done[x, r]
    return out


@_compiled
def _resize_down(pixels, first, count, weights):
    """[H, W] u32 -> [n, W] u32, down the columns; a row of `pixels` is contiguous, the next may be further away."""
    width = pixels.shape[1]
    outputs = len(first)
    out = np.empty((outputs, width), np.uint32)
    out_bytes = out.view(np.uint8)
    sums = np.empty(width * 4, np.int32)
    for y in range(outputs):
        for j in range(width * 4):
            sums[j] = np.int32(HALF)
        fours = count[y] // 4 * 4
        for k in range(0, fours, 4):
            at = first[y] + k
            a, b, c, d = weights[y, k], weights[y, k + 1], weights[y, k + 2], weights[y, k + 3]
            p, q = pixels[at].view(np.uint8), pixels[at + 1].view(np.uint8)
            s, t = pixels[at + 2].view(np.uint8), pixels[at + 3].view(np.uint8)
            for j in range(width * 4):
                sums[j] += a * np.int32(p[j]) + b * np.int32(q[j]) + c * np.int32(s[j]) + d * np.int32(t[j])
        for k in range(fours, count[y]):
            a, p = weights[y, k], pixels[first[y] + k].view(np.uint8)
            for j in range(width * 4):
                sums[j] += a * np.int32(p[j])
        line = out_bytes[y]
        for j in range(width * 4):
            line[j] = np.uint8(min(max(sums[j] >> BITS, 0), 255))
    return out


@_compiled
def _rgb(pixels):
    """[H, W] u32 -> [H, W, 3] u8."""
    height, width = pixels.shape
    out = np.empty((height, width, 3), np.uint8)
    pixels = pixels.view(np.uint8)
    for y in range(height):
        for x in range(width):
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = pixels[y, 4 * x], pixels[y, 4 * x + 1], pixels[y, 4 * x + 2]
    return out
