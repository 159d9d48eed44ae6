"""How long a run takes to its first step: what a user waits for, Python's own start and imports included.

python -m neva_jax.bench start --config configs/pretrain_7b.yaml train.micro_batch=32 data.max_length=320

Made-up files and random weights are written first, as a checkpoint of all components. Then `python -m neva_jax.train`
begins from it, with an empty folder of compiled programs (`cold`) and with what that run left there (`warm`,
--repeats times). Each is ended when its log says that the first step is done; the figures are those of that line:
start_to_first_step_s, and first_step_s for the step itself. The checkpoint (checkpoint_bytes) is read from the page
cache where it fits there.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neva_jax.benchmarks.batches import with_made_up_files
from neva_jax.benchmarks.conditions import conditions, describe
from neva_jax.checks import check_numbers
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.errors import UserError
from neva_jax.training.checkpoint_meta import locate
from neva_jax.training.manifest import size_of

HELP = "how long a run takes from its start to its first step, with and without compiled programs"
FIRST = re.compile(r"step 1: the first, ([0-9.]+) s after the start; itself ([0-9.]+) s")
WHERE = re.compile(r"; mesh (\S+) on (.+); \w+$", re.MULTILINE)
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain")
RANDOM = ["model.init_from=null", "model.allow_random_frozen=true"]
# A checkpoint of all weights; a projector's moments are the smallest that a run has.
WEIGHTS = [
    *(*RANDOM, "checkpoint.contents=full"),
    *("model.vision.freeze=true", "model.projector.freeze=false", "model.llm.freeze=true"),
    *("train.steps=1", "optimizer.warmup_steps=0", "optimizer.constant_steps=0", "run.compile_cache=off"),
]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench start`."""
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help="as in training; its data and model.init_from are not used")
    add("--repeats", type=int, default=2, metavar="N", help="warm starts (default: 2)")
    add("--limit", type=float, default=600, metavar="S", help="seconds that a start may take (default: 600)")
    add("--dir", metavar="DIR", help="disk to write to; without it, the folder of temporary files")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides, as in training")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for the cold start, and one for each warm one.

    Raises:
      UserError: flags or configuration that cannot be used, or a run that fails; its last lines say why.
    """
    for name in ("repeats", "limit"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} must be above 0, not {getattr(options, name):g}")
    if options.dir is not None and not Path(options.dir).is_dir():
        raise UserError(f"--dir {options.dir}: no such directory")
    config = load_config(options.config, [*options.overrides, *RANDOM])
    check_numbers(config)
    with tempfile.TemporaryDirectory(prefix="neva_jax-start-", dir=options.dir) as name:
        folder = Path(name)
        arguments = ["--config", options.config, *options.overrides, *_made_up(config, folder)]
        _train([*arguments, *WEIGHTS], folder / "weights", options.limit, until=None)
        weights = locate(folder / "weights")
        arguments += [f"model.init_from={weights}", f"run.compile_cache={folder / 'compiled'}"]
        for i in range(options.repeats + 1):
            log = _train(arguments, folder / f"run_{i}", options.limit, until=FIRST)
            began, itself = map(float, FIRST.search(log).groups())
            mesh, device = WHERE.search(log).groups()
            yield {
                "bench": "start",
                "impl": "neva_jax",
                **describe(config),
                "remat": config.train.remat,
                "unroll": config.train.unroll,
                "mesh": mesh,
                "device": device,
                "workers": config.data.workers,
                "verify": config.checkpoint.verify,
                "checkpoint_bytes": size_of(weights),
                "cache": "warm" if i else "cold",
                "start_to_first_step_s": began,
                "first_step_s": itself,
                **conditions(*PACKAGES),
            }


def _made_up(config: Config, folder: Path) -> list[str]:
    """Overrides that train on made-up files in `folder`."""
    made = with_made_up_files(config, folder)
    (rows,) = made.data.train
    return [
        *(f"model.tokenizer={made.model.tokenizer}", f"data.train=[{{json: {rows.json}, images: {rows.images}}}]"),
        *("data.val=[]", f"data.on_long_row={made.data.on_long_row}", f"data.cache={made.data.cache}"),
        *("log.tensorboard=false", "log.wandb=off"),
    ]


def _train(arguments: list[str], run_dir: Path, limit: float, until: re.Pattern[str] | None) -> str:
    """Runs `train` to its end, or until its log has the line; returns the log.

    Raises:
      UserError: it ends otherwise, or takes more than `limit` seconds.
    """
    said, log, deadline = run_dir.with_suffix(".txt"), run_dir / "log.txt", time.monotonic() + limit
    with said.open("w") as output:
        command = [sys.executable, "-m", "neva_jax.train", *arguments, f"run.dir={run_dir}"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                if until is not None and log.is_file() and until.search(text := log.read_text(encoding="utf-8")):
                    return text
        finally:
            status = process.poll()
            process.kill()
            process.wait()
    if until is None and status == 0:
        return log.read_text(encoding="utf-8")
    why = f"took more than {limit:g} s (--limit)" if status is None else f"ended with exit status {status}"
    last = "\n".join(said.read_text(encoding="utf-8").splitlines()[-5:])
    raise UserError(f"train {why}:\n{last}")
