"""What one device computes in a step, traced from shapes: the real model code, nothing allocated, no device needed.

The traced model is one device's share: under `tensor` its heads, MLP width and vocabulary rows are cut, its rows are
the micro batch of one data-parallel group. What `fsdp` and sequence parallelism cut further is arithmetic
(`memory.py`), because the program of a layer is the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import AbstractMesh, AxisType

from neva_jax.config import MESH_AXES, Config, LlmConfig, VisionConfig
from neva_jax.derived import (
    all_unrolled,
    dropout_seed,
    frozen_components,
    head_dim,
    kv_heads,
    padded_vocab,
    trained_components,
)
from neva_jax.errors import UserError
from neva_jax.models import layers
from neva_jax.models.attention import Backends
from neva_jax.models.layers import Remat
from neva_jax.models.neva import abstract_model
from neva_jax.planning.liveness import Peak, nbytes, peak_bytes
from neva_jax.precision.policy import compute_dtype, frozen_dtype
from neva_jax.training.ahead import batch_shapes
from neva_jax.training.step import Arrays, Parameters, batch_nll, gradients


@dataclass(frozen=True)
class Traced:
    """One device's micro batch in bytes, before `fsdp` and sequence parallelism cut anything.

    kept: (shape, dtype, bytes) of each array that the forward pass keeps for the backward pass.
    peak: of the gradients' program: what is kept, gradients, and temporary buffers.
    gradients: of the trained parameters.
    parameter_shapes: of all parameters, to tell copies of weights from activations.
    """

    kept: tuple[tuple[tuple[int, ...], str, int], ...]
    peak: Peak
    gradients: int
    parameter_shapes: frozenset[tuple[int, ...]]


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(
        tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def attention_backend(config: Config) -> str:
    """The kernel that training takes on an NVIDIA GPU from Ampere on, whatever machine plans: `xla`, `cudnn` or `te`.

    Packed rows under `auto` are planned with XLA's, which needs the most: Transformer Engine may not be installed.

    Raises:
      UserError: `cudnn` or `te` is asked for where training would refuse it.
    """
    name, width, rate = config.model.attention, head_dim(config.model.llm), config.model.llm.attention_dropout
    fits, dtype = _has_kernel(config), jnp.dtype(compute_dtype(config.precision))
    asked = name == "cudnn" or (name == "te" and config.data.pack)
    if asked and rate:
        raise UserError(f"model.attention={name} has no dropout (model.llm.attention_dropout={rate}); use auto or xla")
    if asked and not fits:
        raise UserError(
            f"model.attention={name} needs bf16 (here {dtype.name}), and a head width divisible by 8 and at "
            f"most 128 (here {width}); use auto"
        )
    if name == "xla" or rate or not fits:
        return "xla"
    if config.data.pack:
        return "te" if name == "te" else "xla"
    return "cudnn"


def depends_on_te(config: Config) -> bool:
    """Whether training takes Transformer Engine's attention if it is installed, and XLA's if not."""
    model, packed = config.model, config.data.pack
    return packed and model.attention == "auto" and not model.llm.attention_dropout and _has_kernel(config)


def _has_kernel(config: Config) -> bool:
    width = head_dim(config.model.llm)
    return compute_dtype(config.precision) == jnp.bfloat16 and width % 8 == 0 and width <= 128


def share_of_tensor(config: Config, ways: int) -> Config:
    """The configuration of the model of which one device of the `tensor` axis holds all."""
    llm, vision = config.model.llm, config.model.vision
    rows = padded_vocab(llm) // ways
    local_llm: LlmConfig = dataclasses.replace(
        llm,
        head_dim=head_dim(llm),
        num_heads=llm.num_heads // ways,
        num_kv_heads=max(kv_heads(llm) // ways, 1),
        intermediate_size=llm.intermediate_size // ways,
        vocab_size=rows,
        vocab_multiple=1,
    )
    # With mesh.vision_tensor=false the encoder is whole; that it then sees fewer images is not planned.
    vision_ways = ways if config.mesh.vision_tensor else 1
    local_vision: VisionConfig = dataclasses.replace(vision, intermediate_size=vision.intermediate_size // vision_ways)
    model = dataclasses.replace(config.model, llm=local_llm, vision=local_vision)
    return dataclasses.replace(config, model=model)


def traced(config: Config, tensor: int, backend: str) -> Traced:
    """Traces one device's share of a micro batch.

    Args:
      config: its accumulation is left out; `memory.py` adds what that holds.
      tensor: size of the tensor axis, which divides heads, MLP width and vocabulary.
      backend: `xla`, `cudnn` or `te`.
    """
    # Transformer Engine's kernel for packed rows keeps what cuDNN's keeps for rows of one segment.
    kernel, packed = ("xla", config.data.pack) if backend == "xla" else ("cudnn", False)
    graphdef, trained, frozen = _model(share_of_tensor(config, tensor), kernel, tensor)
    chunk = config.train.loss_chunk
    rng = None if dropout_seed(config) is None else jax.random.key(0)
    batch = batch_shapes(config, 1, config.train.micro_batch)
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def forward(trained: Parameters, frozen: Parameters, micro: Arrays) -> Callable:
        return jax.vjp(lambda t: batch_nll(graphdef, {**frozen, **t}, micro, chunk, packed, rng), trained)[1]

    def step(trained: Parameters, frozen: Parameters, batch: Arrays) -> Parameters:
        return gradients(graphdef, trained, frozen, batch, chunk, packed, rng)[1]

    with _flash_attention():
        kept = _outputs(jax.make_jaxpr(forward)(trained, frozen, micro))
        peak = peak_bytes(jax.make_jaxpr(step)(trained, frozen, batch))
    leaves = jax.tree.leaves((trained, frozen))
    return Traced(kept, peak, sum(map(nbytes, jax.tree.leaves(trained))), frozenset(leaf.shape for leaf in leaves))


def _model(config: Config, backend: str, tensor: int) -> tuple[nnx.GraphDef, Parameters, Parameters]:
    """(graph definition, trained parameters, frozen parameters) as shapes, as `training.setup.abstract_parameters`."""
    train = config.train
    # Where no loop stacks what is kept, XLA keeps the products' results and computes what is cheap again by itself.
    dissolved = train.remat == "none" and all_unrolled(config)
    remat = Remat("dots") if dissolved else Remat(train.remat, train.remat_method, train.remat_layers)
    # `xla` is the one backend that a machine without GPU makes a model for.
    model_config = dataclasses.replace(config.model, attention="xla")
    model = nnx.merge(*abstract_model(model_config, config.precision, remat, train.unroll))
    model.llm.layers.backends = Backends(single=backend)
    graphdef, state = nnx.split(model)
    trained_names = trained_components(config.model)

    def describe(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path[0].key in trained_names else frozen_dtype(config.precision)
        shape = tuple(leaf.shape)
        # The encoder's width must stay a multiple of its heads: they are cut here, not in the configuration.
        if tensor > 1 and config.mesh.vision_tensor and path[0].key == "vision":
            named = zip(shape, _axes(state, path), strict=True)
            shape = tuple(n // tensor if axis == "heads" else n for n, axis in named)
        return jax.ShapeDtypeStruct(shape, dtype)

    params = jax.tree_util.tree_map_with_path(describe, nnx.to_pure_dict(state))
    frozen_names = frozen_components(config.model)
    return graphdef, {name: params[name] for name in trained_names}, {name: params[name] for name in frozen_names}


def _axes(state: nnx.State, path: tuple) -> tuple[str | None, ...]:
    node = state
    for part in path:
        node = node[part.key]
    return node.get_metadata()["axes"]


def _outputs(closed: ClosedJaxpr) -> tuple[tuple[tuple[int, ...], str, int], ...]:
    """The arrays that a program returns, each once, without those that it was given, in this shape or another."""
    given, found = set(closed.jaxpr.invars), {}
    for eqn in closed.jaxpr.eqns:
        if eqn.primitive.name == "reshape" and eqn.invars[0] in given:
            given.update(eqn.outvars)
    for var in closed.jaxpr.outvars:
        if not isinstance(var, Literal) and var not in given and nbytes(var.aval):
            found[var] = (tuple(var.aval.shape), var.aval.dtype.name, nbytes(var.aval))
    return tuple(sorted(found.values(), key=lambda item: -item[2]))


@contextmanager
def _flash_attention() -> Iterator[None]:
    """A cuDNN kernel's shapes in place of the kernel, which cannot even be traced without its GPU.

    Forward: output and one fp32 number per row and head (log of the softmax's sum); kept for the backward pass: q, k, v
    and both (jax._src.cudnn.fused_attention_stablehlo, `_dot_product_attention_fwd_rule`).
    """

    @jax.custom_vjp
    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return forward(q, k, v)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        rows, length, heads, _ = q.shape
        statistics = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
        out, kept = jax.pure_callback(_never, (jax.ShapeDtypeStruct(q.shape, q.dtype), statistics), q, k, v)
        return out, (q, k, v, out, kept)

    def backward(kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept[:3]]
        return tuple(jax.pure_callback(_never, shapes, *kept, cotangent))

    flash.defvjp(forward, backward)
    kernels = (*layers.KERNELS, "pure_callback")
    with (
        mock.patch.object(jax.nn, "dot_product_attention", lambda q, k, v, **_: flash(q, k, v)),
        mock.patch.object(layers, "KERNELS", kernels),
    ):
        yield


def _never(*_: jax.Array) -> None:
    raise AssertionError("a shape is not a kernel")
