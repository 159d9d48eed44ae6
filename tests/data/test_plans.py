"""Packed streams against a plain loop over the plan; each sample once an epoch; the same stream from anywhere."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from neva_jax.checks import check
from neva_jax.data.pipeline import SampleMaker, batches, plan_rows
from neva_jax.data.plans import Plans
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import UserError
from tests.data.rows import IMAGE_SIZE, PATCHES, SIZE, assert_same, conversation, rows_of, stacked, write_rows

PACKED = ["data.pack=true", "data.images_per_row=3", "data.segments_per_row=4", "data.max_length=512"]


@pytest.fixture
def packed(config, tokenizer):
    """Makes configuration, sources and plans."""

    def make(*overrides):
        settings, sources = config(*PACKED, *overrides)
        return settings, sources, plan_rows(sources, settings, tokenizer, lambda text: None, "training")

    return make


def many_rows(count, images=3):
    """Rows of different lengths, two thirds with an image."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        answer = " ".join(["yes it is"] * int(draw.integers(1, 20)))
        picture = {"image": f"{i % images}.png"} if i % 3 else {}
        rows.append(conversation(f"row-{i}", f"{'<image>' if picture else ''}\nIs it {i}?", answer, **picture))
    return rows


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (0.3, 1.7)])
def test_each_sample_of_an_epoch_is_in_one_row(packed, tmp_path, llava_data, weights):
    _, path = write_rows(tmp_path, many_rows(30))
    folder = tmp_path / "images"
    sources = [(path, folder), (llava_data.json, llava_data.images)]
    given = ", ".join(
        f"{{json: {json_}, images: {images}, weight: {weight}}}"
        for (json_, images), weight in zip(sources, weights, strict=True)
    )
    _, sources, plans = packed(f"data.train=[{given}]")
    lengths = plans.lengths
    for epoch in range(3):
        plan, size = plans[epoch], sources.epoch_size
        assert sorted(plan.samples.tolist()) == list(range(size))
        refs = [[sources.order(epoch * size + sample) for sample in plan.row(row)] for row in range(plan.rows)]
        tokens = [sum(int(lengths[ref.source][ref.row]["tokens"]) for ref in row) for row in refs]
        tiles = [sum(int(lengths[ref.source][ref.row]["tiles"]) for ref in row) for row in refs]
        assert max(tokens) <= 512
        assert max(tiles) <= 3
        assert all(1 <= len(row) <= 4 for row in refs)
        assert plan.tokens == sum(tokens)


def test_plans_differ_by_epoch_and_seed_and_by_nothing_else(packed, tmp_path):
    override, _ = write_rows(tmp_path, many_rows(30))
    _, _, plans = packed(override)
    again = packed(override, "data.workers=3", f"data.cache={tmp_path / 'elsewhere'}", "train.global_batch=16")[2]
    assert again.digest == plans.digest
    np.testing.assert_array_equal(again[1].samples, plans[1].samples)
    np.testing.assert_array_equal(again[1].starts, plans[1].starts)
    assert plans[0].samples.tolist() != plans[1].samples.tolist()
    others = ["run.seed=7", "data.images_per_row=2", "data.segments_per_row=3", "data.max_length=400"]
    assert len({packed(override, other)[2].digest for other in others} | {plans.digest}) == 5


def test_a_plan_is_made_once_and_read_again(packed, tmp_path, monkeypatch):
    override, _ = write_rows(tmp_path, many_rows(30))
    _, _, plans = packed(override)
    before = plans[3].samples.tolist()
    copy = pickle.loads(pickle.dumps(plans))
    monkeypatch.setattr(Plans, "_make", None)
    assert copy[3].samples.tolist() == before
    assert len(pickle.dumps(copy)) < len(pickle.dumps(plans.sources)) + 2000


def test_without_shuffling_rows_stay_in_the_order_of_their_first_samples(config, tokenizer, tmp_path):
    override, _ = write_rows(tmp_path, many_rows(20))
    settings, _ = config(override, *PACKED)
    sources = Sources(settings.data, "train", 0, shuffle=False)
    plan = plan_rows(sources, settings, tokenizer, lambda text: None, "validation")[0]
    firsts = [plan.row(row)[0] for row in range(plan.rows)]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0


def test_what_is_said_of_a_plan(config, tokenizer, tmp_path):
    override, path = write_rows(tmp_path, many_rows(30))
    settings, sources = config(*PACKED, override)
    said = []
    plans = plan_rows(sources, settings, tokenizer, said.append, "training")
    assert said == [
        f"{path}: no lengths are cached for this content, tokenizer and settings; measuring its rows",
        f"training: 30 samples packed into {plans[0].rows} rows of 512 tokens, "
        f"{100 * plans[0].tokens / plans[0].rows / 512:.1f} % of them useful",
    ]
    assert plans[0].rows < 15


