"""The most bytes that a traced program holds at once, from its jaxpr: what XLA's buffer assignment does, roughly.

A value is a buffer only where XLA has to write it down:

    writes    dot, reduction, gather, scatter, sort, loop, random bits       their results are buffers
    reads     dot, sort, loop, condition, and the program's result           their operands are buffers too
    fused     everything else (elementwise, broadcast, reshape, convert …)   no buffer, unless something above reads it;
                                                                             what it was computed from lives on instead

    x = dot(a, b)           buffer
    y = silu(x) * x         read by a dot: buffer; x may end here, and y takes its place
    z = dot(y, c)           buffer; y ends here

Buffers live from the line that writes them to the last line that reads them, in the order of the trace. A loop holds
its carry once, its stacked results from the start, and one iteration's buffers (those of `unroll` iterations where it
is unrolled, but of no more than `TOGETHER`: XLA schedules them together). Random bits hold four times their size.
Inputs of the program are the caller's and count nothing, nor do slices of them that are fused into their readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

TOGETHER = 3  # 32 unrolled layers of a 7B took 2.5 GiB more on an H100 than a loop, two more layers' buffers
_STRICT = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "pure_callback"}
_WRITES = {
    "gather",
    "scatter",
    "scatter-add",
    "scatter_add",
    "dynamic_update_slice",
    "argsort",
    "top_k",
    "cumsum",
    "random_bits",
}
_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "copy", "sharding_constraint", "optimization_barrier"}
_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass
class _Line:
    """One equation of the flattened program; operands and results are ids of values.

    consts, carry: of a scan, how many operands it holds and how many it carries; what it slices follows.
    """

    name: str
    params: dict[str, Any]
    inputs: list[int]
    outputs: list[int]
    consts: int = 0
    carry: int = 0


@dataclass
class _Program:
    lines: list[_Line] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)

    def new(self, aval: Any) -> int:
        """A new value's id."""
        index = len(self.sizes)
        self.sizes[index] = nbytes(aval)
        return index


def nbytes(aval: Any) -> int:
    """Bytes of an array's shape and dtype; 0 for what is no array, or a key of the random generator."""
    try:
        return int(aval.size) * aval.dtype.itemsize
    except (AttributeError, TypeError):
        return 0


class Peak(NamedTuple):
    """Most bytes held at once, and the most that any loop or condition at the top level holds inside."""

    total: int
    inside: int


def peak_bytes(closed: ClosedJaxpr) -> Peak:
    """Most bytes that the program holds at once, its results included and its inputs not."""
    program, _, results = _flatten(closed.jaxpr)
    inside = max(map(_inner, _without_dead(program.lines, set(results))), default=0)
    return Peak(_peak(closed.jaxpr, fused_inputs=frozenset()), inside)


