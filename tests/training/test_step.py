"""One optimizer step: accumulation against one large batch, the loss against the formula, what a step may change."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.config import OptimizerConfig
from neva_jax.data.encoding import Encoded
from neva_jax.data.packing import training_row
from neva_jax.derived import frozen_components, image_tokens, trained_components
from neva_jax.models.neva import abstract_model, random_parameters
from neva_jax.parallel.mesh import make_mesh, place_batch, shardings
from neva_jax.training import step as training_step
from neva_jax.training.guard import GuardState
from neva_jax.training.optimizer import learning_rate, make_optimizer
from neva_jax.training.step import TrainState, gradients, layout_of, make_eval_step, make_train_step
from tests.models.helpers import FP32, neva_graph, random_batch, tiny_config

ROWS, LENGTH, CHUNK = 8, 14, 5
# Labels of each row: with four micro batches of two rows, the first has 2 of them, the third none, the last 22.
LABELS = (1, 1, 6, 3, 0, 0, 12, 10)


def model_config(*frozen):
    config = tiny_config()
    names = ("vision", "projector", "llm")
    parts = {name: dataclasses.replace(getattr(config, name), freeze=name in frozen) for name in names}
    return dataclasses.replace(config, **parts)


@cache
def model(*frozen):
    """(graph definition, trained parameters, frozen parameters) of a model with these components frozen."""
    config = model_config(*frozen)
    params = parameters()
    return (
        neva_graph(config),
        {name: params[name] for name in trained_components(config)},
        {name: params[name] for name in frozen_components(config)},
    )


@cache
def parameters():
    make = jax.jit(partial(random_parameters, tiny_config(), FP32))
    return jax.tree.map(np.asarray, make(jax.random.key(1)))


@cache
def rows():
    """A batch of host arrays [ROWS, ...]; the weights are 1 but for row 6, where they are fractions."""
    draw = np.random.default_rng(4)
    batch = random_batch(tiny_config(), rows=ROWS, length=LENGTH, images=1)
    batch["targets"] = draw.integers(0, 40, (ROWS, LENGTH)).astype(np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row, count in enumerate(LABELS):
        weights[row, draw.permutation(LENGTH)[:count]] = 1
    weights[6] *= draw.random(LENGTH).astype(np.float32)
    batch["loss_weights"] = weights
    return batch


def in_micro_batches(batch, accumulate):
    return {name: array.reshape(accumulate, -1, *array.shape[1:]) for name, array in batch.items()}


def relative_error(ours, theirs):
    ours, theirs = (np.asarray(value, np.float64) for value in (ours, theirs))
    norm = np.linalg.norm(theirs)
    return np.linalg.norm(ours - theirs) / norm if norm else np.linalg.norm(ours)


def assert_trees_close(ours, theirs, bound):
    """Each parameter within `bound` of its norm, but for the keys' bias: its gradient is 0 apart from rounding."""
    ours, theirs = (nnx.traversals.flatten_mapping(tree) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        if path[-1] != "k_bias":
            assert relative_error(ours[path], expected) < bound, path


@cache
def compute_gradients(accumulate, frozen=()):
    """(loss, gradients) of the batch in this many micro batches."""
    graphdef, trained, rest = model(*frozen)
    # Unoptimised: it compiles faster, and runs once.
    compute = jax.jit(partial(gradients, graphdef, chunk=CHUNK), compiler_options={"xla_backend_optimization_level": 0})
    return compute(trained, rest, batch=in_micro_batches(rows(), accumulate))[:2]


@cache
def token_losses():
    """-log softmax of the targets [ROWS, LENGTH] in float64, from the logits of all positions."""

    @jax.jit
    def all_logits(params, batch):
        neva = nnx.merge(neva_graph(tiny_config()), params)
        return neva.llm.logits(neva(batch)[0])

    logits = np.asarray(all_logits(parameters(), rows()), np.float64)
    picked = np.take_along_axis(logits, rows()["targets"][..., None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - picked


# --- loss and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4, 8])
def test_loss_is_the_mean_over_all_labels_of_the_batch(accumulate):
    weights = rows()["loss_weights"].astype(np.float64)
    expected = (token_losses() * weights).sum() / weights.sum()
    loss, _ = compute_gradients(accumulate)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    # The mean of micro batches' means, which this must not be, is another number.
    if accumulate == 4:
        means = [
            (nll * weight).sum() / weight.sum()
            for nll, weight in zip(token_losses().reshape(4, -1), weights.reshape(4, -1), strict=True)
            if weight.sum()
        ]
        assert abs(np.mean(means) / expected - 1) > 1e-3


def test_gradients_are_those_of_the_formula():
    """jax.grad of a loss that holds the logits of all rows and positions at once."""
    graphdef = neva_graph(tiny_config())

    @jax.jit
    def reference(params, batch):
        def loss(params):
            neva = nnx.merge(graphdef, params)
            log_probabilities = jax.nn.log_softmax(neva.llm.logits(neva(batch)[0]))
            picked = jnp.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
            return -jnp.sum(picked * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

        return jax.grad(loss)(params)

    _, grads = compute_gradients(1)
    assert_trees_close(grads, reference(parameters(), rows()), 1e-5)


@pytest.mark.parametrize("accumulate", [4, 8])
def test_accumulated_gradients_equal_those_of_one_batch(accumulate):
    loss, grads = compute_gradients(accumulate)
    whole_loss, whole_grads = compute_gradients(1)
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-5)
    assert_trees_close(grads, whole_grads, 1e-5)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(whole_grads["projector"]))


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "llm"), ("vision", "projector")])
def test_frozen_components_get_no_gradient(frozen):
    loss, grads = compute_gradients(1, frozen)
    every_loss, every_grad = compute_gradients(1)
    assert set(grads) == {"vision", "projector", "llm"} - set(frozen)
    assert float(loss) == pytest.approx(float(every_loss), rel=1e-6)
    assert_trees_close(grads, {name: every_grad[name] for name in grads}, 1e-5)


