"""The order of an epoch against what it must be: each row so often, whatever the seed, and nothing but a function."""

import itertools
import json
import pickle
import shutil
from collections import Counter

import pytest

from neva_jax.config import DataConfig, SourceConfig
from neva_jax.data.rows import BadRow, Turn
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import UserError


def make_sources(train, seed, shuffle, **settings):
    return Sources(DataConfig(train=train, **settings), "train", seed, shuffle)


@pytest.fixture
def source(tmp_path):
    """Makes a source of so many rows, whose ids are their numbers."""

    def make(count, weight=1.0, name="rows"):
        path = tmp_path / f"{name}.json"
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This"}]
        path.write_text(json.dumps([{"id": i, "conversations": turns} for i in range(count)]))
        return SourceConfig(json=str(path), weight=weight)

    return make


def epoch(sources, number):
    first = number * sources.epoch_size
    return [sources.order(i) for i in range(first, first + sources.epoch_size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 101])
def test_each_row_comes_once_an_epoch(source, count, shuffle):
    sources = make_sources([source(count)], seed=3, shuffle=shuffle)
    assert sources.epoch_size == sources.row_count == count
    for number in (0, 1, 2, 9, 10**6):
        assert sorted(ref.row for ref in epoch(sources, number)) == list(range(count))


def test_without_shuffling_the_order_is_that_of_the_files(source):
    sources = make_sources([source(3, name="a"), source(2, name="b")], seed=3, shuffle=False)
    once = [RowRef(0, 0), RowRef(0, 1), RowRef(0, 2), RowRef(1, 0), RowRef(1, 1)]
    assert [sources.order(i) for i in range(10)] == once * 2


def test_the_order_is_a_pure_function_of_seed_and_index(source):
    """Asked backwards, twice and in a new object, an index gives the same row."""
    configs = [source(23, name="a"), source(9, 0.5, name="b")]
    one = make_sources(configs, seed=11, shuffle=True)
    order = [one.order(i) for i in range(90)]
    other = make_sources(configs, seed=11, shuffle=True)
    assert [other.order(i) for i in reversed(range(90))] == order[::-1]
    assert [one.order(i) for i in range(90)] == order


def test_epochs_and_seeds_have_orders_of_their_own(source):
    config = source(40)
    orders = [
        tuple(ref.row for ref in epoch(make_sources([config], seed, shuffle=True), number))
        for seed in (0, 1, 2, 2**31, 2**40 + 5)
        for number in range(4)
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(40)) not in orders


def test_every_row_can_come_first(source):
    """Over 200 epochs, each of 4 rows comes first 50 times on average (standard deviation 6)."""
    sources = make_sources([source(4)], seed=0, shuffle=True)
    first = Counter(sources.order(4 * number).row for number in range(200))
    assert sorted(first) == list(range(4))
    assert min(first.values()) > 20
    assert max(first.values()) < 80


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weight", [2, 3.0])
def test_a_whole_weight_shows_each_row_so_often(source, weight, shuffle):
    sources = make_sources([source(7, weight)], seed=5, shuffle=shuffle)
    assert (sources.epoch_size, sources.row_count) == (7 * weight, 7)
    for number in range(3):
        assert Counter(ref.row for ref in epoch(sources, number)) == dict.fromkeys(range(7), weight)


@pytest.mark.parametrize("shuffle", [True, False])
def test_weight_one_half_takes_the_other_half_in_the_next_epoch(source, shuffle):
    sources = make_sources([source(10, 0.5)], seed=5, shuffle=shuffle)
    halves = [{ref.row for ref in epoch(sources, number)} for number in range(4)]
    assert [len(half) for half in halves] == [5, 5, 5, 5]
    for one, other in itertools.pairwise(halves):
        assert one | other == set(range(10))


