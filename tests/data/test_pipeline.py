"""Batches against a plain loop over the samples."""

import pytest

from neva_jax.data.pipeline import ARRAYS, SampleMaker, batches
from tests.data.rows import IMAGE_SIZE, LENGTH, SIZE, assert_same, rows_of, stacked


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
