"""Operations against the figures that were worked out before, transfers and times against sums made by hand."""

import pytest

from neva_jax.planning.flops import flops_per_row
from neva_jax.planning.memory import estimate
from neva_jax.planning.speed import Machine, Transfer, bandwidth, default_rate, predict

H200 = Machine(flops=790e12)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("name", "length", "tflop"),
    [("pretrain_7b", 272, 7.3), ("pretrain_7b", 300, 8.0), ("pretrain_7b", 345, 9.2), ("finetune_7b", 806, 32.4)],
)
def test_operations_per_sample(shipped, name, length, tflop):
    flops = flops_per_row(shipped(name, f"data.max_length={length}"), "cudnn")
    assert flops.model / 1e12 == pytest.approx(tflop, abs=0.05)


def test_samples_per_second_at_the_limit(shipped):
    # 98 samples/s at T = 300 and 86 at 345, all of the product rate
    for length, limit in ((300, 98), (345, 86)):
        flops = flops_per_row(shipped("pretrain_7b", f"data.max_length={length}"), "cudnn")
        assert 790e12 / flops.model == pytest.approx(limit, abs=1)


def test_a_frozen_model_needs_two_thirds(shipped):
    frozen = flops_per_row(shipped("pretrain_7b"), "cudnn")
    trained = flops_per_row(shipped("pretrain_7b", "model.llm.freeze=false"), "cudnn")
    products = 2 * 384 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert trained.llm - frozen.llm == products
    assert trained.head == 1.5 * frozen.head
    assert trained.vision == frozen.vision


def test_recomputing_adds_what_runs_again(shipped):
    def again(*overrides: str, backend: str = "cudnn") -> float:
        return flops_per_row(shipped("pretrain_7b", *overrides), backend).recomputed

    products, attention = 2 * 384 * 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 384**2 * 4096 * 32
    down = 2 * 384 * 32 * 4096 * 11008
    assert again("train.remat=none") == attention / 2
    assert again("train.remat=none", backend="xla") == 0
    assert again("train.remat=dots") == attention * 1.5
    assert again("train.remat=full") == products - down + attention * 1.5
    assert again("train.remat=full", "train.remat_method=block", "train.remat_layers=8") == pytest.approx(
        (products - down + attention) / 4 + attention / 2
    )


def transfers(config, sizes) -> dict[tuple[str, str], float]:
    sent: dict[tuple[str, str], float] = {}
    for t in predict(estimate(config, sizes), H200).transfers:
        sent[t.kind, t.axis] = sent.get((t.kind, t.axis), 0) + t.size
    return sent


def test_one_device_sends_nothing(shipped):
    speed = predict(estimate(shipped("pretrain_7b"), ONE), H200)
    assert speed.transfers == ()
    assert speed.seconds == speed.compute == pytest.approx(speed.flops.hardware * 128 / 790e12)


def test_data_parallel_reduces_the_trained_part_only(shipped):
    sent = transfers(shipped("pretrain_7b"), {"data": 8, "fsdp": 1, "tensor": 1})
    projector = 1024 * 4096 + 4096
    assert sent == {("all-reduce", "data"): pytest.approx(2 * 7 / 8 * projector * 2)}


def test_fsdp_gathers_weights_and_scatters_gradients(shipped):
    config = shipped("pretrain_7b", "train.global_batch=64")  # no accumulation
    sent = transfers(config, {"data": 1, "fsdp": 4, "tensor": 1})
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32128 * 4096
    vision = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 588 * 1024 + 257 * 1024
    projector = 1024 * 4096
    weights = 2 * (2 * layers + head + vision + 2 * projector)
    assert sent[("all-gather", "fsdp")] == pytest.approx(3 / 4 * weights)
    assert sent[("reduce-scatter", "fsdp")] == pytest.approx(3 / 4 * 2 * projector)
    accumulated = transfers(shipped("pretrain_7b"), {"data": 1, "fsdp": 4, "tensor": 1})
    assert accumulated[("all-gather", "fsdp")] == pytest.approx(2 * sent[("all-gather", "fsdp")])


@pytest.mark.parametrize(
    ("name", "settings", "sent"),
    [
        ("finetune_7b", ["train.remat=none"], 2.194),
        ("finetune_7b", ["train.remat=dots"], 3.813),
        ("finetune_7b", ["train.remat=none", "precision.compute=fp8_delayed"], 2.194),
        ("pretrain_7b", ["train.remat=none"], 3.681),
        ("pretrain_7b", ["train.remat=none", "precision.compute=fp8_delayed"], 2.062),
    ],
)
def test_fsdp_gathers_what_xla_says_of_two_h200s(name, settings, sent, shipped):
    """GB of the all-gathers in the step that jax 0.11.2 compiles for them: 8 layers, unrolled."""
    unrolled = ["model.llm.num_layers=8", "train.unroll=8", "train.micro_batch=4", "train.global_batch=8"]
    config = shipped(name, *unrolled, "model.projector.kind=mlp2x_gelu", *settings)
    gathered = transfers(config, {"data": 1, "fsdp": 2, "tensor": 1})[("all-gather", "fsdp")]
    assert gathered / 1e9 == pytest.approx(sent, rel=0.02)


