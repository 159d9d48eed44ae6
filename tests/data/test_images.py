"""Files that hold an image in any format and mode, and files that are no usable image; names; frames of a video."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from neva_jax.configfile import load_config
from neva_jax.data.images import load_image, open_image, sample_frames
from neva_jax.data.rows import BadRow
from neva_jax.data.tiles import fit
from tests.data.helpers import clip, noise

MEAN = (0.48145466, 0.4578275, 0.40821073)


def load(path, size=32, mode="square"):
    with open_image(path) as image:
        return fit(image, size, mode, MEAN)


# --- files that hold an image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "tiff"])
def test_a_lossless_file_gives_its_pixels(tmp_path, kind):
    pixels = noise(40, 40)
    path = tmp_path / f"image.{kind}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if kind == "webp" else {}))
    ours = load(path, 40)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(load(str(path), 24, "pad"), clip(Image.fromarray(pixels), 24))


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
        np.testing.assert_array_equal(load(tmp_path / f"{name}.{kind}"), reference)
    for fitting in ("square", "pad"):
        middle = load(tmp_path / f"flat.{kind}", 32, fitting)[16, 16]
        assert tuple(middle.tolist()) == expected


# --- files that cannot be used ---------------------------------------------------------------------------------------


def broken(path):
    with pytest.raises(BadRow) as error:
        load(path)
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
        load(path, 224, mode)
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


# --- what the model takes --------------------------------------------------------------------------------------------


def test_an_image_is_read_in_the_mode_of_the_configuration(tmp_path):
    path = tmp_path / "image.png"
    pixels = noise(50, 40)
    Image.fromarray(pixels).save(path)
    overrides = ["model.vision.image_size=32", "model.vision.patch_size=8", "data.image_grids=[[32, 64], [64, 32]]"]
    read = {mode: load_image(path, load_config(None, [*overrides, f"data.image_mode={mode}"])) for mode in MODE_SHAPES}
    assert {mode: one.tiles.shape for mode, one in read.items()} == MODE_SHAPES
    np.testing.assert_array_equal(read["square"].tiles[0], clip(Image.fromarray(pixels), 32))
    assert not np.array_equal(read["square"].tiles[0], read["pad"].tiles[0])
    for mode in ("square", "pad"):
        assert read[mode].span.slots.tolist() == list(range(16))


MODE_SHAPES = {"square": (1, 32, 32, 3), "pad": (1, 32, 32, 3), "anyres": (3, 32, 32, 3)}


def test_a_broken_frame_is_called_a_video(tmp_path):
    (tmp_path / "f.png").write_text("text")
    with pytest.raises(BadRow, match=r"^field video: .*/f\.png is no image that can be read$"):
        load_image(tmp_path / "f.png", load_config(None), frame=True)


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "count", "chosen"),
    [
        (7, 1, [0]),
        (7, 2, [0, 6]),
        (7, 3, [0, 3, 6]),
        (7, 4, [0, 2, 4, 6]),
        (7, 5, [0, 1, 3, 4, 6]),
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (3, 5, [0, 1, 2, 2, 2]),
        (1, 3, [0, 0, 0]),
        (100, 4, [0, 33, 66, 99]),
    ],
)
def test_frames_are_taken_evenly_and_the_last_is_repeated(length, count, chosen):
    assert sample_frames(list(range(length)), count, "none") == chosen


@pytest.mark.parametrize(("length", "chosen"), [(1, (0, 0, 0)), (2, (0, 1, 1)), (7, (0, 3, 6)), (8, (0, 4, 7))])
def test_one_frame_is_taken(length, chosen):
    frames = list(range(length))
    assert tuple(sample_frames(frames, 4, which) for which in ("first", "middle", "last")) == tuple([i] for i in chosen)
