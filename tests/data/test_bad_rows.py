"""Rows that cannot be used: what stands in for them, what is said, and when the run stops."""

import json
from dataclasses import replace

import numpy as np
import pytest

from neva_jax.data.bad_rows import BadRowCount, BadRowReport
from neva_jax.data.pipeline import ARRAYS, SampleMaker, batches
from neva_jax.data.rows import DroppedRow
from neva_jax.data.samples import Samples
from neva_jax.data.sources import RowRef
from neva_jax.errors import UserError
from tests.data.rows import SIZE, assert_same, conversation, rows_of, stacked, write_rows


def counter(sources, settings, known=(), **data):
    return BadRowCount(sources, replace(settings.data, **data), "train", known)


def take(count, batch):
    """As the training loop does: the messages of the new rows."""
    new = [one.message for one in count.add(batch.bad_rows)]
    count.check(batch.bad_rows, complete=bool(batch.arrays))
    return new


def test_with_error_the_first_bad_row_stops_the_run(config, tokenizer, broken_rows):
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=error")
    count = counter(sources, settings, on_bad_row="error", max_bad_fraction=1.0)
    order = [sources.order(i).row for i in range(20)]
    first = next(row for row in order if row in messages)
    good = order.index(first) // SIZE
    stream = batches(sources, settings, tokenizer, 0, 24)
    for _ in range(good):
        assert take(count, next(stream)) == []
    batch = next(stream)
    assert batch.arrays == {}
    with pytest.raises(UserError) as error:
        take(count, batch)
    assert str(error.value) == f"{messages[first]}; mend the row, or set data.on_bad_row=skip"


@pytest.mark.parametrize("bad", [4, 5, 12])
def test_the_message_names_file_row_id_and_field(config, tokenizer, broken_rows, bad):
    override, path, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=error")
    (index,) = [i for i in range(20) if sources.order(i).row == bad]
    sample = SampleMaker(sources, settings, tokenizer)(index)
    (report,) = sample.pop("bad_rows")
    assert sample == {"consumed": index + 1, "refs": []}
    assert report.message == messages[bad]
    where, reason = f"{path}: row {bad} (id 'row-{bad}')", messages[bad].split("): ", 1)[1]
    assert report == BadRowReport(RowRef(0, bad), index, "bad", f"row-{bad}", where, reason)


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
    count = counter(sources, settings, max_bad_fraction=3 / 20)
    made = list(batches(sources, settings, tokenizer, 0, 40))
    assert sum(len(batch.bad_rows) for batch in made) == 8
    new = [message for batch in made for message in take(count, batch)]
    assert sorted(new) == sorted(messages.values())
    assert count.counts == {"bad": 3}
    records = [count.record(one, 7) for batch in made for one in batch.bad_rows]
    resumed = counter(sources, settings, records)
    assert resumed.counts == {"bad": 3}
    assert [message for batch in made for message in take(resumed, batch)] == []
    other = BadRowCount(sources, settings.data, "val", records)
    assert other.counts == {}


@pytest.mark.parametrize(("fraction", "stops_at"), [(0.0, 1), (0.09, 2), (0.1, 3), (0.149, 3), (0.15, None)])
def test_more_bad_rows_than_the_bound_stop_the_run(config, tokenizer, broken_rows, fraction, stops_at):
    """Batches of one row, so that the bad ones are met one by one."""
    override, _, messages = broken_rows
    settings, sources = config(override, "data.on_bad_row=skip", "train.global_batch=1", "train.micro_batch=1")
    index = {sources.order(i).row: i for i in range(20)}
    order = (12, 5, 4)  # 4 comes with 5, so it is last
    made = [next(batches(sources, settings, tokenizer, index[row], 1)) for row in order]
    count = counter(sources, settings, max_bad_fraction=fraction)
    if stops_at is None:
        for batch in made:
            take(count, batch)
        return
    for batch in made[: stops_at - 1]:
        assert len(take(count, batch)) == 1
    with pytest.raises(UserError) as error:
        take(count, made[stops_at - 1])
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
        take(counter(sources, settings, max_bad_fraction=0.5), batch)
    assert str(error.value).startswith("3 of 3 rows are bad, more than data.max_bad_fraction=0.5; the last: ")
    with pytest.raises(UserError) as error:
        take(counter(sources, settings, max_bad_fraction=1.0), batch)
    assert str(error.value).startswith(f"no good row in 100 places of the order; the last: {path}: row ")


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
            r"field image: text\.png is no image that can be read",
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
        take(counter(sources, settings, max_bad_fraction=1.0), batch)


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
    assert set(samples[1]) == {*ARRAYS, "bad_rows", "consumed", "refs"}


# --- rows left out on purpose ----------------------------------------------------------------------------------------


@pytest.fixture
def too_short(monkeypatch):
    """Rows whose number is odd count as dropped."""
    real = Samples.make

    def make(self, ref):
        if ref.row % 2:
            raise DroppedRow("is odd")
        return real(self, ref)

    monkeypatch.setattr(Samples, "make", make)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_dropped_row_is_replaced_counted_apart_and_no_error(config, tokenizer, tmp_path, too_short, policy):
    rows = [conversation(f"{i}", "Hi", f"It is {i}.") for i in range(6)]
    override, path = write_rows(tmp_path, rows)
    settings, sources = config(override, f"data.on_bad_row={policy}", "data.max_bad_fraction=0")
    count, new = counter(sources, settings), []
    for batch in batches(sources, settings, tokenizer, 0, 16):
        new += take(count, batch)
        assert len(batch.arrays["tokens"]) == SIZE
    assert sorted(new) == [f"{path}: row {i} (id '{i}'): is odd" for i in (1, 3, 5)]
    assert count.counts == {"dropped": 3}
    assert count.summary() == "0 bad and 3 dropped of 6 rows"
    made = SampleMaker(sources, settings, tokenizer)
    (index,) = [i for i in range(6) if sources.order(i).row == 5]
    np.testing.assert_array_equal(made(index)["tokens"], made.make(RowRef(0, 0))["tokens"])


def test_a_source_whose_rows_are_all_dropped(config, tokenizer, tmp_path, too_short):
    rows = [conversation("0", "Hi", "x"), conversation("1", "Hi", "x")]
    override, path = write_rows(tmp_path, rows)
    settings, sources = config(override)
    sources.after = lambda ref, steps: RowRef(0, 1)
    (batch,) = batches(sources, settings, tokenizer, 0, 8)
    with pytest.raises(UserError, match=f"^no good row in 100 places of the order; the last: {path}: row 1 "):
        take(counter(sources, settings), batch)
