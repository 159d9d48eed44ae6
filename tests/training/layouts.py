"""One small model on any layout: its compiled step, runs of it, and its state on disk."""

import dataclasses
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh

from neva_jax.checks import check_mesh
from neva_jax.config import (
    Config,
    DataConfig,
    LlmConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
    VisionConfig,
)
from neva_jax.derived import frozen_components, parse_mesh_shape, trained_components
from neva_jax.parallel.mesh import make_mesh, one_device_mesh, place_batch, replicated
from neva_jax.training.guard import GuardState
from neva_jax.training.optimizer import learning_rate, make_optimizer
from neva_jax.training.setup import (
    abstract_optimizer,
    abstract_parameters,
    initialise_parameters,
    place_updates,
)
from neva_jax.training.step import TrainState, layout_of, make_train_step
from tests.models.helpers import random_batch

STEPS, ROWS, LENGTH, CHUNK = 20, 16, 24, 8
PACKED = 2  # samples in a packed row
LAYERS, WIDTH, VOCAB = 2, 32, 40
# 2 key and value heads: on a tensor axis of 8 each lies on 4 devices. 4 patches of 4 x 4 pixels.
MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=8, select_layer=-2
    ),
    llm=LlmConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_layers=LAYERS,
        num_heads=8,
        num_kv_heads=2,
        init_std=0.2,
    ),
    allow_random_frozen=True,
)
# With Adam's usual epsilon the first step moves an element whose gradient is a rounding error by a whole learning rate.
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


