"""Pixels and slots against Hugging Face's processors and model code, and a brute-force padding."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil, LlavaNextProcessor, SiglipImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from neva_jax.configfile import load_config
from neva_jax.data.tiles import (
    NEWLINE,
    best_grid,
    cut,
    fit,
    frames_per_video,
    image_span,
    picture,
    tiles_per_image,
    tiles_per_row,
)
from tests.data.helpers import clip, noise

try:
    import torch
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="Hugging Face's model code needs PyTorch")
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


# LLaVA-NeXT's grids, in tiles; and others, with one of a single tile, and two of one area.
GRIDS = {"next": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], "other": [(1, 1), (4, 1), (1, 4), (2, 2), (2, 3), (3, 2)]}
ANYRES_SIZES = [*SIZES, (1, 300), (300, 1), (1, 5000), (2000, 1), (672, 672), (336, 672), (1008, 337), (1009, 336)]


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


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pad_gives_the_pixels_of_llava(size):
    """Hugging Face's colour is rounded, LLaVA's own and ours is cut off: the mean here is the same either way."""
    mean = (100 / 255, 50 / 255, 200 / 255)
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=mean,
        do_pad=True,
        do_rescale=False,
        do_normalize=False,
    )
    image = Image.fromarray(noise(*size))
    (pixels,) = processor(image)["pixel_values"]
    exact = tuple(m + 1e-6 for m in mean)
    np.testing.assert_array_equal(fit(image, 32, "pad", exact), np.asarray(pixels).transpose(1, 2, 0))


@pytest.mark.parametrize("side", [32, 384])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_squash_gives_the_pixels_of_siglip(size, side):
    processor = SiglipImageProcessorPil(size={"height": side, "width": side}, do_rescale=False, do_normalize=False)
    image = Image.fromarray(noise(*size))
    (pixels,) = processor(image)["pixel_values"]
    np.testing.assert_array_equal(fit(image, side, "squash", MEAN), np.asarray(pixels).transpose(1, 2, 0))


@pytest.mark.parametrize("side", [32, 35, 224])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_keep_shows_the_whole_image_on_the_mean_colour(size, side):
    image = Image.fromarray(noise(*size))
    longer = max(size)
    width, height = (max(math.floor(side * one / longer), 1) for one in size)
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = [math.floor(255 * m) for m in MEAN]
    left, top = (side - width) // 2, (side - height) // 2
    expected[top : top + height, left : left + width] = image.resize((width, height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fit(image, side, "keep", MEAN), expected)
    assert max(width, height) == side


def test_keep_of_a_square_is_square():
    image = Image.fromarray(noise(50, 50))
    np.testing.assert_array_equal(fit(image, 32, "keep", MEAN), fit(image, 32, "square", MEAN))


# --- anyres: pixels --------------------------------------------------------------------------------------------------


def grids_of(name, side):
    return [[rows * side, columns * side] for rows, columns in GRIDS[name]]


def next_processor(side, grids):
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=grids,
        do_rescale=False,
        do_normalize=False,
    )


@pytest.mark.parametrize(("name", "side"), [("next", 336), ("next", 35), ("other", 48)])
@pytest.mark.parametrize("size", ANYRES_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_anyres_gives_the_pixels_of_llava_next(size, name, side):
    image, grids = Image.fromarray(noise(*size)), grids_of(name, side)
    result = next_processor(side, grids)(image)
    assert tuple(result["image_sizes"][0]) == size[::-1]
    ours = cut(image, side, grids)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, np.asarray(result["pixel_values"][0]).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", GRIDS)
def test_the_best_grid_is_that_of_hugging_face(name):
    rng = np.random.default_rng(0)
    grids = grids_of(name, 336)
    for width, height in [*ANYRES_SIZES, *rng.integers(1, 2000, (2000, 2)).tolist()]:
        assert best_grid(width, height, grids) == tuple(select_best_resolution((height, width), grids))
        assert best_grid(width, height, grids[::-1]) == tuple(select_best_resolution((height, width), grids[::-1]))


# --- anyres: slots ---------------------------------------------------------------------------------------------------


def settings(*overrides, side=336, patch=14, name="next"):
    """A configuration with anyres and the newline, unless the overrides say otherwise."""
    return load_config(
        None,
        [
            f"model.vision.image_size={side}",
            f"model.vision.patch_size={patch}",
            f"data.image_grids={grids_of(name, side)}",
            "data.image_mode=anyres",
            "model.projector.newline=true",
            *overrides,
        ],
    )


def packed_by_hugging_face(width, height, side, patch, grids, newline=True):
    """HF's own packing of features that are their slots: what the model would read, in order."""
    vision = SimpleNamespace(image_size=side, patch_size=patch)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=grids))
    tiles, tokens = image_size_to_num_patches((height, width), grids, side), (side // patch) ** 2
    features = torch.arange(tiles * tokens).view(tiles, tokens, 1)
    marker = torch.tensor([NEWLINE]) if newline else None
    ((packed,), (length,)) = LlavaNextModel.pack_image_features(
        model, [features], torch.tensor([[height, width]]), "default", image_newline=marker
    )
    assert len(packed) == length
    return packed[:, 0].tolist(), tiles * tokens


def counted_by_hugging_face(width, height, side, patch, grids):
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=grids)
    processor.patch_size, processor.num_additional_image_tokens = patch, 0
    return processor._get_number_of_features(height, width, side, side)


