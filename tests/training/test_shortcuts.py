"""Shortcuts of a step: the same loss and gradients as without, and no shortcut where something would be lost."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.checks import check_mesh, check_numbers
from neva_jax.config import Fp8Config, PrecisionConfig
from neva_jax.errors import UserError
from neva_jax.training.shortcuts import (
    abstract_prefix,
    fits,
    labelled_positions,
    prefix_tokens,
)
from tests.training.layouts import VOCAB, Layout
from tests.training.micro_batches import FP8, MOST, PREFIX, assert_same, compute, config_of, flat, rows


@cache
def reference():
    """(loss, gradients) of `rows()` without shortcuts, in fp32."""
    return compute(Layout("data=1", "pretrain"), rows())[0]


# --- the same numbers ------------------------------------------------------------------------------------------------


LAYOUTS = [
    pytest.param(Layout("data=1", "pretrain"), marks=pytest.mark.thorough),
    pytest.param(Layout("data=2,fsdp=2", "pretrain"), marks=pytest.mark.thorough),
    Layout("tensor=8", "pretrain"),
    Layout("data=2,tensor=2", "pretrain", sequence_parallel=True),
    Layout("fsdp=2,tensor=2", "pretrain", overlap=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.shape)
def test_both_shortcuts_give_the_loss_and_the_gradients_of_the_whole(layout):
    short, more = compute(layout, rows(), prefix=True, labelled=MOST)
    assert_same(short, reference(), 2e-5)
    config = config_of(layout, constant_prefix=PREFIX)
    expected = abstract_prefix(config, layout.mesh)
    for found, wanted in zip(jax.tree.leaves(more.prefix), jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)


RECOMPUTED = [
    pytest.param({"remat": "full"}, marks=pytest.mark.thorough),
    pytest.param({"remat": "none"}, marks=pytest.mark.thorough),
    {"remat": "dots", "unroll": 2},
    pytest.param({"remat": "full", "remat_method": "block", "remat_layers": 1}, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("train", RECOMPUTED, ids=str)
def test_with_any_recomputation(train):
    short, _ = compute(Layout("data=1", "pretrain"), rows(), prefix=True, labelled=MOST, **train)
    assert_same(short, reference(), 2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_labelled_positions_while_the_language_model_is_trained(packed):
    layout = Layout("data=1", "finetune", accumulate=2, packed=packed)
    arrays = rows(packed)
    assert np.count_nonzero(arrays["loss_weights"], axis=1).max() <= MOST
    assert_same(compute(layout, arrays, labelled=MOST)[0], compute(layout, arrays)[0], 2e-5)


@pytest.mark.parametrize(
    ("kind", "prefix", "unroll"),
    [
        ("fp8_delayed", True, 2),
        pytest.param("fp8_delayed", False, 1, marks=pytest.mark.thorough),
        pytest.param("fp8_current", True, 1, marks=pytest.mark.thorough),
    ],
)
def test_in_fp8_within_its_rounding(kind, prefix, unroll):
    """The gradients are no further from those of fp32 than FP8's are without the shortcuts."""
    layout = Layout("data=1", "pretrain")
    whole, _ = compute(layout, rows(), precision=FP8[kind], unroll=unroll)
    short, _ = compute(layout, rows(), prefix=prefix, labelled=MOST, precision=FP8[kind], unroll=unroll)
    assert short[0] == pytest.approx(whole[0], rel=0.01)
    ours, theirs, wanted = (flat(gradients) for _, gradients in (short, whole, reference()))
    assert np.linalg.norm(theirs - wanted) > 1e-3  # it is FP8
    assert np.linalg.norm(ours - wanted) < 1.3 * np.linalg.norm(theirs - wanted)


