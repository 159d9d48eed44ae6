"""FP8 linear layers: what is quantized, when, and what a run remembers. Models call `linear`, `heads` and `mlp` only.

    x [.., K] --cast e4m3--+                         e4m3: 448 at most, 3 bits of mantissa
                           matmul --> y [.., N]      e5m2: 57344 at most, 2 bits
    kernel    --cast e4m3--+
                                      g [.., N] --cast e5m2 (`hybrid`)--+--> dx = g . kernel^T,  dkernel = x^T . g

One scale for each tensor: q = round(clip(scale * x)). `fp8_current` takes it from the tensor itself (the largest
absolute value, amax, becomes the largest FP8 number), which needs a pass before the cast. `fp8_delayed` takes it from
the largest values of past steps, so that a value is cast where it is computed; what it remembers is the FP8 state:

    {site: {"x" | "grad" | "kernel": {"scale": f32 [L], "history": f32 [L, H]}}}      sites: qkv, o, gate_up, down

The state is no parameter: its "gradient" is its new value, which `training.step` puts in the place of the old one. (A
layer gets scales alone, and its backward pass returns the amax of each tensor where the scale's gradient would stand;
`scales` makes new states of them, for all layers at once.) `kernel` is there for trained kernels alone. A frozen one
has one scale for ever, and is cast when it is loaded (`precision.fp8.quantize_frozen`), into both layouts that the
products need: FP8 ones want both operands contiguous along the sum.

Which kernels compute this is the backend's: `fp8_xla`, or `fp8_te` with the same functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from neva_jax.models.rotary import split_rotated
from neva_jax.parallel.mesh import constrain, constrain_stream, divides, spec, stream_axes
from neva_jax.precision import fp8_xla
from neva_jax.precision.fp8_recipe import Recipe

# Largest values before any was seen. With the scale of 1 that Transformer Engine begins with, gradients of a mean over
# thousands of tokens become zero in the first step's `o` and `down`, which leaves `qkv` and `gate_up` nothing to scale
# by until the third. e5m2 reaches far enough down for the gradients of few tokens and of many; e4m3 does not: it begins
# in between.
ASSUMED = {"x": 448.0, "kernel": 4.0}
ASSUMED_GRADIENT = {jnp.float8_e5m2: 1.0, jnp.float8_e4m3fn: 2.0**-6}
KEPT = "fp8_amax"  # the name of what recomputation must not recompute: scalars that cost a pass each
# Logical axes of activations.
HEADS, KV_HEADS = ("batch", "length", "heads", "head_dim"), ("batch", "length", "kv_heads", "head_dim")
MLP, HALVES = ("batch", "length", "mlp"), ("batch", "length", None, "mlp")
State = dict[str, Any]
Scales = dict[str, Any]


class Stored(NamedTuple):
    """A kernel in FP8 in both layouts, `forward` [*N, *K] and `backward` [*K, *N], and what undoes its scale."""

    forward: jax.Array
    backward: jax.Array
    inverse: jax.Array


@dataclass(frozen=True)
class _Call:
    """The static part of a call: recipe, epsilon of the norm before it (None: no norm)."""

    recipe: Recipe
    eps: float | None

    @property
    def ops(self) -> ModuleType:
        return backend_functions(self.recipe.backend)


def backend_functions(name: str) -> ModuleType:
    """The module of a backend; Transformer Engine is imported here and not before."""
    if name == "xla":
        return fp8_xla
    from neva_jax.precision import fp8_te

    return fp8_te


# --- state


def initial_state(recipe: Recipe | None, trained: bool) -> State:
    """Scales for the values that are assumed and empty histories; {} where the recipe needs no state.

    trained: kernels have a history too.
    """
    if recipe is None or not recipe.delayed:
        return {}
    layers = recipe.last - recipe.first

    def meta(tensor: str) -> dict[str, jax.Array]:
        assumed = ASSUMED.get(tensor, ASSUMED_GRADIENT[recipe.gradient])
        scale = fp8_xla.largest(_dtypes(recipe)[tensor]) / assumed / 2.0**recipe.margin
        return {
            "scale": jnp.full(layers, scale, jnp.float32),
            "history": jnp.zeros((layers, recipe.history), jnp.float32),
        }

    tensors = ("x", "grad", "kernel") if trained else ("x", "grad")
    return {site: {tensor: meta(tensor) for tensor in tensors} for site in recipe.sites}


def _dtypes(recipe: Recipe) -> dict[str, Any]:
    return {"x": jnp.float8_e4m3fn, "kernel": jnp.float8_e4m3fn, "grad": recipe.gradient}


def updated(meta: State, amax: jax.Array, dtype: Any, recipe: Recipe) -> State:
    """A tensor's state after a step in which its largest absolute value was `amax`.

    As Transformer Engine does it: `amax` goes to place 0, the scale of the next step follows from the largest of the
    history (or from place 0 alone), and the history rolls by one. A zero or non-finite value leaves the scale as it is.
    meta: {"scale": [L], "history": [L, H]}; amax: [L].
    """
    amax = jnp.where(jnp.isfinite(amax), amax, 0)
    history = meta["history"].at[:, 0].set(amax)
    top = jnp.max(history, axis=1) if recipe.algorithm == "max" else amax
    scale = jnp.where(top > 0, fp8_xla.largest(dtype) / jnp.where(top > 0, top, 1) / 2.0**recipe.margin, meta["scale"])
    return {"scale": scale, "history": jnp.roll(history, -1, axis=1).at[:, 0].set(0)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scales(recipe: Recipe, states: State) -> Scales:
    """What layers need of the state, {site: {tensor: f32 [L]}}; the state's "gradient" is its next value."""
    return jax.tree.map(lambda meta: meta["scale"], states, is_leaf=lambda node: "scale" in node)


