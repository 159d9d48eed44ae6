"""The schedule against NeMo's, and the optimizer against Adam written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neva_jax.config import OptimizerConfig
from neva_jax.models.neva import abstract_model
from neva_jax.training.optimizer import decay_mask, learning_rate, make_optimizer
from tests.models.helpers import FP32, tiny_config


def nemo_learning_rate(step, lr, min_lr, warmup_steps, constant_steps, max_steps):
    """CosineAnnealing of nemo/core/optim/lr_scheduler.py; its other warm-up for constant_steps > 0 is not ours."""
    decay_steps = max_steps - (constant_steps + warmup_steps)
    if warmup_steps > 0 and step <= warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if constant_steps > 0:
        if step > warmup_steps + decay_steps:
            return min_lr
        return min_lr + 0.5 * (math.cos(math.pi * (step - warmup_steps) / decay_steps) + 1.0) * (lr - min_lr)
    if step > max_steps:
        return min_lr
    mult = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (max_steps - warmup_steps)))
    return (lr - min_lr) * mult + min_lr


@pytest.mark.parametrize(
    ("warmup", "constant", "steps"),
    [(0, 0, 1), (0, 0, 20), (1, 0, 4), (5, 0, 20), (3, 4, 20), (0, 7, 20), (19, 0, 20), (10, 9, 20), (140, 0, 4650)],
)
def test_learning_rate_is_nemos(warmup, constant, steps):
    config = OptimizerConfig(lr=2e-3, min_lr=2e-5, warmup_steps=warmup, constant_steps=constant)
    schedule = learning_rate(config, steps)
    numbers = np.arange(steps + 5)
    expected = [nemo_learning_rate(int(n), 2e-3, 2e-5, warmup, constant, steps) for n in numbers]
    np.testing.assert_allclose(schedule(numbers), expected, rtol=1e-5)


def test_learning_rate_at_the_corners():
    schedule = learning_rate(OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, constant_steps=6), 20)
    values = {n: float(schedule(n)) for n in (0, 3, 4, 9, 14, 15, 19, 20, 1000)}
    expected = {0: 0.2, 3: 0.8, 4: 1.0, 9: 0.55, 14: 0.1, 15: 0.1, 19: 0.1, 20: 0.1, 1000: 0.1}
    assert values == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("warmup", "constant"), [(20, 0), (0, 20), (12, 8)])
def test_learning_rate_without_any_cosine_step(warmup, constant):
    """Warm-up and constant steps fill the run: the peak at the last warm-up step, then the minimum at once."""
    schedule = learning_rate(OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, constant_steps=constant), 20)
    values = np.asarray(schedule(np.arange(25)))
    rising = (np.arange(warmup + 1) + 1) / (warmup + 1)
    np.testing.assert_allclose(values[: warmup + 1], rising, rtol=1e-6)
    np.testing.assert_allclose(values[warmup + 1 :], 0.1, rtol=1e-6)


def numpy_adam(params, gradients, config, lr):
    """Parameters after each of the steps; decoupled weight decay for what is called `kernel`."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    history = []
    for count, grads in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        for name, value in params.items():
            grad = grads[name] * scale
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
            mean = first[name] / (1 - config.beta1**count)
            square = second[name] / (1 - config.beta2**count)
            decay = config.weight_decay * value if name == "kernel" else 0.0
            params[name] = value - lr(count - 1) * (mean / (np.sqrt(square) + config.eps) + decay)
        history.append(dict(params))
    return history


