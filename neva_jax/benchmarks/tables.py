"""The tables of docs/performance.md, from rows of `bench train` and `bench attention`.

A table is a function: rows -> Markdown. What was not measured says so; of several rows that fit, the fastest is shown.
"""

import datetime
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Row = dict[str, Any]
NOT_MEASURED = "not measured"
CURVE = 50  # losses from which on a row is a curve
LAYOUT = ("mesh", "sequence_parallel", "overlap")
SESSION = 2.0  # hours within which rows are of one session: cards of one kind differ by some percent

# The NeVA workflow's figures, samples/s/GPU on H100 NVL 94 GB (H800 where named):
# stage, model, precision, mesh, micro batch, global batch, figure, remark
WORKFLOW = (
    ("pretrain", "7B", "bf16", {}, 32, 128, 29.19, ""),
    ("pretrain", "7B", "fp8", {}, 32, 128, 52.52, ""),
    ("pretrain", "7B", "bf16", {"data": 2}, 32, 256, 29.09, ""),
    ("pretrain", "7B", "fp8", {"data": 2}, 32, 256, 51.94, ""),
    ("pretrain", "7B", "bf16", {"data": 2}, 32, 128, 22.55, "data against tensor"),
    ("pretrain", "7B", "bf16", {"tensor": 2}, 32, 128, 22.67, "data against tensor"),
    ("pretrain", "7B", "bf16", {"data": 2}, 64, 512, 22.74, "data against tensor"),
    ("pretrain", "7B", "bf16", {"tensor": 2}, 64, 512, 22.83, "data against tensor"),
    ("finetune", "7B", "bf16", {"tensor": 2}, 4, 32, 6.5, ""),
    ("finetune", "7B", "fp8", {"tensor": 2}, 4, 32, 7.5, ""),
    ("pretrain", "7B", "bf16", {}, None, None, 24.24, "H800"),
    ("pretrain", "13B", "bf16", {}, None, None, 14.13, "H800"),
)
# Layers -> GB per GPU of the workflow's finetune, tensor=2, micro batch 4; 32 layers ran out of 80 GB
WORKFLOW_MEMORY = {16: 34.7, 20: 42.4, 24: 49.9, 30: 61.4, 32: None}


def workflow(rows: list[Row]) -> str:
    """The workflow's throughput, ours beside it."""
    lines = []
    for stage, model, precision, mesh, micro, batch, figure, remark in WORKFLOW:
        fits = [
            row
            for row in ours(rows)
            if (row["stage"], row["model"], kind(row)) == (stage, model, precision)
            and row["mesh"] == mesh
            and (not mesh or micro == row["micro_batch"])
        ]
        fits = [row for row in fits if row["global_batch"] == batch] or fits
        where = _mesh(mesh)
        given = [stage, model, precision, where, "–" if micro is None else f"{micro}/{batch}", _figure(figure, remark)]
        found = list(best_of_each(fits, "gpu", "tokens_computed"))
        lines += [
            [
                *given,
                f"**{row['samples_per_s_per_gpu']:.1f}**",
                f"{row['micro_batch']}/{row['global_batch']}",
                _tokens(row),
                row["image_px"],
                card(row),
                _percent(row["utilisation"]),
            ]
            for row in found
        ] or [[*given, NOT_MEASURED, "", "", "", "", ""]]
    head = "stage | model | precision | mesh | theirs: micro/global | theirs | ours | ours: micro/global | tokens useful/computed | px | card | of the limit"  # noqa: E501
    return _table(head, lines)


def baseline(rows: list[Row]) -> str:
    """Hugging Face's LLaVA in PyTorch against ours, on the same card and shapes."""
    lines = []
    theirs = [row for row in rows if row.get("impl") == "hf_torch" and "error" not in row]
    same = ("gpu", "stage", "model", "tokens_computed", "image_px")
    for key in sorted({tuple(row[name] for name in same) for row in theirs}):
        here = [row for row in theirs if tuple(row[name] for name in same) == key]
        mine = [row for row in ours(rows) if tuple(row[name] for name in same) == key and row["gpus"] == 1]
        plain = _best([row for row in here if row["remat"] == "none"])
        checkpointing = _best([row for row in here if row["remat"] == "full"])
        for precision in ("bf16", "fp8"):
            row = _best([row for row in mine if kind(row) == precision])
            line = [card(here[0]), key[1], key[2], f"{key[3]:g}", key[4], precision]
            line += [_rate(row), _rate(plain), _rate(checkpointing)]
            line += [_ratio(row, plain), _ratio(row, checkpointing)]
            lines.append(line)
    head = "card | stage | model | tokens | px | ours in | ours | theirs | theirs, checkpointing | ratio | ratio to checkpointing"  # noqa: E501
    return _table(head, lines or [[NOT_MEASURED, *[""] * 10]])


