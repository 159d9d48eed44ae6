"""The plan as text and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from neva_jax.config import MESH_AXES, Config
from neva_jax.derived import frozen_components, trained_components
from neva_jax.errors import UserError
from neva_jax.planning.collectives import Collective
from neva_jax.planning.compiled import Compiled
from neva_jax.planning.knobs import Knob, shape_text
from neva_jax.planning.memory import GIB, Estimate, Memory, estimate
from neva_jax.planning.speed import Machine, Speed, predict
from neva_jax.planning.trace import depends_on_te

RESERVED_GIB = 1.0  # CUDA's context and the libraries' workspaces, which are not XLA's
XLA_SHARE = 0.75  # of the memory that XLA takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
ERROR = 0.1  # how far an estimate may lie from what a GPU measures

WORDS = {
    "masters": "trained parameters, fp32",
    "frozen": "frozen parameters",
    "moments": "Adam's moments",
    "average": "moving average of the trained, fp32",
    "batch": "batch",
    "kept": "activations kept for the backward pass",
    "gradients": "gradients, fp32",
    "temporary": "temporary buffers at the peak",
}


@dataclass(frozen=True)
class Layout:
    """One mesh of a sweep; `reason` says why it cannot be, and then there is no plan."""

    sizes: dict[str, int]
    plan: Estimate | None
    speed: Speed | None
    reason: str


def sweep(config: Config, devices: int, machine: Machine) -> list[Layout]:
    """Every mesh of that many devices, fastest first, whether it fits into memory or not; at the end what cannot be."""
    found = []
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            sizes = dict(zip(MESH_AXES, (data, fsdp, devices // data // fsdp), strict=True))
            try:
                plan = estimate(config, sizes)
            except UserError as error:
                found.append(Layout(sizes, None, None, str(error)))
                continue
            found.append(Layout(sizes, plan, predict(plan, machine), ""))
    return sorted(found, key=_rank)


def _rank(layout: Layout) -> tuple[float, float]:
    """Fastest first; of equals, the one that sends least."""
    return (math.inf, 0.0) if layout.speed is None else (layout.speed.seconds, layout.speed.overlapped)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def limit_bytes(memory_gib: float) -> float:
    """What XLA can have of a device's memory."""
    return (memory_gib - RESERVED_GIB) * GIB


def verdict(plan: Estimate, memory_gib: float, knobs: Sequence[Knob]) -> list[str]:
    """Fits or not, by how much, and what would help."""
    total, limit = plan.memory.total, limit_bytes(memory_gib)
    left = limit - total
    of = f"{memory_gib:g} GiB ({RESERVED_GIB:g} GiB of them for CUDA and its libraries)"
    if left < 0:
        lines = [f"does not fit: {gib(-left)} more than {of}"]
        helps = [knob for knob in knobs if knob.saved >= -left]
        if helps:
            lines.append(f"helps most: {knobs[0].override} saves {gib(knobs[0].saved)}; enough alone: " + _names(helps))
        elif knobs:
            lines.append(f"helps most: {knobs[0].override} saves {gib(knobs[0].saved)}, which alone is not enough")
        else:
            lines.append("none of the settings tried helps: take more devices on fsdp or tensor")
        return lines
    lines = [f"fits: {gib(left)} left of {of}"]
    if left < ERROR * total:
        lines.append(f"tight: measurements lie up to {ERROR:.0%} from estimates")
    if total > XLA_SHARE * memory_gib * GIB:
        share = min(math.ceil((total / GIB + 1) / memory_gib * 100) / 100 + 0.02, 0.98)
        lines.append(
            f"XLA takes {XLA_SHARE:.0%} of the memory unless told otherwise: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f}"
        )
    return lines


def _names(knobs: Sequence[Knob]) -> str:
    shown = ", ".join(knob.override for knob in knobs[:4])
    return shown + (f" and {len(knobs) - 4} more" if len(knobs) > 4 else "")


