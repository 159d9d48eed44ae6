"""Rows that cannot be used: what stands in for them, what is said, and when the run stops."""

import json

import numpy as np
import pytest

from neva_jax.data.bad_rows import BadRowCount
from neva_jax.data.pipeline import ARRAYS, SampleMaker, batches
from neva_jax.data.sources import RowRef
from neva_jax.errors import UserError
from tests.data.rows import SIZE, assert_same, conversation, rows_of, stacked, write_rows


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