def memory(rows: list[Row]) -> str:
    """Peak memory per GPU against the number of layers; the workflow's finetune beside it."""
    lines = []
    fits = [row for row in rows if row.get("impl") == "neva_jax" and row.get("bench") == "train" and _of_7b(row)]
    fits = [row for row in fits if not row.get("shortcuts")]
    fits = [row for row in fits if row["stage"] == "finetune" and (row.get("peak_gib") or "error" in row)]
    groups = sorted({_memory_group(row) for row in fits}) or [None]
    for group in groups:
        here = {row["layers"] for row in fits if _memory_group(row) == group}
        shown = here if len(here) == 1 else here | set(WORKFLOW_MEMORY)  # one size is not set beside a curve
        for layers in sorted(shown):
            theirs = WORKFLOW_MEMORY.get(layers, "–")
            found = [row for row in fits if _memory_group(row) == group and row["layers"] == layers]
            measured = [row["peak_gib"] for row in found if row.get("peak_gib")]
            gib = f"{min(measured):.1f}" if measured else found[0]["error"][:40] if found else NOT_MEASURED
            lines.append([*(group or [""] * 5), layers, gib, "out of memory" if theirs is None else theirs])
    head = "card | mesh | precision | micro batch | remat | layers | ours, GiB | workflow, GB (tensor=2, micro batch 4)"
    return _table(head, lines)


def cost(rows: list[Row]) -> str:
    """Step time and memory against size, and how steeply they grow."""
    lines = []
    for name, points in sweeps(rows).items():
        for i, (size, row) in enumerate(points):
            grown = ""
            if i:
                before_size, before = points[i - 1]
                grown = f"{math.log(row['step_ms'] / before['step_ms']) / math.log(size / before_size):.2f}"
            lines.append([*name, f"{size:g}", _ms(row), _rate(row), _gib(row), grown])
    head = "card | stage | precision | remat | what grows | to | step, ms | samples/s | peak, GiB | exponent of the step's time"  # noqa: E501
    return _table(head, lines or [[NOT_MEASURED, *[""] * 9]])


def layouts(rows: list[Row]) -> str:
    """Meshes of several GPUs against the fastest row of one GPU: same card, shapes and session.

    Exposed communication is that of the fastest traced row of the mesh, which may be of another session.
    """
    lines = []
    several = [row for row in ours(rows) if row["gpus"] > 1]
    alone = [row for row in ours(rows) if row["gpus"] == 1 and "sweep" not in row]
    key = ("gpu", "stage", "model", "precision", "micro_batch", "global_batch", "tokens_computed")
    each = best_of_each(several, *key, *LAYOUT)
    shapes = ("gpu", "stage", "model", "precision", "tokens_computed", "image_px", "micro_batch", "packed")
    traced = [row for row in several if "exposed_communication_ms" in row]
    for row in sorted(each, key=lambda row: (*map(str, map(row.get, key)), layout(row))):
        single = _fastest_like(row, alone, shapes)
        trace = _best(other for other in traced if all(other.get(name) == row.get(name) for name in (*key, *LAYOUT)))
        lines.append(
            [
                f"{row['gpus']} x {card(row)}",
                row["stage"],
                row["model"],
                row["precision"],
                layout(row),
                f"{row['micro_batch']}/{row['global_batch']}",
                f"{row['tokens_computed']:g}",
                _ms(row),
                f"{row['samples_per_s_per_gpu']:.1f}",
                _gib(row),
                NOT_MEASURED if trace is None else f"{trace['exposed_communication_ms']:.1f}",
                NOT_MEASURED
                if single is None
                else f"{row['samples_per_s_per_gpu'] / single['samples_per_s_per_gpu']:.3f}",
            ]
        )
    head = "cards | stage | model | precision | mesh | micro/global | tokens | step, ms | samples/s/GPU | peak per GPU, GiB | exposed communication, ms | efficiency"  # noqa: E501
    return _table(head, lines or [[NOT_MEASURED, *[""] * 11]])