def random_sizes(count):
    rng = np.random.default_rng(1)
    return [(int(w), int(h)) for w, h in np.exp(rng.uniform(0, 8, (count, 2)))]


LAYOUTS = [
    (336, 14, "next", [*ANYRES_SIZES, *random_sizes(40)]),
    (336, 14, "other", ANYRES_SIZES),
    (28, 4, "next", [*ANYRES_SIZES, *random_sizes(400)]),
    (20, 4, "other", [*ANYRES_SIZES, *random_sizes(400)]),
    (14, 14, "other", [*ANYRES_SIZES, *random_sizes(400)]),
]


@pytest.mark.parametrize(("side", "patch", "name", "sizes"), LAYOUTS)
def test_there_are_as_many_slots_as_llava_next_counts(side, patch, name, sizes):
    config, grids = settings(side=side, patch=patch, name=name), grids_of(name, side)
    for width, height in sizes:
        slots = image_span(width, height, config).slots
        assert len(slots) == counted_by_hugging_face(width, height, side, patch, grids), (width, height)


@needs_torch
@pytest.mark.parametrize(("side", "patch", "name", "sizes"), LAYOUTS)
def test_slots_are_the_features_that_llava_next_packs(side, patch, name, sizes):
    config, grids = settings(side=side, patch=patch, name=name), grids_of(name, side)
    bare = settings("model.projector.newline=false", side=side, patch=patch, name=name)
    for width, height in sizes:
        span = image_span(width, height, config)
        slots, features = packed_by_hugging_face(width, height, side, patch, grids)
        assert span.slots.dtype == np.int32
        assert (span.slots.tolist(), span.features) == (slots, features), (width, height)
        without, _ = packed_by_hugging_face(width, height, side, patch, grids, newline=False)
        assert image_span(width, height, bare).slots.tolist() == without == [s for s in slots if s != NEWLINE]


def test_the_example_of_the_drawing():
    config = settings("data.image_grids=[[8, 8]]", side=4, patch=2)
    span = image_span(20, 40, config)
    assert span.slots.tolist() == [0, 1, 2, 3, 5, 8, -2, 7, 10, -2, 13, 16, -2, 15, 18, -2]
    assert span.features == 20


def test_a_whole_grid_has_a_newline_after_each_row():
    """LLaVA-NeXT's largest: 672 x 672 at 336 px, 24 x 24 features a tile."""
    slots = image_span(700, 700, settings()).slots
    assert len(slots) == 576 + 48 * 49 == 2928
    assert (np.flatnonzero(slots == NEWLINE) == 576 + 49 * np.arange(48) + 48).all()
    assert sorted(slots[slots >= 0].tolist()) == list(range(5 * 576))


