"""Files of rows for tests, and batches compared."""

import json

import numpy as np
from PIL import Image

from neva_jax.data.pipeline import ARRAYS

SIZE = 8  # train.global_batch of small_overrides
LENGTH = 192
PATCHES = 16
IMAGE_SIZE = 32
DTYPES = {name: np.uint8 if name == "images" else np.float32 if name == "loss_weights" else np.int32 for name in ARRAYS}


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