def test_a_head_that_is_the_embedding_is_gathered(shipped):
    def gathered(*settings):
        config = shipped("pretrain_7b", "train.global_batch=64", *settings)
        return transfers(config, {"data": 1, "fsdp": 4, "tensor": 1})[("all-gather", "fsdp")]

    assert gathered("model.llm.tie_embeddings=true") == gathered()


def test_tensor_parallel_reduces_activations_of_each_layer(shipped):
    config = shipped("pretrain_7b", "train.global_batch=16")
    sent = transfers(config, {"data": 1, "fsdp": 1, "tensor": 2})
    language = 16 * 4096 * (4 * 32 * 384 + 384 + 128)  # and look-up, and the head's backward pass at labels
    encoder = 16 * 257 * 1024 * 23 * 2
    assert sent == {("all-reduce", "tensor"): pytest.approx(2 / 2 * 2 * (language + encoder))}


def test_an_encoder_that_tensor_does_not_split_sends_features_and_gradients(shipped):
    settings = ["train.global_batch=32", "mesh.vision_tensor=false"]
    sizes = {"data": 2, "fsdp": 1, "tensor": 2}
    frozen = predict(estimate(shipped("pretrain_7b", *settings), sizes), H200).transfers
    features = 16 * 256 * 1024  # without the class token
    assert [t.size for t in frozen if t.kind == "all-gather"] == [pytest.approx(1 / 2 * 2 * features)]
    language = 16 * 4096 * (4 * 32 * 384 + 384 + 128)
    reduced = [t.size for t in frozen if (t.kind, t.axis) == ("all-reduce", "tensor")]
    assert sum(reduced) == pytest.approx(2 / 2 * 2 * language)
    trained = predict(estimate(shipped("pretrain_7b", *settings, "model.vision.freeze=false"), sizes), H200).transfers
    vision = 24 * (4 * 1024**2 + 2 * 1024 * 4096) + 588 * 1024 + 257 * 1024
    gradients = [t.size for t in trained if t.what == "encoder's gradients"]
    assert gradients == [pytest.approx(2 / 2 * 2 * vision, rel=2e-3)]  # and its biases and norms


def test_an_axis_inside_a_node_has_nvlink():
    assert bandwidth({"data": 2, "fsdp": 2, "tensor": 2}, "data", H200) == 450e9
    # data leaves the node and each device has a port of its own; fsdp's eight share theirs, up to NVLink's speed
    assert bandwidth({"data": 4, "fsdp": 1, "tensor": 8}, "data", H200) == 50e9
    assert bandwidth({"data": 4, "fsdp": 1, "tensor": 8}, "tensor", H200) == 450e9
    assert bandwidth({"data": 1, "fsdp": 64, "tensor": 1}, "fsdp", H200) == 400e9
    assert bandwidth({"data": 1, "fsdp": 16, "tensor": 4}, "fsdp", H200) == 100e9


def test_transfers_overlap_except_those_over_tensor(shipped):
    config = shipped("finetune_7b", "train.global_batch=32")
    speed = predict(estimate(config, {"data": 2, "fsdp": 2, "tensor": 2}), Machine(flops=790e12, nvlink=1e9))
    beside = sum(t.seconds for t in speed.transfers if t.axis != "tensor")
    before = sum(t.seconds for t in speed.transfers if t.axis == "tensor")
    assert beside > speed.compute
    assert speed.seconds == pytest.approx(beside + before)
    assert all(isinstance(t, Transfer) and t.seconds == pytest.approx(t.size / 1e9) for t in speed.transfers)


def test_with_overlap_what_the_language_model_sends_over_tensor_is_beside_the_computing(shipped):
    sizes = {"data": 1, "fsdp": 1, "tensor": 2}
    plain, overlapped = (
        predict(estimate(shipped("pretrain_7b", "train.global_batch=16", f"mesh.overlap={on}"), sizes), H200)
        for on in ("false", "true")
    )
    others = [t.seconds for t in plain.transfers if t.what != "activations"]
    assert plain.overlapped == 0
    assert len(others) == 2 and overlapped.exposed == pytest.approx(sum(others))
    assert overlapped.exposed + overlapped.overlapped == pytest.approx(plain.exposed)
    assert overlapped.seconds < plain.seconds


def test_the_rate_follows_the_compute_dtype(shipped):
    assert default_rate(shipped("pretrain_7b")) == 790
    assert default_rate(shipped("pretrain_7b", "precision.compute=fp8_current")) == 1450