def test_an_image_too_thin_for_a_row_of_features_keeps_its_first_tile():
    span = image_span(5000, 1, settings())
    assert span.slots.tolist() == list(range(576))
    assert span.features == 3 * 576


@needs_torch
def test_with_mlp_downsample_a_tile_has_a_quarter_of_the_features():
    """As for patches of twice the side; 5 x 5 patches are padded to 3 x 3 pairs."""
    for side, patch, coarse in ((32, 4, 8), (20, 4, 20 // 3)):
        config = settings("model.projector.kind=mlp_downsample", side=side, patch=patch)
        for width, height in random_sizes(50):
            slots, features = packed_by_hugging_face(width, height, side, coarse, grids_of("next", side))
            span = image_span(width, height, config)
            assert (span.slots.tolist(), span.features) == (slots, features)


def test_a_class_token_stands_first_in_the_whole_image_and_not_in_the_crops():
    config = settings("model.vision.select_feature=cls_patch", "data.image_grids=[[4, 8]]", side=4, patch=2)
    assert image_span(20, 10, config).slots.tolist() == [0, 1, 2, 3, 4, 6, 7, 11, 12, -2, 8, 9, 13, 14, -2]
    one = settings("model.vision.select_feature=cls_patch", "data.image_mode=square", side=4, patch=2)
    assert image_span(20, 10, one).slots.tolist() == [0, 1, 2, 3, 4]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 40), (30, 90), (200, 41)])
def test_a_picture_has_a_tile_for_each_slot(size):
    config = settings(side=28, patch=7)
    image = Image.fromarray(noise(*size))
    made = picture(image, config)
    np.testing.assert_array_equal(made.tiles, cut(image, 28, config.data.image_grids))
    assert made.span.features == 16 * len(made.tiles)
    assert made.span.slots.tolist() == image_span(*size, config).slots.tolist()


@pytest.mark.parametrize("mode", ["square", "pad", "keep", "squash"])
def test_a_picture_of_one_tile(mode):
    config = settings(f"data.image_mode={mode}", side=28, patch=7)
    image = Image.fromarray(noise(50, 40))
    made = picture(image, config)
    np.testing.assert_array_equal(made.tiles, fit(image, 28, mode, config.model.vision.image_mean)[None])
    assert (made.span.slots.tolist(), made.span.features) == (list(range(16)), 16)
    assert image_span(50, 40, config).slots.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("mode", "fitted"), [(mode, mode) for mode in ("square", "pad", "keep", "squash")] + [("anyres", "square")]
)
def test_a_frame_of_a_video_is_one_tile(mode, fitted):
    config = settings(f"data.image_mode={mode}", side=28, patch=7)
    image = Image.fromarray(noise(50, 40))
    made = picture(image, config, frame=True)
    np.testing.assert_array_equal(made.tiles, fit(image, 28, fitted, config.model.vision.image_mean)[None])
    assert (made.span.slots.tolist(), made.span.features) == (list(range(16)), 16)


@pytest.mark.parametrize(
    ("overrides", "image", "frames", "row"),
    [
        (["data.image_mode=square", "data.images_per_row=3"], 1, 0, 3),
        (["data.image_mode=pad", "data.images_per_row=3", "data.video_frames=8"], 1, 8, 8),
        (["data.images_per_row=2"], 5, 0, 10),
        (["data.images_per_row=1", "data.video_frames=4"], 5, 4, 5),
        (["data.image_grids=[[336, 336]]", "data.video_frames=4"], 2, 4, 4),
        (["data.image_mode=square", "data.video_frames=4", "data.splice_single_frame=middle"], 1, 1, 1),
    ],
)
def test_the_bound_on_tiles(overrides, image, frames, row):
    config = settings(*overrides)
    assert (tiles_per_image(config), frames_per_video(config.data), tiles_per_row(config)) == (image, frames, row)
