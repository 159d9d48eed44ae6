"""How long each row will be: measured once in parallel processes, kept in the cache folder, mapped from there.

A table has a line for each row of a source (`ROW`). Its name is a digest of all that the numbers depend on: the rows'
content, the tokenizer, and the settings that decide how text and images become tokens. So a table whose ground has
changed is not found, and a table that is found holds.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neva_jax.config import Config
from neva_jax.data.cache import cache_folder, cached_array, prune
from neva_jax.data.chat_template import read_chat_template
from neva_jax.data.processes import in_order
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.samples import Samples
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.templates import NEVA, TEMPLATES
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError
from neva_jax.files import usable_cores

VERSION = 1  # of the tables: another one makes all of them anew
# tokens: positions that the row fills, 0 if it cannot be used; tiles: the most that its images take
ROW = np.dtype([("tokens", "<i4"), ("supervised", "<i4"), ("tiles", "<i2"), ("state", "u1")])
GOOD, BAD, DROPPED = 0, 1, 2  # states
CHUNK = 1000  # rows that a process measures at a time
# What a row's length depends on, besides its content and the tokenizer.
_DATA_KEYS = (
    "template",
    "compat",
    "image_position",
    "max_length",
    "on_long_row",
    "images_per_row",
    "image_mode",
    "image_grids",
    "image_start",
    "image_end",
    "exif_rotate",
    "max_pixels",
    "video_frames",
    "splice_single_frame",
)
_VISION_KEYS = ("kind", "image_size", "patch_size", "select_feature")


@dataclass(frozen=True)
class Lengths:
    """The tables of all sources, each [rows] of ROW; `digest` of what they hold."""

    names: tuple[str, ...]
    folder: Path
    digest: str

    def __getitem__(self, source: int) -> np.ndarray:
        """The table of one source, mapped into memory."""
        return np.load(self.folder / f"{self.names[source]}.npy", mmap_mode="r").view(np.ndarray)

    def of(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Lines for (source, row) pairs: two [n] -> [n] of ROW."""
        found = np.zeros(len(rows), ROW)
        for source in range(len(self.names)):
            here = sources == source
            found[here] = self[source][rows[here]]
        return found


def row_lengths(sources: Sources, config: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> Lengths:
    """The lengths of all rows, from the cache or measured now, with a progress bar.

    Raises:
      UserError: the cache folder cannot be used, or a setting that the rows are encoded by is wrong.
      WorkerError: a process that measured has died.
    """
    folder, names, digest = cache_folder(config.data.cache), [], hashlib.sha256()
    for source, source_config in enumerate(sources.configs):
        name = f"lengths-{_key(sources, source, config, tokenizer)}"

        def make(source: int = source, rows: str = source_config.json or source_config.records) -> np.ndarray:
            say(f"{rows}: no lengths are cached for this content, tokenizer and settings; measuring its rows")
            return measure(sources, source, config, tokenizer)

        table = cached_array(folder, name, make)
        if table.dtype != ROW or len(table) != sources.rows_in(source):
            raise UserError(f"data.cache: {folder / name}.npy is not what it should be; delete it")
        names.append(name)
        digest.update(np.ascontiguousarray(table).tobytes())
    prune(folder, say)
    return Lengths(tuple(names), folder, digest.hexdigest())


def summary(table: np.ndarray) -> dict[str, int | float]:
    """What a table [rows] of ROW says as a whole: counts of rows, and tokens of those that can be used."""
    tokens = table["tokens"][table["state"] == GOOD]
    quantiles = np.quantile(tokens, (0.1, 0.5, 0.9)).tolist() if len(tokens) else [0.0] * 3
    return {
        "rows": len(table),
        "bad": int((table["state"] == BAD).sum()),
        "dropped": int((table["state"] == DROPPED).sum()),
        "tokens": int(tokens.sum(dtype=np.int64)),
        "supervised": int(table["supervised"].sum(dtype=np.int64)),
        "tiles": int(table["tiles"].sum(dtype=np.int64)),
        "tokens_mean": float(tokens.mean()) if len(tokens) else 0.0,
        "tokens_p10": quantiles[0],
        "tokens_p50": quantiles[1],
        "tokens_p90": quantiles[2],
        "longest": int(tokens.max(initial=0)),
    }


def measure(sources: Sources, source: int, config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """The table of one source, [rows] of ROW."""
    count, samples = sources.rows_in(source), Samples(sources, config, tokenizer)
    jobs = [(source, start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = min(config.data.workers, usable_cores(), len(jobs))
    what = f"measured rows of {sources.configs[source].json or sources.configs[source].records}"
    parts = []
    with tqdm(total=count, unit="row", unit_scale=True, desc="lengths", disable=None) as progress:
        for part in in_order(_measure_rows, samples, jobs, processes, what):
            parts.append(part)
            progress.update(len(part))
    return np.concatenate(parts)


def _measure_rows(samples: Samples, source: int, start: int, end: int) -> np.ndarray:
    table = np.zeros(end - start, ROW)
    for i in range(end - start):
        try:
            tokens, tiles, supervised = samples.measure(RowRef(source, start + i))
            table[i] = tokens, supervised, tiles, GOOD
        except DroppedRow:
            table[i]["state"] = DROPPED
        except BadRow:
            table[i]["state"] = BAD
    return table


def _key(sources: Sources, source: int, config: Config, tokenizer: Tokenizer) -> str:
    data, model = config.data, config.model
    ground: dict[str, Any] = {
        "version": VERSION,
        "rows": sources.fingerprint(source),
        "tags_are_images": sources.tags_are_images(source),
        "tokenizer": [tokenizer.sha256, tokenizer.settings],
        "data": {name: getattr(data, name) for name in _DATA_KEYS},
        # Its content: a table whose template has been changed since is not found.
        "frames": read_chat_template(data.chat_template)
        if data.template == "jinja"
        else repr((NEVA if data.compat == "neva" else TEMPLATES)[data.template]),
        "vision": {name: getattr(model.vision, name) for name in _VISION_KEYS},
        "projector": [model.projector.kind, model.projector.newline],
    }
    if data.image_mode == "anyres":  # the images' sizes count; a file that was exchanged is found when it is read
        ground["images"] = sources.configs[source].images
    return hashlib.sha256(json.dumps(ground, sort_keys=True, default=list).encode()).hexdigest()[:32]