# --- streams ---------------------------------------------------------------------------------------------------------


def by_hand(settings, sources, plans, tokenizer, rows):
    """The rows (epoch, row), made sample by sample."""
    maker = SampleMaker(sources, settings, tokenizer)
    size = sources.epoch_size
    made = []
    for epoch, row in rows:
        refs = [sources.order(epoch * size + sample) for sample in plans[epoch].row(row)]
        made.append(maker.row([maker.samples.make(ref) for ref in refs]))
    return stacked(made)


def test_packed_batches_are_the_rows_of_the_plans(packed, tokenizer, tmp_path):
    settings, sources, plans = packed(write_rows(tmp_path, many_rows(30))[0])
    rows = [(epoch, row) for epoch in range(3) for row in range(plans[epoch].rows)]
    count = len(rows) // SIZE * SIZE
    made = list(batches(sources, settings, tokenizer, 0, count, plans))
    assert_same(rows_of(made), by_hand(settings, sources, plans, tokenizer, rows[:count]))
    assert made[0].arrays["images"].shape == (SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, 3)
    ends = np.cumsum([len(plans[epoch].row(row)) for epoch, row in rows[:count]])
    assert [batch.consumed for batch in made] == ends[SIZE - 1 :: SIZE].tolist()
    assert sum(batch.samples for batch in made) == ends[-1]


def test_a_packed_row_is_its_samples_side_by_side(packed, tokenizer, tmp_path):
    """Each segment has the tokens, targets and weights of its sample alone, and its slots show the same pixels."""
    settings, sources, plans = packed(write_rows(tmp_path, many_rows(12))[0])
    maker = SampleMaker(sources, settings, tokenizer, plans)
    for number in range(plans[0].rows):
        row = maker(number)
        for segment, sample in enumerate(plans[0].row(number), 1):
            alone = maker.make(sources.order(sample))
            here, there = row["segment_ids"] == segment, alone["segment_ids"] == 1
            for name in ("tokens", "targets", "loss_weights", "positions"):
                np.testing.assert_array_equal(row[name][here], alone[name][there], err_msg=name)
            slots, expected = row["image_slots"][here], alone["image_slots"][there]
            np.testing.assert_array_equal(slots < 0, expected < 0)
            if (slots >= 0).any():
                tile = slots.max() // PATCHES
                np.testing.assert_array_equal(slots[slots >= 0] - tile * PATCHES, expected[expected >= 0])
                np.testing.assert_array_equal(row["images"][tile], alone["images"][0])
        assert not row["loss_weights"][row["segment_ids"] == 0].any()


def test_workers_change_no_bit_of_a_packed_stream(packed, tokenizer, tmp_path):
    override = write_rows(tmp_path, many_rows(30))[0]
    settings, sources, plans = packed(override)
    threads = list(batches(sources, settings, tokenizer, 0, 5 * SIZE, plans))
    settings, sources, plans = packed(override, "data.workers=2")
    workers = list(batches(sources, settings, tokenizer, 0, 5 * SIZE, plans))
    assert_same(rows_of(threads), rows_of(workers))
    assert [batch.consumed for batch in threads] == [batch.consumed for batch in workers]


def test_a_packed_stream_goes_on_from_any_batch(packed, tokenizer, tmp_path):
    settings, sources, plans = packed(write_rows(tmp_path, many_rows(30))[0])
    whole = list(batches(sources, settings, tokenizer, 0, 6 * SIZE, plans))
    assert whole[-1].consumed > 60  # of epochs of 30
    for done in range(1, 6):
        tail = list(batches(sources, settings, tokenizer, whole[done - 1].consumed, (6 - done) * SIZE, plans))
        assert_same(rows_of(tail), rows_of(whole[done:]))
        assert [batch.consumed for batch in tail] == [batch.consumed for batch in whole[done:]]


def test_a_stream_cannot_begin_within_a_row(packed, tokenizer, tmp_path):
    settings, sources, plans = packed(write_rows(tmp_path, many_rows(30))[0])
    row = int(np.diff(plans[0].starts).argmax())
    inside = int(plans[0].starts[row]) + 1
    with pytest.raises(UserError, match=f"^{inside} samples of the run end within a packed row"):
        batches(sources, settings, tokenizer, inside, SIZE, plans)