@pytest.mark.parametrize("clip_norm", [None, 0.3, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_against_numpy(weight_decay, clip_norm):
    # A large epsilon makes the size of the gradients, and so the clipping, visible in Adam's update.
    config = OptimizerConfig(
        lr=0.05, min_lr=0.01, warmup_steps=1, weight_decay=weight_decay, clip_norm=clip_norm, eps=1e-2
    )
    draw = np.random.default_rng(0)
    shapes = {"kernel": (4, 5), "bias": (5,), "scale": (4,)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {name: (draw.normal(size=shape) * size).astype(np.float32) for name, shape in shapes.items()}
        for size in (0.2, 0.01, 3.0)
    ]
    expected = numpy_adam(params, gradients, config, lambda n: nemo_learning_rate(n, 0.05, 0.01, 1, 0, 6))
    optimizer = make_optimizer(config, steps=6)
    state = optimizer.init(params)
    for grads, reference in zip(gradients, expected, strict=True):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in params.items():
            np.testing.assert_allclose(value, reference[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("size", "clipped"), [(0.5, False), (0.999, False), (1.001, True), (40.0, True)])
def test_gradients_are_clipped_at_the_global_norm(size, clipped):
    """The first moment after one step is (1 - beta1) * what Adam was given."""
    draw = np.random.default_rng(1)
    grads = {"kernel": draw.normal(size=(3, 4)), "bias": draw.normal(size=4)}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    grads = {name: jnp.asarray(g / norm * size, jnp.float32) for name, g in grads.items()}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, beta1=0.9), steps=300)
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")
    given = {name: np.asarray(moments[name]) / 0.1 for name in grads}
    length = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in given.values()))
    assert length == pytest.approx(1.0 if clipped else size, rel=1e-5)
    for name, value in given.items():
        np.testing.assert_allclose(value, grads[name] / (size if clipped else 1), rtol=1e-5, atol=1e-6)


def test_clip_norm_null_leaves_large_gradients():
    grads = {"kernel": jnp.full((3, 4), 1e4, jnp.float32)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=None, beta1=0.9), steps=300)
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["kernel"], 1e3, rtol=1e-5)


def test_moments_are_fp32_and_start_at_zero():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    state = make_optimizer(OptimizerConfig(), steps=300).init(params)
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state, name)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), moments) == jax.tree.map(
            lambda leaf: (leaf.shape, jnp.float32), params
        )
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(moments))


NOT_DECAYED = {
    "vision.class_token",
    *(f"vision.{norm}.{part}" for norm in ("pre_norm", "post_norm") for part in ("scale", "bias")),
    *(f"vision.layers.{norm}.{part}" for norm in ("attention_norm", "mlp_norm") for part in ("scale", "bias")),
    *(f"vision.layers.{name}_bias" for name in ("q", "k", "v", "o", "up", "down")),
    "projector.bias_1",
    "projector.bias_2",
    "llm.layers.attention_norm.scale",
    "llm.layers.mlp_norm.scale",
    "llm.norm.scale",
}
DECAYED = {
    "vision.patch",
    "vision.position",
    *(f"vision.layers.{name}" for name in ("q", "k", "v", "o", "up", "down")),
    "projector.kernel_1",
    "projector.kernel_2",
    "llm.embedding",
    "llm.head",
    *(f"llm.layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")),
}


def test_decay_mask_of_the_model():
    params = nnx.to_pure_dict(abstract_model(tiny_config(), FP32)[1])
    mask = {".".join(path): value for path, value in nnx.traversals.flatten_mapping(decay_mask(params)).items()}
    assert {name for name, value in mask.items() if value} == DECAYED
    assert {name for name, value in mask.items() if not value} == NOT_DECAYED


def test_weight_decay_shrinks_what_the_mask_names_and_nothing_else():
    """Without a gradient, a decayed parameter is multiplied by 1 - lr * weight_decay; lr of the first step is 0.05."""
    config = OptimizerConfig(lr=0.1, min_lr=0.0, warmup_steps=1, weight_decay=0.5)
    shapes = nnx.to_pure_dict(abstract_model(tiny_config(), FP32)[1])
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    optimizer = make_optimizer(config, steps=10)
    first_step = jax.jit(lambda params, grads: optimizer.update(grads, optimizer.init(params), params)[0])
    updates = first_step(params, jax.tree.map(np.zeros_like, params))
    for path, update in nnx.traversals.flatten_mapping(updates).items():
        name = ".".join(path)
        np.testing.assert_allclose(update, -0.025 if name in DECAYED else 0.0, rtol=1e-5, err_msg=name)