# --- a whole step ----------------------------------------------------------------------------------------------------

# With Adam's usual epsilon the first step moves an element whose gradient is a rounding error by a whole learning rate.
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-4, warmup_steps=3, weight_decay=0.1, clip_norm=0.5, eps=1e-3)


@cache
def run_step(accumulate, frozen=("vision",)):
    """Step 2 of a run: (new state, metrics, frozen parameters as they lie on the device afterwards)."""
    graphdef, trained, rest = model(*frozen)
    optimizer, schedule = make_optimizer(OPTIMIZER, 20), learning_rate(OPTIMIZER, 20)
    trained, rest = (jax.tree.map(jnp.array, tree) for tree in (trained, rest))
    state = TrainState(jnp.int32(1), trained, jax.jit(optimizer.init)(trained))
    train_step = make_train_step(graphdef, optimizer, schedule, CHUNK)
    state, metrics = train_step(state, rest, in_micro_batches(rows(), accumulate))
    return state, metrics, rest


def test_the_new_state_lies_where_its_layout_says(monkeypatch):
    """A CPU's compiler leaves it where the old one lay, a GPU's does not: what is asked for here is another place."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 1})
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    ones = lambda graphdef, trained, *_: (jnp.float32(0), jax.tree.map(jnp.ones_like, trained), {})  # noqa: E731
    monkeypatch.setattr(training_step, "gradients", ones)
    optimizer = optax.sgd(0.1, momentum=0.9)
    trained = {"projector": jax.device_put(jnp.ones((4, 2)), split)}
    numbers = jax.device_put((jnp.int32(0), GuardState()), whole)
    state = TrainState(numbers[0], trained, optimizer.init(trained), numbers[1])
    layout = layout_of(state)
    assert layout.trained["projector"] == split
    for place in (split, whole):
        asked = layout._replace(trained={"projector": place})
        step = make_train_step(None, optimizer, lambda n: 0.1, 1, layout=asked)
        made = step.lower(state, {}, {"loss_weights": jnp.ones((1, 2, 3))}).compile().output_shardings[0]
        assert made.trained["projector"].is_equivalent_to(place, 2)


def test_one_step_with_four_micro_batches_equals_one_with_one():
    accumulated, accumulated_metrics, _ = run_step(4)
    whole, whole_metrics, _ = run_step(1)
    for name, value in whole_metrics.items():
        assert float(accumulated_metrics[name]) == pytest.approx(float(value), rel=1e-5), name
    assert_trees_close(accumulated.trained, whole.trained, 1e-5)


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "llm")])
def test_a_step_changes_the_trained_components_alone(frozen):
    state, _, rest = run_step(4, frozen)
    _, trained, before = model(*frozen)
    assert int(state.step) == 2
    assert set(state.trained) == set(trained)
    for path, leaf in nnx.traversals.flatten_mapping(state.trained).items():
        assert leaf.dtype == jnp.float32
        assert np.any(leaf != nnx.traversals.flatten_mapping(trained)[path]), path
    jax.tree.map(np.testing.assert_array_equal, rest, before)


def test_metrics():
    """Loss and norm of the unclipped gradients, and the learning rate that this step used."""
    _, metrics, _ = run_step(4)
    loss, grads = compute_gradients(1, ("vision",))
    norm = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
    assert norm > OPTIMIZER.clip_norm
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"loss": float(loss), "grad_norm": norm, "lr": 0.01 * 2 / 4, "verdict": 0}, rel=1e-5
    )


def test_the_update_is_the_optimizers():
    """The new parameters are those of make_optimizer, given the gradients of the whole batch."""
    state, _, _ = run_step(4)
    _, trained, _ = model("vision")
    _, grads = compute_gradients(1, ("vision",))
    optimizer = make_optimizer(OPTIMIZER, 20)

    @jax.jit
    def expected(trained, grads):
        return optax.apply_updates(trained, optimizer.update(grads, optimizer.init(trained), trained)[0])

    assert_trees_close(state.trained, expected(trained, grads), 1e-5)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_eval_step_sums_losses_and_weights(accumulate):
    graphdef, trained, rest = model("vision")
    total, weight = make_eval_step(graphdef, CHUNK)(trained, rest, in_micro_batches(rows(), accumulate))
    weights = rows()["loss_weights"].astype(np.float64)
    assert float(total) == pytest.approx((token_losses() * weights).sum(), rel=1e-5)
    assert float(weight) == pytest.approx(weights.sum(), rel=1e-6)


def test_eval_step_leaves_out_rows_whose_weights_were_zeroed():
    graphdef, trained, rest = model("vision")
    batch = {**rows(), "loss_weights": rows()["loss_weights"].copy()}
    batch["loss_weights"][5:] = 0
    total, weight = make_eval_step(graphdef, CHUNK)(trained, rest, in_micro_batches(batch, 2))
    assert float(weight) == sum(LABELS[:5])
    assert float(total) == pytest.approx((token_losses() * batch["loss_weights"]).sum(), rel=1e-5)


def test_eval_step_of_a_batch_without_labels_is_zero():
    graphdef, trained, rest = model("vision")
    batch = {**rows(), "loss_weights": np.zeros_like(rows()["loss_weights"])}
    total, weight = make_eval_step(graphdef, CHUNK)(trained, rest, in_micro_batches(batch, 2))
    assert (float(total), float(weight)) == (0, 0)


# --- dropout ---------------------------------------------------------------------------------------------------------

RATES = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "ffn_dropout": 0.1}


def dropout_model():
    config = model_config("vision")
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, **RATES))


@cache
def dropout_loss(accumulate, seed, batch=rows):
    """(loss, gradients) with dropout; seed None: without."""
    _, trained, rest = model("vision")
    rng = None if seed is None else jax.random.key(seed)
    compute = jax.jit(
        partial(gradients, neva_graph(dropout_model()), chunk=CHUNK),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return compute(trained, rest, batch=in_micro_batches(batch(), accumulate), rng=rng)[:2]


def eight_times_the_same():
    return {name: np.repeat(array[6:7], ROWS, axis=0) for name, array in rows().items()}


def test_dropout_follows_the_key_and_the_micro_batch():
    assert float(dropout_loss(4, 1)[0]) == float(dropout_loss.__wrapped__(4, 1)[0])
    assert float(dropout_loss(4, 1)[0]) != float(dropout_loss(4, 2)[0])
    plain = float(dropout_loss(4, None)[0])
    assert plain == pytest.approx(float(compute_gradients(4, ("vision",))[0]), rel=1e-6)
    # Rows alike: if each micro batch drew the same masks, 4 of them would be as good as the first alone.
    four = float(dropout_loss(4, 1, eight_times_the_same)[0])
    _, trained, rest = model("vision")
    first = in_micro_batches({name: array[:2] for name, array in eight_times_the_same().items()}, 1)
    compute = jax.jit(partial(gradients, neva_graph(dropout_model()), chunk=CHUNK))
    one = compute(trained, rest, batch=first, rng=jax.random.key(1))[0]
    assert abs(four - float(one)) > 1e-4


def test_dropout_is_the_same_on_any_mesh():
    _, trained, rest = model("vision")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, abstract = abstract_model(dropout_model(), FP32)
    layout = shardings(mesh, abstract)
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(tree, layout[name]) for name, tree in {**trained, **rest}.items()}
        compute = jax.jit(partial(gradients, neva_graph(dropout_model()), chunk=CHUNK))
        loss, grads, _ = compute(
            {name: params[name] for name in trained},
            {name: params[name] for name in rest},
            batch=place_batch(mesh, rows(), 2),
            rng=jax.random.key(1),
        )
    expected, expected_grads = dropout_loss(2, 1)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert_trees_close(grads, expected_grads, 1e-5)


def dropout_steps(train_step, optimizer, states):
    """Runs a step from each of these; the old state is given away, so copies go in."""
    _, _, rest = model("vision")
    batch = in_micro_batches(rows(), 2)
    return [train_step(jax.tree.map(jnp.array, state), rest, batch) for state in states]


def test_dropout_is_drawn_anew_in_each_step_and_again_after_a_resume():
    _, trained, _ = model("vision")
    optimizer, schedule = make_optimizer(OPTIMIZER, 20), learning_rate(OPTIMIZER, 20)
    train_step = make_train_step(neva_graph(dropout_model()), optimizer, schedule, CHUNK, dropout_seed=3)
    state = TrainState(jnp.int32(0), trained, jax.jit(optimizer.init)(trained))
    (first, metrics), (_, other) = dropout_steps(train_step, optimizer, [state, state._replace(step=jnp.int32(1))])
    assert float(metrics["loss"]) != float(other["loss"])
    saved = jax.tree.map(np.asarray, first)  # what a checkpoint holds
    (ended, _), (resumed, _) = dropout_steps(train_step, optimizer, [first, saved])
    jax.tree.map(np.testing.assert_array_equal, resumed, ended)


def test_no_dropout_in_validation_and_no_random_numbers_without_rates():
    _, trained, rest = model("vision")
    batch = in_micro_batches(rows(), 2)
    nll, _ = make_eval_step(neva_graph(dropout_model()), CHUNK)(trained, rest, batch)
    plain, _ = make_eval_step(model("vision")[0], CHUNK)(trained, rest, batch)
    assert float(nll) == float(plain)
    optimizer, schedule = make_optimizer(OPTIMIZER, 20), learning_rate(OPTIMIZER, 20)
    state = TrainState(jnp.int32(0), trained, jax.eval_shape(optimizer.init, trained))

    def program(graphdef, seed):
        step = make_train_step(graphdef, optimizer, schedule, CHUNK, dropout_seed=seed)
        return step.lower(state, rest, batch).as_text()

    assert "threefry" in program(neva_graph(dropout_model()), 3)
    assert "threefry" not in program(model("vision")[0], None)


# --- packed rows -----------------------------------------------------------------------------------------------------


def packed_and_alone():
    """The same six samples, one or two tiles each or none, alone in rows and packed into two rows: [6, ...], [2, ...].

    Their tokens are random, so the targets are: what counts is that no sample sees another.
    """
    draw = np.random.default_rng(5)
    config = tiny_config()
    features = image_tokens(config)
    size = config.vision.image_size
    samples, tiles = [], []
    for length, count in ((12, 1), (7, 0), (13, 2), (9, 1), (14, 1), (5, 0)):
        slots = np.full(length + 1, -1, np.int32)
        room = min(count * features, length - 2)
        slots[1 : 1 + room] = np.arange(count * features)[-room:] if room else []
        weights = np.where(np.arange(length + 1) > room + 1, draw.random(length + 1), 0).astype(np.float32)
        samples.append(Encoded(draw.integers(1, 40, length + 1).astype(np.int32), weights, slots))
        tiles.append(draw.integers(0, 256, (count, size, size, 3)).astype(np.uint8))

    def batch(rows, length, most):
        made = []
        for row in rows:
            arrays = training_row([samples[i] for i in row], [len(tiles[i]) * features for i in row], length)
            arrays["images"] = np.zeros((most, size, size, 3), np.uint8)
            own = np.concatenate([tiles[i] for i in row])
            arrays["images"][: len(own)] = own
            made.append(arrays)
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    return batch([[i] for i in range(6)], 14, 2), batch([[0, 1, 2], [3, 4, 5]], 34, 3)


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "llm"), ()])
def test_packed_rows_have_the_loss_and_gradients_of_the_samples_alone(frozen):
    alone, packed = packed_and_alone()
    graphdef, trained, rest = model(*frozen)
    compute = jax.jit(partial(gradients, graphdef), static_argnums=(3, 4))
    loss, grads, _ = compute(trained, rest, in_micro_batches(alone, 1), CHUNK, False)
    packed_loss, packed_grads, _ = compute(trained, rest, in_micro_batches(packed, 1), CHUNK, True)
    assert relative_error(packed_loss, loss) < 1e-5
    assert_trees_close(packed_grads, grads, 1e-5)
    unaware, *_ = compute(trained, rest, in_micro_batches(packed, 1), CHUNK, False)
    assert relative_error(unaware, loss) > 1e-3


def test_a_packed_mask_is_causal_within_each_segment():
    """Which tokens a token sees, by brute force: changing one token changes the outputs of those that see it alone."""
    _, packed = packed_and_alone()
    graphdef, trained, _ = model()
    row = {name: values[:1] for name, values in packed.items()}
    segments, length = row["segment_ids"][0], 34

    @jax.jit
    def outputs(tokens):
        return nnx.merge(graphdef, trained)({**row, "tokens": tokens, "image_slots": jnp.full((1, length), -1)}, True)[
            0
        ]

    before = np.asarray(outputs(row["tokens"]))[0]
    for changed in range(length):
        tokens = row["tokens"].copy()
        tokens[0, changed] += 1
        differs = np.abs(np.asarray(outputs(tokens))[0] - before).max(axis=-1) > 0
        sees = (np.arange(length) >= changed) & (segments == segments[changed])
        np.testing.assert_array_equal(differs, sees)
