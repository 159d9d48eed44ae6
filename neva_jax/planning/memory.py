"""Bytes per device of a training step, from shapes.

    masters       trained parameters, fp32
    frozen        frozen parameters in their storage dtype
    moments       Adam's two, fp32
    average       of the trained parameters, fp32 (`optimizer.ema_decay`)
    batch         the step's rows, all micro batches
    kept          what the forward pass keeps for the backward pass
    gradients     of the trained parameters, fp32; twice where micro batches are accumulated
    temporary     the rest of the peak: logits of a chunk, a layer computed again, gathered or cast weights …

The first five are shapes divided by the one logical-axis table. `kept` is what `jax.vjp` returns for the real model,
`temporary` comes from walking the traced program (`liveness.py`). Where a copy is the compiler's choice (layout copies,
padding, fragmentation) nothing is counted but one that is as large as the weights (`_kept_by_xla`): docs/planning.md
says how far measurements lie from this.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neva_jax.checks import check_mesh
from neva_jax.config import Config
from neva_jax.derived import (
    all_unrolled,
    frozen_components,
    layers_kept_whole,
    padded_vocab,
    remat_group,
    trained_components,
)
from neva_jax.planning.liveness import nbytes
from neva_jax.planning.trace import (
    Traced,
    abstract_mesh,
    attention_backend,
    traced,
)
from neva_jax.precision.policy import compute_dtype
from neva_jax.training.ahead import batch_shapes
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.setup import Parameters, abstract_optimizer, abstract_parameters

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    masters: int
    frozen: int
    moments: int
    average: int
    batch: int
    kept: int
    gradients: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak of a step."""
        return sum(dataclasses.astuple(self))

    @property
    def arguments(self) -> int:
        """What exists between steps: the compiled step's arguments."""
        return self.masters + self.frozen + self.moments + self.average + self.batch


@dataclass(frozen=True)
class Estimate:
    """A configuration on a mesh: `memory` per device, and what it was computed from.

    backend: of attention. layout: each parameter's shape, dtype and sharding.
    largest_kept: (shape, dtype, bytes) of what the forward pass keeps, before fsdp and sequence parallelism.
    """

    config: Config
    sizes: dict[str, int]
    accumulate: int
    backend: str
    layout: Parameters
    memory: Memory
    largest_kept: tuple[tuple[tuple[int, ...], str, int], ...]


def estimate(config: Config, sizes: dict[str, int], platform: str = "gpu") -> Estimate:
    """Memory per device on a mesh of `sizes`, without devices.

    Args:
      config: checked, with a vocabulary size.
      platform: `gpu`, or `cpu` for comparison with what XLA compiles here: its optimizer writes all updates down before
        it applies them (one more copy of the trained parameters), and attention is XLA's.

    Raises:
      UserError: a dimension that the mesh does not divide, with both numbers.
    """
    accumulate = check_mesh(config, sizes)
    mesh = abstract_mesh(sizes)
    shapes = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    _, parameters = abstract_parameters(shapes, mesh)
    trained = {name: parameters[name] for name in trained_components(config.model)}
    frozen = {name: parameters[name] for name in frozen_components(config.model)}
    moments = abstract_optimizer(make_optimizer(config.optimizer, config.train.steps), trained, mesh, config.mesh.zero1)

    backend = "xla" if platform == "cpu" else attention_backend(config)
    program = _traced(_traced_part(config), sizes["tensor"], backend)
    share = _Share(config, sizes, program)
    # With ZeRO-1 gradients are reduced onto the shards of the moments (training.setup.place_updates).
    gradients = (local_bytes(moments) // 2 if config.mesh.zero1 else local_bytes(trained)) * min(accumulate, 2)
    kept = share.kept()
    copies = _kept_by_xla(config, sizes, parameters["llm"]) if platform == "gpu" else 0
    updates = (1 if config.mesh.zero1 else 2) * local_bytes(trained) if platform == "cpu" else 0
    peak = max(kept + gradients + program.peak.inside, share.peak() + gradients, updates) + copies
    memory = Memory(
        masters=local_bytes(trained),
        frozen=local_bytes(frozen),
        moments=local_bytes(moments),
        average=0 if config.optimizer.ema_decay is None else local_bytes(trained),
        batch=sum(map(nbytes, batch_shapes(config, accumulate, config.train.micro_batch).values())),
        kept=kept,
        gradients=gradients,
        temporary=peak - kept - gradients,
    )
    return Estimate(config, sizes, accumulate, backend, parameters, memory, program.kept[:12])


def _kept_by_xla(config: Config, sizes: dict[str, int], llm: Parameters) -> int:
    """Weights of unrolled layers that XLA keeps over fsdp until the backward pass, beside what JAX keeps.

    Frozen ones: the shard, which it cuts out of the stack before it gathers it, and gathers again (there is no stack
    where kernels are held in FP8). Trained ones, where `layers_kept_whole`: the gathered layer, whose place its own
    gradient's shard then takes.
    """
    if sizes["fsdp"] == 1:
        return 0
    shards = local_bytes(llm.get("layers", {}))
    if layers_kept_whole(config):  # the shards are fp32, as their gradients
        whole = shards * sizes["fsdp"] // 4 * jnp.dtype(compute_dtype(config.precision)).itemsize
        return max(0, whole - shards)
    cut = config.model.llm.freeze and all_unrolled(config) and remat_group(config.train) == 1
    return shards if cut else 0


def local_bytes(tree: Any) -> int:
    """Bytes of one device's shards of abstract arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


@dataclass(frozen=True)
class _Share:
    """What the fsdp axis and sequence parallelism leave of a traced program on one device.

    Copies of weights that are kept stay spread over fsdp; a residual stream [.., B, T, D] is split along B or T. The
    head's copy of the loss (training.loss) is gathered under fsdp, and otherwise the parameter itself.
    """

    config: Config
    sizes: dict[str, int]
    program: Traced

    def _spared(self) -> int:
        fsdp = self.sizes["fsdp"]
        tensor = self.sizes["tensor"] if self.config.mesh.sequence_parallel else 1
        stream = (self.config.train.micro_batch, self.config.data.max_length, self.config.model.llm.hidden_size)
        llm = self.config.model.llm
        head = (1, llm.hidden_size, padded_vocab(llm) // self.sizes["tensor"])
        spared = 0
        for shape, _, size in self.program.kept:
            if shape == head and fsdp == 1 and not llm.tie_embeddings:
                spared += size
                continue
            ways = fsdp if shape in self.program.parameter_shapes else tensor if shape[-3:] == stream else 1
            spared += size - size // ways
        return spared

    def kept(self) -> int:
        """Bytes kept for the backward pass."""
        return sum(size for _, _, size in self.program.kept) - self._spared()

    def peak(self) -> int:
        """The peak of the gradients' program, without the gradients."""
        return self.program.peak.total - self.program.gradients - self._spared()


def _traced_part(config: Config) -> Config:
    """The configuration without what cannot change the traced program, so that a sweep traces each program once."""
    blank = Config()
    train = dataclasses.replace(config.train, global_batch=config.train.micro_batch, steps=1)
    mesh = dataclasses.replace(blank.mesh, vision_tensor=config.mesh.vision_tensor)
    return dataclasses.replace(
        blank, model=config.model, data=config.data, mesh=mesh, precision=config.precision, train=train
    )


def _traced(config: Config, tensor: int, backend: str) -> Traced:
    key = repr((config, tensor, backend))  # configurations hold lists and have no hash
    if key not in _TRACES:
        _TRACES[key] = traced(config, tensor, backend)
    return _TRACES[key]


_TRACES: dict[str, Traced] = {}
