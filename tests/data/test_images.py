"""Files that hold an image in any format and mode, and files that are no usable image; names; frames of a video."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from neva_jax.configfile import load_config
from neva_jax.data.images import (
    _plain_jpeg,
    decode_image,
    image_header,
    image_size,
    jpeg_is_complete,
    load_image,
    open_image,
    sample_frames,
)
from neva_jax.data.rows import BadRow
from neva_jax.data.stores import MAX_IMAGE_BYTES
from neva_jax.data.tiles import fit
from tests.data.helpers import clip, noise

MEAN = (0.48145466, 0.4578275, 0.40821073)


CONFIG = load_config(None, [])
AS_STORED = load_config(None, ["data.exif_rotate=false"])


def load(path, size=32, mode="square"):
    return fit(open_image(path.read_bytes(), str(path), CONFIG), size, mode, MEAN)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data, config=CONFIG):
    return np.asarray(open_image(data, "a", config).convert("RGB"))


# --- files that hold an image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "tiff"])
def test_a_lossless_file_gives_its_pixels(tmp_path, kind):
    pixels = noise(40, 40)
    path = tmp_path / f"image.{kind}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if kind == "webp" else {}))
    ours = load(path, 40)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(load(path, 24, "pad"), clip(Image.fromarray(pixels), 24))


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
    assert broken(path).startswith(f"field image: {path} is incomplete: it has no end marker")


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
        assert (
            broken(path) == f"field image: {path} has {width} x {height} pixels, more than data.max_pixels=40,000,000"
        )


def test_a_long_thin_image_does_not_become_gigabytes(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (30, 7000)).save(path)
    with pytest.raises(BadRow) as error:
        load_image(path, load_config(None, ["data.image_mode=pad"]))
    made = "has 30 x 7000 pixels, and padded 7000 x 7000: more than data.max_pixels=40,000,000"
    assert str(error.value) == f"field image: {path} {made}"


def test_an_image_of_the_most_pixels_is_decoded(tmp_path):
    path = tmp_path / "image.png"
    png_header(path, 8000, 5000)
    assert broken(path).startswith(f"field image: {path} is broken (")


def test_an_image_that_pillow_takes_for_a_bomb(tmp_path):
    path = tmp_path / "image.png"
    png_header(path, 60_000, 60_000)
    assert broken(path).startswith(f"field image: {path} is broken (Image size (3600000000 pixels) exceeds limit")


@pytest.mark.parametrize("kind", ["dds", "eps", "ico", "psd"])
def test_formats_that_no_data_set_uses_are_not_opened(tmp_path, kind):
    path = tmp_path / "image.jpg"
    if kind == "psd":
        path.write_bytes(b"8BPS\0\1" + bytes(20))
    else:
        Image.new("RGB", (16, 16)).save(path, kind)
    assert broken(path) == f"field image: {path} is no image that can be read"


def test_a_side_that_no_photograph_has(tmp_path):
    path = tmp_path / "image.png"
    png_header(path, 65_536, 10)
    assert broken(path) == f"field image: {path} has 65536 x 10 pixels, a side longer than 65,535"


def test_the_bound_on_pixels_is_a_setting(tmp_path):
    config = load_config(None, ["data.max_pixels=100"])
    assert image_size(encoded(Image.new("RGB", (10, 10)), "png"), "a", config) == (10, 10)
    data = encoded(Image.new("RGB", (10, 11)), "png")
    for read in (image_size, image_header, open_image, decode_image):
        with pytest.raises(BadRow) as error:
            read(data, "a", config, "video")
        assert str(error.value) == "field video: a has 10 x 11 pixels, more than data.max_pixels=100"


def test_files_that_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", MAX_IMAGE_BYTES + 1)
    for name, message in {
        "pipe.png": "is no regular file",
        "folder.png": "is no regular file",
        "large.png": f"has {MAX_IMAGE_BYTES + 1:,} bytes, more than {MAX_IMAGE_BYTES:,}",
        "absent.png": "cannot be read (",
        "a\0b.png": "cannot be read (",
    }.items():
        with pytest.raises(BadRow) as error:
            load_image(tmp_path / name, CONFIG)
        assert str(error.value).startswith(f"field image: {tmp_path / name} {message}")


def test_nothing_is_held_after_a_refusal(tmp_path):
    for _ in range(50):
        for name in ("absent.png", "."):
            with pytest.raises(BadRow):
                load_image(tmp_path / name, CONFIG)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with pytest.raises(BadRow):
            load_image(tmp_path, CONFIG)
    assert len(os.listdir("/proc/self/fd")) == before


# --- bombs and incomplete files --------------------------------------------------------------------------------------


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks, depth=1, color=0):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([png_chunk(b"IHDR", header), *chunks, png_chunk(b"IEND", b"")])


def webp(kind, header):
    """A WebP file that claims a canvas and holds no picture."""
    body = b"WEBP" + kind + struct.pack("<I", len(header)) + header + bytes(64)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(entries):
    """A TIFF of one directory with the entries {tag: value} and 64 bytes of pixels."""
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4 + 64)


def bombs():
    zeros = zlib.compress(bytes(600 << 20), 9)
    pixel = png_chunk(b"IDAT", zlib.compress(b"\0\0"))
    plain = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1}
    side = 16_383
    yield "png pixels", png(100_000, 100_000, png_chunk(b"IDAT", zeros))
    yield "png profile", png(1, 1, png_chunk(b"iCCP", b"a\0\0" + zeros), pixel)
    yield "png text", png(1, 1, png_chunk(b"zTXt", b"a\0\0" + zeros), pixel)
    yield "png more text", png(1, 1, *[png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 200, pixel)
    yield "png too many pixels", png(1, 1, png_chunk(b"IDAT", zeros))
    yield "webp", webp(b"VP8X", bytes(4) + (side - 1).to_bytes(3, "little") * 2)
    yield "webp lossless", webp(b"VP8L", b"\x2f" + (side - 1 | (side - 1) << 14).to_bytes(4, "little"))
    yield "webp lossy", webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + side.to_bytes(2, "little") * 2)
    yield "gif", b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;"
    yield "gif frame", b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;"
    yield "tiff", tiff(plain | {256: 60_000, 257: 60_000, 273: 120, 279: 64})
    yield "tiff tiles", tiff(plain | {322: 32_000, 323: 32_000, 324: 120, 325: 64})
    yield "tiff strip", tiff(plain | {273: 120, 278: 0xFFFFFFFF, 279: 0xFFFFFFF0})
    yield "pgm", b"P5 60000 60000 255\n" + bytes(100)
    yield (
        "bmp",
        encoded(Image.new("RGB", (1, 1)), "bmp").replace(struct.pack("<ii", 1, 1), struct.pack("<ii", 60000, 60000)),
    )


MEASURED = """
import pathlib, resource, sys
from neva_jax.configfile import load_config
from neva_jax.data.images import decode_image
from neva_jax.data.rows import BadRow
config = load_config(None, [])
decode_image(pathlib.Path(sys.argv[1]).read_bytes(), "warm", config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
# 400 MB more of addresses than now; a decoder that asks for more gets none, and the row says "broken".
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
for path in sys.argv[2:]:
    try:
        decode_image(pathlib.Path(path).read_bytes(), "a", config)
        print("decoded")
    except BadRow as error:
        print(str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_within_bounded_memory(tmp_path):
    """Each in a few kilobytes or less; what they would unpack to is hundreds of megabytes and more."""
    (tmp_path / "warm").write_bytes(encoded(Image.new("RGB", (50, 40)), "jpeg"))
    names = []
    for name, data in bombs():
        names.append(name)
        (tmp_path / name).write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ["warm", *names])],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    *said, megabytes = run.stdout.splitlines()
    said = dict(zip(names, said, strict=True))
    assert int(megabytes) < 100, said
    sizes = {name: message for name, message in said.items() if "more than data.max_pixels" in message}
    assert set(sizes) >= {"webp", "webp lossless", "webp lossy", "tiff tiles"}, said
    # A row whose picture is one pixel and well-formed, but followed by more, is not damaged.
    assert {name for name, message in said.items() if message == "decoded"} <= {"png too many pixels", "tiff strip"}


