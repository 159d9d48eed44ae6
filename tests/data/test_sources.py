"""The order of an epoch against what it must be: each row so often, whatever the seed, and nothing but a function."""

import itertools
import json
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
    assert str(error.value) == f"{tmp_path}/bad.json: byte 2 is no JSON (Expecting value)"
