"""Hugging Face folders -> our checkpoint.

    1 the folders' config.json -> our configuration            hf_config.py, hf_llava.py
    2 the headers of the weight files, compared with it        tensors.py, names.py
    3 the tokenizer, compared with the embedding's rows
    4 one tensor after the other is read, moved, written       store.py

Nothing is written before 1 to 3 have passed, and the output appears when all is on disk.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from neva_jax.config import COMPONENTS, Config, DataConfig, ModelConfig, PrecisionConfig
from neva_jax.configfile import to_yaml
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import padded_vocab
from neva_jax.errors import UserError
from neva_jax.files import readable
from neva_jax.interop.names import Parameter, check_tensors, parameters
from neva_jax.interop.output import check_folder, replacing_folder
from neva_jax.interop.sources import Source, gather
from neva_jax.interop.store import Block, LazyArray, chunk_shape, save
from neva_jax.interop.tensors import DTYPES, Tensor, Tensors
from neva_jax.training.checkpoint_meta import Meta

BLOCK_BYTES = 64 * 2**20  # of the vocabulary that is in memory at a time
MOST_PADDING = 1024  # rows beyond the tokenizer's size that count as padding
NEW_ROWS = ("mean", "zero", "normal")


@dataclass(frozen=True)
class Options:
    """The flags of `convert from-hf`."""

    src: Path
    out: Path
    vision: Path | None = None
    projector: Path | None = None
    tokenizer: Path | None = None
    dtype: str = "keep"
    vocab_multiple: int = 1
    new_rows: str | None = None
    select_layer: int = -2
    select_feature: str = "patch"
    check_finite: bool = False
    allow_pickle: bool = False
    force: bool = False


@dataclass(frozen=True)
class Conversion:
    """How tensors become parameters: their dtype (None: as it is), what new rows hold, and what is checked."""

    dtype: np.dtype | None
    check_finite: bool
    file_rows: int
    rows: int
    new_rows: str
    init_std: float
    progress: Callable[[int], Any] = field(default=lambda _: None)


def from_hf(options: Options, say: Callable[[str], None] = print) -> None:
    """Converts; `say` gets what a user should know about choices that were made.

    Raises:
      UserError: a field, tensor or file that does not fit, named with its file and the numbers.
    """
    source = gather(options.src, options.vision, options.projector, options.allow_pickle, _select(options))
    check_folder(options.out, options.force, source.folders)
    tokenizer = _read_tokenizer(options, source)
    file_rows = source.model.llm.vocab_size if "llm" in source.tensors else 0
    model = _with_vocabulary(source.model, tokenizer, options, say)
    table = {name: parameters(name, model, file_rows) for name in COMPONENTS if name in source.tensors}
    for name, rows in table.items():
        tied = ("lm_head.weight",) if model.llm.tie_embeddings else ()
        check_tensors(rows, source.tensors[name], source.origins[name], tied)
    conversion = Conversion(
        {"keep": None, "bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}[options.dtype],
        options.check_finite,
        file_rows,
        padded_vocab(model.llm),
        options.new_rows or "mean",
        model.llm.init_std,
    )
    dtypes = {_dtype(parameter, source.tensors[name], conversion) for name, rows in table.items() for parameter in rows}
    config = _config(model, source, dtypes)
    sizes = [_size(parameter, source.tensors[name], conversion) for name, rows in table.items() for parameter in rows]
    check_folder(options.out, options.force, source.folders, sum(sizes))
    for note in source.notes:
        say(f"note: {note}")
    say(f"{', '.join(table)}: {readable(sum(sizes))} as {', '.join(sorted(d.name for d in dtypes))}")
    meta = Meta(0, config, tuple(table), None, tokenizer)
    with (
        replacing_folder(options.out) as fresh,
        tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="converting", disable=None) as bar,
    ):
        conversion = dataclasses.replace(conversion, progress=bar.update)
        params = {name: _tree(rows, source.tensors[name], conversion) for name, rows in table.items()}
        save(fresh / "checkpoints" / "0", params, meta.files())
        (fresh / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    say(
        f"{options.out}: written, with data.template={config.data.template}, data.image_mode={config.data.image_mode}, "
        f"data.max_length={config.data.max_length}, precision.compute={config.precision.compute}"
    )


def _select(options: Options) -> tuple[int, str]:
    return options.select_layer, options.select_feature


def _config(model: ModelConfig, source: Source, dtypes: set[np.dtype]) -> Config:
    """The configuration of the checkpoint. Every family gets the template `v1`: LLaVA's own, and no other is known."""
    compute = "fp32" if dtypes == {np.dtype(np.float32)} else "bf16"
    data = DataConfig(template="v1", max_length=source.max_length, **source.data)
    return Config(model=model, data=data, precision=PrecisionConfig(compute=compute))


# --- tokenizer and vocabulary ----------------------------------------------------------------------------------------


def _read_tokenizer(options: Options, source: Source) -> Tokenizer:
    if options.tokenizer is not None:
        return Tokenizer.from_file(options.tokenizer)
    folder = options.src if options.src.is_dir() else options.src.parent
    for name in ("tokenizer.model", "tokenizer.json"):
        if (folder / name).is_file():
            return Tokenizer.from_file(folder / name)
    raise UserError(
        f"--src {options.src}: has no tokenizer.model or tokenizer.json; name one with --tokenizer (a checkpoint "
        "carries that of its language model)"
    )