def photograph(width=64, height=48, **options):
    return encoded(Image.fromarray(noise(width, height)), "jpeg", **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_with_a_tail_of_zeros_is_incomplete(options):
    data = photograph(**options)
    assert jpeg_is_complete(data)
    decode_image(data, "a", CONFIG)
    start = data.rindex(b"\xff\xda") if not options.get("progressive") else data.index(b"\xff\xda")
    for cut in (start, start + 20, (start + len(data)) // 2, len(data) - 2, len(data) - 1):
        tailed = data[:cut] + bytes(len(data) - cut)
        assert not jpeg_is_complete(tailed)
        with pytest.raises(BadRow, match=r"^field image: a is "):
            decode_image(tailed, "a", CONFIG)
    half = data[: len(data) // 2] + bytes(len(data) // 2)
    with pytest.raises(BadRow) as error:
        decode_image(half, "a", CONFIG)
    assert str(error.value) == (
        "field image: a is incomplete: it has no end marker, so its lower part is missing, or zeros"
    )


def test_the_end_of_a_thumbnail_is_not_the_end():
    thumbnail = photograph(16, 16)
    data = photograph(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail)
    assert thumbnail in data and jpeg_is_complete(data)
    assert not jpeg_is_complete(data[: len(data) // 2] + bytes(1000))


def test_what_follows_the_end_does_no_harm():
    data = photograph()
    for more in (b"\0" * 5000, b"trailing words"):
        assert jpeg_is_complete(data + more)
        np.testing.assert_array_equal(opened(data + more), opened(data))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\0", b"\xff" * 99])
def test_the_end_of_nothing(data):
    assert not jpeg_is_complete(data)


def test_damage_of_any_kind_is_a_bad_row():
    """Bytes changed, removed and repeated at random: a picture or BadRow, nothing else."""
    rng = np.random.default_rng(0)
    files = [photograph(), photograph(progressive=True)]
    files += [encoded(Image.fromarray(noise(20, 20)), kind) for kind in ("png", "webp", "gif", "tiff", "bmp", "ppm")]
    outcomes = set()
    for data in files:
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(int(rng.integers(1, 6))):
                at = int(rng.integers(0, len(changed) if rng.random() < 0.5 else 40))
                changed[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
            try:
                outcomes.add(type(decode_image(bytes(changed), "a", CONFIG)).__name__)
            except BadRow as error:
                outcomes.add("BadRow")
                assert str(error).startswith("field image: a ")
    assert outcomes == {"Picture", "BadRow"}


# --- JPEG in colour, which simplejpeg decodes ------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "restart_marker_blocks": 3}])
@pytest.mark.parametrize("keep_rgb", [False, True])
def test_pixels_of_a_jpeg_are_those_of_pillow(sampling, options, keep_rgb):
    """By simplejpeg, to the bit; of all sizes around a block, where the last blocks are cut."""
    for width, height in ((64, 48), (1, 1), (17, 1), (1, 33), (15, 31), (100, 75), (333, 250)):
        coarse = Image.fromarray(noise(width // 4 + 1, height // 4 + 1))
        for quality in (30,) if keep_rgb else (30, 90, 100):
            data = encoded(
                coarse.resize((width, height)),
                "jpeg",
                subsampling=sampling if not keep_rgb else "4:4:4",
                quality=quality,
                keep_rgb=keep_rgb,
                **options,
            )
            with Image.open(io.BytesIO(data)) as stored:
                wanted = np.asarray(stored.convert("RGB"))
            with Image.open(io.BytesIO(data)) as stored:
                assert _plain_jpeg(data, stored).mode == "RGBX"
            np.testing.assert_array_equal(opened(data), wanted)


def test_what_simplejpeg_refuses_is_judged_by_pillow():
    """Grey, CMYK, and files with damage that Pillow puts up with, or does not."""
    for mode in ("L", "CMYK"):
        data = encoded(Image.fromarray(noise(40, 24)).convert(mode), "jpeg")
        with Image.open(io.BytesIO(data)) as stored:
            assert _plain_jpeg(data, stored) is None
            np.testing.assert_array_equal(opened(data), np.asarray(stored.convert("RGB")))
    data = encoded(Image.fromarray(noise(400, 240)), "jpeg", quality=90)
    rng, judged = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(rng.integers(700, len(data) - 2))] = int(rng.integers(256))
        try:
            with Image.open(io.BytesIO(damaged)) as stored:
                wanted = np.asarray(stored.convert("RGB"))
        except OSError:
            with pytest.raises(BadRow):
                opened(bytes(damaged))
            continue
        np.testing.assert_array_equal(opened(bytes(damaged)), wanted)
        with Image.open(io.BytesIO(damaged)) as stored:
            judged[_plain_jpeg(bytes(damaged), stored) is None] += 1
    assert judged[True] and judged[False]


# --- photographs held upright ----------------------------------------------------------------------------------------


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_is_turned_as_its_exif_says(kind, orientation):
    """Of 0 and 9 there is no meaning: they turn nothing."""
    data = encoded(Image.fromarray(noise(40, 24)), kind, exif=turned(orientation))
    with Image.open(io.BytesIO(data)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(opened(data), upright)
    assert image_size(data, "a", CONFIG) == upright.shape[1::-1]
    assert (upright.shape[0] == 40) == (orientation in (5, 6, 7, 8))
    if kind != "tiff":  # Pillow turns these itself
        with Image.open(io.BytesIO(data)) as stored:
            np.testing.assert_array_equal(opened(data, AS_STORED), np.asarray(stored.convert("RGB")))
        assert image_size(data, "a", AS_STORED) == (40, 24)


def test_the_tiles_of_a_photograph_follow_its_upright_size():
    config = load_config(None, ["data.image_mode=anyres", "model.vision.image_size=336"])
    data = encoded(Image.fromarray(noise(60, 30)), "jpeg", exif=turned(6))
    assert len(decode_image(data, "a", config).tiles) == 3
    assert image_size(data, "a", config) == (30, 60)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"none"]
)
def test_damaged_exif_turns_nothing(exif):
    image = Image.fromarray(noise(40, 24))
    np.testing.assert_array_equal(opened(encoded(image, "jpeg", exif=exif)), opened(encoded(image, "jpeg")))


def test_the_size_of_a_png_is_known_without_its_pixels():
    data = png(30, 20, png_chunk(b"IDAT", b"no pixels"), png_chunk(b"eXIf", turned(6).tobytes()[6:]))
    assert image_size(data, "a", CONFIG) == (30, 20)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_sixteen_bits_are_scaled():
    """0 … 65535 becomes 0 … 255, rounded; Pillow alone would clip at 255."""
    values = np.array([[0, 1, 128, 129, 257, 385, 386, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)[..., None].repeat(3, -1)
    files = {
        "png": encoded(Image.fromarray(values), "png"),
        "tiff": encoded(Image.fromarray(values), "tiff"),
        "big-endian tiff": encoded(Image.fromarray(values.astype(">u2")), "tiff"),
        "pgm": b"P5 12 1 65535\n" + values.astype(">u2").tobytes(),
    }
    assert {image_header(data, "a", CONFIG).mode for data in files.values()} == {"I;16", "I;16B", "I"}
    for data in files.values():
        np.testing.assert_array_equal(opened(data), expected)


def test_integers_and_floats():
    integers = np.array([[-5, 0, 257, 65535, 70000]], np.int32)
    assert opened(encoded(Image.fromarray(integers), "tiff"))[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    floats = np.array([[-5, 0, 0.9, 100.7, 255, 256]], np.float32)
    assert opened(encoded(Image.fromarray(floats), "tiff"))[0, :, 0].tolist() == [0, 0, 0, 100, 255, 255]


def test_transparency_is_dropped_wherever_it_stands():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    for data in (
        encoded(palette, "png", transparency=1),
        encoded(palette, "png", transparency=b"\x10\x20"),
        encoded(palette, "gif", transparency=1),
        encoded(Image.new("RGB", (4, 4), (10, 200, 30)), "png", transparency=(10, 200, 30)),
        encoded(Image.new("RGBA", (4, 4), (10, 200, 30, 0)), "png"),
    ):
        assert opened(data).reshape(-1, 3).tolist() == [[10, 200, 30]] * 16
    for mode, value in (("LA", (77, 0)), ("1", 1), ("L", 255)):
        flat = opened(encoded(Image.new(mode, (4, 4), value), "png"))
        assert set(flat.ravel().tolist()) == {77 if mode == "LA" else 255}


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk(kind):
    """Ink of none is white; Adobe's JPEG files hold it inverted, which Pillow knows and undoes."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), kind)
    assert image_header(data, "a", CONFIG).mode == "CMYK"
    assert (b"Adobe" in data) == (kind == "jpeg")
    assert np.abs(opened(data).astype(int) - [0, 255, 255]).max() <= 2
    white = opened(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), kind))
    assert white.min() >= 253


def test_ycck():
    """The Adobe marker's transform 2 says that the inks were turned into YCC before they were compressed."""
    data = bytearray(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "jpeg"))
    at = data.index(b"Adobe") + 11
    assert data[at] in (0, 2)
    data[at] = 2
    with Image.open(io.BytesIO(data)) as stored:
        reference = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(opened(bytes(data)), reference)


def test_lab():
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), (200, 30, 60)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert np.abs(opened(encoded(lab, "tiff")).astype(int) - [200, 30, 60]).max() <= 3


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.n_frames == 3
    assert np.abs(opened(data).astype(int) - [250, 0, 0]).max() <= 3


# --- what the model takes --------------------------------------------------------------------------------------------


def test_an_image_is_read_in_the_mode_of_the_configuration(tmp_path):
    path = tmp_path / "image.png"
    pixels = noise(50, 40)
    Image.fromarray(pixels).save(path)
    overrides = ["model.vision.image_size=32", "model.vision.patch_size=8", "data.image_grids=[[32, 64], [64, 32]]"]
    read = {mode: load_image(path, load_config(None, [*overrides, f"data.image_mode={mode}"])) for mode in MODE_SHAPES}
    assert {mode: one.tiles.shape for mode, one in read.items()} == MODE_SHAPES
    np.testing.assert_array_equal(read["square"].tiles[0], clip(Image.fromarray(pixels), 32))
    assert len({one.tiles.tobytes() for one in read.values()}) == len(MODE_SHAPES)
    for mode in ("square", "pad", "keep", "squash"):
        assert read[mode].span.slots.tolist() == list(range(16))


MODE_SHAPES = dict.fromkeys(["square", "pad", "keep", "squash"], (1, 32, 32, 3)) | {"anyres": (3, 32, 32, 3)}


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
