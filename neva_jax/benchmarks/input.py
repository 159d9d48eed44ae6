"""How fast rows become batches: one line for each image size and number of workers.

The rows go through the pipeline of training (data.pipeline.batches), from JSON and JPEG files in the page cache to
batches in the main process. Without --json, made-up photographs and conversations are used.

images_per_s and images_per_s_per_worker are of the wall clock; images_per_cpu_s counts the CPU time of all processes
and is what a core can do alone, however busy the machine is. The stages are CPU milliseconds per image, each the best
of several passes in one process:
  read, decode, resize   the file, its pixels (RGB), and the encoder's pixels from them
  text                   the same rows without their images: JSON, template, tokens, arrays
  rest                   what a row costs in the pipeline beyond that: image tokens, copies, Grain, and between
                         processes where there are workers
max_pixel_difference: to Hugging Face's processor, over all distinct images; hf_ms: what that needs after decoding.
"""

import argparse
import dataclasses
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from neva_jax.benchmarks.conditions import conditions
from neva_jax.benchmarks.synthetic import write_rows, write_tokenizer
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.data.images import open_image
from neva_jax.data.pipeline import batches, batches_ahead
from neva_jax.data.rows import BadRow
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import picture
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.errors import UserError

HELP = "from JSON and JPEG files to batches: images per second, and where the time goes"
PACKAGES = ("grain", "numba", "numpy", "pillow", "sentencepiece", "simplejpeg", "transformers")
PASSES = 5  # over the distinct images, for the stages; the best counts
LEAST = 16  # batches of each worker that are measured, so that one more or less is no matter
MODES = ("square", "pad", "keep", "squash", "anyres")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m neva_jax.bench input`."""
    add = parser.add_argument
    add("--image-px", type=_numbers, default=[336], metavar="N,…", help="side of the encoder's images (default: 336)")
    add("--workers", type=_numbers, default=[0, 1, 2], metavar="N,…", help="worker processes (default: 0,1,2)")
    add("--rows", type=int, default=2000, metavar="N", help="rows that are measured in each line (default: 2000), "
        f"{LEAST} batches of each worker at least")  # fmt: skip
    add("--batch", type=int, default=32, metavar="N", help="rows per batch (default: 32)")
    add("--mode", choices=MODES, default="square", help="data.image_mode (default: square)")
    add("--json", type=Path, metavar="F", help="own rows, of one image each; needs --images and --tokenizer")
    add("--images", type=Path, metavar="DIR", help="their images")
    add("--tokenizer", type=Path, metavar="F", help="default: one trained on the made-up text, when it starts")
    add("--template", default="v1", metavar="T", help="data.template (default: v1)")
    add("--source-size", type=_size, default=(640, 480), metavar="WxH", help="of made-up images (default: 640x480)")
    add("--quality", type=int, default=90, metavar="N", help="JPEG quality of made-up images (default: 90)")
    add("--distinct", type=int, default=64, metavar="N", help="distinct images that are measured (default: 64)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each image size and number of workers.

    Raises:
      UserError: flags that contradict each other, or data that cannot be used.
    """
    if (options.json is None) != (options.images is None):
        raise UserError("--json and --images belong together; give both, or neither for made-up data")
    if options.json is not None and options.tokenizer is None:
        raise UserError("--json: needs --tokenizer, the tokenizer file for its text")
    for name in ("rows", "batch", "distinct"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    for image_px in options.image_px:
        if image_px % 14 or not image_px:
            raise UserError(f"--image-px {image_px}: must be a multiple of 14, the side of CLIP's patch")
    with tempfile.TemporaryDirectory(prefix="neva_jax_bench_") as name:
        folder = Path(name)
        source = {"json": options.json, "images": options.images}
        if options.json is None:
            write_rows(folder, options.rows, options.distinct, options.source_size, options.quality)
            source = {"json": folder / "rows.json", "images": folder}
        tokenizer = options.tokenizer or folder / "tokenizer.model"
        if options.tokenizer is None:
            write_tokenizer(tokenizer)
        for image_px in options.image_px:
            config = _config(options, image_px, source, tokenizer)
            stages = _stages(config, options.distinct)
            text_ms = None
            if options.json is None:
                text = _config(options, image_px, {"json": folder / "text.json", "images": None}, tokenizer)
                text_ms = _pipeline(text, 0, options.rows)["cpu_ms"]
            for workers in options.workers:
                made = _pipeline(config, workers, options.rows)
                known = sum(stages[f"{stage}_ms"] for stage in ("read", "decode", "resize")) + (text_ms or 0)
                yield {
                    "bench": "input",
                    "impl": "neva_jax",
                    "image_px": image_px,
                    "image_mode": options.mode,
                    "workers": workers,
                    **made,
                    **stages,
                    "text_ms": text_ms,
                    "rest_ms": None if text_ms is None else round(made["cpu_ms"] - known, 3),
                    "batch": options.batch,
                    "data": "made-up" if options.json is None else str(options.json),
                    "quality": options.quality if options.json is None else None,
                    "template": options.template,
                    **conditions(*PACKAGES),
                }


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 0,1,2")
    return values


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 640x480")
    return int(parts[0]), int(parts[1])


def _config(options: argparse.Namespace, image_px: int, source: dict[str, Path | None], tokenizer: Path) -> Config:
    described = ", ".join(f"{name}: {'null' if value is None else repr(str(value))}" for name, value in source.items())
    grids = [[rows * image_px, columns * image_px] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return load_config(
        None,
        [
            f"model.vision.image_size={image_px}",
            f"model.tokenizer={tokenizer}",
            f"data.train=[{{{described}}}]",
            f"data.image_mode={options.mode}",
            f"data.image_grids={grids}",
            f"data.template={options.template}",
            "data.max_length=4096" if options.mode == "anyres" else "data.max_length=2048",
            f"train.micro_batch={options.batch}",
            f"train.global_batch={options.batch}",
        ],
    )


def _stages(config: Config, distinct: int) -> dict[str, Any]:
    """Milliseconds of CPU per image in one process, stage by stage; and what the images are."""
    sources = Sources(config.data, "train", config.run.seed, shuffle=False)
    found: dict[str, RowRef] = {}
    for number in range(sources.row_count):
        ref = RowRef(0, number)
        try:
            found |= dict.fromkeys(sources.read(ref).images, ref)
        except BadRow:
            continue
        if len(found) >= distinct:
            break
    try:
        files = [sources.read_image(ref, name) for name, ref in found.items()]
        images = [open_image(data, name, config) for data, name in zip(files, found, strict=True)]
    except BadRow as error:
        raise UserError(f"{config.data.train[0].json}: {error}") from None
    if not images:
        raise UserError(f"{config.data.train[0].json}: no row has an image")
    hf_ms = difference = None
    if by_hugging_face := _hugging_face(config):
        gaps = [picture(image, config).tiles[0].astype(int) - by_hugging_face(image) for image in images]
        difference = int(max(np.abs(gap).max() for gap in gaps))
        hf_ms = _milliseconds(by_hugging_face, images)
    widths, heights = ({getattr(image, side) for image in images} for side in ("width", "height"))
    return {
        "read_ms": _milliseconds(lambda name: sources.read_image(found[name], name), list(found)),
        "decode_ms": _milliseconds(lambda data: open_image(data, "", config), files),
        "resize_ms": _milliseconds(lambda image: picture(image, config), images),
        "hf_ms": hf_ms,
        "max_pixel_difference": difference,
        "source_width": _one_or_mean(widths, [image.width for image in images]),
        "source_height": _one_or_mean(heights, [image.height for image in images]),
        "source_bytes": round(float(np.mean([len(data) for data in files]))),
        "distinct_images": len(images),
    }


def _hugging_face(config: Config) -> Callable[[Image.Image], np.ndarray] | None:
    """RGB image -> [S, S, 3] uint8 by the processor that the image mode stands for; None: by none."""
    # Here, because workers import what this module does, and transformers takes seconds.
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    side = config.model.vision.image_size
    square = {"height": side, "width": side}
    if config.data.image_mode == "square":
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, do_rescale=False, do_normalize=False
        )
    elif config.data.image_mode == "squash":
        processor = SiglipImageProcessorPil(size=square, do_rescale=False, do_normalize=False)
    else:
        return None
    return lambda image: np.asarray(processor(image.convert("RGB"))["pixel_values"][0]).transpose(1, 2, 0)


def _one_or_mean(values: set[int], all_values: Sequence[int]) -> float:
    return values.pop() if len(values) == 1 else round(float(np.mean(all_values)), 1)


def _milliseconds(function: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """CPU milliseconds per item: the best of PASSES passes, without garbage collection."""
    times = []
    gc.disable()
    for _ in range(PASSES):
        start = time.process_time()
        for item in items:
            function(item)
        times.append(time.process_time() - start)
    gc.enable()
    return round(1000 * min(times) / len(items), 3)


def _pipeline(config: Config, workers: int, rows: int) -> dict[str, Any]:
    """`rows` rows through the pipeline, after as many batches as may have been ready before the clock ran.

    At the end twice as many are left: as many may be ready by then, and the CPU time of a worker that has ended is not
    known.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    tokenizer, size = Tokenizer.from_file(config.model.tokenizer), config.train.global_batch
    started = time.perf_counter()
    held, measured = batches_ahead(workers), max(-(-rows // size), LEAST * workers)
    sources = Sources(config.data, "train", config.run.seed, shuffle=True)
    stream = batches(sources, config, tokenizer, 0, (measured + 3 * held) * size)
    first = None
    for _ in range(held):
        batch = next(stream)
        first = first or time.perf_counter() - started
    images = tokens = 0
    start, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(measured):
        batch = next(stream)
        if batch.bad_rows:
            raise UserError(f"{batch.bad_rows[0].message}; measure with data that is whole")
        images += size
        tokens += int((batch.arrays["segment_ids"] > 0).sum())
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu
    for _ in stream:  # or the workers would be there beside the next line's
        pass
    return {
        "images_per_s": round(images / seconds, 1),
        "images_per_s_per_worker": round(images / seconds / max(workers, 1), 1),
        "images_per_cpu_s": round(images / cpu, 1),
        "cpu_ms": round(1000 * cpu / images, 3),
        "first_batch_s": round(first, 2),
        "rows": images,
        "tokens_per_row": round(tokens / images, 1),
    }


def _cpu_seconds() -> float:
    """CPU time of this process and of its living children, the workers."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="utf-8") as file:
            user, system = file.read().rsplit(")", 1)[1].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total
