"""Pixels against Hugging Face's CLIPImageProcessor and a brute-force padding; files that are no usable image."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from neva_jax.data.images import find_image, fit, load_image
from neva_jax.data.rows import BadRow

MEAN = (0.48145466, 0.4578275, 0.40821073)
SIZES = [
    (1, 1),
    (1, 7),
    (9, 2),
    (31, 33),
    (32, 32),
    (33, 32),
    (32, 47),
    (37, 53),
    (53, 37),
    (63, 65),
    (64, 64),
    (99, 101),
    (127, 64),
    (3, 150),
    (150, 5),
    (201, 77),
    (336, 335),
    (333, 500),
    (641, 479),
]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(image, size):
    """[S, S, 3] uint8 of Hugging Face's processor, before it scales and normalises."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        do_rescale=False,
        do_normalize=False,
    )
    (pixels,) = processor(image)["pixel_values"]
    return np.asarray(pixels).transpose(1, 2, 0)


def padded(pixels, mean):
    """expand2square, pixel by pixel."""
    height, width, _ = pixels.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    out = np.empty((side, side, 3), np.uint8)
    for y in range(side):
        for x in range(side):
            inside = top <= y < top + height and left <= x < left + width
            out[y, x] = pixels[y - top, x - left] if inside else [int(255 * m) for m in mean]
    return out


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 35, 224])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_square_gives_the_pixels_of_clip(size, side):
    image = Image.fromarray(noise(*size))
    ours = fit(image, side, "square", MEAN)
    assert (ours.shape, ours.dtype) == ((side, side, 3), np.uint8)
    np.testing.assert_array_equal(ours, clip(image, side))


@pytest.mark.parametrize("size", [(7, 7), (7, 12), (12, 7), (8, 13), (13, 8), (1, 9), (20, 3)])
def test_pad_against_brute_force(size):
    """At the padded image's own side nothing is resampled; at another, CLIP's processor resamples the padded image."""
    pixels = noise(*size)
    expected = padded(pixels, MEAN)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(fit(image, max(size), "pad", MEAN), expected)
    np.testing.assert_array_equal(fit(image, 32, "pad", MEAN), clip(Image.fromarray(expected), 32))


def test_pad_uses_the_mean_of_each_channel():
    image = Image.new("RGB", (4, 2), "white")
    ours = fit(image, 4, "pad", (0.1, 0.5, 0.99))
    assert ours[0].tolist() == ours[3].tolist() == [[25, 127, 252]] * 4
    assert ours[1].tolist() == ours[2].tolist() == [[255, 255, 255]] * 4


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "tiff"])
def test_a_lossless_file_gives_its_pixels(tmp_path, kind):
    pixels = noise(40, 40)
    path = tmp_path / f"image.{kind}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if kind == "webp" else {}))
    ours = load_image(path, 40, "square", MEAN)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(load_image(str(path), 24, "pad", MEAN), clip(Image.fromarray(pixels), 24))