def gib(size: float) -> str:
    """`12.3 GiB`, or MiB where it is less than a tenth."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def heading(plan: Estimate) -> list[str]:
    """What is planned."""
    config = plan.config
    counts = parameter_counts(plan)
    trained, frozen = trained_components(config.model), frozen_components(config.model)
    data, train = config.data, config.train
    lines = [
        f"{'+'.join(trained)} trained ({sum(counts[n] for n in trained) / 1e9:.3f} B), "
        f"{'+'.join(frozen) or 'nothing'} frozen ({sum(counts[n] for n in frozen) / 1e9:.3f} B); "
        f"{config.precision.compute}, attention {plan.backend}, remat {remat_text(plan)}",
        f"mesh {shape_text(plan.sizes)} ({math.prod(plan.sizes.values())} devices); {train.global_batch} rows of "
        f"{data.max_length} tokens per step: {plan.accumulate} x {train.micro_batch} for each of "
        f"{plan.sizes['data'] * plan.sizes['fsdp']} groups",
    ]
    if config.precision.compute.startswith("fp8"):
        lines.append(
            "FP8 is planned like bf16: a frozen weight takes 2 bytes either way (FP8 in two layouts, or bf16); "
            "activations kept in FP8 may take less"
        )
    if depends_on_te(config):
        lines.append(
            "packed rows are planned with XLA's attention, which needs the most; where Transformer Engine is installed "
            "training takes its kernel: model.attention=te plans that"
        )
    return lines


def remat_text(plan: Estimate) -> str:
    """`dots`, or `full (block, 8 layers)`."""
    train = plan.config.train
    plain = train.remat == "none" or (train.remat_method == "uniform" and train.remat_layers == 1)
    return train.remat if plain else f"{train.remat} ({train.remat_method}, {train.remat_layers} layers)"


def parameter_counts(plan: Estimate) -> dict[str, int]:
    """Component -> its parameters, over all devices."""
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in plan.layout.items()}


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns: the first `left` to the left, the others to the right. Rows may end early."""
    width = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(len(row) for row in rows))]
    aligned = [
        "  ".join(cell.ljust(width[i]) if i < left else cell.rjust(width[i]) for i, cell in enumerate(row))
        for row in rows
    ]
    return [line.rstrip() for line in aligned]


def _parts(memories: Sequence[Memory]) -> list[str]:
    """Names of the parts to show: all, but an average only where there is one."""
    return [name for name in WORDS if name != "average" or any(memory.average for memory in memories)]


def memory_table(memory: Memory, compiled: Compiled | None, beside: Memory | None) -> list[str]:
    """One line per part. `beside` is the estimate for the platform that compiled, whose sums stand next to XLA's."""
    rows = [["per device", "GiB"]]
    rows += [[WORDS[name], f"{getattr(memory, name) / GIB:.2f}"] for name in _parts([memory])]
    rows.append(["peak", f"{memory.total / GIB:.2f}"])
    lines = table(rows)
    if compiled is None or beside is None:
        return lines
    parts = [
        ("arguments", beside.arguments, compiled.arguments),
        ("results", 0, compiled.results),
        ("temporary, kept and gradients", beside.total - beside.arguments, compiled.temporary),
        ("sum", beside.total, compiled.total),
    ]
    rows = [[f"compiled for {compiled.platform}, GiB", "estimate", "XLA", "ratio"]]
    for name, ours, theirs in parts:
        ratio = f"{ours / theirs:.3f}" if theirs else "-"
        rows.append([name, f"{ours / GIB:.2f}", f"{theirs / GIB:.2f}", ratio])
    return [*lines, "", *table(rows)]


