"""The collectives of one training step, layout by layout, against the budget that docs/parallelism.md explains.

Shapes are those that one device makes. The CPU compiler has neither of two things that XLA's GPU compiler does: it
leaves an all-reduce that is cut into shards afterwards as it is, where the GPU's makes a reduce-scatter of it; and it
reduces what must still be added (the gradients that q, k and v, or gate and up, give their input) one by one.

L layers, B rows on a device, T tokens, D width, F MLP width, V vocabulary, N chunks of the loss of C positions each.
"""

from collections import Counter
from math import prod

import jax
import pytest

from neva_jax.planning.collectives import Collective, collectives
from tests.training.layouts import CHUNK, LAYERS, LENGTH, MODEL, ROWS, VOCAB, WIDTH, Layout, prepare
from tests.training.test_layouts import LAYOUTS, cases, name_of

L, T, D, V, C = LAYERS, LENGTH, WIDTH, VOCAB, CHUNK
F, N = MODEL.llm.intermediate_size, LENGTH // CHUNK
SMALL = 64  # elements: norms, sums over a chunk, the metrics

Key = tuple[str, str, tuple[int, ...]]


def of(layout: Layout) -> list[Collective]:
    run = prepare(layout)
    return collectives(run.step.as_text(), run.mesh)


def large(found: list[Collective]) -> dict[Key, int]:
    """(kind, axes, sizes of the dimensions) -> how often a step makes it; an all-to-all by its elements.

    A gradient may come transposed, so the sizes are sorted.
    """
    counts: Counter[Key] = Counter()
    for one in found:
        shapes = [(one.elements,)] if one.kind == "all-to-all" else [shape for _, shape in one.shapes]
        for shape in shapes:
            if prod(shape) > SMALL:
                counts[one.kind, "+".join(one.axes), tuple(sorted(shape))] += one.times
    return dict(counts)


def elements(found: list[Collective], kind: str, dtype: str = "f32") -> int:
    """Elements of all results of a kind in one step."""
    shapes = [(one.times, shape) for one in found if one.kind == kind for name, shape in one.shapes if name == dtype]
    return sum(times * prod(shape) for times, shape in shapes)


def trained_elements(layout: Layout) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(prepare(layout).trained))


def budget(*entries: tuple[str, str, tuple[int, ...], int]) -> dict[Key, int]:
    """Entries (kind, axes, shape, times); equal shapes are added."""
    total: Counter[Key] = Counter()
    for kind, axes, shape, times in entries:
        total[kind, axes, tuple(sorted(shape))] += times
    return dict(total)


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_data_parallel_reduces_the_gradients_of_what_is_trained_and_no_more(stage):
    layout = Layout("data=8", stage)
    found = of(layout)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("data",))}
    # and the loss, and the sum of the weights: for the loss, and for the guard
    assert elements(found, "all-reduce") == trained_elements(layout) + 3
    assert elements(found, "all-reduce", "pred") == N  # which chunks have a label


def test_each_micro_batch_reduces_its_own_gradients():
    layout = Layout("data=8", "pretrain", accumulate=2)
    assert elements(of(layout), "all-reduce") == 2 * (trained_elements(layout) + 1) + 2


@pytest.mark.parametrize("shape", ["data=8", "data=2"])  # moments are split inside layers, and by layers
def test_zero1_gathers_each_update_once(shape):
    layout = Layout(shape, zero1=True)
    found = of(layout)
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("data",)), ("all-gather", ("data",))}
    assert elements(found, "all-gather") == trained_elements(layout)
    leaves = len(jax.tree.leaves(prepare(layout).trained))
    norms = elements(found, "all-reduce") - trained_elements(layout) - 3
    assert 0 <= norms <= 3 * leaves  # each parameter's part of the gradient's norm


# --- fsdp ------------------------------------------------------------------------------------------------------------

