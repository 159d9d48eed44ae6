"""The collectives of a compiled program, read from its HLO text: kind, mesh axes, bytes, and how often each runs.

A collective inside a loop is counted once per iteration where XLA knows the trip count; all branches of a
conditional are counted, so a count is an upper bound.
"""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2}
BYTES |= {"u16": 2, "s16": 2, "u64": 8, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective: its results on a device, the axes and the number of devices that it runs over, and its place."""

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of its results: (dtype, shape)
    times: int
    place: str
    members: int = 0  # 0: unknown

    @property
    def elements(self) -> int:
        """Elements of all results."""
        return sum(prod(shape) for _, shape in self.shapes)

    @property
    def size(self) -> int:
        """Bytes of all results on one device, each time."""
        return sum(BYTES[dtype] * prod(shape) for dtype, shape in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its runs, by the ring algorithms (an all-reduce is two of the others)."""
        others = max(self.members - 1, 0)
        share = others / self.members if self.members else 1.0
        rounds = {"all-reduce": 2 * share, "reduce-scatter": others, "collective-permute": 1.0}
        return self.times * self.size * rounds.get(self.kind, share)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives that a device runs in one call of the program with this optimised HLO."""
    computations, entry = _computations(text)
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name]:
            trips = int(match[1]) if " while(" in line and (match := _TRIPS.search(line)) else 1
            called = _CALLED.findall(line)
            if match := _BRANCHES.search(line):
                called += [part.strip().lstrip("%") for part in match[1].split(",")]
            for other in called:
                if other in computations:
                    visit(other, count * trips)

    visit(entry, 1)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = _OPERATION.match(line)
            if match is None:
                continue
            kind = match[2].removesuffix("-start")
            if kind in KINDS and times[name]:
                made = _results(match[1], kind) if match[2].endswith("-start") else match[1]
                shapes = tuple(
                    (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(made)
                )
                place = re.search(r'op_name="([^"]*)"', line)
                groups = _groups(line, mesh)
                members = max(map(len, groups or [()]))
                found.append(
                    Collective(kind, _axes(groups, mesh), shapes, times[name], place[1] if place else "", members)
                )
    return found


def _results(tuples: str, kind: str) -> str:
    """What is made, of the type of an operation that starts a collective, which names its operands too.

    ((operands), results), or by older compilers (operand, result) and for a permutation two counters after them.
    """
    nested = re.sub(r"^\(\(.*?\), ", "", tuples)
    if nested != tuples or kind not in ("all-gather", "collective-permute"):
        return nested
    return ", ".join(f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(tuples)[1:2])


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            computations[current].append(line)
    return computations, entry


def _axes(groups: set[frozenset[int]] | None, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that the groups of a collective span; "part of" an axis, or ("?",)."""
    if groups is None:
        return ("?",)
    ids = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            inner = [mesh.axis_names.index(name) for name in axes]
            outer = [i for i in range(ids.ndim) if i not in inner]
            rows = ids.transpose(*outer, *inner).reshape(-1, prod(ids.shape[i] for i in inner))
            whole = {frozenset(row) for row in rows.tolist()}
            if whole == groups:
                return axes
            if count == 1 and all(any(group < row for row in whole) for group in groups):
                return (f"part of {axes[0]}",)
    return ("?",)


def _groups(line: str, mesh: Mesh) -> set[frozenset[int]] | None:
    if match := re.search(r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(([^ ]+)\))? \{([^}]*)\}", line):
        return _named_groups(match[1], match[2], match[3])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return {frozenset(row) for row in _ids(match[2]).reshape([int(n) for n in match[1].split(",")]).tolist()}
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return {frozenset(int(n) for n in part.split(",")) for part in re.findall(r"\{([\d,]+)\}", match[1])}
    if re.search(r"replica_groups=\{\}", line):
        return {frozenset(range(mesh.devices.size))}
    return None


def _ids(order: str) -> np.ndarray:
    """`[2,4]T(1,0)` -> device numbers in this order."""
    shape, _, axes = order.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    ids = np.arange(prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in re.findall(r"\d+", axes)]) if axes else ids


def _named_groups(sizes: str, order: str | None, axes: str) -> set[frozenset[int]]:
    """`'a'=2,'b'=4`, perhaps `[2,4]T(1,0)`, and `'a','b':(1)2` (the first 2 of b's 4) -> the groups of devices."""
    wanted: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        wanted[name] = (int(before or 1), int(size or 0))
    shape, inner = [], []
    for name, text in re.findall(r"'(\w+)'=(\d+)", sizes):
        before, size = wanted.get(name, (1, 1))
        size = size or int(text)
        if name in wanted:
            inner.append(len(shape) + 1)
        shape += [before, size, int(text) // before // size]
    ids = (np.arange(prod(shape)) if order is None else _ids(order)).reshape(shape)
    outer = [i for i in range(len(shape)) if i not in inner]
    rows = ids.transpose(*outer, *inner).reshape(-1, prod(shape[i] for i in inner))
    return {frozenset(row) for row in rows.tolist()}