def flags(rows: list[Row]) -> str:
    """What settings of XLA and NCCL change: each row that has some, against the fastest like it that has none."""
    lines = []
    same = ("gpu", "gpus", *LAYOUT, "stage", "model", "precision", "backend", "remat", "unroll")
    same += ("tokens_computed", "image_px", "micro_batch", "packed", "data")
    plain = [row for row in ours(rows) if not _flags(row)]
    for row in _measured(rows):
        if not (given := _flags(row)) or row.get("shortcuts") or "kernels_ms" in row:
            continue
        what = f"{row['stage']} {row['model']}, {row['precision']}, {layout(row)}"
        without = _fastest_like(row, plain, same)
        before = NOT_MEASURED if without is None else _ms(without)
        lines.append([card(row), what, given, _ms(row), before, _ratio(row, without), _gib(row)])
    head = "card | step | settings | step, ms | without, ms | samples/s against without | peak per GPU, GiB"
    return _table(head, lines or [[NOT_MEASURED, *[""] * 6]])


def losses(rows: list[Row]) -> str:
    """Final losses of several runs, against the bf16 one on the fewest GPUs."""
    lines = []
    for name, group in curves(rows).items():
        wanted = final_loss(group[0])
        for row in group:
            last = final_loss(row)
            lines.append([*name, label(row), len(row["losses"]), f"{last:.4f}", f"{100 * (last / wanted - 1):+.2f} %"])
    head = "card | stage | model | tokens | rows of a step | run | steps | final loss | against the first"
    return _table(head, lines or [[NOT_MEASURED, *[""] * 8]])


def kernels(rows: list[Row]) -> str:
    """Where each millisecond goes: the kernels of a step by class, and by scope where the trace tells it."""
    lines = []
    traced = [row for row in ours(rows) if "kernels_ms" in row]
    for row in best_of_each(traced, "gpu", "stage", "model", "precision", "remat", *LAYOUT):
        what = f"{card(row)}, {row['stage']} {row['model']}, {row['precision']}, {row['remat']}"
        what += f", {layout(row)}" if row["gpus"] > 1 else ""
        bound = row["tflop_per_sample"] * row["samples_per_step"] / row["gpus"] / row["peak_tflops"] * 1e3
        total = row["busy_ms"] + row["idle_ms"]
        for name, spent in [*row["kernels_ms"].items(), ("idle", row["idle_ms"])]:
            limit = f"{bound:.0f} (the model's operations at {row['peak_tflops']:g} TFLOP/s)" if name == "gemm" else ""
            lines.append([what, name, f"{spent:.1f}", _percent(spent / total), limit])
        for name, spent in row.get("scopes_ms", {}).items():
            lines.append([what, f"scope: {name}", f"{spent:.1f}", _percent(spent / total), ""])
    head = "step | kernels | ms | of the step | at least, ms"
    return _table(head, lines or [[NOT_MEASURED, *[""] * 4]])


def variants(rows: list[Row]) -> str:
    """Every setting that was measured on one GPU, ours and theirs."""
    lines = []
    single = [row for row in rows if row.get("bench") == "train" and row.get("gpus", 1) == 1 and "sweep" not in row]
    order = sorted(single, key=lambda row: (row.get("gpu", ""), row["stage"], row["model"], row["impl"]))
    for row in order:
        setting = [f"remat {row['remat']}"] if "remat" in row else []
        setting += [f"unroll {row['unroll']}"] if row.get("unroll", 1) > 1 else []
        setting += [f"FP8 by {row['backend']}"] if row.get("backend") and row["precision"].startswith("fp8") else []
        setting += [given] if (given := _flags(row)) else []
        setting += [f"data {row['data']}"] if row.get("data", "synthetic") != "synthetic" else []
        setting += ["packed"] if row.get("packed") else []
        setting += [f"{name} {value}" for name, value in row.get("shortcuts", {}).items()]
        line = [card(row), row["impl"], row["stage"], row["model"], row["precision"]]
        line += [row.get("attention", ""), ", ".join(setting), f"{row['micro_batch']}/{row['global_batch']}"]
        if "error" in row:
            lines.append([*line, "", row["error"][:60], "", "", "", ""])
            continue
        timing = f"{row['step_ms']:.1f} ({row['step_ms_p10']:.1f} … {row['step_ms_p90']:.1f})"
        compiled = f"{row['compile_s']:.0f}" if "compile_s" in row else ""
        limit = "" if row.get("shortcuts") else _percent(row["utilisation"])  # of operations that it did not do
        lines.append([*line, _tokens(row), timing, _rate(row), _gib(row), limit, compiled])
    head = "card | what | stage | model | precision | attention | setting | micro/global | tokens useful/computed | step, ms (p10 … p90) | samples/s | peak, GiB | of the limit | compiled in, s"  # noqa: E501
    return _table(head, lines or [[NOT_MEASURED, *[""] * 13]])


