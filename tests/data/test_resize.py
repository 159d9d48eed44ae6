"""Bytes equal to Pillow's own resize: any sizes, any window, both orders of the passes."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from neva_jax.data import resize as resize_module
from neva_jax.data.resize import MAX_SIDE, _rows_first, resize, rgbx
from tests.data.helpers import noise


def by_pillow(image, width, height, window=None):
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop(window) if window else resized)


def random_side(rng, most=6.0):
    return int(np.exp(rng.uniform(0, most)))


@pytest.mark.parametrize("seed", range(4))
def test_any_size_and_window_gives_the_bytes_of_pillow(seed):
    """Half of the images are black and white: the kernel overshoots there, and sums leave 0 … 255."""
    rng = np.random.default_rng(seed)
    orders = set()
    for i in range(150):
        size = old_width, old_height, width, height = [random_side(rng) for _ in range(4)]
        pixels = noise(old_width, old_height, i)
        image = Image.fromarray((pixels > 128) * np.uint8(255) if i % 2 else pixels)
        left, top = int(rng.integers(width)), int(rng.integers(height))
        window = left, top, int(rng.integers(left + 1, width + 1)), int(rng.integers(top + 1, height + 1))
        for chosen in (None, window):
            ours = resize(image, width, height, chosen)
            assert ours.dtype == np.uint8
            np.testing.assert_array_equal(ours, by_pillow(image, width, height, chosen), str((size, chosen)))
        orders.add(_rows_first(*size))
    assert orders == {True, False}


@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (480, 640), (500, 375), (427, 640), (1200, 300), (300, 1200)]
)
@pytest.mark.parametrize("side", [224, 336, 384])
def test_photographs(width, height, side):
    image = Image.fromarray(noise(width, height))
    new_width, new_height = side * width // min(width, height), side * height // min(width, height)
    window = (left := (new_width - side) // 2, top := (new_height - side) // 2, left + side, top + side)
    np.testing.assert_array_equal(
        resize(image, new_width, new_height, window), by_pillow(image, new_width, new_height, window)
    )


def test_the_order_of_the_passes_is_that_of_pillow():
    """On the edge of the rule, where one pixel more or less turns it over."""
    for width, new_width in ((40, 20), (40, 39), (40, 80), (40, 40)):
        for height in (60, 90):
            edge = height - 2 * max(width - new_width, 0)
            for new_height in (edge - 1, edge, edge + 1):
                image = Image.fromarray(noise(width, height))
                ours = resize(image, new_width, new_height)
                np.testing.assert_array_equal(ours, by_pillow(image, new_width, new_height))


def test_an_image_that_pillow_holds_in_several_blocks():
    image = Image.fromarray(noise(3000, 1700))
    pixels = rgbx(image)
    np.testing.assert_array_equal(pixels.view(np.uint8).reshape(1700, 3000, 4)[..., :3], np.asarray(image))
    np.testing.assert_array_equal(resize(image, 40, 30), by_pillow(image, 40, 30))


def test_a_window_of_a_huge_image_is_computed_alone():
    """All of it would be 130 gigabytes."""
    image = Image.new("RGB", (MAX_SIDE, 1), (9, 8, 7))
    ours = resize(image, MAX_SIDE * 800, 800, (10**7, 0, 10**7 + 50, 50))
    assert ours.reshape(-1, 3).tolist() == [[9, 8, 7]] * 2500


def test_a_side_that_is_too_long():
    with pytest.raises(ValueError, match="a side of 65536 pixels is more than 65535"):
        resize(Image.new("RGB", (1, MAX_SIDE + 1)), 2, 2)


def test_an_image_in_use_is_not_changed():
    image = Image.fromarray(noise(50, 40))
    before = image.tobytes()
    resize(image, 20, 20)[:] = 0
    assert image.tobytes() == before


def test_without_a_place_for_its_cache_it_still_computes(tmp_path):
    """Numba keeps machine code beside the source or in the user's cache; a container may let it write to neither."""
    source = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "from PIL import Image\n"
        "from neva_jax.data.resize import resize\n"
        "print(resize(Image.new('RGB', (9, 9), (1, 2, 3)), 4, 4)[0, 0].tolist())\n"
    )
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[1, 2, 3]\n", "")


def test_an_image_that_borrows_its_memory_is_copied_where_pillow_would_die_of_its_export(monkeypatch):
    pixels = np.random.default_rng(3).integers(0, 256, (7, 5, 4), np.uint8)
    image = Image.frombuffer("RGBX", (5, 7), pixels, "raw", "RGBX", 0, 1)
    assert image.readonly
    monkeypatch.setattr(resize_module, "OLD_PILLOW", True)
    monkeypatch.setattr(resize_module.pyarrow, "array", lambda image: pytest.fail("exported"))
    np.testing.assert_array_equal(rgbx(image).view(np.uint8).reshape(7, 5, 4), pixels)