def _with_vocabulary(model: ModelConfig, tokenizer: Tokenizer, options: Options, say: Callable) -> ModelConfig:
    """llm.vocab_size: all rows of the file, for their logits are part of what Hugging Face computes, and those that the
    tokenizer adds; llm.vocab_multiple as asked for."""
    size = tokenizer.size
    rows = model.llm.vocab_size or size  # None: there is no language model among the components
    if rows - size > MOST_PADDING:
        raise UserError(
            f"the tokenizer has {size} tokens, but the embedding {rows} rows; name the tokenizer of these weights with "
            "--tokenizer"
        )
    if size > rows and options.new_rows is None:
        raise UserError(
            f"the tokenizer has {size} tokens, but the embedding only {rows} rows; name the tokenizer of these weights "
            f"with --tokenizer, or add {size - rows} rows with --new-rows {'|'.join(NEW_ROWS)}"
        )
    if size < rows:
        say(f"note: {rows - size} rows of the embedding are beyond the {size} tokens of the tokenizer; they are kept")
    elif size > rows:
        say(f"note: the embedding grows from {rows} to {size} rows ({options.new_rows})")
    llm = dataclasses.replace(model.llm, vocab_size=max(rows, size), vocab_multiple=options.vocab_multiple)
    return dataclasses.replace(model, llm=llm)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _dtype(parameter: Parameter, tensors: Tensors, conversion: Conversion) -> np.dtype:
    """The dtype that a parameter is stored in; raises UserError if its layers do not agree on one."""
    if conversion.dtype is not None:
        return conversion.dtype
    first, *others = (tensors[name] for name in parameter.names())
    for other in others:
        if other.dtype != first.dtype:
            raise UserError(f"{other}: is {other.dtype}, but {first.name} is {first.dtype}; give --dtype bf16 or fp32")
    return DTYPES[first.dtype]


def _shape(parameter: Parameter, conversion: Conversion) -> tuple[int, ...]:
    if parameter.layers is not None:
        return (parameter.layers, *parameter.ours)
    if parameter.vocabulary:
        return tuple(conversion.rows if axis == 0 else parameter.shape[axis] for axis in parameter.axes)
    return parameter.ours


def _size(parameter: Parameter, tensors: Tensors, conversion: Conversion) -> int:
    return math.prod(_shape(parameter, conversion)) * _dtype(parameter, tensors, conversion).itemsize


def _tree(rows: list[Parameter], tensors: Tensors, conversion: Conversion) -> dict:
    """The component's tree of arrays that are made when they are written."""
    tree: dict = {}
    for parameter in rows:
        *outer, last = parameter.path
        branch = tree
        for name in outer:
            branch = branch.setdefault(name, {})
        branch[last] = _array(parameter, [tensors[name] for name in parameter.names()], tensors, conversion)
    return tree


def _array(parameter: Parameter, files: list[Tensor], tensors: Tensors, conversion: Conversion) -> LazyArray:
    shape, dtype = _shape(parameter, conversion), _dtype(parameter, tensors, conversion)

    def layers() -> Iterator[Block]:
        for layer, tensor in enumerate(files):
            block = parameter.to_ours(_checked(tensor.read(), tensor, conversion).astype(dtype, copy=False))
            conversion.progress(block.nbytes)
            yield (layer,) if parameter.layers is not None else (...,), block

    def vocabulary() -> Iterator[Block]:
        axis = parameter.axes.index(0)
        step = chunk_shape(shape, dtype, False)[axis]
        step *= max(1, BLOCK_BYTES // (step * math.prod(parameter.shape[1:]) * dtype.itemsize))
        new = _new_rows(files[0], conversion)
        for start in range(0, conversion.rows, step):
            stop = min(start + step, conversion.rows)
            parts = [new[max(start - conversion.file_rows, 0) : max(stop - conversion.file_rows, 0)]]
            if start < conversion.file_rows:
                read = files[0].read(start, min(stop, conversion.file_rows))
                parts.insert(0, _checked(read, files[0], conversion))
            block = np.concatenate([part.astype(dtype, copy=False) for part in parts]).transpose(parameter.axes)
            conversion.progress(block.nbytes)
            yield tuple(slice(start, stop) if i == axis else slice(None) for i in range(2)), block

    return LazyArray(shape, dtype, parameter.layers is not None, vocabulary if parameter.vocabulary else layers)


def _checked(array: np.ndarray, tensor: Tensor, conversion: Conversion) -> np.ndarray:
    if conversion.check_finite and not np.isfinite(array).all():
        raise UserError(
            f"{tensor}: has values that are not finite ({int((~np.isfinite(array)).sum())} of {array.size})"
        )
    return array


def _new_rows(tensor: Tensor, conversion: Conversion) -> np.ndarray:
    """The rows beyond those of the file, fp32."""
    count, width = conversion.rows - conversion.file_rows, tensor.shape[1]
    if not count or conversion.new_rows == "zero":
        return np.zeros((count, width), np.float32)
    if conversion.new_rows == "normal":
        draw = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        return (draw.standard_normal((count, width)) * conversion.init_std).astype(np.float32)
    return np.broadcast_to(mean_row(tensor), (count, width))


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of a tensor's rows, fp32."""
    total, step = np.zeros(tensor.shape[1], np.float64), max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
    for start in range(0, tensor.shape[0], step):
        total += tensor.read(start, start + step).astype(np.float32).sum(axis=0, dtype=np.float64)
    return (total / tensor.shape[0]).astype(np.float32)
