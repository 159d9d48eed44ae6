"""Batches against a plain loop over the samples, and what happens to rows that cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from neva_jax.config import load_config
from neva_jax.data.pipeline import ARRAYS, BadRowCount, BadRowReport, SampleMaker, batches
from neva_jax.data.sources import RowRef, Sources
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
