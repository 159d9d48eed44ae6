"""Batches against a plain loop over the samples, and what happens to rows that cannot be used."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from neva_jax.checks import check
from neva_jax.configfile import load_config
from neva_jax.data.images import load_image
from neva_jax.data.pipeline import ARRAYS, BadRowCount, BadRowReport, SampleMaker, batches
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError

SIZE = 8  # train.global_batch of small_overrides
LENGTH = 192
PATCHES = 16
IMAGE_SIZE = 32
DTYPES = {name: np.uint8 if name == "images" else np.float32 if name == "loss_weights" else np.int32 for name in ARRAYS}


@pytest.fixture
def config(small_overrides):
    """Makes the configuration, and the sources of its training rows."""

    def make(*overrides):
        made = load_config(None, [*small_overrides, f"data.max_length={LENGTH}", *overrides])
        return made, Sources(made.data.train, made.run.seed, shuffle=True)

    return make


def conversation(name, *texts, **fields):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **fields}


def write_rows(tmp_path, rows):
    """The override that trains on these rows, and the JSON file; images lie in `tmp_path / "images"`."""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return f"data.train=[{{json: {path}, images: {tmp_path / 'images'}}}]", path


@pytest.fixture
def broken_rows(tmp_path):
    """20 rows; 4 has no image file, 5 an unknown role, 12 a truncated image: (override, path, messages of the bad)."""
    rows = [conversation(f"row-{i}", f"<image>\nNumber {i}?", f"It is {i}.", image=f"{i % 3}.png") for i in range(20)]
    rows[4]["image"] = "absent.png"
    rows[5]["conversations"][1]["from"] = "bot"
    rows[12]["image"] = "half.png"
    override, path = write_rows(tmp_path, rows)
    folder = tmp_path / "images"
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    messages = {
        4: f"{path}: row 4 (id 'row-4'): field image: absent.png is not in {folder}",
        5: f"{path}: row 5 (id 'row-5'): field conversations[1].from must be human or gpt, not 'bot'",
        12: f"{path}: row 12 (id 'row-12'): field image: {folder}/half.png is broken (image file is truncated)",
    }
    return override, path, messages


def rows_of(stream):
    """All rows of a stream, one after another: {name: [N, ...]}."""
    made = list(stream)
    return {name: np.concatenate([batch.arrays[name] for batch in made]) for name in ARRAYS}


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in ARRAYS}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs) == set(ARRAYS)
    for name in ARRAYS:
        assert ours[name].dtype == theirs[name].dtype == DTYPES[name]
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# --- one sample ------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_row_that_the_json_holds(config, tokenizer, llava_data):
    """The text is read back from the tokens, and the pixels come from Hugging Face's processor."""
    settings, sources = config()
    make = SampleMaker(sources, settings, tokenizer)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=False,
        do_normalize=False,
    )
    rows = json.loads(llava_data.json.read_text())
    for number in (0, 3, 12, 23):
        sample, raw = make.make(RowRef(0, number)), rows[number]
        said = [turn["value"] for turn in raw["conversations"]]
        text = tokenizer.decode(sample["tokens"][(sample["segment_ids"] == 1) & (sample["image_slots"] < 0)].tolist())
        assert text.startswith("A chat between a curious user")
        assert f"{said[0].removeprefix('<image>')} ASSISTANT: {said[1]}" in text
        learned = sample["targets"][sample["loss_weights"] > 0].tolist()
        assert learned.count(tokenizer.eos_id) == len(said) // 2
        assert tokenizer.decode(learned) == " ".join(said[1::2])
        assert sample["image_slots"][sample["image_slots"] >= 0].tolist() == list(range(PATCHES))
        with Image.open(llava_data.images / raw["image"]) as image:
            (pixels,) = processor(image)["pixel_values"]
        np.testing.assert_array_equal(sample["images"], np.asarray(pixels).transpose(1, 2, 0)[None])


def test_a_row_without_image_has_zero_pixels_and_no_slots(config, tokenizer):
    settings, sources = config("data.images_per_row=2")
    sample = SampleMaker(sources, settings, tokenizer).make(RowRef(0, 24))
    assert sample["images"].shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert not sample["images"].any()
    assert set(sample["image_slots"].tolist()) == {-1}
    assert tokenizer.decode(sample["targets"][sample["loss_weights"] > 0].tolist()) == "4"