HEADS = {"q": (D, 8, 4), "k": (D, 2, 4), "v": (D, 2, 4), "o": (8, 4, D)}
MLP = {"gate": (D, F), "up": (D, F), "down": (F, D)}
VISION = [(16, 8, 2)] * 3 + [(8, 2, 16), (16, 24), (24, 16), (48, 16), (5, 16)]  # q, k, v, o, up, down, patch, position
PROJECTOR = [(16, D), (D, D)]


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_fsdp_gathers_a_layer_for_the_forward_and_once_more_for_the_backward_pass(stage):
    found = of(Layout("fsdp=8", stage))
    gathered = [
        *(("all-gather", "fsdp", shape, 2 * L) for shape in [*HEADS.values(), *MLP.values()]),
        *(("all-gather", "fsdp", shape, 1) for shape in VISION + PROJECTOR),
        ("all-gather", "fsdp", (D, V), 1),  # the head, for all chunks
        ("all-gather", "fsdp", (1, ROWS, T), 1),  # token ids, to look up where the table lies
        # what was found there, and its gradient
        ("all-to-all", "fsdp", (ROWS // 8 * T * D,), 2 if stage == "finetune" else 1),
    ]
    reduced = [("all-reduce", "fsdp", shape, 1) for shape in PROJECTOR]
    if stage == "finetune":  # all but the embedding, whose rows came to it
        reduced += [("all-reduce", "fsdp", shape, L) for shape in [*HEADS.values(), *MLP.values()]]
        reduced += [("all-reduce", "fsdp", (D, V), 1)]
    assert large(found) == budget(*gathered, *reduced)


# --- tensor ----------------------------------------------------------------------------------------------------------

LOSS_OVER_TENSOR = [
    ("all-reduce", "tensor", (1, ROWS, C), 5 * N),  # maximum, sum, the target's logit; maximum and sum once more
    ("all-reduce", "tensor", (1, ROWS, C, D), N),  # the hidden states' gradient
]
INPUTS_OVER_TENSOR = [
    ("all-reduce", "tensor", (ROWS, T, D), 1),  # embeddings: each device has found those of its part of the vocabulary
    ("all-reduce", "tensor", (ROWS, 4, D), 1),  # projector, 4 patches
    ("all-reduce", "tensor", (ROWS, 5, 16), 2),  # the one layer of the vision encoder that runs: attention, MLP
]
LAYERS_OVER_TENSOR = [
    ("all-reduce", "tensor", (ROWS, T, D), 2 * L),  # forward: attention, MLP
    ("all-reduce", "tensor", (ROWS, T, D), (3 + 2) * L),  # backward: q, k, v; gate, up (on a GPU: attention, MLP)
]


def test_tensor_parallel_reduces_twice_a_layer_each_way():
    grouped = [  # the gradients of k and v: summed over the 4 devices with copies of a head, then known to all
        ("all-reduce", "part of tensor", (D, 1, 4), 2 * L),
        ("all-gather", "part of tensor", (D, 2, 4), 2 * L),
    ]
    expected = budget(*INPUTS_OVER_TENSOR, *LAYERS_OVER_TENSOR, *LOSS_OVER_TENSOR, *grouped)
    assert large(of(Layout("tensor=8"))) == expected


def test_sequence_parallel_gathers_before_and_scatters_after_attention_and_mlp():
    gathered = [
        ("all-gather", "tensor", (ROWS, T, D), 2 * L),  # forward: the normed input of attention and of the MLP
        ("all-gather", "tensor", (ROWS, T, D), 2 * L),  # backward: the gradients of their outputs
        ("all-gather", "tensor", (ROWS, T, D), 1),  # hidden states for the loss
        ("all-gather", "tensor", (ROWS, T, D), 1),  # the gradient of the first layer's input, for the image features
    ]
    expected = budget(*gathered, *INPUTS_OVER_TENSOR, *LAYERS_OVER_TENSOR, *LOSS_OVER_TENSOR)
    assert large(of(Layout("tensor=8", "pretrain", sequence_parallel=True))) == expected


# --- all layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases(LAYOUTS), ids=name_of)
def test_nothing_moves_that_no_layout_needs(layout):
    """No shuffling of shards, no logits, no embedding, and nothing over devices that are no axis of the mesh."""
    found, groups = of(layout), ROWS // layout.config.train.micro_batch // layout.accumulate
    assert not [one for one in found if "?" in one.axes]
    assert {one.kind for one in found} <= {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"}
    assert {one.axes for one in found if one.kind == "all-to-all"} <= {("fsdp",)}
    for one in found:
        for _, shape in one.shapes:
            if one.kind == "all-gather" and "tensor" in one.axes:
                assert V not in shape
            assert len(shape) < 3 or shape[-1] != V  # logits of [rows, positions, V]
            if one.kind == "all-gather" and "data" not in one.axes:  # zero1 gathers its update, over data
                assert shape != (V // layout.sizes["tensor"], D)  # the embedding, if only over fsdp
    assert groups * layout.config.train.micro_batch * layout.accumulate == ROWS
