"""Every layout computes the same numbers, packed or not, and a state saved on one goes on on another.

The model has 2 key and value heads, fewer than a tensor axis of 8.
"""

from functools import cache

import jax
import numpy as np
import pytest

from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta, read_data
from tests.training.layouts import ROWS, STEPS, Layout, advance, fresh, prepare, starting_parameters

LAYOUTS = [
    Layout("data=8"),
    Layout("data=8", zero1=True),
    Layout("fsdp=8"),
    Layout("tensor=8"),
    Layout("data=2,fsdp=2,tensor=2"),
    Layout("data=2,fsdp=2,tensor=2", sequence_parallel=True, zero1=True, vision_tensor=False),
    Layout("data=2,tensor=4", accumulate=2, sequence_parallel=True),
    Layout("data=8", "pretrain"),
    Layout("fsdp=8", "pretrain"),
    Layout("tensor=8", "pretrain", sequence_parallel=True),
    Layout("data=2,fsdp=2,tensor=2", "pretrain", accumulate=2, zero1=True),
    Layout("data=2,fsdp=2,tensor=2", "all"),
    Layout("tensor=8", overlap=True),
    Layout("data=2,tensor=4", "pretrain", accumulate=2, sequence_parallel=True, overlap=True),
]
PACKED_LAYOUTS = [
    Layout("data=8", packed=True),
    Layout("fsdp=8", packed=True),
    Layout("tensor=8", packed=True, sequence_parallel=True),
    Layout("data=2,fsdp=2,tensor=2", packed=True, sequence_parallel=True, accumulate=2),
    Layout("fsdp=2,tensor=4", packed=True, overlap=True),
]
# With --thorough: each of their axes and settings is in another one too.
THOROUGH = [
    *(Layout("data=8"), Layout("data=2,fsdp=2,tensor=2"), Layout("data=8", "pretrain"), Layout("fsdp=8", "pretrain")),
    *(Layout("data=8", packed=True), Layout("fsdp=8", packed=True)),
]


def cases(layouts: list[Layout]) -> list:
    """Layouts as parameters, some of them for --thorough alone."""
    return [pytest.param(layout, marks=pytest.mark.thorough) if layout in THOROUGH else layout for layout in layouts]


def name_of(layout: Layout) -> str:
    settings = ("sequence_parallel", "zero1", "vision_tensor", "packed", "overlap")
    changed = [name for name in settings if getattr(layout, name) != getattr(Layout(""), name)]
    return "-".join([layout.stage, layout.shape, f"{layout.accumulate}x", *changed])


@cache
def trained(layout: Layout) -> tuple[dict, list[float]]:
    """(final parameters on the host, losses) of a whole run."""
    run = prepare(layout)
    params, _, losses = advance(run, *fresh(run), 0, STEPS)
    return jax.tree.map(np.asarray, params), losses


def relative_errors(ours: dict, theirs: dict) -> dict[str, float]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for (path, a), b in pairs
        if np.any(b)
    }


@pytest.mark.parametrize("layout", cases(LAYOUTS + PACKED_LAYOUTS), ids=name_of)
def test_twenty_steps_are_the_same_on_every_layout(layout):
    reference, expected = trained(Layout("data=1", layout.stage))
    params, losses = trained(layout)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert min(relative_errors(reference["projector"], starting_parameters()["projector"]).values()) > 0.01
    errors = relative_errors(params, reference)
    # The encoder's biases start at 0 and are small after 20 steps; that of the keys has no gradient but rounding.
    errors.pop("['vision']['layers']['k_bias']", None)
    bound = 5e-5 if layout.stage == "all" else 1e-5
    assert max(errors.values()) < bound, max(errors, key=errors.get)


def test_a_run_moves_from_layout_to_layout(tokenizer, tmp_path):
    """1 device -> tensor=2 -> data=4 -> fsdp=8, five steps on each: bits are kept, losses are those of one device."""
    chain = [Layout("data=1"), Layout("tensor=2"), Layout("data=4", zero1=True), Layout("fsdp=8")]
    losses: list[float] = []
    before = None
    for layout in chain:
        run = prepare(layout)
        if before is None:
            params, moments, samples = *fresh(run), 0
        else:
            with Checkpoints(tmp_path, None) as checkpoints:
                params, moments = checkpoints.restore(len(losses), run.params, run.moments)
            samples = read_data(checkpoints.directory / str(len(losses)))["samples"]
            restored = jax.tree.map(np.asarray, (params, moments))
            jax.tree.map(np.testing.assert_array_equal, restored, before)
            for array, leaf in zip(
                jax.tree.leaves((params, moments)), jax.tree.leaves((run.params, run.moments)), strict=True
            ):
                assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim)
        start = samples // ROWS  # the data order is a function of this number alone
        params, moments, more = advance(run, params, moments, start, start + 5)
        losses += more
        before = jax.tree.map(np.asarray, (params, moments))
        with Checkpoints(tmp_path, None) as checkpoints:
            meta = Meta(len(losses), layout.config, tuple(params), None, tokenizer)
            checkpoints.save(len(losses), params, moments, {"samples": len(losses) * ROWS}, meta)
    reference, expected = trained(Layout("data=1"))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(relative_errors(before[0], reference).values()) < 1e-5