def _flatten(jaxpr: Jaxpr) -> tuple[_Program, list[int], list[int]]:
    """The program without calls: (program, ids of its inputs, ids of its results; -1 for a literal)."""
    program = _Program()

    def run(jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
        env: dict[Var, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {var: program.new(var.aval) for var in jaxpr.constvars}

        def read(atom: Any) -> int:
            return -1 if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = next((eqn.params[name] for name in _INLINED if name in eqn.params), None)
            if inner is not None and eqn.primitive.name not in _STRICT:
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                results = run(inner, operands)
                env |= {var: program.new(var.aval) if r < 0 else r for var, r in zip(eqn.outvars, results, strict=True)}
                continue
            results = [program.new(var.aval) for var in eqn.outvars]
            if eqn.primitive.name == "random_bits":  # threefry: two words of a counter and two of its cipher for one
                program.sizes[results[0]] *= 4
            env |= dict(zip(eqn.outvars, results, strict=True))
            program.lines.append(_Line(eqn.primitive.name, eqn.params, operands, results, *_scan_split(eqn)))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = [program.new(var.aval) for var in jaxpr.invars]
    return program, inputs, run(jaxpr, inputs)


def _peak(jaxpr: Jaxpr, fused_inputs: frozenset[int]) -> int:
    """The most bytes that a program, or the body of a loop, holds.

    fused_inputs: positions of inputs that are slices, which are written down where a line of `_STRICT` reads them.
    """
    program, inputs, results = _flatten(jaxpr)
    lines = _without_dead(program.lines, set(results))
    slices = {inputs[i] for i in fused_inputs}
    given = set(inputs) - slices
    written, alias = _written(program, lines, results, given)

    # What each value was computed from, in buffers (or inputs, which are free).
    roots: dict[int, frozenset[int]] = {-1: frozenset()}
    for value in inputs:
        roots[value] = frozenset({value}) if value in written or value in given else frozenset()
    end: dict[int, int] = {}
    for index, line in enumerate(lines):
        sources = frozenset().union(*(roots.get(value, frozenset()) for value in line.inputs))
        for value in line.outputs:
            root = alias.get(value, value)
            if root != value:
                roots[value] = roots[root]
            else:
                roots[value] = frozenset({value}) if value in written else sources
        if any(value in written and value not in alias for value in line.outputs) or line.name in _STRICT:
            for source in sources:
                end[source] = index
    last = len(lines)
    for value in results:
        for source in roots.get(value, frozenset()):
            end[source] = last

    return _sweep(program, lines, written, alias, slices, end)


def _sweep(
    program: _Program,
    lines: list[_Line],
    written: set[int],
    alias: dict[int, int],
    slices: set[int],
    end: dict[int, int],
) -> int:
    """Walks the lines with the set of live buffers; returns the most bytes held."""
    ending: dict[int, list[int]] = {}
    for value, index in end.items():
        ending.setdefault(index, []).append(value)
    started = dict.fromkeys(slices & written)
    held: dict[int, int] = {}
    total = most = 0

    def free(index: int) -> int:
        return sum(held.pop(value, 0) for value in ending.get(index, ()))

    for index, line in enumerate(lines):
        for value in line.inputs:  # a slice that has to be written down is written when it is first read
            root = alias.get(value, value)
            if root in started:
                del started[root]
                held[root] = program.sizes[root]
                total += held[root]
        fresh = [v for v in line.outputs if v in written and v not in alias]
        strict = line.name in _STRICT
        if not strict:
            total -= free(index)  # elementwise results take the place of what ends here
        for value in _carried(line):  # a loop's last carry takes the place of its first
            root = alias.get(value, value)
            if end.get(root) == index:
                total -= held.pop(root, 0)
        for value in fresh:
            held[value] = program.sizes[value] if value in end else 0
            total += held[value]
        most = max(most, total + _inner(line))
        if strict:
            total -= free(index)
        for value in fresh:
            if value not in end:
                total -= held.pop(value, 0)
    return max(most, total)


def _carried(line: _Line) -> list[int]:
    """The operands that a scan starts its carry with."""
    if line.name != "scan":
        return []
    return line.inputs[line.consts : line.consts + line.carry]


def _scan_split(equation: Any) -> tuple[int, int]:
    """Constants and carry of a scan. By shapes, as jax 0.11 has no counts: what is sliced has one dimension less."""
    if equation.primitive.name != "scan":
        return 0, 0
    body: Jaxpr = equation.params["jaxpr"].jaxpr
    sliced = sum(x.aval.ndim < whole.aval.ndim for x, whole in zip(body.invars, equation.invars, strict=True))
    carry = sum(x.aval.ndim == whole.aval.ndim for x, whole in zip(body.outvars, equation.outvars, strict=True))
    return len(body.invars) - sliced - carry, carry


def _inner(line: _Line) -> int:
    """Bytes that a loop or condition holds inside, besides its operands and results."""
    if line.name == "scan":
        body: Jaxpr = line.params["jaxpr"].jaxpr
        sliced = frozenset(range(line.consts + line.carry, len(body.invars)))
        peak = _peak(body, sliced)
        return peak * min(int(line.params["unroll"]), int(line.params["length"]), TOGETHER)
    if line.name == "cond":
        return max(_peak(branch.jaxpr, frozenset()) for branch in line.params["branches"])
    if line.name == "while":
        return _peak(line.params["body_jaxpr"].jaxpr, frozenset())
    return 0


def _without_dead(lines: list[_Line], needed: set[int]) -> list[_Line]:
    kept = []
    for line in reversed(lines):
        if needed.intersection(line.outputs):
            needed.update(line.inputs)
            kept.append(line)
    return kept[::-1]


def _written(
    program: _Program, lines: list[_Line], results: list[int], given: set[int]
) -> tuple[set[int], dict[int, int]]:
    """(values that are buffers, views -> the value that they show)."""
    alias: dict[int, int] = {}
    for line in lines:
        if line.name in _VIEWS:
            for source, value in zip(line.inputs, line.outputs, strict=False):
                if source >= 0:
                    alias[value] = alias.get(source, source)
    written: set[int] = set()
    for line in lines:
        if line.name in _STRICT or line.name in _WRITES or line.name.startswith(("reduce_", "arg")):
            written.update(line.outputs)
        if line.name in _STRICT:
            written.update(alias.get(value, value) for value in line.inputs if value >= 0)
    written.update(alias.get(value, value) for value in results if value >= 0)
    return written - given, alias
