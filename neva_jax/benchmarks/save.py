"""Saving and restoring: how long training waits for a checkpoint, and how long it takes until it is there.

    projector   what a pretraining run saves: projector and its Adam moments
    full        what full finetuning saves: projector, language model, and their moments (fp32: 12 bytes a parameter)

Without --config the model is tiny, which shows what a save costs whatever its size. With the shapes of a 7B on a GPU:

    python -m neva_jax.bench save --config configs/finetune_7b.yaml --states projector,full --dir /fast/disk

The host's memory is pinned first, as `train` does (reserve_s; rows that do not say it had it in blocked_ms_first).
Values are random (a checkpoint is compressed; zeros would cost nothing). Files are read back from the page cache where
they fit there.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging

from neva_jax.benchmarks.conditions import conditions
from neva_jax.benchmarks.synthetic import write_tokenizer
from neva_jax.checks import check_mesh, check_numbers
from neva_jax.config import COMPONENTS, Config
from neva_jax.configfile import load_config
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import parse_mesh_shape
from neva_jax.errors import UserError
from neva_jax.parallel.mesh import make_mesh
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, verify
from neva_jax.training.host_memory import Reservation, allow_large_saves
from neva_jax.training.manifest import size_of
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.retention import remove
from neva_jax.training.setup import abstract_optimizer, abstract_parameters, with_vocabulary

HELP = "how long training waits for a checkpoint, writing, verifying and restoring it"
STATES = {"projector": ("projector",), "full": ("projector", "llm")}
TINY = [
    *("model.vision.image_size=32", "model.vision.patch_size=8", "model.vision.hidden_size=32"),
    *("model.vision.intermediate_size=64", "model.vision.num_heads=4", "model.vision.num_layers=2"),
    *("model.llm.hidden_size=64", "model.llm.intermediate_size=128", "model.llm.num_heads=4", "model.llm.num_layers=2"),
    "model.allow_random_frozen=true",
]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench save`."""
    parser.add_argument("--config", metavar="FILE", help="whose model and optimizer; without it, a tiny model")
    parser.add_argument("--mesh-shape", metavar="SHAPE", default="fsdp=-1", help="as data=2,tensor=4 (fsdp=-1)")
    parser.add_argument("--states", default="projector,full", help="any of projector and full, comma-separated")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="saves after a first one (3); the disk holds one at a time"
    )
    parser.add_argument("--dir", metavar="DIR", help="disk to write to; without it, the folder of temporary files")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as model.llm.num_layers=16")


def rows(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each state.

    Raises:
      UserError: a state that is not one, a configuration that contradicts itself, or a folder that is not there.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    allow_large_saves()
    names = options.states.split(",")
    if unknown := [name for name in names if name not in STATES]:
        raise UserError(f"--states {options.states}: {unknown[0]} is none of {', '.join(STATES)}")
    if options.repeats < 0:
        raise UserError(f"--repeats {options.repeats}: must be at least 0")
    if options.dir is not None and not Path(options.dir).is_dir():
        raise UserError(f"--dir {options.dir}: no such directory")
    given = [] if options.config else TINY
    config = load_config(options.config, [*given, *options.overrides, f"mesh.shape={options.mesh_shape}"])
    check_numbers(config)
    with tempfile.TemporaryDirectory(prefix="neva_jax-save-", dir=options.dir) as folder:
        write_tokenizer(Path(folder) / "tokenizer.model")
        tokenizer = Tokenizer.from_file(Path(folder) / "tokenizer.model")
        config = with_vocabulary(config, tokenizer)
        for name in names:
            yield _row(name, config, tokenizer, Path(folder) / name, options.repeats)


def _row(name: str, config: Config, tokenizer: Tokenizer, folder: Path, repeats: int) -> dict:
    trained = STATES[name]
    parts = {part: dataclasses.replace(getattr(config.model, part), freeze=part not in trained) for part in COMPONENTS}
    sizes = parse_mesh_shape(config.mesh.shape, jax.device_count())
    train = dataclasses.replace(  # no rows are read: any number of devices will do
        config.train, global_batch=config.train.micro_batch * sizes["data"] * sizes["fsdp"]
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **parts), train=train)
    check_mesh(config, sizes)
    mesh = make_mesh(sizes)
    params = {part: leaf for part, leaf in abstract_parameters(config, mesh)[1].items() if part in trained}
    moments = abstract_optimizer(make_optimizer(config.optimizer, config.train.steps), params, mesh)
    begun = time.monotonic()
    with Reservation((params, moments)) as reservation:
        reservation.wait()
    reserved = time.monotonic() - begun
    if reservation.said:
        _say(name, reservation.said)
    state = _random((params, moments))
    _say(name, "is on the device")
    waited, total = [], []
    with Checkpoints(folder, 1) as checkpoints:
        for step in range(1, repeats + 2):
            if step > 1:  # so that a disk need not hold two
                remove(checkpoints.directory / str(step - 1))
            begun = time.monotonic()
            checkpoints.save(step, *state, {"samples": step}, Meta(step, config, trained, None, tokenizer))
            waited.append(checkpoints.blocked * 1000)
            _say(name, f"save {step} held training up for {waited[-1]:.0f} ms")
            checkpoints.wait()
            total.append(time.monotonic() - begun)
            _say(name, f"save {step} was complete after {total[-1]:.1f} s")
        del state
        begun = time.monotonic()
        jax.block_until_ready(checkpoints.restore(step, params, moments))
        restored = time.monotonic() - begun
        _say(name, f"restored in {restored:.1f} s")
        step_dir = checkpoints.directory / str(step)
        begun = time.monotonic()
        verify(step_dir, "full")
        verified = time.monotonic() - begun
        size = size_of(step_dir)
    leaves = jax.tree.leaves((params, moments))
    llm = config.model.llm
    return {
        "bench": "save",
        "impl": "neva_jax",
        "state": name,
        "model": f"llm {llm.num_layers} x {llm.hidden_size}, {config.model.projector.kind}",
        "mesh": ",".join(f"{axis}={count}" for axis, count in sizes.items()),
        "device": jax.devices()[0].device_kind,
        "arrays": len(leaves),
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "bytes": size,
        "reserve_s": round(reserved, 3),
        "blocked_ms": round(statistics.median(waited[1:]), 2) if repeats else None,
        "blocked_ms_max": round(max(waited[1:]), 2) if repeats else None,
        "blocked_ms_first": round(waited[0], 2),
        "total_s": round(statistics.median(total[1:]), 3) if repeats else None,
        "total_s_first": round(total[0], 3),
        "restore_s": round(restored, 3),
        "verify_s": round(verified, 3),
        "repeats": repeats,
        **conditions("jax", "orbax-checkpoint", "xxhash"),
    }


def _say(state: str, news: str) -> None:
    """A large state takes minutes, and a run of this that is cut off leaves no row: what is known is said at once."""
    print(f"{state}: {news}", file=sys.stderr, flush=True)


def _random(abstract: Any) -> Any:
    """Random arrays on the shards of `abstract`."""
    leaves, tree = jax.tree.flatten(abstract)

    def draw(rng: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(rng, len(leaves))
        return [
            jax.random.normal(key, leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]

    made = jax.jit(draw, out_shardings=[leaf.sharding for leaf in leaves])(jax.random.key(0))
    return jax.block_until_ready(jax.tree.unflatten(tree, made))
