"""Batches for `bench train`: made-up arrays, or the real loader over JPEG files."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neva_jax.benchmarks.synthetic import write_rows, write_tokenizer
from neva_jax.config import Config, SourceConfig
from neva_jax.data.pipeline import Batch, batches, plan_rows
from neva_jax.data.sources import Sources
from neva_jax.data.tiles import tiles_per_row
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import image_tokens
from neva_jax.errors import UserError

POOL = 4  # distinct made-up batches that follow one another: the loss falls as they are learnt
PHOTOGRAPHS, SOURCE_SIZE, QUALITY = 256, (640, 480), 90


def made_up(config: Config, segments: int) -> Iterator[Batch]:
    """Batches without end, a function of `run.seed` alone: `segments` samples a row, image first, then labelled text.

    Each sample has the same number of tokens. Text follows a Zipf distribution, so that there is something to learn.
    With `train.constant_prefix` all rows begin with the same tokens, without labels, and then the image.

    Raises:
      UserError: `data.max_length` is too short for the images.
    """
    rng = np.random.default_rng(config.run.seed)
    pool = [_batch(_row_arrays(config, segments, rng)) for _ in range(POOL)]
    return itertools.cycle(pool)


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    segments = arrays["segment_ids"]
    return Batch(arrays, samples=int(segments.max(axis=1).sum()), tokens=int((segments > 0).sum()))


def _row_arrays(config: Config, segments: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    rows, length, side = config.train.global_batch, config.data.max_length, config.model.vision.image_size
    tiles, each, before = tiles_per_row(config), length // segments, config.train.constant_prefix
    features = tiles // segments * image_tokens(config.model)  # of one sample
    if tiles % segments or before + features >= each:
        raise UserError(
            f"data.max_length={length}: {segments} samples of {each} tokens do not hold the {features} tokens of their "
            f"images and text; {tiles} tiles a row"
        )
    within = np.arange(segments * each)
    segment, position = within // each, within % each
    line = np.full(length, -1, np.int32)  # of a row's slots; what the samples do not fill is padding
    feature = position - before
    line[: len(within)] = np.where((feature >= 0) & (feature < features), segment * features + feature, -1)
    positions, segment_ids = np.zeros(length, np.int32), np.zeros(length, np.int32)
    positions[: len(within)], segment_ids[: len(within)] = position, segment + 1
    labelled = (line < 0) & (segment_ids > 0) & (positions >= before)
    tokens = (rng.zipf(1.3, (rows, length)) % config.model.llm.vocab_size).astype(np.int32)
    tokens[:, :before] = np.arange(before) % config.model.llm.vocab_size
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.broadcast_to(labelled.astype(np.float32), (rows, length)).copy(),
        "positions": np.broadcast_to(positions, (rows, length)).copy(),
        "segment_ids": np.broadcast_to(segment_ids, (rows, length)).copy(),
        "image_slots": np.broadcast_to(line, (rows, length)).copy(),
        "images": rng.integers(0, 256, (rows, tiles, side, side, 3), dtype=np.uint8),
    }


def with_made_up_files(config: Config, folder: Path) -> Config:
    """Writes photographs, conversations and a tokenizer into `folder`, and the configuration that trains on them.

    With `data.template=plain` each row is a caption. Rows that are too long are cut at their end.
    """
    rows = max(2 * PHOTOGRAPHS, config.train.global_batch)
    rounds = 1 if config.data.template == "plain" else 4
    write_rows(folder, rows, PHOTOGRAPHS, SOURCE_SIZE, QUALITY, config.run.seed, rounds)
    write_tokenizer(folder / "tokenizer.model")
    data = dataclasses.replace(
        config.data,
        train=[SourceConfig(json=str(folder / "rows.json"), images=str(folder))],
        val=[],
        on_long_row="truncate_text",
        cache=str(folder / "cache"),
    )
    model = dataclasses.replace(config.model, tokenizer=str(folder / "tokenizer.model"))
    return dataclasses.replace(config, data=data, model=model)


def loaded(config: Config, count: int) -> Iterator[Batch]:
    """`count` batches of the configuration's training rows, as a run gets them.

    Raises:
      UserError: rows or tokenizer cannot be used.
    """
    if not config.data.train or not config.model.tokenizer:
        raise UserError("--data config: set data.train and model.tokenizer")
    tokenizer = Tokenizer.from_file(config.model.tokenizer)
    if tokenizer.size > config.model.llm.vocab_size:
        raise UserError(
            f"model.llm.vocab_size={config.model.llm.vocab_size} is smaller than the {tokenizer.size} tokens of "
            f"{config.model.tokenizer}"
        )
    sources = Sources(config.data, "train", config.run.seed, shuffle=True)
    plans = plan_rows(sources, config, tokenizer, lambda line: None, "training")
    return batches(sources, config, tokenizer, 0, count * config.train.global_batch, plans)


def tokens_per_sample(batch: Batch) -> dict[str, float]:
    """`tokens_useful`, `tokens_labelled` and `tokens_computed` (with padding) per sample of a batch."""
    arrays, samples = batch.arrays, batch.samples
    return {
        "tokens_useful": round(float((arrays["segment_ids"] > 0).sum()) / samples, 2),
        "tokens_labelled": round(float((arrays["loss_weights"] > 0).sum()) / samples, 2),
        "tokens_computed": round(math.prod(arrays["tokens"].shape) / samples, 2),
    }