def test_images_of_a_row_keep_their_order(config, tokenizer, tmp_path):
    rows = [
        conversation("two", "<image> or <image>?", "The second", image=["2.png", "0.png"]),
        *(conversation(f"{i}", "<image>", "x", image=f"{i}.png") for i in range(3)),
    ]
    settings, sources = config(write_rows(tmp_path, rows)[0], "data.images_per_row=3")
    two, *single = (SampleMaker(sources, settings, tokenizer).make(RowRef(0, i)) for i in range(4))
    np.testing.assert_array_equal(two["images"][0], single[2]["images"][0])
    np.testing.assert_array_equal(two["images"][1], single[0]["images"][0])
    assert single[0]["images"][0].any()
    assert not two["images"][2].any()
    assert not single[0]["images"][1:].any()
    assert two["image_slots"][two["image_slots"] >= 0].tolist() == list(range(2 * PATCHES))


def test_image_mode_and_template_are_those_of_the_configuration(config, tokenizer, tmp_path):
    override, _ = write_rows(tmp_path, [conversation("a", "<image>\nWhat?", "A red circle.", image="0.png")])
    settings, sources = config(override, "data.image_mode=pad", "data.template=plain")
    sample = SampleMaker(sources, settings, tokenizer).make(RowRef(0, 0))
    # 50 x 40 on a square of the mean colour: the top row is padding alone.
    assert sample["images"][0, 0].tolist() == [[int(255 * mean) for mean in settings.model.vision.image_mean]] * 32
    assert sample["tokens"][: 1 + PATCHES].tolist() == [tokenizer.bos_id] + [0] * PATCHES
    assert tokenizer.decode(sample["targets"][sample["loss_weights"] > 0].tolist()) == "A red circle.\n"


# --- several tiles ---------------------------------------------------------------------------------------------------

ANYRES = ["data.image_mode=anyres", "data.image_grids=[[32, 64], [64, 32], [64, 64]]", "model.projector.newline=true"]


def sizes_on_disk(tmp_path, sizes):
    for i, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"size-{i}.png")