def _scales_forward(recipe: Recipe, states: State) -> tuple[Scales, State]:
    return scales(recipe, states), states


def _scales_backward(recipe: Recipe, states: State, amax: Scales) -> tuple[State]:
    dtypes = _dtypes(recipe)
    return (
        {
            site: {name: updated(meta, amax[site][name], dtypes[name], recipe) for name, meta in tensors.items()}
            for site, tensors in states.items()
        },
    )


scales.defvjp(_scales_forward, _scales_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def copies(count: int, scales: Scales | None) -> tuple[Scales | None, ...]:
    """The scales of a layer that sees a batch in `count` parts: the largest value that it met is that of all parts.

    XLA does not see that they are equal (`models.parts`), but for those of weights, which are cast once for all parts.
    """

    def hidden(path: tuple, scale: jax.Array) -> jax.Array:
        return scale if path[-1].key == "kernel" else jax.lax.optimization_barrier(scale)

    return scales, *(jax.tree_util.tree_map_with_path(hidden, scales) for _ in range(count - 1))


def _copies_forward(count: int, scales: Scales | None) -> tuple[tuple[Scales | None, ...], None]:
    return copies(count, scales), None


def _copies_backward(count: int, kept: None, amax: tuple[Scales | None, ...]) -> tuple[Scales | None]:
    return (jax.tree.map(lambda *parts: jnp.max(jnp.stack(parts), axis=0), *amax),)


copies.defvjp(_copies_forward, _copies_backward)


# --- kernels


def store(kernel: jax.Array, inputs: int, scales: Scales | None = None) -> tuple[Stored, jax.Array]:
    """A kernel [*K, *N] whose first `inputs` dimensions are summed over, in FP8 -> (both layouts, its amax)."""
    cast = fp8_xla.cast(kernel, (scales or {}).get("kernel"), jnp.float8_e4m3fn)
    order = (*range(inputs, kernel.ndim), *range(inputs))
    return Stored(jnp.transpose(cast.values, order), cast.values, cast.inverse), cast.amax


def _stored(kernel: jax.Array | Stored, inputs: int, scales: Scales) -> tuple[Stored, jax.Array | None]:
    if isinstance(kernel, Stored):
        return kernel, None
    stored, amax = store(kernel, inputs, scales)
    return stored, checkpoint_name(amax, KEPT)


def _met(scales: Scales, amax: dict[str, Any]) -> Scales:
    """The amax of each tensor, in the place of its scale's gradient."""
    return {tensor: amax[tensor] for tensor in scales}


def _by_part(call: _Call, cast: Callable, arrays: tuple, scale: jax.Array | None, axes: tuple, out: tuple) -> Any:
    """`cast(ops, *arrays, scale)`, by each device for its part of the arrays where a backend's kernels know no mesh.

    The largest value is that of all parts. Where the mesh does not split all arrays evenly, or the scale would come
    from the arrays (None), it is plain XLA's.

    Args:
      axes, out: logical axes of the arrays, and of the values that come back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not call.ops.ONE_DEVICE or mesh.empty or mesh.size == 1:
        return cast(call.ops, *arrays, scale)
    if scale is None or not all(divides(array, names) for array, names in zip(arrays, axes, strict=True)):
        return cast(fp8_xla, *arrays, scale)

    def part(*arguments: jax.Array) -> fp8_xla.Cast:
        found = cast(call.ops, *arguments)
        return found._replace(amax=jax.lax.pmax(found.amax, mesh.axis_names))

    whole = spec(())
    specs = (*map(spec, axes), whole)
    # Kernels do not tell along which axes their results are equal.
    run = jax.shard_map(part, in_specs=specs, out_specs=fp8_xla.Cast(spec(out), whole, whole), check_vma=False)
    return run(*arrays, scale)


# --- one linear layer


def linear(
    recipe: Recipe,
    x: jax.Array,
    kernel: jax.Array | Stored,
    scales: Scales,
    *,
    inputs: int = 1,
    norm: tuple[jax.Array, float] | None = None,
) -> jax.Array:
    """x [B, T, *K] times kernel [*K, *N] in FP8 -> [B, T, *N] in x's dtype.

    Args:
      kernel: [*K, *N], quantized in every step, and trained where it is differentiated; or what `store` gave.
      scales: of this site and layer; {} for current scaling.
      inputs: dimensions of K.
      norm: (gamma [K], epsilon): an RMS norm of x comes first, in the same pass as the cast.
    """
    gamma, eps = (None, None) if norm is None else norm
    return _linear(_Call(recipe, eps), inputs, x, gamma, kernel, scales)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(call: _Call, inputs: int, x: jax.Array, gamma: Any, kernel: Any, scales: Scales) -> jax.Array:
    return _linear_forward(call, inputs, x, gamma, kernel, scales)[0]


def _linear_forward(
    call: _Call, inputs: int, x: jax.Array, gamma: Any, kernel: Any, scales: Scales
) -> tuple[jax.Array, Any]:
    y, cast, kept = _first_product(call, inputs, x, gamma, kernel, scales)
    x = None if call.eps is None else x
    return y, (x, gamma, _values(cast, kernel), kept, cast.amax, scales)


def _linear_backward(call: _Call, inputs: int, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    scale = kept[-1].get("grad")
    return _back(call, kept, call.ops.cast(g, scale, call.recipe.gradient), g.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def _back(call: _Call, kept: Any, cast: Any, dtype: jnp.dtype) -> tuple[Any, ...]:
    """Gradients of x, gamma, kernel and scales from what `_linear_forward` kept and the cast gradient of its result."""
    x, gamma, values, (kernel, inverse, kernel_amax), amax, scales = kept
    ops = call.ops
    dx = ops.product(cast, kernel, inverse, cast.values.ndim - 2, dtype, fast=False)
    dkernel = None if values is None else ops.outer(values, cast, dtype)
    dgamma = None
    if call.eps is not None:
        dx, dgamma = ops.norm_grad(constrain_stream(dx, call.recipe.sequence_parallel), x, gamma, call.eps)
    new = _met(scales, {"x": amax, "kernel": kernel_amax, "grad": cast.amax})
    return dx, dgamma, dkernel, new


def _first_product(
    call: _Call, inputs: int, x: jax.Array, gamma: Any, kernel: Any, scales: Scales
) -> tuple[jax.Array, Any, Any]:
    """(norm,) cast and product -> (y, the cast x, (kernel for the way back, its inverse scale, its amax))."""
    scale, ops = scales.get("x"), call.ops
    if call.eps is None:
        cast = ops.cast(x, scale, jnp.float8_e4m3fn)
    else:
        stream = stream_axes(x, call.recipe.sequence_parallel)
        cast = _by_part(
            call,
            lambda ops, x, gamma, scale: ops.norm_cast(x, gamma, call.eps, scale, jnp.float8_e4m3fn),
            (x, gamma),
            scale,
            (stream, ("norm",)),
            stream,
        )
        # With sequence parallelism it is the FP8 values that travel.
        cast = cast._replace(values=constrain(cast.values, "batch", "length", "features"))
    cast = cast._replace(amax=checkpoint_name(cast.amax, KEPT), inverse=checkpoint_name(cast.inverse, KEPT))
    stored, amax = _stored(kernel, inputs, scales)
    y = ops.product(cast, stored.forward, stored.inverse, inputs, x.dtype, fast=True)
    return y, cast, (stored.backward, stored.inverse, amax)


def _values(cast: Any, kernel: Any) -> Any:
    """What the kernel's gradient needs of x: nothing where it is stored, and so never trained."""
    return None if isinstance(kernel, Stored) else (cast.values, cast.inverse)


# --- the heads of attention


def heads(
    recipe: Recipe,
    x: jax.Array,
    kernel: jax.Array | Stored,
    scales: Scales,
    *,
    norm: tuple[jax.Array, float],
    angles: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """RMS norm, the product of site qkv, rotary embedding: x [B, T, D] -> q [B, T, H, K], k and v [B, T, G, K].

    Args:
      kernel, scales, norm: as in `linear`; the kernel is [D, G, R + 2, K] (`models.llama_fp8`).
      angles: cosine and sine [B, T, K/2] or shorter f32 (`models.rotary.rotary_angles`).
    """
    return _heads(_Call(recipe, norm[1]), x, norm[0], kernel, scales, angles)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads(call: _Call, x: jax.Array, gamma: jax.Array, kernel: Any, scales: Scales, angles: Any) -> Any:
    return _heads_forward(call, x, gamma, kernel, scales, angles)[0]


def _heads_forward(
    call: _Call, x: jax.Array, gamma: jax.Array, kernel: Any, scales: Scales, angles: Any
) -> tuple[Any, Any]:
    y, kept = _linear_forward(call, 1, x, gamma, kernel, scales)
    return split_rotated(y, *angles), (kept, angles)


def _heads_backward(call: _Call, kept: Any, g: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    kept, angles = kept
    positions = ("batch", "length", None)
    cast = _by_part(
        call,
        lambda ops, *arrays: ops.heads_grad_cast(*arrays, call.recipe.gradient),
        (*g, *angles),
        kept[-1].get("grad"),
        (HEADS, KV_HEADS, KV_HEADS, positions, positions),
        ("batch", "length", "kv_heads", None, "head_dim"),
    )
    return *_back(call, kept, cast, g[0].dtype), None


_heads.defvjp(_heads_forward, _heads_backward)


# --- the MLP as a whole


def mlp(
    recipe: Recipe,
    x: jax.Array,
    norm: tuple[jax.Array, float],
    kernels: tuple[jax.Array | Stored, jax.Array | Stored],
    scales: tuple[Scales, Scales],
) -> jax.Array:
    """RMS norm, gate and up, SwiGLU, down: x [B, T, D] -> [B, T, D], everything between the products cast at once.

    Args:
      norm: (gamma [D], epsilon).
      kernels: gate and up [D, 2, F], down [F, D], as in `linear`.
      scales: of the sites gate_up and down.
    """
    return _mlp(_Call(recipe, norm[1]), x, norm[0], kernels, scales)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(call: _Call, x: jax.Array, gamma: jax.Array, kernels: Any, scales: Any) -> jax.Array:
    return _mlp_forward(call, x, gamma, kernels, scales)[0]


def _mlp_forward(call: _Call, x: jax.Array, gamma: jax.Array, kernels: Any, scales: Any) -> tuple[jax.Array, Any]:
    ops = call.ops
    halves, cast, kept = _first_product(call, 1, x, gamma, kernels[0], scales[0])
    halves = constrain(halves, *HALVES)
    inner = _by_part(
        call,
        lambda ops, *arrays: ops.swiglu_cast(*arrays, jnp.float8_e4m3fn),
        (halves,),
        scales[1].get("x"),
        (HALVES,),
        MLP,
    )
    inner = inner._replace(amax=checkpoint_name(inner.amax, KEPT), inverse=checkpoint_name(inner.inverse, KEPT))
    down, down_amax = _stored(kernels[1], 1, scales[1])
    y = ops.product(inner, down.forward, down.inverse, 1, x.dtype, fast=True)
    values = (_values(cast, kernels[0]), _values(inner, kernels[1]))
    kept = (kept, (down.backward, down.inverse, down_amax))
    return y, (x, gamma, halves, values, kept, (cast.amax, inner.amax), scales)


def _mlp_backward(call: _Call, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    x, gamma, halves, values, ((kernel, inverse, kernel_amax), (down, down_inverse, down_amax)), amax, scales = kept
    ops, gradient = call.ops, call.recipe.gradient
    cast = ops.cast(g, scales[1].get("grad"), gradient)
    dinner = ops.product(cast, down, down_inverse, 1, x.dtype, fast=False)
    dinner = constrain(dinner, *MLP)
    inner = _by_part(
        call,
        lambda ops, *arrays: ops.swiglu_grad_cast(*arrays, gradient),
        (dinner, halves),
        scales[0].get("grad"),
        (MLP, HALVES),
        HALVES,
    )
    dx = ops.product(inner, kernel, inverse, 2, x.dtype, fast=False)
    dx, dgamma = ops.norm_grad(constrain_stream(dx, call.recipe.sequence_parallel), x, gamma, call.eps)
    dkernels = (
        None if values[0] is None else ops.outer(values[0], inner, x.dtype),
        None if values[1] is None else ops.outer(values[1], cast, x.dtype),
    )
    new = (
        _met(scales[0], {"x": amax[0], "kernel": kernel_amax, "grad": inner.amax}),
        _met(scales[1], {"x": amax[1], "kernel": down_amax, "grad": cast.amax}),
    )
    return dx, dgamma, dkernels, new


_mlp.defvjp(_mlp_forward, _mlp_backward)
