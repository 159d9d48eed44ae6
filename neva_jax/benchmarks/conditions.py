"""What a measurement must say about where it was made."""

import datetime
import os
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

from neva_jax.config import Config
from neva_jax.derived import trained_components

# trained components -> the stage's name; layers, width, width inside the MLP -> the model's
STAGES = {("projector",): "pretrain", ("projector", "llm"): "finetune"}
MODELS = {(32, 4096, 11008): "7B", (40, 5120, 13824): "13B"}
SHORTCUTS = ("labelled_positions", "constant_prefix")  # of train (training/shortcuts.py)


def conditions(*packages: str) -> dict:
    """Machine, date, and versions of `packages`; part of each row of a benchmark.

    load: the machine's load average when the row was made: others at work make a timing worthless.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe(config: Config) -> dict[str, Any]:
    """What is trained, on what, in which precision: the same for each implementation."""
    llm, vision, trained = config.model.llm, config.model.vision, trained_components(config.model)
    sizes = (llm.num_layers, llm.hidden_size, llm.intermediate_size)
    return {
        "stage": STAGES.get(trained, "+".join(trained)),
        "model": MODELS.get(sizes, "{} x {}/{}".format(*sizes)),
        "layers": llm.num_layers,
        "vision": f"{vision.kind} {vision.num_layers} x {vision.hidden_size}/{vision.patch_size}",
        "projector": config.model.projector.kind,
        "image_px": vision.image_size,
        "precision": config.precision.compute,
        "fp8": asdict(config.precision.fp8) if config.precision.compute.startswith("fp8") else None,
        "template": config.data.template,
        "packed": config.data.pack,
        "micro_batch": config.train.micro_batch,
        "global_batch": config.train.global_batch,
        "seed": config.run.seed,
        "shortcuts": {name: value for name in SHORTCUTS if (value := getattr(config.train, name))},
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