MODES = {
    "L": (100, "png", (100, 100, 100)),
    "RGBA": ((250, 10, 20, 90), "png", (250, 10, 20)),
    "LA": ((100, 30), "png", (100, 100, 100)),
    "P": (3, "png", (10, 200, 30)),
    "CMYK": ((0, 255, 255, 0), "tiff", (255, 0, 0)),
    "1": (1, "png", (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_become_rgb(tmp_path, mode):
    color, kind, expected = MODES[mode]
    flat = Image.new(mode, (40, 31), color)
    mixed = Image.fromarray(noise(40, 31)).convert(mode)
    if mode == "P":
        flat.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 200, 30])
    for name, image in (("flat", flat), ("mixed", mixed)):
        image.save(tmp_path / f"{name}.{kind}")
        with Image.open(tmp_path / f"{name}.{kind}") as stored:
            assert stored.mode == mode
            # Alpha is dropped, as LLaVA's loader does it; Hugging Face's processor alone would lay it over white.
            reference = clip(stored.convert("RGB") if "A" in mode else stored, 32)
        np.testing.assert_array_equal(load_image(tmp_path / f"{name}.{kind}", 32, "square", MEAN), reference)
    for fitting in ("square", "pad"):
        middle = load_image(tmp_path / f"flat.{kind}", 32, fitting, MEAN)[16, 16]
        assert tuple(middle.tolist()) == expected


# --- files that cannot be used ---------------------------------------------------------------------------------------


def broken(path):
    with pytest.raises(BadRow) as error:
        load_image(path, 32, "square", MEAN)
    return str(error.value)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_truncated_image(tmp_path, kind, kept):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(noise(64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert broken(path).startswith(f"field image: {path} is ")


def test_a_truncated_jpeg_says_how(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert broken(path).startswith(f"field image: {path} is broken (image file is truncated")


@pytest.mark.parametrize("content", [b"", b"an image, I swear\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert broken(path).startswith(f"field image: {path} is ")


def test_a_text_file_is_called_no_image(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_text("an image, I swear\n")
    assert broken(path) == f"field image: {path} is no image that can be read"


def png_header(path, width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b""))


@pytest.mark.parametrize(("width", "height"), [(8000, 5001), (40_000_001, 1), (10_000, 9_000)])
def test_an_image_with_too_many_pixels_is_not_decoded(tmp_path, width, height):
    path = tmp_path / "image.png"
    png_header(path, width, height)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert broken(path) == f"field image: {path} has {width} x {height} pixels, more than 40,000,000"


@pytest.mark.parametrize(
    ("size", "mode", "made"),
    [
        ((2000, 1), "square", "resized 448000 x 224"),
        ((1, 2000), "square", "resized 224 x 448000"),
        ((30, 7000), "pad", "padded 7000 x 7000"),
    ],
)
def test_a_long_thin_image_does_not_become_gigabytes(tmp_path, size, mode, made):
    path = tmp_path / "image.png"
    Image.new("RGB", size).save(path)
    with pytest.raises(BadRow) as error:
        load_image(path, 224, mode, MEAN)
    pixels = f"{size[0]} x {size[1]} pixels"
    assert str(error.value) == f"field image: {path} has {pixels}, and {made}: more than 40,000,000"


def test_a_damaged_header_that_its_decoder_does_not_know(tmp_path):
    path = tmp_path / "image.dds"
    path.write_bytes(b"DDS " + bytes([124, 0, 0, 0]) + bytes(120))
    assert broken(path).startswith(f"field image: {path} is broken (")


def test_an_image_of_the_most_pixels_is_decoded(tmp_path):
    path = tmp_path / "image.png"
    png_header(path, 8000, 5000)
    assert broken(path).startswith(f"field image: {path} is broken (")


def test_an_image_that_pillow_takes_for_a_bomb(tmp_path):
    path = tmp_path / "image.png"
    png_header(path, 60_000, 60_000)
    assert broken(path).startswith(f"field image: {path} is broken (Image size (3600000000 pixels) exceeds limit")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """`images` with one file, between files that do not belong to it."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images2").mkdir()
    for name in ("images/sub/a.png", "images2/a.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "images"


def test_names_inside_the_folder_are_found(folder):
    inside = folder / "sub" / "a.png"
    (folder / "link.png").symlink_to("sub/a.png")
    (folder.parent / "elsewhere").symlink_to(folder)
    for name in ("sub/a.png", "./sub//a.png", "sub/../sub/a.png", "../images/sub/a.png", "link.png", str(inside)):
        assert find_image(folder, name) == inside
        assert find_image(str(folder), name) == inside
    assert find_image(folder.parent / "elsewhere", "sub/a.png") == inside


def test_names_that_lead_out_are_refused(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "up").symlink_to("..")
    outside = str(folder.parent / "outside.png")
    for name in ("../outside.png", "sub/../../outside.png", "../images2/a.png", outside, "link.png", "up/outside.png"):
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} leads out of {folder}"


def test_names_of_nothing_are_refused(folder):
    (folder / "dangling.png").symlink_to("absent.png")
    (folder / "loop.png").symlink_to("loop.png")
    names = ["absent.png", "sub/absent.png", "../absent.png", "/absent.png", "dangling.png", "loop.png", "a\0b.png"]
    for name in [*names, "sub/a.png/b.png", "x" * 300, "x/" * 3000]:
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} is not in {folder}"


def test_names_of_something_else_are_refused(folder):
    os.mkfifo(folder / "pipe.png")
    for name in ("sub", ".", "", "pipe.png"):
        with pytest.raises(BadRow) as error:
            find_image(folder, name)
        assert str(error.value) == f"field image: {name} in {folder} is no regular file"


def test_without_a_folder_no_image_is_found():
    with pytest.raises(BadRow) as error:
        find_image(None, "a.png")
    assert str(error.value) == "field image names a.png, but its source has no images folder"