def test_images_of_mixed_sizes_in_one_row_take_the_tiles_one_after_another(config, tokenizer, tmp_path):
    """Tiles and slots are those of each image alone, moved up by the tiles before it."""
    sizes = [(30, 60), (64, 64), (100, 20), (200, 200)]
    names = [f"size-{i}.png" for i in range(4)]
    rows = [conversation("a", "<image> and <image>, <image> or <image>?", "No", image=names)]
    override, _ = write_rows(tmp_path, rows)
    sizes_on_disk(tmp_path, sizes)
    settings, sources = config(override, *ANYRES, "data.images_per_row=4", "data.max_length=512")
    sample = SampleMaker(sources, settings, tokenizer).make(RowRef(0, 0))
    alone = [load_image(tmp_path / "images" / name, settings) for name in names]
    assert [len(one.tiles) for one in alone] == [3, 5, 3, 5]
    assert sample["images"].shape == (4 * 5, IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_array_equal(sample["images"][:16], np.concatenate([one.tiles for one in alone]))
    assert not sample["images"][16:].any()
    slots = sample["image_slots"]
    expected = []
    for one, before in zip(alone, (0, 3, 8, 11), strict=True):
        expected += [slot if slot == -2 else slot + before * PATCHES for slot in one.span.slots.tolist()]
    assert slots[slots != -1].tolist() == expected
    assert -2 in expected
    starts = [slots.tolist().index(before * PATCHES) for before in (0, 3, 8, 11)]
    between = [sample["tokens"][a:b][slots[a:b] == -1].tolist() for a, b in pairwise(starts)]
    assert [tokenizer.decode(ids).strip() for ids in between] == ["and", ",", "or"]
    assert not sample["tokens"][slots != -1].any()
    assert not sample["loss_weights"][: slots.tolist().index(-1, starts[-1]) - 1].any()


def test_rows_of_any_size_make_batches_of_one_shape(config, tokenizer, tmp_path):
    rows = [conversation(f"{i}", "<image>\nWhat?", "A cat.", image=f"size-{i}.png") for i in range(6)]
    rows.append(conversation("text", "Hi", "Hello"))
    override, _ = write_rows(tmp_path, rows)
    sizes_on_disk(tmp_path, [(1, 1), (3, 200), (200, 3), (64, 63), (31, 90), (500, 499)])
    settings, sources = config(override, *ANYRES, "data.max_length=256")
    for batch in batches(sources, settings, tokenizer, 0, 16):
        assert batch.bad_rows == []
        assert batch.arrays["images"].shape == (SIZE, 5, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert batch.arrays["image_slots"].shape == (SIZE, 256)
        assert batch.arrays["image_slots"].max() < 5 * PATCHES
        assert batch.arrays["image_slots"].min() == -2


def test_too_many_tokens_count_newlines_as_of_the_image(config, tokenizer, tmp_path):
    override, path = write_rows(tmp_path, [conversation("x", "<image>", "x", image="size-0.png")])
    sizes_on_disk(tmp_path, [(64, 64)])
    settings, sources = config(override, *ANYRES, "data.max_length=100")
    (report,) = SampleMaker(sources, settings, tokenizer)(0)["bad_rows"]
    assert report.message.startswith(f"{path}: row 0 (id 'x'): has ")
    assert report.message.endswith(f"tokens ({16 + 8 * 9} of images), but data.max_length is 100")


def test_start_and_end_tokens_come_from_the_tokenizer(config, tokenizer):
    grown = Tokenizer(add_tokens(tokenizer.serialized, ["<extra_id_4>", "<extra_id_5>"], True, "x")[0])
    settings, sources = config("data.image_start=<extra_id_4>", "data.image_end=<extra_id_5>")
    sample = SampleMaker(sources, settings, grown).make(RowRef(0, 0))
    (first,) = np.flatnonzero(sample["image_slots"] == 0)
    assert sample["tokens"][first - 1 : first + PATCHES + 1].tolist() == [400] + [0] * PATCHES + [401]
    assert sample["image_slots"][[first - 1, first + PATCHES]].tolist() == [-1, -1]
    assert not sample["loss_weights"][: first + PATCHES + 1].any()
    with pytest.raises(UserError, match=r"^data\.image_start=<extra_id_4>: the tokenizer has no such token"):
        next(batches(sources, settings, tokenizer, 0, 1))


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def video_rows(tmp_path):
    """Rows with a video of 5 frames and one of 2, an image and no picture: the override and the JSON file."""
    rows = [
        conversation("five", "Before <video> after", "It moves.", video="five"),
        conversation("two", "<video>\nWhat?", "It stops.", video="clips/two"),
        conversation("image", "<image>\nWhat?", "A cat.", image="0.png"),
        conversation("text", "Hi", "Hello"),
    ]
    override, path = write_rows(tmp_path, rows)
    for name, count in (("five", 5), ("clips/two", 2)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(10 * count + i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"frame-{i}.png")
    return override, path


def frame(tmp_path, settings, name, i):
    (tile,) = load_image(tmp_path / "images" / name / f"frame-{i}.png", settings, frame=True).tiles
    return tile


@pytest.mark.parametrize("mode", [["data.image_mode=square"], ANYRES], ids=["square", "anyres"])
@pytest.mark.parametrize(
    ("overrides", "five", "two"),
    [
        (["data.video_frames=3"], [0, 2, 4], [0, 1, 1]),
        (["data.video_frames=1"], [0], [0]),
        (["data.video_frames=6"], [0, 1, 2, 3, 4, 4], [0, 1, 1, 1, 1, 1]),
        (["data.video_frames=3", "data.splice_single_frame=first"], [0], [0]),
        (["data.video_frames=3", "data.splice_single_frame=middle"], [2], [1]),
        (["data.video_frames=3", "data.splice_single_frame=last"], [4], [1]),
    ],
)
def test_the_frames_of_a_video_stand_where_its_mark_stands(
    config, tokenizer, tmp_path, video_rows, overrides, five, two, mode
):
    settings, sources = config(video_rows[0], *overrides, *mode, "data.max_length=256")
    make = SampleMaker(sources, settings, tokenizer).make
    tiles = max(len(five), 5 if mode is ANYRES else 1)
    for number, name, chosen, before in ((0, "five", five, "USER: Before"), (1, "clips/two", two, "USER:")):
        sample = make(RowRef(0, number))
        assert sample["images"].shape == (tiles, IMAGE_SIZE, IMAGE_SIZE, 3)
        for k, i in enumerate(chosen):
            np.testing.assert_array_equal(sample["images"][k], frame(tmp_path, settings, name, i))
        assert not sample["images"][len(chosen) :].any()
        first = sample["image_slots"].tolist().index(0)
        end = first + len(chosen) * PATCHES
        assert sample["image_slots"][first:end].tolist() == list(range(len(chosen) * PATCHES))
        assert set(sample["image_slots"][:first].tolist()) | set(sample["image_slots"][end:].tolist()) == {-1}
        assert tokenizer.decode(sample["tokens"][:first].tolist()).rstrip().endswith(before)
    assert set(make(RowRef(0, 3))["image_slots"].tolist()) == {-1}
    assert make(RowRef(0, 2))["images"].any()


def test_a_batch_has_videos_images_and_text_in_one_shape(config, tokenizer, video_rows):
    settings, sources = config(video_rows[0], "data.video_frames=3")
    (batch,) = batches(sources, settings, tokenizer, 0, SIZE)
    assert batch.bad_rows == []
    assert batch.arrays["images"].shape == (SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert sorted((row >= 0).sum() // PATCHES for row in batch.arrays["image_slots"]) == [0, 0, 1, 1, 3, 3, 3, 3]


def test_each_frame_stands_between_its_own_tokens(config, tokenizer, video_rows):
    grown = Tokenizer(add_tokens(tokenizer.serialized, ["<s4>", "<s5>"], True, "x")[0])
    settings, sources = config(video_rows[0], "data.video_frames=2", "data.image_start=<s4>", "data.image_end=<s5>")
    sample = SampleMaker(sources, settings, grown).make(RowRef(0, 1))
    first = sample["image_slots"].tolist().index(0) - 1
    assert sample["tokens"][first : first + 36].tolist() == ([400] + [0] * PATCHES + [401]) * 2


@pytest.mark.parametrize(
    ("overrides", "row", "message"),
    [
        (
            [],
            conversation("x", "<video>", "x", video="five"),
            "has a field video, but data.video_frames is 0; set the number of frames to take of a video",
        ),
        (
            ["data.video_frames=2"],
            conversation("x", "<video>", "x"),
            "field conversations has 1 <video> marks in human turns, but no field video",
        ),
        (["data.video_frames=2"], conversation("x", "<video>", "x", video="no"), "field video: no is not in {folder}"),
        (
            ["data.video_frames=2"],
            conversation("x", "<video>", "x", video="five"),
            "field video: {folder}/five/frame-4.png is no image that can be read",
        ),
    ],
    ids=["videos are off", "no field", "absent", "broken frame"],
)
def test_videos_that_make_a_row_bad(config, tokenizer, tmp_path, video_rows, overrides, row, message):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    folder = tmp_path / "images"
    (folder / "five" / "frame-4.png").write_text("text")
    settings, sources = config(f"data.train=[{{json: {path}, images: {folder}}}]", *overrides)
    (report,) = SampleMaker(sources, settings, tokenizer)(0)["bad_rows"]
    assert report.message == f"{path}: row 0 (id 'x'): {message.format(folder=folder)}"


def test_the_word_video_is_text_where_there_are_no_videos(config, tokenizer, tmp_path):
    override, _ = write_rows(tmp_path, [conversation("x", "What is <video> in HTML?", "A tag.")])
    settings, sources = config(override)
    sample = SampleMaker(sources, settings, tokenizer).make(RowRef(0, 0))
    assert "USER: What is <video> in HTML?" in tokenizer.decode(sample["tokens"].tolist())


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.video_frames=-1"], "data.video_frames=-1 must not be negative"),
        (
            ["data.splice_single_frame=last"],
            "data.splice_single_frame=last has no effect with data.video_frames=0, which refuses videos; set "
            "data.video_frames=1",
        ),
        (
            ["data.video_frames=12"],
            "data.max_length=192 leaves no room for text: 12 frames of a video (data.video_frames) take 192 tokens",
        ),
        (
            ["data.image_mode=anyres", "data.image_grids=[]"],
            "data.image_grids=[] is empty; data.image_mode=anyres needs at least one [height, width]",
        ),
        *(
            (
                ["data.image_mode=anyres", f"data.image_grids=[[32, 64], {grid}]"],
                f"data.image_grids[1]={grid} must be [height, width], both multiples of model.vision.image_size=32",
            )
            for grid in ("[32]", "[32, 32, 32]", "[]", "[0, 32]", "[-32, 32]", "[32, 48]", "[16, 32]")
        ),
    ],
)
def test_a_contradiction_about_pictures_is_refused(config, overrides, message):
    with pytest.raises(UserError) as error:
        check(config(*overrides)[0])
    assert str(error.value) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ANYRES,
        ["data.image_grids=[[1, 1]]"],
        ["data.video_frames=11"],
        ["data.video_frames=99", "data.splice_single_frame=first"],
    ],
)
def test_what_is_no_contradiction(config, overrides):
    check(config(*overrides)[0])


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_the_samples_of_a_plain_loop(config, tokenizer):
    """Three epochs of 25 rows: batches reach across the ends of epochs."""
    settings, sources = config()
    make = SampleMaker(sources, settings, tokenizer)
    count = 0
    for number, batch in enumerate(batches(sources, settings, tokenizer, 0, 72)):
        assert_same(batch.arrays, stacked([make(i) for i in range(number * SIZE, (number + 1) * SIZE)]))
        assert batch.bad_rows == []
        count += 1
    assert count == 9
    assert batch.arrays["images"].shape == (SIZE, 1, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert all(batch.arrays[name].shape == (SIZE, LENGTH) for name in ARRAYS if name != "images")


def test_worker_processes_change_no_bit(config, tokenizer):
    settings, sources = config()
    threads = list(batches(sources, settings, tokenizer, 0, 56))
    with_workers, _ = config("data.workers=2")
    workers = list(batches(sources, with_workers, tokenizer, 0, 56))
    assert len(threads) == len(workers) == 7
    for one, other in zip(threads, workers, strict=True):
        assert_same(one.arrays, other.arrays)
    assert len({batch.arrays["tokens"].tobytes() for batch in threads}) == 7


@pytest.mark.parametrize("first", [0, 8, 5, 24, 25, 41])
def test_a_stream_that_starts_later_is_the_tail_of_the_whole(config, tokenizer, first):
    settings, sources = config()
    whole = rows_of(batches(sources, settings, tokenizer, 0, 72))
    tail = rows_of(batches(sources, settings, tokenizer, first, 24))
    assert_same(tail, {name: values[first : first + 24] for name, values in whole.items()})


@pytest.mark.parametrize(("samples", "count"), [(0, 0), (1, 1), (8, 1), (9, 2), (23, 3)])
def test_the_last_batch_is_filled_up_with_what_comes_next(config, tokenizer, samples, count):
    settings, sources = config()
    made = list(batches(sources, settings, tokenizer, 0, samples))
    assert len(made) == count
    make = SampleMaker(sources, settings, tokenizer)
    if made:
        assert_same(rows_of(made), stacked([make(i) for i in range(count * SIZE)]))


def test_the_seed_changes_the_stream(config, tokenizer):
    streams = []
    for seed in (0, 1):
        settings, sources = config(f"run.seed={seed}")
        streams.append(rows_of(batches(sources, settings, tokenizer, 0, 25))["tokens"].tobytes())
    assert streams[0] != streams[1]


# --- bad rows --------------------------------------------------------------------------------------------------------


def test_with_error_the_first_bad_row_stops_the_run(config, tokenizer, broken_rows):
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=error")
    count = BadRowCount(sources, "error", 1.0)
    order = [sources.order(i).row for i in range(20)]
    first = next(row for row in order if row in messages)
    good = order.index(first) // SIZE
    stream = batches(sources, settings, tokenizer, 0, 24)
    for _ in range(good):
        assert count.add(next(stream)) == []
    batch = next(stream)
    assert batch.arrays == {}
    with pytest.raises(UserError) as error:
        count.add(batch)
    assert str(error.value) == f"{messages[first]}; mend the row, or set data.on_bad_row=skip"


@pytest.mark.parametrize("bad", [4, 5, 12])
def test_the_message_names_file_row_id_and_field(config, tokenizer, broken_rows, bad):
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=error")
    (index,) = [i for i in range(20) if sources.order(i).row == bad]
    sample = SampleMaker(sources, settings, tokenizer)(index)
    assert sample == {"bad_rows": [BadRowReport(RowRef(0, bad), messages[bad])]}


def test_with_skip_the_next_good_row_stands_in(config, tokenizer, broken_rows):
    """Brute force: row 4 becomes 6, 5 becomes 6, 12 becomes 13, in every epoch."""
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=skip")
    make = SampleMaker(sources, settings, tokenizer)
    stand_in = {4: 6, 5: 6, 12: 13}
    made = list(batches(sources, settings, tokenizer, 0, 40))
    order = [sources.order(i).row for i in range(40)]
    assert_same(rows_of(made), stacked([make.make(RowRef(0, stand_in.get(row, row))) for row in order]))
    met = [report.ref.row for batch in made for report in batch.bad_rows]
    assert met == [bad for row in order for bad in {4: [4, 5], 5: [5], 12: [12]}.get(row, [])]
    assert {report.message for batch in made for report in batch.bad_rows} == set(messages.values())


def test_after_the_last_row_the_first_stands_in(config, tokenizer, tmp_path):
    rows = [conversation(f"{i}", "Hi", f"It is {i}.") for i in range(5)]
    rows[4]["image"] = "0.png"
    settings, sources = config(write_rows(tmp_path, rows)[0], "data.on_bad_row=skip")
    make = SampleMaker(sources, settings, tokenizer)
    (index,) = [i for i in range(5) if sources.order(i).row == 4]
    np.testing.assert_array_equal(make(index)["tokens"], make.make(RowRef(0, 0))["tokens"])


def test_worker_processes_report_the_same_bad_rows(config, tokenizer, broken_rows):
    override, _, _ = broken_rows
    settings, sources = config(override, "data.on_bad_row=skip")
    threads = list(batches(sources, settings, tokenizer, 0, 40))
    with_workers, _ = config(override, "data.on_bad_row=skip", "data.workers=2")
    workers = list(batches(sources, with_workers, tokenizer, 0, 40))
    assert any(batch.bad_rows for batch in threads)
    for one, other in zip(threads, workers, strict=True):
        assert_same(one.arrays, other.arrays)
        assert one.bad_rows == other.bad_rows


def test_a_bad_row_is_counted_once(config, tokenizer, broken_rows):
    """Row 5 is met in its own place and in place of 4, and all of them again in the second epoch."""
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=skip")
    count = BadRowCount(sources, "skip", 3 / 20)
    made = list(batches(sources, settings, tokenizer, 0, 40))
    assert sum(len(batch.bad_rows) for batch in made) == 8
    new = [message for batch in made for message in count.add(batch)]
    assert sorted(new) == sorted(messages.values())
    assert sorted(count.messages) == sorted(messages.values())
    resumed = BadRowCount(sources, "skip", 3 / 20, known=list(count.messages))
    assert [message for batch in made for message in resumed.add(batch)] == []


@pytest.mark.parametrize(("fraction", "stops_at"), [(0.0, 1), (0.09, 2), (0.1, 3), (0.149, 3), (0.15, None)])
def test_more_bad_rows_than_the_bound_stop_the_run(config, tokenizer, broken_rows, fraction, stops_at):
    """Batches of one row, so that the bad ones are met one by one."""
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=skip", "train.global_batch=1", "train.micro_batch=1")
    index = {sources.order(i).row: i for i in range(20)}
    order = (12, 5, 4)  # 4 comes with 5, so it is last
    made = [next(batches(sources, settings, tokenizer, index[row], 1)) for row in order]
    count = BadRowCount(sources, "skip", fraction)
    if stops_at is None:
        for batch in made:
            count.add(batch)
        return
    for batch in made[: stops_at - 1]:
        assert len(count.add(batch)) == 1
    with pytest.raises(UserError) as error:
        count.add(made[stops_at - 1])
    assert str(error.value) == (
        f"{stops_at} of 20 rows are bad, more than data.max_bad_fraction={fraction}; "
        f"the last: {messages[order[stops_at - 1]]}"
    )


def test_a_source_without_any_good_row(config, tokenizer, tmp_path):
    rows = [conversation(f"{i}", "<image>", "x", image=f"absent-{i}.png") for i in range(3)]
    override, path = write_rows(tmp_path, rows)
    settings, sources = config(override, "data.on_bad_row=skip")
    (batch,) = batches(sources, settings, tokenizer, 0, SIZE)
    with pytest.raises(UserError) as error:
        BadRowCount(sources, "skip", 0.5).add(batch)
    assert str(error.value).startswith("3 of 3 rows are bad, more than data.max_bad_fraction=0.5; the last: ")
    with pytest.raises(UserError) as error:
        BadRowCount(sources, "skip", 1.0).add(batch)
    assert str(error.value).startswith(f"no good row within 100 rows of {path}: row ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            conversation("x", "<image><image>", "x", image=["0.png", "1.png"]),
            "field image has 2 images, but data.images_per_row is 1",
        ),
        (conversation("x", "<image>", "y" * 500, image="0.png"), r"has \d+ tokens \(16 of images\), but .* is 192"),
        (conversation("x", "<image>", "x", image="../bad.json"), r"field image: \.\./bad\.json leads out of .*/images"),
        (
            conversation("x", "<image>", "x", image="text.png"),
            r"field image: .*/text\.png is no image that can be read",
        ),
    ],
    ids=["too many images", "too long", "outside", "no image"],
)
def test_other_reasons_that_make_a_row_bad(config, tokenizer, tmp_path, row, message):
    override, path = write_rows(tmp_path, [row])
    (tmp_path / "images" / "text.png").write_text("text")
    settings, sources = config(override, "data.on_bad_row=error")
    (batch,) = batches(sources, settings, tokenizer, 0, 1)
    with pytest.raises(UserError, match=rf"^{path}: row 0 \(id 'x'\): {message}; mend the row, or set "):
        BadRowCount(sources, "error", 1.0).add(batch)