@pytest.mark.parametrize(("weight", "count"), [(0.3, 3), (0.5, 6), (1.5, 16), (2.25, 25)])
def test_any_weight_shows_all_rows_equally_often_in_the_end(source, weight, count):
    """11 rows, `count` samples an epoch: after as many epochs each row came `count` times."""
    sources = make_sources([source(11, weight)], seed=5, shuffle=True)
    assert sources.epoch_size == count
    seen = Counter(sources.order(i).row for i in range(11 * count))
    assert seen == dict.fromkeys(range(11), count)
    for number in range(11):
        times = Counter(ref.row for ref in epoch(sources, number))
        assert max(times.values()) - (min(times.values()) if len(times) == 11 else 0) <= 1


def test_two_sources_are_mixed_in_the_ratio_of_their_weights(source):
    sources = make_sources([source(20, 2, name="a"), source(30, 0.5, name="b")], seed=1, shuffle=True)
    assert (sources.epoch_size, sources.row_count) == (55, 50)
    for number in range(4):
        refs = epoch(sources, number)
        assert Counter(ref.row for ref in refs if ref.source == 0) == dict.fromkeys(range(20), 2)
        half = range(15) if number % 2 == 0 else range(15, 30)
        assert sorted(ref.row for ref in refs if ref.source == 1) == list(half)
        assert {ref.source for ref in refs[:15]} == {0, 1}


def test_after_goes_on_in_the_same_file_and_round_its_end(source):
    sources = make_sources([source(3, name="a"), source(5, name="b")], seed=1, shuffle=True)
    assert [sources.after(RowRef(1, 3), steps) for steps in range(4)] == [
        RowRef(1, 3),
        RowRef(1, 4),
        RowRef(1, 0),
        RowRef(1, 1),
    ]
    assert sources.after(RowRef(0, 2), 1) == RowRef(0, 0)
    assert sources.after(RowRef(0, 2), 300) == RowRef(0, 2)


def test_rows_are_checked_when_they_are_read(tmp_path):
    path = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, 4]))
    sources = make_sources([SourceConfig(json=str(path))], seed=0, shuffle=True)
    assert sources.read(RowRef(0, 0)).turns == (Turn("user", "Which?"), Turn("assistant", "This"))
    for number, message in ((1, "the last must be an answer of gpt"), (2, "must be an object, not 4")):
        with pytest.raises(BadRow, match=message):
            sources.read(RowRef(0, number))


def test_describe_names_file_row_and_id(source, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([{"id": "x/1"}, {"id": 7}, {}, "text", None, {"id": None}]))
    sources = make_sources([source(2), SourceConfig(json=str(path))], seed=0, shuffle=True)
    assert sources.describe(RowRef(0, 1)) == f"{tmp_path}/rows.json: row 1 (id 1)"
    assert [sources.describe(RowRef(1, i)) for i in range(6)] == [
        f"{path}: row 0 (id 'x/1')",
        f"{path}: row 1 (id 7)",
        f"{path}: row 2",
        f"{path}: row 3",
        f"{path}: row 4",
        f"{path}: row 5 (id None)",
    ]


@pytest.mark.parametrize("weight", [0.0, 0.04])
def test_a_weight_that_leaves_no_row(source, tmp_path, weight):
    with pytest.raises(UserError) as error:
        make_sources([source(5, name="a"), source(10, weight, name="b")], seed=0, shuffle=True)
    assert str(error.value) == f"weight={weight} of {tmp_path}/b.json leaves none of its 10 rows"


def test_a_file_that_is_no_llava_json(source, tmp_path):
    (tmp_path / "bad.json").write_text("[\n,]")
    with pytest.raises(UserError) as error:
        make_sources([source(5), SourceConfig(json=str(tmp_path / "bad.json"))], seed=0, shuffle=True)
    assert str(error.value) == f"{tmp_path}/bad.json: line 2 column 1 (byte 2) is no JSON (Expecting value)"


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("settings", [{}, {"val_fraction": 0.3}, {"sampling": "replacement"}])
def test_the_order_of_many_is_that_of_each(source, shuffle, settings):
    sources = make_sources([source(17, 2, name="a"), source(9, 0.5, name="b")], 3, shuffle, **settings)
    numbers, rows = sources.order_many(11, 150)
    assert [RowRef(*pair) for pair in zip(numbers, rows, strict=True)] == [sources.order(i) for i in range(11, 161)]


