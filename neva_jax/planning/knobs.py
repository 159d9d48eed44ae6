"""What would help: each setting that saves memory is tried, and what it saves and costs is computed like the plan."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neva_jax.checks import check_numbers
from neva_jax.config import Config
from neva_jax.data.tiles import tiles_per_row
from neva_jax.derived import all_unrolled, frozen_components, image_tokens, layers_kept_whole
from neva_jax.errors import UserError
from neva_jax.planning.memory import Estimate, estimate
from neva_jax.planning.speed import Machine, predict
from neva_jax.planning.trace import depends_on_te


@dataclass(frozen=True)
class Knob:
    """One change: the override that makes it, bytes saved per device, and the step's time afterwards over that before.

    changes: what else it means, in words; empty where the run computes the same.
    """

    override: str
    saved: int
    time_ratio: float
    changes: str


def knobs(plan: Estimate, machine: Machine) -> list[Knob]:
    """Every change that saves memory, the most first; those that the model or the mesh cannot have are left out."""
    before = predict(plan, machine).seconds
    found = []
    for changed, sizes, override, changes in _candidates(plan):
        try:
            check_numbers(changed)
            other = estimate(changed, sizes)
        except UserError:
            continue
        saved = plan.memory.total - other.memory.total
        if saved > 0:
            after = predict(other, machine)
            per_row = before / plan.config.train.global_batch
            found.append(Knob(override, saved, after.seconds / after.samples / per_row, changes))
    return sorted(found, key=lambda knob: -knob.saved)


def _candidates(plan: Estimate) -> Iterator[tuple[Config, dict[str, int], str, str]]:
    """(changed configuration, mesh sizes, override, what else it means)."""
    config, sizes = plan.config, plan.sizes
    train, groups = config.train, sizes["data"] * sizes["fsdp"]

    def change(section: str, changes: str = "", **values: Any) -> tuple[Config, dict[str, int], str, str]:
        changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
        shown = " ".join(f"{section}.{name}={str(value).lower()}" for name, value in values.items())
        return changed, sizes, shown, changes

    # Unrolled layers that are recomputed save less, if anything: XLA keeps little of them anyway.
    loop = {"unroll": 1} if all_unrolled(config) else {}
    if sizes["fsdp"] > 1 and layers_kept_whole(config) and (train.remat_method, train.remat_layers) == ("uniform", 1):
        yield change("train", "weights are gathered twice", remat="dots")
    for policy in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[train.remat]:
        yield change("train", remat=policy, **loop)
    if train.remat != "none" and train.remat_method == "block":
        yield change("train", remat_method="uniform", remat_layers=1)
    elif train.remat != "none" and train.remat_layers > 1:
        yield change("train", remat_layers=1)
    if train.micro_batch % 2 == 0:
        yield change("train", micro_batch=train.micro_batch // 2)
    if plan.accumulate > 1:
        yield change("train", "a smaller batch: no second copy of gradients", global_batch=train.micro_batch * groups)
    if train.unroll > 1:
        yield change("train", unroll=1)
    yield change("train", loss_chunk=max(min(train.loss_chunk, config.data.max_length) // 2, 1))
    text = config.data.max_length - tiles_per_row(config) * image_tokens(config.model)
    if text > 1:
        length = config.data.max_length - text // 2
        yield change("data", "longer rows are bad rows", max_length=length)
    if config.precision.frozen == "fp32" and frozen_components(config.model):
        yield change("precision", "frozen weights rounded to bf16", frozen="bf16")
    if plan.backend == "xla" and config.model.attention == "xla":
        yield change("model", "the kernel that a GPU has", attention="auto")
    if depends_on_te(config):
        yield change("model", "as auto does where Transformer Engine is installed", attention="te")
    for name in ("zero1", "sequence_parallel"):
        if not getattr(config.mesh, name):
            yield change("mesh", **{name: True})
    yield from _meshes(config, sizes)


def _meshes(config: Config, sizes: dict[str, int]) -> Iterator[tuple[Config, dict[str, int], str, str]]:
    """Two more ways on fsdp or tensor: taken from data where it has them, else with twice the devices."""
    for axis in ("fsdp", "tensor"):
        doubled = {**sizes, axis: 2 * sizes[axis]}
        if sizes["data"] % 2 == 0:
            yield config, {**doubled, "data": sizes["data"] // 2}, _shape({**doubled, "data": sizes["data"] // 2}), ""
            continue
        batch = config.train.global_batch * (2 if axis == "fsdp" else 1)
        larger = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=batch))
        words = "twice the devices" + (", and global_batch" if axis == "fsdp" else "")
        yield larger, doubled, _shape(doubled), words


def _shape(sizes: dict[str, int]) -> str:
    return f"mesh.shape={shape_text(sizes)}"


def shape_text(sizes: dict[str, int]) -> str:
    """`data=2,tensor=4`; axes of one device are left out."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
