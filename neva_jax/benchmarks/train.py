"""What a train step costs: time, samples per second, memory, and the loss.

python -m neva_jax.bench train --config configs/pretrain_7b.yaml --tokens 320 --micro-batch 32 train.remat=dots
python -m neva_jax.bench train --config configs/pretrain_7b.yaml --sweep tokens=256,512,1024 --sweep layers=16,32
python -m neva_jax.bench train --config configs/pretrain_7b.yaml --baseline hf --sweep micro-batch=8,16,32

The step is the one of neva_jax.train for the configuration, with random weights. Every row is a process of its own,
because the peak of memory that a device reports is its process's; what fails is a row with `error`. Without
--global-batch a step is one micro batch for each data-parallel group. A step's time is that between two results while
the next step is already started; step_ms is the median after some steps that are not timed, compiling apart.

--data synthetic    arrays made up beforehand, rows full of tokens; a pool of batches that follow one another
       jpeg         photographs and conversations are written to a temporary folder and come through the real loader
       config       data.train and model.tokenizer of the configuration

tokens_useful, tokens_labelled and tokens_computed are per sample, the last with padding. tflop_per_sample is what the
model needs (planning/flops.py), utilisation its rate over peak_tflops, a measured rate of large matrix products.
losses are those of all steps, so that two layouts or precisions can be compared: they follow from run.seed.
"""

import argparse
import itertools
import multiprocessing
import os
import queue
import re
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neva_jax.benchmarks.conditions import conditions, describe
from neva_jax.checks import check_mesh, check_numbers
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.derived import parse_mesh_shape
from neva_jax.errors import UserError

