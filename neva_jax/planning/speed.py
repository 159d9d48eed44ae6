"""Bytes that a step sends, by kind and mesh axis, and the step's time from stated rates.

Bytes are those that one device sends in a ring over n devices (Patarasuk & Yuan 2009), S the size of the whole array:

    all-gather, reduce-scatter    (n-1)/n · S
    all-reduce                    2 (n-1)/n · S

What is sent, for each of the A micro batches of a step (B rows of T tokens per group, L layers of width D):

    fsdp     all-gather of weights in the compute dtype: forward, and again backward (ZeRO-3, Rajbhandari et al. 2020,
             section 7.2); once those of a frozen encoder, of layers that are unrolled, trained and not computed again,
             and the head, as it is held; layers of FP8 as FP8, and what is held in two layouts each in its pass;
             embeddings never (their rows travel, which is not counted)
    fsdp     reduce-scatter of gradients, trained parameters only
    data     all-reduce of gradients, trained parameters only; with mesh.zero1 also all-gather of the new fp32
             parameters (section 7.1 there has reduce-scatter and all-gather: here a device owns whole layers, and a
             layer's gradient is reduced inside the backward loop, where each device takes part in all)
    tensor   all-reduce of [B, T, D]: two per layer forward, two backward (Shoeybi et al. 2019, section 3), one more
             where a layer is computed again; with sequence parallelism each as reduce-scatter and all-gather, the same
             bytes (Korthikanti et al. 2022, section 4.2.2); one each for the embedding and the head's backward pass
    tensor   with mesh.vision_tensor=false instead of the encoder's: all-gather of its features, and all-reduce of its
             gradients where it is trained, because each device has other images

Gradients travel in the compute dtype, because XLA reduces a product's result before it is converted to fp32.

Time: max(operations / rate, overlapped transfers) + transfers that are not. Those over data and fsdp depend on no
activation and overlap with computing; those over tensor stand between two products and do not, but for the layers' with
mesh.overlap, which gives a device other rows to compute meanwhile. Ranks are laid out with tensor innermost and data
outermost. An axis that stays inside a node has NVLink; one that leaves it shares the network ports of those of its
members that sit in one node, never faster than NVLink. Latency, norms, attention's softmax and the optimizer's
arithmetic are not in it: it is a bound from below that ranks meshes, not a forecast of a measurement.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from neva_jax.config import MESH_AXES, Config
from neva_jax.data.tiles import tiles_per_row
from neva_jax.derived import layers_kept_whole, patch_grid, trained_components
from neva_jax.planning.flops import (
    Flops,
    flops_per_row,
    labelled_positions,
    recomputed_fraction,
    vision_layers,
    vision_tokens,
)
from neva_jax.planning.memory import Estimate
from neva_jax.precision.policy import compute_dtype

# TFLOP/s of an H200's matrix products: bf16 and FP8 measured at our shapes, fp32 80 % of what NVIDIA states for TF32.
RATES = {"fp32": 400.0, "bf16": 790.0, "fp8": 1450.0}


@dataclass(frozen=True)
class Machine:
    """What a device computes and sends, in operations and bytes per second; `network` is per device."""

    flops: float
    nvlink: float = 450e9
    network: float = 50e9
    per_node: int = 8


@dataclass(frozen=True)
class Transfer:
    """One kind of collective over one axis: bytes that a device sends per step, and their time."""

    kind: str
    what: str
    axis: str
    size: float
    seconds: float
    overlapped: bool


@dataclass(frozen=True)
class Speed:
    """A step on a mesh."""

    flops: Flops
    compute: float
    transfers: tuple[Transfer, ...]
    samples: int

    @property
    def overlapped(self) -> float:
        """Seconds of the transfers that run beside the computation."""
        return sum(transfer.seconds for transfer in self.transfers if transfer.overlapped)

    @property
    def exposed(self) -> float:
        """Seconds of the transfers that the computation waits for."""
        return sum(transfer.seconds for transfer in self.transfers if not transfer.overlapped)

    @property
    def seconds(self) -> float:
        """Of one optimizer step."""
        return max(self.compute, self.overlapped) + self.exposed


def default_rate(config: Config) -> float:
    """TFLOP/s of an H200 for the compute dtype of the configuration."""
    return RATES[config.precision.compute.split("_")[0]]


def predict(plan: Estimate, machine: Machine) -> Speed:
    """Operations, transfers and time of one optimizer step of an estimated configuration."""
    config, sizes = plan.config, plan.sizes
    flops = flops_per_row(config, plan.backend)
    rows = config.train.global_batch
    compute = flops.hardware * rows / np.prod([sizes[axis] for axis in MESH_AXES]) / machine.flops
    transfers = tuple(
        Transfer(kind, what, axis, size, size / bandwidth(sizes, axis, machine), _overlapped(config, what, axis))
        for kind, what, axis, size in _transfers(plan)
        if size
    )
    return Speed(flops, float(compute), transfers, rows)


def _overlapped(config: Config, what: str, axis: str) -> bool:
    return axis != "tensor" or (config.mesh.overlap and what == "activations")


def bandwidth(sizes: dict[str, int], axis: str, machine: Machine) -> float:
    """Bytes per second that a device sends along an axis."""
    stride = int(np.prod([sizes[inner] for inner in MESH_AXES[MESH_AXES.index(axis) + 1 :]]))
    if stride * sizes[axis] <= machine.per_node:
        return machine.nvlink
    in_one_node = max(machine.per_node // stride, 1)
    return min(machine.nvlink, machine.network * in_one_node)


def _gathered_bytes(config: Config, component: str, part: str, leaf: jax.ShapeDtypeStruct, item: int) -> int:
    """Bytes for each element of a parameter that fsdp gathers in a micro batch, both passes together."""
    if component == "vision":
        return item if config.model.vision.freeze else 2 * item
    if component == "llm":
        if part == "head":  # for all chunks of the loss, as it is held
            return leaf.dtype.itemsize
        if part == "embedding":  # looked up where it lies, unless it is the head
            return leaf.dtype.itemsize if config.model.llm.tie_embeddings else 0
        if leaf.dtype.itemsize == 1:  # held in FP8, a layout for each pass
            return 1
        if config.precision.compute.startswith("fp8"):  # cast before they travel, for each pass
            return 2
        if layers_kept_whole(config):
            return item
    return 2 * item


def _transfers(plan: Estimate) -> Iterator[tuple[str, str, str, float]]:
    """(kind, what, axis, bytes that a device sends per step)."""
    config, sizes, steps = plan.config, plan.sizes, plan.accumulate
    data, fsdp, tensor = (sizes[axis] for axis in MESH_AXES)
    item = jnp.dtype(compute_dtype(config.precision)).itemsize

    gathered = reduced = whole = encoder = 0.0
    for name, tree in plan.layout.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            split = any("fsdp" in (part or ()) for part in leaf.sharding.spec)
            count = float(np.prod(leaf.sharding.shard_shape(leaf.shape)))
            held = count * item
            gathered += count * fsdp * _gathered_bytes(config, name, path[0].key, leaf, item) if split else 0.0
            if name in trained_components(config.model):
                reduced += held * fsdp if split else 0.0
                whole += held
                encoder += held if name == "vision" else 0.0
    yield "all-gather", "weights", "fsdp", steps * gathered * _share(fsdp)
    yield "reduce-scatter", "gradients", "fsdp", steps * reduced * _share(fsdp)
    yield "all-reduce", "gradients", "data", 2 * steps * whole * _share(data)
    if config.mesh.zero1:
        yield "all-gather", "weights", "data", whole / item * 4 * _share(data)

    ring = steps * _share(tensor)
    layers_bytes, ends_bytes = ring * _layer_activations(config) * item, ring * _end_activations(config) * item
    vision_bytes = ring * _vision_activations(config) * item if config.mesh.vision_tensor else 0.0
    if config.mesh.sequence_parallel:
        yield "all-gather", "activations", "tensor", layers_bytes + ends_bytes
        yield "reduce-scatter", "activations", "tensor", layers_bytes + ends_bytes
    else:
        yield "all-reduce", "activations", "tensor", 2 * layers_bytes
        yield "all-reduce", "activations before and behind the layers", "tensor", 2 * ends_bytes
    yield "all-reduce", "image activations", "tensor", 2 * vision_bytes
    if not config.mesh.vision_tensor:
        yield "all-gather", "image features", "tensor", ring * _image_features(config) * item
        yield "all-reduce", "encoder's gradients", "tensor", 2 * ring * encoder


def _layer_activations(config: Config) -> float:
    """Values summed over tensor per micro batch, in the language model's layers."""
    again = recomputed_fraction(config) if config.train.remat == "full" else 0.0
    sums = (4 + again) * config.model.llm.num_layers
    return config.train.micro_batch * config.model.llm.hidden_size * config.data.max_length * sums


def _end_activations(config: Config) -> float:
    """Values summed over tensor per micro batch, before and behind the layers."""
    positions = config.data.max_length + labelled_positions(config)
    return config.train.micro_batch * config.model.llm.hidden_size * positions


def _vision_activations(config: Config) -> float:
    """Values all-reduced over tensor per micro batch, in the encoder."""
    vision, images = config.model.vision, config.train.micro_batch * tiles_per_row(config)
    each = vision_tokens(vision) * vision.hidden_size
    return images * each * vision_layers(vision) * (2 if vision.freeze else 4)


def _image_features(config: Config) -> float:
    """Values that the encoder gives the projector per micro batch."""
    vision, images = config.model.vision, config.train.micro_batch * tiles_per_row(config)
    tokens = patch_grid(vision) ** 2 + (vision.select_feature == "cls_patch")
    return float(images * tokens * vision.hidden_size)


def _share(ways: int) -> float:
    return (ways - 1) / ways