# --- sampling with replacement ---------------------------------------------------------------------------------------


def test_replacement_draws_sources_by_weight_and_rows_evenly(source):
    """66,000 samples; each count lies within 5 standard deviations of what its probability says."""
    configs = [source(20, 2, name="a"), source(30, 0.5, name="b")]
    sources = make_sources(configs, 7, True, sampling="replacement")
    assert (sources.epoch_size, sources.row_count) == (55, 50)
    draws = Counter(sources.order(i) for i in range(66_000))
    assert len(draws) == 50
    for (ref, seen), probability in ((item, (40 / 55 / 20, 15 / 55 / 30)[item[0].source]) for item in draws.items()):
        expected = 66_000 * probability
        assert abs(seen - expected) < 5 * expected**0.5, ref


def test_replacement_is_a_pure_function_of_seed_and_index(source):
    config = source(1000)
    one, two, other = (make_sources([config], seed, True, sampling="replacement") for seed in (1, 1, 2))
    order = [one.order(i) for i in range(100)]
    assert [two.order(i) for i in reversed(range(100))] == order[::-1]
    assert [other.order(i) for i in range(100)] != order
    assert len({one.order(i).row for i in range(1000)}) < 700  # 632 are expected; without replacement all 1000


def test_validation_is_never_drawn(source):
    data = DataConfig(train=[source(5)], val=[source(6, name="val")], sampling="replacement")
    assert [Sources(data, "val", 0, shuffle=False).order(i).row for i in range(6)] == list(range(6))


# --- validation held out ---------------------------------------------------------------------------------------------


def ids_of(split, train, fraction=0.2):
    sources = Sources(DataConfig(train=train, val_fraction=fraction), split, 0, shuffle=False)
    refs = [sources.order(i) for i in range(sources.epoch_size)]
    assert sources.row_count == len(set(refs))
    return [(ref.source, sources.row_id(ref)) for ref in refs]


def test_the_two_sides_are_disjoint_and_complete(source):
    configs = [source(300, name="a"), source(500, name="b")]
    train, val = ids_of("train", configs), ids_of("val", configs)
    assert sorted(train + val) == sorted([(0, str(i)) for i in range(300)] + [(1, str(i)) for i in range(500)])
    assert 100 < len(val) < 220  # 160 ± 5 standard deviations of 11
    # The same id is on the same side of both.
    assert {name for number, name in val if number == 0} == {name for _, name in val if int(name) < 300}


def test_rows_stay_on_their_side_when_others_are_added(source):
    before = {split: ids_of(split, [source(300)]) for split in ("train", "val")}
    for split, rows in before.items():
        assert ids_of(split, [source(450)])[: len(rows)] == rows


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_larger_fraction_only_adds(source, split):
    config = source(200)
    small, large = (set(ids_of("val", [config], fraction)) for fraction in (0.1, 0.4))
    assert small < large
    assert 50 < len(large) < 110


def test_rows_without_id_are_told_apart_by_their_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*["{}"] * 100, "no JSON", *['{"id": null}'] * 99]))
    data = DataConfig(train=[SourceConfig(json=str(path))], val_fraction=0.3)
    sides = [Sources(data, split, 0, shuffle=False) for split in ("train", "val")]
    rows = [{side.order(i).row for i in range(side.epoch_size)} for side in sides]
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] | rows[1] == set(range(200))
    assert len(rows[1]) > 30


def test_a_bad_row_is_replaced_from_its_own_side(source):
    data = DataConfig(train=[source(50)], val_fraction=0.3)
    for split in ("train", "val"):
        sources = Sources(data, split, 0, shuffle=True)
        own = {sources.order(i) for i in range(sources.epoch_size)}
        first = sources.order(0)
        assert {sources.after(first, steps) for steps in range(len(own))} == own
        assert sources.after(first, len(own)) == first
    assert sources.rows_in(0) == 50