def test_an_image_without_a_folder_is_a_bad_row(config, tokenizer, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([conversation("x", "<image>", "x", image="a.png"), conversation("y", "Hi", "x")]))
    settings, sources = config(f"data.train=[{{json: {path}}}]")
    make = SampleMaker(sources, settings, tokenizer)
    samples = {sources.order(i).row: make(i) for i in range(2)}
    assert [report.message for report in samples[0]["bad_rows"]] == [
        f"{path}: row 0 (id 'x'): field image names a.png, but its source has no images folder"
    ]
    assert samples[1]["bad_rows"] == []
    assert set(samples[1]) == {*ARRAYS, "bad_rows"}


def test_a_long_row_is_cut_dropped_or_bad(config, tmp_path, tokenizer):
    rows = [conversation("long", "<image>\nWhat?", "It is red. " * 60, image="0.png")]
    override, _ = write_rows(tmp_path, rows)
    made, sources = config(override, "data.on_long_row=truncate_text")
    row = SampleMaker(sources, made, tokenizer).make(RowRef(0, 0))
    assert row["segment_ids"].all()
    assert row["loss_weights"][-1] == 1
    for policy, kind in (("drop", DroppedRow), ("error", BadRow)):
        made, sources = config(override, f"data.on_long_row={policy}")
        with pytest.raises(BadRow, match=r"^has \d+ tokens \(16 of images\), but data.max_length is 192$") as error:
            SampleMaker(sources, made, tokenizer).make(RowRef(0, 0))
        assert type(error.value) is kind