@dataclass(frozen=True)
class Layout:
    """A mesh, its settings, what is trained, and how many micro batches make a step.

    Stages: `pretrain` trains the projector, `finetune` the language model too, `all` everything.
    packed: several samples in a row.
    """

    shape: str
    stage: str = "finetune"
    accumulate: int = 1
    sequence_parallel: bool = False
    zero1: bool = False
    vision_tensor: bool = True
    packed: bool = False
    overlap: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes."""
        devices = np.prod([int(part.partition("=")[2]) for part in self.shape.split(",")])
        return parse_mesh_shape(self.shape, int(devices))

    @property
    def mesh(self) -> Mesh:
        """The mesh over the first devices."""
        return make_mesh(self.sizes, jax.devices()[: np.prod(list(self.sizes.values()))])

    @property
    def config(self) -> Config:
        """The configuration of a run on this layout."""
        llm = dataclasses.replace(MODEL.llm, freeze=self.stage == "pretrain")
        vision = dataclasses.replace(MODEL.vision, freeze=self.stage != "all")
        groups, packed = self.sizes["data"] * self.sizes["fsdp"], PACKED if self.packed else 1
        rows = ROWS // packed
        return Config(
            model=dataclasses.replace(MODEL, llm=llm, vision=vision),
            data=DataConfig(
                max_length=LENGTH * packed, pack=self.packed, images_per_row=packed, segments_per_row=packed
            ),
            mesh=MeshConfig(
                self.shape,
                self.sequence_parallel,
                overlap=self.overlap,
                zero1=self.zero1,
                vision_tensor=self.vision_tensor,
            ),
            precision=PrecisionConfig(compute="fp32"),
            train=TrainConfig(STEPS, rows // groups // self.accumulate, rows, loss_chunk=CHUNK),
            optimizer=OPTIMIZER,
        )


@dataclass(frozen=True)
class Run:
    """A layout made ready: shapes and shardings of everything, and the compiled step."""

    layout: Layout
    mesh: Mesh
    params: dict
    moments: tuple
    optimizer: object
    step: jax.stages.Compiled

    @property
    def trained(self) -> dict:
        """The trained part of `params`."""
        return {name: self.params[name] for name in trained_components(self.layout.config.model)}

    def split(self, params: dict) -> tuple[dict, dict]:
        """Parameters -> (trained, frozen)."""
        model = self.layout.config.model
        return tuple({name: params[name] for name in names(model)} for names in (trained_components, frozen_components))


@cache
def prepare(layout: Layout) -> Run:
    """Compiles the step of a layout, as train.py makes it."""
    config, mesh = layout.config, layout.mesh
    assert check_mesh(config, layout.sizes) == layout.accumulate
    graphdef, params = abstract_parameters(config, mesh)
    trained, frozen = ({n: params[n] for n in names(config.model)} for names in (trained_components, frozen_components))
    optimizer = make_optimizer(config.optimizer, STEPS)
    moments = abstract_optimizer(optimizer, trained, mesh, layout.zero1)
    optimizer, apply_updates = place_updates(optimizer, trained, layout.zero1)
    step, guard = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), numbers)
        for numbers in (np.int32(0), GuardState())
    )
    state = TrainState(step, trained, moments, guard)
    with jax.set_mesh(mesh):
        schedule, chunk = learning_rate(config.optimizer, STEPS), config.train.loss_chunk
        step = make_train_step(
            graphdef, optimizer, schedule, chunk, layout.packed, layout=layout_of(state), apply_updates=apply_updates
        )
        lowered = step.lower(state, frozen, place_batch(mesh, batch(0, layout.packed), layout.accumulate))
        # Compiles in less time; the partitioner's work is the same.
        compiled = lowered.compile({"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})
    return Run(layout, mesh, params, moments, optimizer, compiled)


@cache
def batch(number: int, packed: bool = False) -> dict[str, np.ndarray]:
    """The global batch of a step on the host; lengths and labels differ from row to row, one row has no label.

    packed: the same samples, `PACKED` in a row of their own segments.
    """
    arrays = random_batch(MODEL, rows=ROWS, length=LENGTH, images=1, seed=number)
    draw = np.random.default_rng(number)
    arrays["targets"] = draw.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    share = draw.random((ROWS, 1)) * (np.arange(ROWS) != number % ROWS)[:, None]
    lengths = draw.integers(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    inside = np.arange(LENGTH) < lengths
    arrays["loss_weights"] = ((draw.random((ROWS, LENGTH)) < share) & inside).astype(np.float32)
    arrays["segment_ids"] = inside.astype(np.int32)
    return _joined(arrays, lengths[:, 0]) if packed else arrays


def _joined(arrays: dict[str, np.ndarray], lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Rows 0 and 1 one after the other in row 0, rows 2 and 3 in row 1 and so on, without the padding between them."""
    rows, patches = ROWS // PACKED, (MODEL.vision.image_size // MODEL.vision.patch_size) ** 2
    joined = {name: np.zeros((rows, PACKED * LENGTH), x.dtype) for name, x in arrays.items() if name != "images"}
    joined["image_slots"] -= 1
    for row in range(rows):
        start = 0
        for place, sample in enumerate(range(row * PACKED, (row + 1) * PACKED)):
            stop = start + lengths[sample]
            for name, array in joined.items():
                array[row, start:stop] = arrays[name][sample, : lengths[sample]]
            joined["segment_ids"][row, start:stop] = place + 1
            slots = joined["image_slots"][row, start:stop]
            slots[slots >= 0] += place * patches
            start = stop
    return {**joined, "images": arrays["images"].reshape(rows, PACKED, *arrays["images"].shape[2:])}


@cache
def starting_parameters() -> dict:
    """Random parameters on the host."""
    config, mesh = Layout("data=1").config, one_device_mesh()
    params = initialise_parameters(config, abstract_parameters(config, mesh)[1], {}, lambda _: None)
    return jax.tree.map(np.asarray, params)


def fresh(run: Run) -> tuple[dict, tuple]:
    """(parameters, moments) at the start of a run."""

    def put(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(np.array(array, leaf.dtype), leaf.sharding)

    params = jax.tree.map(put, starting_parameters(), run.params)
    return params, jax.tree.map(lambda leaf: put(np.zeros(leaf.shape), leaf), run.moments)


def advance(run: Run, params: dict, moments: tuple, start: int, stop: int) -> tuple[dict, tuple, list[float]]:
    """Steps start ... stop - 1 -> (parameters, moments, losses); what is given is used up."""
    trained, frozen = run.split(params)
    step = jax.device_put(np.int32(start), replicated(run.mesh))
    state, losses = TrainState(step, trained, moments), []
    for number in range(start, stop):
        state, metrics = run.step(
            state, frozen, place_batch(run.mesh, batch(number, run.layout.packed), run.layout.accumulate)
        )
        losses.append(float(metrics["loss"]))
    return {**frozen, **state.trained}, state.optimizer, losses