def test_weights_do_not_change_what_is_held_out(source):
    assert ids_of("val", [source(100)]) == ids_of("val", [source(100, 3.0)])
    sources = Sources(DataConfig(train=[source(100, 3.0)], val_fraction=0.2), "train", 0, shuffle=True)
    assert sources.epoch_size == 3 * sources.row_count


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_a_fraction_that_leaves_no_row(source, fraction, side):
    with pytest.raises(UserError, match=f"data.val_fraction={fraction} leaves no row for .* of 5 rows"):
        Sources(DataConfig(train=[source(5)], val_fraction=fraction), side, 0, shuffle=False)


def test_hashes_of_many_ids_are_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr("neva_jax.data.sources._FEW", 10)
    data = DataConfig(train=[source(300)], val_fraction=0.2, cache=str(tmp_path / "cache"))
    first = Sources(data, "val", 0, shuffle=False)
    monkeypatch.setattr("neva_jax.data.row_files.JsonRows.raw", None)  # would fail if it were called
    again = Sources(data, "val", 0, shuffle=False)
    assert first.order_many(0, first.epoch_size)[1].tolist() == again.order_many(0, again.epoch_size)[1].tolist()
    assert len(list((tmp_path / "cache").glob("ids-*.npy"))) == 1


# --- what a worker is sent -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"val_fraction": 0.3}, {"sampling": "replacement"}])
def test_a_worker_opens_the_files_again(source, settings):
    sources = make_sources([source(5000, 2, name="a"), source(100, name="b")], 3, True, **settings)
    sent = pickle.dumps(sources)
    assert len(sent) < 5000
    there = pickle.loads(sent)
    for i in (0, 1, 77, 12_345):
        ref = sources.order(i)
        assert (there.order(i), there.after(ref, 2)) == (ref, sources.after(ref, 2))
        assert (there.read(ref), there.describe(ref)) == (sources.read(ref), sources.describe(ref))
    assert [there.fingerprint(i) for i in (0, 1)] == [sources.fingerprint(i) for i in (0, 1)]


def test_a_fingerprint_is_of_the_content_not_the_name(source, tmp_path):
    one = source(5)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy2(one.json, copied := tmp_path / "elsewhere" / "copied.json")
    sources = make_sources([one, SourceConfig(json=str(copied)), source(6, name="other")], 0, True)
    keys = [sources.fingerprint(i) for i in range(3)]
    assert keys[0] == keys[1] != keys[2]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_and_frames_come_from_the_rows_own_source(tmp_path):
    for name in ("a/x.png", "b/x.png", "b/clip/1.png", "b/clip/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "rows.json").write_text("[1]")
    json_path = str(tmp_path / "rows.json")
    configs = [SourceConfig(json=json_path, images=images and str(tmp_path / images)) for images in ("a", "b", None)]
    sources = make_sources(configs, 0, True)
    assert [sources.read_image(RowRef(i, 0), "x.png") for i in range(2)] == [b"a/x.png", b"b/x.png"]
    assert sources.frames(RowRef(1, 0), "clip") == ["clip/0.png", "clip/1.png"]
    assert sources.read_image(RowRef(1, 0), "clip/1.png", "video") == b"b/clip/1.png"
    with pytest.raises(BadRow, match=r"^field image names x.png, but its source has no images folder$"):
        sources.read_image(RowRef(2, 0), "x.png")


def test_steerlm_tags_are_images_in_lines_with_images_and_text_elsewhere(tmp_path):
    turns = [
        {"from": "User", "value": '<img src="a/b.png">'},
        {"from": "Assistant", "value": "x", "label": "quality:4"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns}))
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}]))
    configs = [
        SourceConfig(json=str(tmp_path / name), images=images)
        for name, images in (("rows.jsonl", str(tmp_path)), ("rows.jsonl", None), ("rows.json", str(tmp_path)))
    ]
    rows = [make_sources([config], 0, True).read(RowRef(0, 0)) for config in configs]
    assert [row.images for row in rows] == [("b.png",), (), ()]
    assert [row.turns[0].text for row in rows] == ["<image>", '<img src="a/b.png">', '<img src="a/b.png">']
    assert rows[0].turns[1] == Turn("assistant", "x", "quality:4")