HELP = "a train step's time, memory and loss, ours or that of Hugging Face's LLaVA in PyTorch"
# What a sweep may call by a flag's name.
SWEPT = {"tokens": "tokens", "micro-batch": "micro_batch", "layers": "layers", "pack": "pack"}
TINY = [
    "model.llm.hidden_size=64",
    "model.llm.intermediate_size=160",
    "model.llm.num_layers=4",
    "model.llm.num_heads=4",
    "model.llm.num_kv_heads=4",
    "model.llm.vocab_size=4480",
    "model.vision.image_size=28",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=64",
    "model.vision.num_layers=2",
    "model.vision.num_heads=2",
    "data.workers=0",
]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m neva_jax.bench train`."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="as in training; without it Llama-2 7B with CLIP ViT-L/14 at 224 px")
    add("--mesh-shape", metavar="SHAPE", help="as in training")
    add("--stage", choices=("pretrain", "finetune"), help="train the projector, or the language model too")
    add("--tokens", type=int, metavar="T", help="tokens of a sample, image tokens included (default: data.max_length)")
    add("--pack", type=int, default=1, metavar="N", help="samples in a row of N x T tokens (default: 1)")
    add("--micro-batch", type=int, metavar="N", help="train.micro_batch")
    add("--global-batch", type=int, metavar="N", help="train.global_batch (default: no accumulation)")
    add("--layers", type=int, metavar="L", help="layers of the language model")
    add("--precision", choices=("fp32", "bf16", "fp8_delayed", "fp8_current"), help="precision.compute")
    add("--data", choices=("synthetic", "jpeg", "config"), default="synthetic", help="see above (default: synthetic)")
    add("--steps", type=int, default=20, metavar="N", help="steps that are timed (default: 20)")
    add("--sweep", action="append", default=[], type=_sweep, metavar="NAME=A,B", help="a row for each value of tokens, "
        "micro-batch, layers, pack or a key of the configuration; several make all combinations")  # fmt: skip
    add("--limit", type=float, default=600, metavar="S", help="seconds that a row may take (default: 600)")
    add("--plan", action="store_true", help="also the memory that neva_jax.plan estimates")
    add("--profile", type=Path, metavar="DIR", help="a trace of 3 more steps in DIR, and the time of their kernels")
    add("--baseline", choices=("hf", "hf_checkpointing"), help="instead of ours: LlavaForConditionalGeneration in "
        "PyTorch, without and with gradient checkpointing")  # fmt: skip
    add("--tiny", action="store_true", help="a tiny model, to try a command on a CPU")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides, as in training")


def _sweep(text: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r"([a-z0-9_.-]+)=([^,]+(?:,[^,]+)*)", text)
    if match is None or (match[1] not in SWEPT and "." not in match[1]):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write it as NAME=A,B, with NAME one of {', '.join(SWEPT)} or a key as train.remat"
        )
    values = match[2].split(",")
    if match[1] in SWEPT and not all(value.isdecimal() and int(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: {match[1]} needs whole numbers above 0")
    return match[1], values


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each combination of the swept values.

    Raises:
      UserError: flags or configuration that cannot be used.
    """
    for name in ("tokens", "pack", "micro_batch", "global_batch", "layers", "steps", "limit"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    if options.baseline and (options.pack > 1 or options.data != "synthetic" or options.profile or options.plan):
        raise UserError("--baseline: goes with neither --pack, --data, --profile nor --plan")
    chosen = list(itertools.product(*map(_values, options.sweep)))
    runs = [_with(options, values) for values in chosen]
    described = [describe(configuration(run, None)) for run in runs]  # for its errors, before minutes of measuring
    if options.baseline and any(known["shortcuts"] for known in described):
        raise UserError("--baseline: has neither train.labelled_positions nor train.constant_prefix")
    for values, run, known in zip(chosen, runs, described, strict=True):
        row = _isolated(run)
        if "error" in row:
            impl = "hf_torch" if run.baseline else "neva_jax"
            row = {"bench": "train", "impl": impl, **known, "tokens_computed": run.tokens, **row}
        yield {**row, "sweep": dict(values)} if values else row


def _values(sweep: tuple[str, list[str]]) -> list[tuple[str, str]]:
    return [(sweep[0], value) for value in sweep[1]]


def _with(options: argparse.Namespace, chosen: tuple[tuple[str, str], ...]) -> argparse.Namespace:
    flags = {SWEPT[name]: int(value) for name, value in chosen if name in SWEPT}
    keys = [f"{name}={value}" for name, value in chosen if name not in SWEPT]
    return argparse.Namespace(**{**vars(options), **flags, "overrides": [*options.overrides, *keys]})


def configuration(options: argparse.Namespace, devices: int | None) -> Config:
    """What the flags and overrides describe; on `devices` devices, or as far as they do not matter.

    Raises:
      UserError: a key, value or file that cannot be used, or a mesh that does not divide.
    """
    flags = ["model.init_from=null", "model.allow_random_frozen=true"]
    if options.config is None:
        flags += ["model.llm.vocab_size=32008", "model.llm.vocab_multiple=128"]
    flags += TINY if options.tiny else []
    flags += [f"mesh.shape={options.mesh_shape}"] if options.mesh_shape else []
    if options.stage:
        flags += [f"model.llm.freeze={str(options.stage == 'pretrain').lower()}", "model.projector.freeze=false"]
    flags += [f"precision.compute={options.precision}"] if options.precision else []
    flags += [f"model.llm.num_layers={options.layers}"] if options.layers else []
    flags += [f"train.micro_batch={options.micro_batch}"] if options.micro_batch else []
    if options.pack > 1:
        flags += ["data.pack=true", f"data.images_per_row={options.pack}", f"data.segments_per_row={options.pack}"]
    config = load_config(options.config, [*flags, *options.overrides])
    length = (options.tokens or config.data.max_length) * options.pack
    sizes = parse_mesh_shape(config.mesh.shape, devices) if devices else {"data": 1, "fsdp": 1}
    batch = options.global_batch or config.train.micro_batch * sizes["data"] * sizes["fsdp"]
    flags += [f"data.max_length={length}", f"train.global_batch={batch}"]
    config = load_config(options.config, [*flags, *options.overrides])
    if config.model.llm.vocab_size is None:
        raise UserError("model.llm.vocab_size is not set; there is no tokenizer to take it from, so give it")
    check_numbers(config)
    if devices:
        check_mesh(config, sizes)
    return config


def _isolated(options: argparse.Namespace) -> dict[str, Any]:
    """The row of `_measure` in a process of its own, or a row with its `error`.

    Raises:
      UserError: the process found the configuration impossible.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_child, args=(options, answers))
    process.start()
    deadline = time.monotonic() + options.limit
    answer = None
    while answer is None and time.monotonic() < deadline:
        alive = process.is_alive()  # before asking: what it said last would be there
        try:
            answer = answers.get(timeout=0.5)
        except queue.Empty:
            if not alive:
                answer = "error", f"the process ended with exit status {process.exitcode}"
    if answer is None:
        answer = "error", f"more than {options.limit:g} s"
    process.join(10 if answer[0] == "row" else 0)
    if process.is_alive():
        process.kill()
        process.join()
    kind, value = answer
    if kind == "user":
        raise UserError(value)
    if kind == "row":
        return value
    return {"error": value, **conditions()}


def _child(options: argparse.Namespace, answers: multiprocessing.Queue) -> None:
    # Read when JAX first looks for devices, which is later than here.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if options.profile:  # see benchmarks.profile
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    try:
        answers.put(("row", _measure(options)))
    except UserError as error:
        answers.put(("user", str(error)))
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        memory = "RESOURCE_EXHAUSTED" in text or "OutOfMemory" in text
        answers.put(("error", f"out of memory: {text}"[:300] if memory else text[:300]))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.baseline:
        from neva_jax.benchmarks.hf_torch import measure as measure_theirs

        return measure_theirs(configuration(options, None), options.steps, options.baseline == "hf_checkpointing")
    import jax

    from neva_jax.benchmarks.steps import measure

    config = configuration(options, jax.device_count())
    return measure(
        config,
        steps=options.steps,
        segments=options.pack,
        data=options.data,
        plan=options.plan,
        profile=options.profile,
    )