def collectives_dict(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """What a compiled step sends, by kind and mesh axes: how often it runs, bytes that a device sends; most first."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, " ".join(one.axes)), []).append(one)
    rows = [
        {"kind": kind, "over": over, "runs": sum(one.times for one in same), "sent": sum(one.sent for one in same)}
        for (kind, over), same in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["sent"])


def collectives_table(found: Sequence[Collective], machine: Machine) -> list[str]:
    """The same, and the time that NVLink takes for it; nothing where a step sends nothing."""
    if not found:
        return []
    rows = [["sent by the compiled step", "over", "runs", "GB", "ms by NVLink"]]
    for row in collectives_dict(found):
        took = row["sent"] / machine.nvlink
        rows.append([row["kind"], row["over"], str(row["runs"]), f"{row['sent'] / 1e9:.3f}", f"{took * 1e3:.1f}"])
    return ["", *table(rows)]


def knob_table(knobs: Sequence[Knob]) -> list[str]:
    """One line per setting that saves memory."""
    if not knobs:
        return []
    rows = [["what would save memory", "GiB", "time per sample", ""]]
    rows += [[knob.override, f"{knob.saved / GIB:.2f}", f"x {knob.time_ratio:.2f}", knob.changes] for knob in knobs]
    aligned = table([row[:3] for row in rows])
    return [f"{line}  {row[3]}".rstrip() for line, row in zip(aligned, rows, strict=True)]


def speed_lines(speed: Speed) -> list[str]:
    """Operations, transfers and time."""
    flops = speed.flops
    lines = [
        f"per sample {flops.model / 1e12:.2f} TFLOP (language model {flops.llm / 1e12:.2f}, head "
        f"{flops.head / 1e12:.2f}, encoder {flops.vision / 1e12:.2f}, projector {flops.projector / 1e12:.2f}) + "
        f"{flops.recomputed / 1e12:.2f} computed again",
        f"step at least {speed.seconds * 1e3:.0f} ms ({speed.samples / speed.seconds:.1f} samples/s): computing "
        f"{speed.compute * 1e3:.0f} ms, transfers beside it {speed.overlapped * 1e3:.0f} ms, before it "
        f"{speed.exposed * 1e3:.0f} ms",
    ]
    if speed.transfers:
        rows = [["sent by a device per step", "axis", "GiB", "ms"]]
        rows += [
            [f"{t.kind} of {t.what}", t.axis, f"{t.size / GIB:.2f}", f"{t.seconds * 1e3:.1f}"] for t in speed.transfers
        ]
        lines += ["", *table(rows, left=2)]
    return lines


def sweep_table(layouts: Sequence[Layout], memory_gib: float) -> list[str]:
    """One line per mesh that can be, those that fit first; the others are counted by what stands against them."""
    rows = [["data", "fsdp", "tensor", "GiB", "fits", "step ms", "samples/s", *(f"{a} GiB" for a in MESH_AXES)]]
    possible = [layout for layout in layouts if layout.plan is not None and layout.speed is not None]
    for fitting in (True, False):
        for layout in possible:
            total = layout.plan.memory.total
            if (total <= limit_bytes(memory_gib)) != fitting:
                continue
            sent = [sum(t.size for t in layout.speed.transfers if t.axis == axis) / GIB for axis in MESH_AXES]
            rows.append(
                [
                    *(str(layout.sizes[axis]) for axis in MESH_AXES),
                    f"{total / GIB:.1f}",
                    "yes" if fitting else "no",
                    f"{layout.speed.seconds * 1e3:.0f}",
                    f"{layout.speed.samples / layout.speed.seconds:.1f}",
                    *(f"{size:.2f}" for size in sent),
                ]
            )
    lines = table(rows, left=0) if possible else []
    refused: dict[str, list[str]] = {}
    for layout in layouts:
        if layout.reason:
            refused.setdefault(layout.reason.split("=")[0], []).append(layout.reason)
    for reasons in refused.values():
        lines.append(f"{len(reasons)} mesh{'es' * (len(reasons) > 1)} not possible, as: {reasons[0]}")
    return lines


def layers_table(plans: Sequence[Estimate], memory_gib: float) -> list[str]:
    """Memory against the number of layers."""
    parts = _parts([plan.memory for plan in plans])
    rows = [["layers", "GiB", *parts, "fits"]]
    for plan in plans:
        memory = plan.memory
        fits = memory.total <= limit_bytes(memory_gib)
        rows.append(
            [
                str(plan.config.model.llm.num_layers),
                f"{memory.total / GIB:.1f}",
                *(f"{getattr(memory, name) / GIB:.2f}" for name in parts),
                "yes" if fits else "no",
            ]
        )
    return table(rows, left=0)


def plan_dict(plan: Estimate, memory_gib: float, speed: Speed) -> dict[str, Any]:
    """A plan as JSON: bytes, seconds, operations."""
    return {
        "mesh": plan.sizes,
        "accumulate": plan.accumulate,
        "attention": plan.backend,
        "remat": remat_text(plan),
        "layers": plan.config.model.llm.num_layers,
        "parameters": parameter_counts(plan),
        "memory": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "limit": limit_bytes(memory_gib),
        "fits": plan.memory.total <= limit_bytes(memory_gib),
        "largest_kept": [{"shape": shape, "dtype": dtype, "bytes": size} for shape, dtype, size in plan.largest_kept],
        "step_seconds": speed.seconds,
        "compute_seconds": speed.compute,
        "samples_per_s": speed.samples / speed.seconds,
        "flops_per_sample": {**dataclasses.asdict(speed.flops), "model": speed.flops.model},
        "transfers": [dataclasses.asdict(transfer) for transfer in speed.transfers],
    }
