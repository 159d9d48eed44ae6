"""Attention alone, forward and backward: each backend checked against fp32, then timed.

python -m neva_jax.bench attention --rows 32 --tokens 320 --heads 32 --width 128
python -m neva_jax.bench attention --rows 2 --tokens 4096 --kv-heads 8 --segments 1,13

error and gradient_error are relative norms of the difference to plain fp32 arithmetic, over the tokens of all segments.
A backend that cannot do a case (cudnn with several segments) or is not there is a row with `error_text`. ms is the
median of forward and backward together, several calls to a measurement; tflops counts half of the T x T products of
each segment, and the backward pass twice.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neva_jax.benchmarks.conditions import conditions
from neva_jax.errors import UserError
from neva_jax.models.attention import attend

HELP = "attention's backends, forward and backward: error against fp32, and time"
CALLS, REPEATS = 5, 20  # calls that one measurement takes together; measurements
LIMIT = 3e-2  # relative error past which a backend is wrong, not imprecise


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m neva_jax.bench attention`."""
    add = parser.add_argument
    add("--backends", default="xla,cudnn,te", metavar="A,B", help="as model.attention (default: xla,cudnn,te)")
    add("--rows", type=int, default=32, metavar="B", help="rows (default: 32)")
    add("--tokens", type=int, default=320, metavar="T", help="tokens of a row (default: 320)")
    add("--heads", type=int, default=32, metavar="H", help="query heads (default: 32)")
    add("--kv-heads", type=int, metavar="G", help="key and value heads (default: --heads)")
    add("--width", type=int, default=128, metavar="K", help="width of a head (default: 128)")
    add("--segments", default="1", metavar="N,…", help="equal segments in a row; above 1 it is packed (default: 1)")
    add("--bidirectional", action="store_true", help="no causal mask, as in the vision encoder")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of q, k and v (default: bf16)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of segments and backend.

    Raises:
      UserError: sizes that do not divide.
    """
    groups = options.kv_heads or options.heads
    try:
        segments = [int(part) for part in options.segments.split(",")]
    except ValueError:
        raise UserError(f"--segments {options.segments}: write numbers like 1,13") from None
    for name in ("rows", "tokens", "heads", "width"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.heads % groups:
        raise UserError(f"--heads {options.heads} is not divisible by --kv-heads {groups}")
    for count in segments:
        if not 1 <= count <= options.tokens:
            raise UserError(f"--segments {count}: must be between 1 and --tokens {options.tokens}")
    for count in segments:
        case = _Case(options, groups, count)
        for backend in options.backends.split(","):
            yield {
                "bench": "attention",
                "impl": "neva_jax",
                "backend": backend,
                "rows": options.rows,
                "tokens": options.tokens,
                "heads": options.heads,
                "kv_heads": groups,
                "width": options.width,
                "segments": count,
                "causal": not options.bidirectional,
                "dtype": options.dtype,
                **case.measure(backend),
                "gpu": jax.devices()[0].device_kind,
                **conditions("jax", "jaxlib"),
            }


class _Case:
    """One shape: its inputs, and their results and gradients in fp32."""

    def __init__(self, options: argparse.Namespace, groups: int, segments: int):
        b, t, h, width = options.rows, options.tokens, options.heads, options.width
        each = t // segments
        self.causal, self.dtype = not options.bidirectional, options.dtype
        self.segments = None
        if segments > 1:
            line = np.minimum(np.arange(t) // each + 1, segments)  # the last one takes what is left
            self.segments = jnp.asarray(np.broadcast_to(line, (b, t)), jnp.int32)
        lengths = [each] * (segments - 1) + [t - each * (segments - 1)]
        pairs = sum(n * n for n in lengths) / (2 if self.causal else 1)
        self.packing = {}
        if segments > 1:
            place = np.broadcast_to(np.arange(t) - (line - 1) * each, (b, t))
            # Transformer Engine's kernel must be told.
            self.packing = {"segment_positions": jnp.asarray(place, jnp.int32), "segments": segments + 1}
        self.tflop = 3 * 4 * b * h * width * pairs / 1e12
        keys = jax.random.split(jax.random.key(0), 4)
        dtype = jnp.bfloat16 if options.dtype == "bf16" else jnp.float32
        shapes = [(b, t, h, width), (b, t, groups, width), (b, t, groups, width), (b, t, h, width)]
        self.inputs = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
        self.reference = self._run_by_row()

    def program(self, backend: str) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
        """(q, k, v, cotangent, segment ids) -> (output, gradients of q, k and v)."""

        def both(
            q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, segments: jax.Array | None
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                more = self.packing if backend == "te" else {}
                return attend(q, k, v, causal=self.causal, segment_ids=segments, backend=backend, **more)

            output, pullback = jax.vjp(call, q, k, v)
            return output, pullback(cotangent)

        return jax.jit(both)

    def _run_by_row(self) -> list[jax.Array]:
        """Output and gradients in fp32, a row at a time, because its scores are large."""
        inputs = [x.astype(jnp.float32) for x in self.inputs]
        program, made = self.program("xla"), []
        with jax.default_matmul_precision("highest"):
            for i in range(inputs[0].shape[0]):
                one = [x[i : i + 1] for x in inputs]
                output, gradients = program(*one, None if self.segments is None else self.segments[i : i + 1])
                made.append([output, *gradients])
        return [jnp.concatenate(parts) for parts in zip(*made, strict=True)]

    def measure(self, backend: str) -> dict[str, Any]:
        """Error and time of a backend, or why it has none."""
        program = self.program(backend)
        try:
            output, gradients = jax.block_until_ready(program(*self.inputs, self.segments))
        except Exception as error:
            return {"error_text": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        errors = [_relative(a, b) for a, b in zip((output, *gradients), self.reference, strict=True)]
        found = {"error": errors[0], "gradient_error": max(errors[1:])}
        if not max(errors) < LIMIT:
            return {**found, "error_text": f"relative error {max(errors):.3g} is above {LIMIT}: wrong, so not timed"}
        times = []
        for _ in range(REPEATS):
            before = time.perf_counter()
            for _ in range(CALLS):
                result = program(*self.inputs, self.segments)
            jax.block_until_ready(result)
            times.append(1e3 * (time.perf_counter() - before) / CALLS)
        low, middle, high = np.percentile(times, [10, 50, 90])
        return {
            **found,
            "ms": round(float(middle), 4),
            "ms_p10": round(float(low), 4),
            "ms_p90": round(float(high), 4),
            "tflops": round(self.tflop / middle * 1e3, 1),
        }


def _relative(a: jax.Array, b: jax.Array) -> float:
    """|a - b| / |b| in fp32."""
    return float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
