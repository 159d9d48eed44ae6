"""A batch in two parts that take turns (`mesh.overlap`); that layouts agree is tests/training/test_layouts.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.models.parts import joined, next_in_turn, parted
from tests.training.layouts import Layout
from tests.training.micro_batches import FP8, MOST, compute, rows


def test_parts_are_put_together_as_they_were():
    array = jnp.arange(24).reshape(4, 3, 2)
    first, second = parted(array, 2)
    np.testing.assert_array_equal(first, array[::2])
    np.testing.assert_array_equal(joined([first, second]), array)
    assert parted(array, 1)[0] is joined([array]) is array


def test_taking_turns_changes_neither_values_nor_gradients():
    x, y = jnp.arange(3.0), jnp.arange(3.0) + 1
    (a, b), back = jax.vjp(lambda x, y: tuple(next_in_turn([x, y], 0)), x, y)
    np.testing.assert_array_equal((a, b), (x, y))
    np.testing.assert_array_equal(back((3 * x, 5 * y)), (3 * x, 5 * y))


@pytest.mark.parametrize("kind", ["fp8_delayed", pytest.param("fp8_current", marks=pytest.mark.thorough)])
def test_stored_kernels_are_those_of_the_whole_batch(kind):
    """Delayed scaling casts both parts by the same scales, and remembers the largest value of both: bits are equal."""
    plain, overlapped = (
        compute(dataclasses.replace(Layout("tensor=2", "pretrain"), overlap=on), rows(), precision=FP8[kind], unroll=2)
        for on in (False, True)
    )
    bound = 0.01 if kind == "fp8_current" else 1e-6
    assert overlapped[0][0] == pytest.approx(plain[0][0], rel=bound)
    jax.tree.map(np.testing.assert_array_equal, overlapped[1].after, plain[1].after)


@pytest.mark.thorough
@pytest.mark.parametrize("train", [{"remat": "full"}, {"remat": "none", "unroll": 2}], ids=str)
def test_with_shortcuts_and_any_recomputation(train):
    whole, short = (
        compute(dataclasses.replace(Layout("data=2,tensor=2", "pretrain"), overlap=on), rows(), **given, **train)[0]
        for on, given in ((False, {}), (True, {"prefix": True, "labelled": MOST}))
    )
    assert short[0] == pytest.approx(whole[0], rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(short[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
