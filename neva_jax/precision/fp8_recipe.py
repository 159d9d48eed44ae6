"""How the linear layers of a run are computed in FP8: which of them, with which scales, by whose kernels.

What FP8 is here, and what a run remembers, says `precision.fp8`, which computes by a recipe.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from neva_jax.config import Config, Fp8Config
from neva_jax.derived import head_dim, kv_heads, parse_mesh_shape, remat_group, rows_at_once
from neva_jax.errors import UserError
from neva_jax.parallel.target import target_devices

SITES = {"all": ("qkv", "o", "gate_up", "down"), "attention": ("qkv", "o"), "mlp": ("gate_up", "down")}


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model run in FP8.

    delayed: scales from past steps, else from the tensor itself.
    gradient: dtype of gradients; all else is e4m3.
    margin, history, algorithm: see `precision.fp8`.
    sites: the linear layers in FP8, of the layers `first` ... `last` - 1 (`last` counts from the start).
    stored: the frozen language model's kernels are held in FP8.
    apart: each layer's stored kernels are parameters of their own, not slices of a stack, out of which XLA would copy
      them before each product.
    sequence_parallel: of the residual stream, where norms and their gradients are taken.
    vision: the encoder's too, always by current scaling: nothing flows back through it, which would carry a state.
    """

    delayed: bool
    gradient: Any
    margin: int
    history: int
    algorithm: str
    sites: tuple[str, ...]
    first: int
    last: int
    stored: bool
    apart: bool
    sequence_parallel: bool
    vision: bool
    backend: str

    def covers(self, *sites: str) -> bool:
        """Whether all these sites are in FP8."""
        return all(site in self.sites for site in sites)


def make_recipe(config: Config, devices: int = 1, quantize_frozen: bool = True) -> Recipe | None:
    """The recipe of a configuration on this machine, or None without FP8.

    Args:
      devices: of the mesh.
      quantize_frozen: False where the frozen weights themselves are needed, to be saved.

    Raises:
      UserError: the device has no FP8, or `fp8.backend=te` does not run here.
    """
    compute, fp8 = config.precision.compute, config.precision.fp8
    if not compute.startswith("fp8"):
        return None
    device = target_devices()[0]
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "0")) < 8.9:
        raise UserError(
            f"precision.compute={compute} needs a GPU of compute capability 8.9 (Ada, Hopper or later), not "
            f"{device.device_kind} ({device.compute_capability}); use bf16"
        )
    first, last = fp8.first_layers_bf16, config.model.llm.num_layers - fp8.last_layers_bf16
    stored = fp8.quantize_frozen and quantize_frozen and config.model.llm.freeze
    return Recipe(
        delayed=compute == "fp8_delayed",
        gradient=jnp.float8_e5m2 if fp8.format == "hybrid" else jnp.float8_e4m3fn,
        margin=fp8.margin if compute == "fp8_delayed" else 0,
        history=fp8.amax_history,
        algorithm=fp8.amax_algorithm,
        sites=SITES[fp8.layers],
        first=first,
        last=last,
        stored=stored,
        apart=stored and remat_group(config.train) == 1 and 1 < last - first <= config.train.unroll,
        sequence_parallel=config.mesh.sequence_parallel,
        vision=fp8.vision,
        backend=choose_backend(fp8, config, devices)[0],
    )


def choose_backend(fp8: Fp8Config, config: Config, devices: int) -> tuple[str, str]:
    """(`te` or `xla`, why).

    Raises:
      UserError: `fp8.backend=te` where it does not run.
    """
    if fp8.backend == "xla":
        return "xla", "as configured"
    problem = _te_problem(config, devices)
    if problem is None:
        return "te", "as configured" if fp8.backend == "te" else "Transformer Engine is there"
    if fp8.backend == "te":
        raise UserError(f"precision.fp8.backend=te: {problem}; use auto or xla")
    return "xla", problem


def _te_problem(config: Config, devices: int) -> str | None:
    """Why Transformer Engine cannot be used, or None."""
    if target_devices()[0].platform != "gpu":
        return f"Transformer Engine needs a GPU, here is {target_devices()[0].platform}"
    if devices > 1 and config.precision.compute == "fp8_current":
        return f"by current scaling it serves one device, the mesh has {devices}"
    llm = config.model.llm
    widths = (llm.hidden_size, llm.intermediate_size, llm.num_heads * head_dim(llm), kv_heads(llm) * head_dim(llm))
    if any(width % 16 for width in widths):
        return f"its kernels need widths that 16 divides, not {', '.join(map(str, widths))}"
    from neva_jax.precision.te import problem

    return problem()


def describe(config: Config, devices: int, stored: bool) -> str:
    """One line for the run's log: backend and why, scaling, layers, frozen weights, and a shape that costs copies."""
    fp8, llm = config.precision.fp8, config.model.llm
    backend, why = choose_backend(fp8, config, devices)
    scaling = "current scaling"
    if config.precision.compute == "fp8_delayed":
        scaling = f"delayed scaling ({fp8.amax_algorithm} of {fp8.amax_history} steps, margin {fp8.margin})"
    kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
    layers = f"{fp8.layers} linear layers" if fp8.layers == "all" else f"linear layers of the {fp8.layers}"
    weights = ("quantized once" if stored else "quantized in every step") if llm.freeze else "trained"
    rows = rows_at_once(config, parse_mesh_shape(config.mesh.shape, devices)["tensor"])
    prefix = config.train.constant_prefix
    length = config.data.max_length - prefix
    padded = ""
    if rows * length % 16:
        padded = (
            f"; each product is padded and cut, because {rows} rows of {length} tokens are no multiple of 16: "
            f"data.max_length={-(-length // 16) * 16 + prefix} would be one"
        )
    return (
        f"fp8: {backend} backend ({why}), {fp8.format}, {scaling}, {layers} of {llm.num_layers - kept} of "
        f"{llm.num_layers} layers, weights {weights}{', vision encoder too' if fp8.vision else ''}{padded}"
    )