def shortcuts(rows: list[Row]) -> str:
    """Steps that leave work out which changes nothing, against the fastest that do all of it."""
    lines = []
    same = ("gpu", "gpus", "stage", "model", "precision", "tokens_computed", "image_px", "micro_batch", "packed")
    complete = ours(rows)
    for row in _measured(rows):
        if not row.get("shortcuts"):
            continue
        whole = _fastest_like(row, complete, same)
        lines.append(
            [
                card(row),
                row["stage"],
                row["model"],
                row["precision"],
                _tokens(row),
                f"{row['tokens_labelled']:g}",
                ", ".join(f"train.{name}={value}" for name, value in row["shortcuts"].items()),
                _percent(row["short"]),
                _ms(row),
                f"**{_rate(row)}**",
                _rate(whole),
                _ratio(row, whole),
                _gib(row),
            ]
        )
    head = "card | stage | model | precision | tokens useful/computed | labelled | setting | micro batches that took it | step, ms | samples/s | without | ratio | peak, GiB"  # noqa: E501
    return _table(head, lines or [[NOT_MEASURED, *[""] * 12]])


def attention(rows: list[Row]) -> str:
    """Attention's backends alone, forward and backward."""
    lines = []
    for row in rows:
        if row.get("bench") != "attention":
            continue
        shape = f"{row['rows']} x {row['tokens']}, {row['heads']}/{row['kv_heads']} heads x {row['width']}"
        error = "" if "error" not in row else f"{row['error']:.4f} / {row['gradient_error']:.4f}"
        result = f"{row['ms']:.2f}" if "ms" in row else row["error_text"][:60]
        lines.append([card(row), row["backend"], shape, row["segments"], row["dtype"], result, row.get("tflops", "")])
        lines[-1].append(error)
    head = "card | backend | rows x tokens, heads | segments | dtype | ms | TFLOP/s | error / of gradients"
    return _table(head, lines or [[NOT_MEASURED, *[""] * 7]])


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "workflow": workflow,
    "baseline": baseline,
    "memory": memory,
    "cost": cost,
    "layouts": layouts,
    "flags": flags,
    "losses": losses,
    "kernels": kernels,
    "variants": variants,
    "attention": attention,
    "shortcuts": shortcuts,
}


# --- rows that belong together ---------------------------------------------------------------------------------------


def ours(rows: Iterable[Row]) -> list[Row]:
    """Our train steps that were measured, but for those that leave work out, and on several GPUs those with settings of
    XLA or NCCL: they have tables of their own.

    Without CUDA graphs, which hide the kernels of a trace, is no such setting; and on one GPU `train` has since made
    its own what was faster.
    """
    return [row for row in _measured(rows) if not row.get("shortcuts") and (row["gpus"] == 1 or not _tuned(row))]


def _tuned(row: Row) -> bool:
    return _flags(row) not in ("", "gpu_enable_command_buffer=")


def _measured(rows: Iterable[Row]) -> list[Row]:
    train = [row for row in rows if row.get("bench") == "train" and row.get("impl") == "neva_jax"]
    return [{"overlap": False, **row} for row in train if "error" not in row]  # the first rows do not say it


