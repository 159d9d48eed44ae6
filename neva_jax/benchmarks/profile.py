"""Where a step's time goes: the kernels of a trace by jax.profiler, by class.

A trace holds the kernels of each CUDA stream with their names and times. busy is the time in which any kernel ran, idle
the rest between the first and the last one; exposed communication is the time of NCCL's kernels beside which no other
kernel ran. Kernels inside a CUDA graph do not tell which operation they are, so `bench train --profile` runs without
graphs; the scope of an operation (`attention`, `mlp`, …) stands in the compiled program's text.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neva_jax.errors import UserError

# class -> what the names of its kernels contain; the first that fits counts
CLASSES = (
    ("communication", r"nccl"),
    ("attention", r"cudnn|sdpa|fmha|flash|fused_attn"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|cublas|wgmma|_dot"),
    ("quantize", r"amax|quantize|cast_transpose|fp8|float8"),
    ("fill", r"memset|broadcast"),
    ("copy", r"memcpy|copy|transpose|dynamic_slice|dynamic_update_slice|gather|scatter"),
    ("reduction", r"reduce|norm"),
    ("elementwise", r"fusion|elementwise|loop_|wrapped_"),
)
TOP = 16  # kernels that are listed by name


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel: begin and end in nanoseconds."""

    name: str
    begin: float
    end: float
    scope: str = ""


def kernel_table(folder: Path, steps: int, program: str) -> dict[str, Any]:
    """What `table` says of the newest trace in `folder`; `program` is the text of the compiled step."""
    return table(read_kernels(folder, scopes_of(program)), steps)


def table(devices: Sequence[Sequence[Kernel]], steps: int) -> dict[str, Any]:
    """The kernels of each device -> milliseconds per step on the first one, by class, by scope and by name."""
    kernels = devices[0]
    by_class: dict[str, float] = defaultdict(float)
    by_scope: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        spent = kernel.end - kernel.begin
        by_class[classify(kernel.name)] += spent
        by_scope[kernel.scope] += spent
        entry = by_name[re.sub(r"_\d+$", "", kernel.name)]
        entry[0] += spent
        entry[1] += 1
    busy = _covered((kernel.begin, kernel.end) for kernel in kernels)
    other = _covered((k.begin, k.end) for k in kernels if classify(k.name) != "communication")
    span = max(kernel.end for kernel in kernels) - min(kernel.begin for kernel in kernels)

    def ms(nanoseconds: float) -> float:
        return round(nanoseconds / steps / 1e6, 3)

    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "kernels_ms": {name: ms(spent) for name, spent in sorted(by_class.items(), key=lambda item: -item[1])},
        "busy_ms": ms(busy),
        "idle_ms": ms(span - busy),
        "exposed_communication_ms": ms(busy - other),
        "scopes_ms": {name: ms(spent) for name, spent in sorted(by_scope.items(), key=lambda item: -item[1])},
        "top_kernels": [
            {"name": name[:100], "ms": ms(spent), "runs": count / steps} for name, (spent, count) in longest
        ],
    }


def classify(name: str) -> str:
    """The class of a kernel's name."""
    return next((label for label, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def read_kernels(folder: Path, scopes: dict[str, str]) -> list[list[Kernel]]:
    """The kernels of each GPU in the newest trace under `folder`; `scopes`: operation -> scope.

    Raises:
      UserError: no trace, or none of a GPU.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder}: holds no trace (*.xplane.pb)")
    devices = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        kernels = []
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue  # others repeat the same time by step, module or operation
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                kernels.append(Kernel(event.name, event.start_ns, event.end_ns, scopes.get(operation, "rest")))
        if kernels:
            devices.append(kernels)
    if not devices:
        raise UserError(f"{files[-1]}: has no kernels of a GPU")
    return devices


SCOPES = ("vision_attention", "vision_mlp", "attention", "mlp")


def scopes_of(program: str) -> dict[str, str]:
    """Operation -> scope, from the text of a compiled program."""
    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"'
    return {name: scope(path) for name, path in re.findall(pattern, program, re.MULTILINE)}


def scope(path: str) -> str:
    """The model's named scope in an operation's path (`jit(step)/…/mlp/dot_general`), and whether it is backward."""
    parts = path.split("/")
    found = next((part for part in map(_inner, reversed(parts)) if part in SCOPES), "rest")
    return f"{found} backward" if any("transpose(" in part for part in parts) else found


def _inner(part: str) -> str:
    return part.rsplit("(", 1)[-1].rstrip(")")