# --- bad rows --------------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_left_out_of_its_row(packed, tokenizer, tmp_path):
    rows = many_rows(24)
    rows[4]["image"] = "absent.png"
    rows[9]["conversations"][1]["from"] = "bot"
    override, _ = write_rows(tmp_path, rows)
    settings, sources, plans = packed(override, "data.on_bad_row=skip")
    maker = SampleMaker(sources, settings, tokenizer, plans)
    met = []
    for number in range(plans[0].rows):
        row = maker(number)
        refs = [sources.order(sample) for sample in plans[0].row(number)]
        good = [ref for ref in refs if ref.row not in (4, 9)]
        if good:
            expected = maker.row([maker.samples.make(ref) for ref in good])
            assert_same({name: row[name][None] for name in expected}, stacked([expected]))
        met += [(one.ref.row, one.kind) for one in row["bad_rows"]]
    assert sorted(met) == [(4, "bad"), (9, "bad")]
    assert plans.lengths[0]["state"].tolist() == [0] * 9 + [1] + [0] * 14  # images are not looked at


def test_a_row_without_a_good_sample_is_replaced_by_the_next(packed, tokenizer, tmp_path):
    rows = [conversation(f"{i}", "<image>", "yes", image="absent.png" if i == 3 else f"{i % 3}.png") for i in range(8)]
    override, _ = write_rows(tmp_path, rows)
    settings, sources, plans = packed(override, "data.on_bad_row=skip", "data.images_per_row=1")
    assert plans[0].rows == 8
    maker = SampleMaker(sources, settings, tokenizer, plans)
    (bad,) = [number for number in range(8) if sources.order(plans[0].row(number)[0]).row == 3]
    for name, values in maker(bad + 1).items():
        if name not in ("bad_rows", "consumed", "refs"):
            np.testing.assert_array_equal(maker(bad)[name], values)
    assert maker(bad)["consumed"] == bad + 1


def test_with_error_a_bad_sample_stops_the_row(packed, tokenizer, tmp_path):
    rows = many_rows(12)
    rows[4]["image"] = "absent.png"
    settings, sources, plans = packed(write_rows(tmp_path, rows)[0])
    maker = SampleMaker(sources, settings, tokenizer, plans)
    stopped = [made for made in map(maker, range(plans[0].rows)) if "tokens" not in made]
    assert [[one.ref for one in made["bad_rows"]] for made in stopped] == [[RowRef(0, 4)]]


def test_a_sample_that_has_grown_is_left_out(packed, tokenizer, tmp_path):
    """The images of anyres have other sizes than when the lengths were measured."""
    rows = [conversation(f"{i}", "<image>", "yes", image="0.png") for i in range(6)]
    override, path = write_rows(tmp_path, rows)
    Image.new("RGB", (64, 32)).save(tmp_path / "images" / "0.png")
    anyres = ["data.image_mode=anyres", "data.image_grids=[[32, 64], [64, 32], [64, 64]]", "data.max_length=500"]
    settings, sources, plans = packed(override, *anyres, "data.on_bad_row=skip")
    assert [len(plans[0].row(row)) for row in range(plans[0].rows)] == [3, 3]
    maker = SampleMaker(sources, settings, tokenizer, plans)
    whole = maker(0)
    assert whole["bad_rows"] == []
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "0.png")
    first, second, _ = (sources.order(sample) for sample in plans[0].row(0))
    made = maker(0)
    (report,) = made.pop("bad_rows")
    assert made.pop("consumed") == whole["consumed"] == 3
    assert made.pop("refs") == [first, second]
    assert_same(stacked([made]), stacked([maker.row([maker.samples.make(ref) for ref in (first, second)])]))
    assert report.where.startswith(f"{path}: row ")
    assert re.fullmatch(r"needs \d+ tokens and 5 tiles, more than when its row was planned; .*", report.reason)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.length_buckets=[64]"], "data.length_buckets=[64] has no effect with data.pack=true"),
        (["model.llm.rope_scaling=dynamic", "model.llm.rope_factor=2.0"], "model.llm.rope_scaling=dynamic stretches"),
        (["model.attention=cudnn"], "model.attention=cudnn has no mask for the rows of data.pack=true"),
        (["data.segments_per_row=0"], "data.segments_per_row=0 must be at least 1"),
    ],
)
def test_what_does_not_go_with_packing_is_refused(config, overrides, message):
    with pytest.raises(UserError) as error:
        check(config(*PACKED, *overrides)[0])
    assert str(error.value).startswith(message)


def test_the_lengths_of_the_plan_are_those_of_the_rows(packed, tokenizer, llava_data):
    settings, sources, plans = packed()
    maker = SampleMaker(sources, settings, tokenizer)
    rows = json.loads(llava_data.json.read_text())
    for number in range(len(rows)):
        made, line = maker.make(RowRef(0, number)), plans.lengths[0][number]
        assert line["tokens"] == (made["segment_ids"] == 1).sum()
        assert line["supervised"] == (made["loss_weights"] > 0).sum()
        assert line["tiles"] == ("image" in rows[number])