def best_of_each(rows: Iterable[Row], *names: str) -> Iterator[Row]:
    """The fastest row for each combination of the named fields, in a fixed order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row.get(name) for name in names]), []).append(row)
    for key in sorted(groups):
        yield _best(groups[key])


def sweeps(rows: Iterable[Row]) -> dict[tuple[str, ...], list[tuple[float, Row]]]:
    """(card, stage, precision, remat, what grows) -> its rows by size."""
    found: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in ours(rows):
        if len(row.get("sweep", {})) != 1:
            continue
        ((name, value),) = row["sweep"].items()
        if not value.isdecimal():
            continue
        points = found.setdefault((card(row), row["stage"], row["precision"], row["remat"], name), {})
        points[float(value)] = row
    return {key: sorted(points.items()) for key, points in sorted(found.items()) if len(points) > 1}


def curves(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """(card, stage, model, tokens, rows of a step) -> its runs, where there are several.

    Those of one seed see the same data. Seed by seed, the bf16 run on the fewest GPUs first.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in ours(rows):
        if len(row.get("losses", ())) >= CURVE:
            key = (card(row), row["stage"], row["model"], f"{row['tokens_computed']:g}", f"{row['global_batch']}")
            found.setdefault(key, []).append(row)

    def order(row: Row) -> tuple[Any, ...]:
        return row["seed"], kind(row) != "bf16", row["gpus"], label(row)

    return {key: sorted(group, key=order) for key, group in sorted(found.items()) if len(group) > 1}


def final_loss(row: Row) -> float:
    """The mean of the last tenth of a curve."""
    return float(np.mean(row["losses"][-max(len(row["losses"]) // 10, 1) :]))


def label(row: Row) -> str:
    """What tells a run from others."""
    return f"{row['precision']}, {layout(row)}, seed {row['seed']}"


def layout(row: Row) -> str:
    """The mesh and what goes with it."""
    settings = [name for name in ("sequence_parallel", "overlap") if row[name]]
    return ", ".join([_mesh(row["mesh"]), *(name.replace("_", " ") for name in settings)])


def kind(row: Row) -> str:
    """`fp32`, `bf16` or `fp8`."""
    return row["precision"].split("_")[0]


def _flags(row: Row) -> str:
    """The settings of XLA and NCCL that its environment named, but for multicast off, as it must be on our machines."""
    nccl = [f"{name}={value}" for name, value in row.get("nccl", {}).items()]
    nccl = [setting for setting in nccl if setting != "NCCL_NVLS_ENABLE=0"]
    return " ".join([row.get("xla_flags", "").replace("--xla_", ""), *nccl]).strip()


def card(row: Row) -> str:
    """The GPU's name without its maker's."""
    return row.get("gpu", "?").removeprefix("NVIDIA ")


def _fastest_like(row: Row, others: Iterable[Row], same: Iterable[str]) -> Row | None:
    """Of the rows that have these fields as `row`, and are of its session, the fastest."""
    fits = [other for other in others if all(other[name] == row[name] for name in same)]
    return _best([other for other in fits if _hours_between(other, row) <= SESSION])


def _hours_between(row: Row, other: Row) -> float:
    dates = [datetime.datetime.fromisoformat(each["date"]) for each in (row, other)]
    return abs((dates[0] - dates[1]).total_seconds()) / 3600


def _of_7b(row: Row) -> bool:
    return row["model"] == "7B" or row["model"].endswith(" x 4096/11008")


def _memory_group(row: Row) -> tuple[str, ...]:
    return card(row), _mesh(row.get("mesh", {})), row["precision"], str(row["micro_batch"]), row.get("remat", "")


def _best(rows: Iterable[Row]) -> Row | None:
    return max(rows, key=lambda row: row["samples_per_s_per_gpu"], default=None)


# --- cells -----------------------------------------------------------------------------------------------------------


def _table(head: str, lines: Iterable[Iterable[Any]]) -> str:
    titles = head.split(" | ")
    out = [f"| {head} |", "|" + "---|" * len(titles)]
    return "\n".join([*out, *("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)])


def _mesh(mesh: Row) -> str:
    mesh = mesh.get("mesh", mesh)
    return ",".join(f"{axis}={size}" for axis, size in mesh.items()) or "1 GPU"


def _figure(figure: float, remark: str) -> str:
    return f"{figure:g} ({remark})" if remark else f"{figure:g}"


def _tokens(row: Row) -> str:
    return f"{row['tokens_useful']:g}/{row['tokens_computed']:g}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _rate(row: Row | None) -> str:
    return NOT_MEASURED if row is None else f"{row['samples_per_s']:.1f}"


def _ms(row: Row) -> str:
    return f"{row['step_ms']:.1f}"


def _gib(row: Row) -> str:
    return "" if row.get("peak_gib") is None else f"{row['peak_gib']:.1f}"


def _ratio(row: Row | None, other: Row | None) -> str:
    return NOT_MEASURED if row is None or other is None else f"{row['samples_per_s'] / other['samples_per_s']:.2f}"