def test_in_bf16_within_a_hundredth():
    layout, bf16 = Layout("data=1", "pretrain"), PrecisionConfig(compute="bf16")
    whole, _ = compute(layout, rows(), precision=bf16)
    short, _ = compute(layout, rows(), prefix=True, labelled=MOST, precision=bf16)
    ours, theirs, exact = (flat(gradients) for _, gradients in (short, whole, reference()))
    assert np.linalg.norm(theirs - exact) > 1e-3 * np.linalg.norm(exact)  # it is bf16
    assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    "llm",
    [
        {"sliding_window": 7, "rope_fraction": 0.5},
        pytest.param({"rope_scaling": "linear", "rope_factor": 2.0, "qkv_bias": True}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_with_other_positions_and_masks(llm):
    layout = Layout("data=1", "pretrain")
    whole, _ = compute(layout, rows(), llm=llm)
    assert np.linalg.norm(flat(whole[1]) - flat(reference()[1])) > 1e-4  # it matters
    assert_same(compute(layout, rows(), prefix=True, labelled=MOST, llm=llm)[0], whole, 2e-5)


@pytest.mark.thorough
def test_with_the_last_layer_in_bf16():
    layout = Layout("data=1", "pretrain")
    some = PrecisionConfig(compute="fp8_current", fp8=Fp8Config(last_layers_bf16=1))
    whole, _ = compute(layout, rows(), precision=some)
    short, _ = compute(layout, rows(), prefix=True, labelled=MOST, precision=some)
    assert short[0] == pytest.approx(whole[0], rel=0.01)


# --- what does not fit is computed whole ------------------------------------------------------------------------------


def odd_rows():
    """Name -> the batch with one row that does not fit."""
    changed = {}
    for name in ("label", "token", "image", "many"):
        arrays = {key: array.copy() for key, array in rows().items()}
        if name == "label":
            arrays["loss_weights"][3, PREFIX - 1] = 1
        if name == "token":
            arrays["tokens"][3, 1] = (arrays["tokens"][3, 1] + 1) % VOCAB
        if name == "image":
            arrays["image_slots"][3, 2] = 0
        if name == "many":
            arrays["loss_weights"][3, -MOST - 1 :] = 1
        changed[name] = arrays
    return changed


@pytest.mark.parametrize(
    "name", ["label", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("token", "image")), "many"]
)
def test_a_batch_that_does_not_fit_is_computed_whole(name):
    layout, arrays = Layout("data=1", "pretrain", accumulate=4), odd_rows()[name]
    whole, _ = compute(layout, arrays)
    short, more = compute(layout, arrays, prefix=True, labelled=MOST)
    assert_same(short, whole, 2e-5)
    parts = {key: array.reshape(4, -1, *array.shape[1:]) for key, array in arrays.items()}
    taken = [bool(fits({key: array[i] for key, array in parts.items()}, more.prefix, MOST)) for i in range(4)]
    assert taken == [False, True, True, True]  # row 3 is in the first of four micro batches


def test_with_delayed_scaling_it_takes_scales_of_its_own():
    """Those of past steps never saw the prefix, and the state goes on as if the batch had not been."""
    layout, arrays, delayed = Layout("data=1", "pretrain"), odd_rows()["many"], FP8["fp8_delayed"]
    expected, _ = compute(layout, arrays, precision=FP8["fp8_current"])
    found, more = compute(layout, arrays, prefix=True, labelled=MOST, precision=delayed)
    assert_same(found, expected, 1e-6)
    assert jax.tree.leaves(more.before) and jax.tree.all(jax.tree.map(np.array_equal, more.after, more.before))
    _, more = compute(layout, rows(), prefix=True, labelled=MOST, precision=delayed)
    assert not jax.tree.all(jax.tree.map(np.array_equal, more.after, more.before))


def test_positions_with_labels_come_first_in_their_order():
    weights = jnp.array([[0, 1, 0, 0.5, 2], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    assert labelled_positions(weights, 3).tolist() == [[1, 3, 4], [0, 1, 2], [0, 1, 2]]


def test_more_positions_than_there_are_change_nothing():
    assert_same(compute(Layout("data=1", "pretrain"), rows(), labelled=1000)[0], reference(), 0)


# --- the prefix ------------------------------------------------------------------------------------------------------


def row(**changes):
    arrays = {name: array[0].copy() for name, array in rows().items()}
    for name, (place, value) in changes.items():
        arrays[name][place] = value
    return arrays


def test_a_prefix_is_text_without_labels():
    assert prefix_tokens(row(), PREFIX).tolist() == rows()["tokens"][0, :PREFIX].tolist()
    for name, value in (("image_slots", 0), ("loss_weights", 1.0), ("segment_ids", 0)):
        with pytest.raises(UserError, match=r"train.constant_prefix=5: .* has 3 tokens before .*use at most 3"):
            prefix_tokens(row(**{name: (3, value)}), PREFIX)


@pytest.mark.parametrize("length", [32, 32 + PREFIX])
def test_sequence_parallelism_splits_what_is_left_of_a_row(length):
    config = config_of(Layout("tensor=8", "pretrain", sequence_parallel=True), constant_prefix=PREFIX)
    config = _with(config, ["data", "max_length"], length)
    sizes = {"data": 1, "fsdp": 1, "tensor": 8}
    assert check_mesh(config, sizes) == 1  # rows are split: 16 of them
    with pytest.raises(UserError, match=r"less train\.constant_prefix\) is not divisible by the mesh axis tensor=8"):
        check_mesh(_with(config, ["train", "micro_batch"], 4), sizes)


UNROLLED = {"train.labelled_positions": 4, "train.unroll": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.llm.freeze": False}, "model.llm.freeze=false"),
        ({"data.pack": True}, "data.pack=true"),
        ({"model.llm.rope_scaling": "dynamic", "model.llm.rope_original_length": 64}, "rope_scaling=dynamic"),
        ({"model.llm.attention_dropout": 0.1}, "constant_prefix=4 does not go with dropout in model.llm"),
        ({"train.constant_prefix": 29}, "leaves nothing of rows of 29 tokens"),
        ({"train.constant_prefix": -1}, "must not be negative"),
        ({"train.labelled_positions": 0}, "must be at least 1"),
        ({**UNROLLED, "train.remat": "full", "train.remat_layers": 2}, "remat_layers=2 .the last layer stands alone"),
        ({"train.labelled_positions": 4}, r"train\.unroll=1 .*, train\.unroll=2\); use null"),
        ({**UNROLLED, "model.llm.hidden_dropout": 0.1}, "labelled_positions=4 does not go with dropout"),
        ({**UNROLLED, "model.llm.freeze": False, "mesh.zero1": True}, r"mesh\.zero1=true and a trained"),
    ],
    ids=str,
)
def test_settings_that_contradict(change, message):
    config = config_of(Layout("data=1", "pretrain"), constant_prefix=0 if "train.labelled_positions" in change else 4)
    check_numbers(config)
    for name, value in change.items():
        config = _with(config, name.split("."), value)
    with pytest.raises(UserError, match=message):
        check_numbers(config)


def _with(part, path, value):
    if len(path) > 1:
        value = _with(getattr(part, path[0]), path[1:], value)
    return dataclasses.replace(part, **{path[0]: value})
