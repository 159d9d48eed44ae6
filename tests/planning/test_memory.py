"""The estimate against XLA's own memory_analysis, and against sums made by hand."""

import dataclasses

import jax
import pytest

from neva_jax.config import Config
from neva_jax.derived import padded_vocab, parse_mesh_shape
from neva_jax.errors import UserError
from neva_jax.planning.compiled import compile_step
from neva_jax.planning.memory import GIB, Estimate, estimate
from neva_jax.planning.trace import traced

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
FROZEN = "model.llm.freeze=true"


def on(config: Config, shape: str) -> tuple[Config, dict[str, int]]:
    """The configuration with as many rows per step as the mesh has groups, and the mesh's sizes."""
    devices = 1
    for part in shape.split(","):
        devices *= int(part.split("=")[1])
    sizes = parse_mesh_shape(shape, devices)
    rows = config.train.micro_batch * sizes["data"] * sizes["fsdp"]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=rows)), sizes


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        pytest.param("data=1", [FROZEN, "train.remat=none"], marks=pytest.mark.thorough),
        ("data=1", [FROZEN, "train.remat=dots"]),
        ("data=1", [FROZEN, "train.remat=full"]),
        ("data=1", ["train.remat=dots", "model.vision.freeze=false"]),
        pytest.param("data=1", [FROZEN, "train.remat=full", "train.remat_layers=4"], marks=pytest.mark.thorough),
        ("data=1", [FROZEN, "train.remat=dots", "data.pack=true"]),
        ("data=1", [FROZEN, "train.remat=full", "model.llm.num_layers=4", "model.llm.attention_dropout=0.1"]),
        ("data=1", [FROZEN, "train.remat=full", "model.llm.num_layers=4", "model.llm.ffn_dropout=0.1"]),
        pytest.param("fsdp=4", ["train.remat=none"], marks=pytest.mark.thorough),
        ("fsdp=4,tensor=2", ["train.remat=full"]),
    ],
)
def test_within_a_few_percent_of_what_xla_says(middle, shape, overrides):
    config, sizes = on(middle(*overrides), shape)
    ours = estimate(config, sizes, "cpu").memory
    theirs, _ = compile_step(config, sizes)
    assert ours.arguments == pytest.approx(theirs.arguments, rel=1e-4)
    assert ours.total == pytest.approx(theirs.total, rel=0.06)
    assert ours.total - ours.arguments == pytest.approx(theirs.temporary, rel=0.12)


def test_accumulated_against_xla(middle):
    config = middle("train.remat=dots", "train.global_batch=16")
    ours = estimate(config, ONE, "cpu").memory
    theirs, _ = compile_step(config, ONE)
    assert ours.total == pytest.approx(theirs.total, rel=0.1)
    once = estimate(middle("train.remat=dots"), ONE, "cpu").memory
    assert ours.gradients == 2 * once.gradients


def test_parameters_by_hand(shipped):
    plan = estimate(shipped("finetune_7b", "mesh.shape=data=1"), ONE)
    d, f, layers, rows = 4096, 11008, 32, 32128
    llm = layers * (4 * d * d + 3 * d * f + 2 * d) + 2 * rows * d + d
    projector = 1024 * d + d
    memory = plan.memory
    assert memory.masters == 4 * (llm + projector)
    assert memory.moments == 2 * memory.masters + 8  # Adam's count and the schedule's
    assert memory.gradients == 2 * memory.masters  # accumulated
    patches, width, inner = 576, 1024, 4096
    norms = 2 * 2 * width
    layer = 4 * width * width + 4 * width + 2 * width * inner + inner + width + norms
    vision = width + 588 * width + (patches + 1) * width + norms + 24 * layer
    assert memory.frozen == 2 * vision


def kept_per_token(plan: Estimate) -> float:
    """Bytes that each token of the language model's layers keeps, per layer."""
    config = plan.config
    tokens = config.train.micro_batch * config.data.max_length
    shapes = [
        (shape, size)
        for shape, _, size in plan.largest_kept
        if shape[0] == config.model.llm.num_layers and shape[1] == config.train.micro_batch
    ]
    return sum(size for _, size in shapes) / tokens / config.model.llm.num_layers


def test_kept_activations_by_hand(shipped):
    d, f = 4096, 11008
    full = estimate(shipped("pretrain_7b", "train.remat=full", "train.unroll=1"), ONE)
    assert kept_per_token(full) == 2 * d  # the layer's input
    dots = estimate(shipped("pretrain_7b", "train.remat=dots", "train.unroll=1"), ONE)
    # input, q, k, v, what attention and its output projection gave; gate and up. The residual stream tells of `down`.
    assert kept_per_token(dots) == 2 * (6 * d + 2 * f)
    none = estimate(shipped("pretrain_7b", "train.remat=none", "train.unroll=1"), ONE)
    assert none.memory.kept > dots.memory.kept > full.memory.kept


def test_flash_attention_keeps_no_scores(shipped):
    settings = ["train.remat=none", "train.unroll=1", "data.max_length=1024", "train.micro_batch=4"]
    flash = estimate(shipped("pretrain_7b", *settings), ONE)
    plain = estimate(shipped("pretrain_7b", *settings, "model.attention=xla"), ONE)
    assert (flash.backend, plain.backend) == ("cudnn", "xla")
    scores = 32 * 4 * 32 * 1024 * 1024  # layers, rows, heads, T x T
    assert plain.memory.kept - flash.memory.kept > 4 * scores


@pytest.mark.parametrize(
    ("name", "tensor", "tokens", "rows", "gib"),
    [("pretrain_7b", 1, 320, 32, 43.4), ("finetune_7b", 2, 2048, 4, 65.7), ("finetune_7b", 1, 800, 9, 112.3)],
)
def test_unrolled_layers_that_keep_all_take_what_xla_counts(shipped, name, tensor, tokens, rows, gib):
    """`neva_jax.plan --compile-for h200` of these (jax 0.11.2); the first was measured too."""
    settings = [f"data.max_length={tokens}", f"train.micro_batch={rows}", f"train.global_batch={rows}"]
    settings += ["train.remat=none", "train.unroll=32"]
    sizes = {"data": 1, "fsdp": 1, "tensor": tensor}
    config = shipped(name, *settings, "model.projector.kind=mlp2x_gelu", f"mesh.shape=tensor={tensor}")
    plan = estimate(config, sizes).memory
    assert 1 < plan.total / GIB / gib < 1.13
    train = dataclasses.replace(config.train, remat_method="block", remat_layers=5)  # means nothing for `none`
    assert estimate(dataclasses.replace(config, train=train), sizes).memory == plan


def test_published_peaks_of_a_7b_pretrain_step(shipped):
    # 32 samples of 320 tokens on one H200, without an encoder: 40 GiB with dots_saveable and 17 with full remat. The
    # encoder's weights (0.6 GiB) are not among theirs.
    settings = ["data.max_length=320", "train.micro_batch=32", "train.global_batch=32", "train.unroll=1"]
    for policy, measured in (("dots", 40), ("full", 17)):
        total = estimate(shipped("pretrain_7b", f"train.remat={policy}", *settings), ONE).memory.total / GIB
        assert total == pytest.approx(measured, rel=0.1), policy


def gathered_head(config: Config) -> int:
    """Bytes of the fp32 head, which fsdp gathers for the loss; on one device it is the parameter itself."""
    return 4 * config.model.llm.hidden_size * padded_vocab(config.model.llm)


def test_axes_split_what_the_table_says(shipped):
    config = shipped("finetune_7b", "train.global_batch=64", "mesh.shape=data=1", "train.remat=full", "train.unroll=1")
    whole = estimate(config, ONE).memory
    data = estimate(config, {"data": 4, "fsdp": 1, "tensor": 1}).memory
    assert dataclasses.replace(data, batch=whole.batch) == whole
    assert data.batch * 4 == whole.batch
    fsdp = estimate(config, {"data": 1, "fsdp": 4, "tensor": 1}).memory
    assert fsdp.masters == pytest.approx(whole.masters / 4, rel=1e-3)
    assert fsdp.gradients == pytest.approx(whole.gradients / 4, rel=1e-3)
    assert fsdp.kept - whole.kept == gathered_head(config)
    tensor = estimate(config, {"data": 1, "fsdp": 1, "tensor": 4}).memory
    assert tensor.masters == pytest.approx(whole.masters / 4, rel=3e-3)  # the projector is not split
    assert tensor.kept == whole.kept  # full remat keeps the residual stream, which is whole on each device
    dots = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="dots"))
    assert estimate(dots, {"data": 1, "fsdp": 1, "tensor": 4}).memory.kept < estimate(dots, ONE).memory.kept


def test_a_kept_cast_of_weights_is_spread_over_fsdp(shipped):
    config = shipped("finetune_7b", "train.remat=none", "train.unroll=1", "train.global_batch=64", "mesh.shape=data=1")
    whole = estimate(config, ONE).memory.kept
    spread = estimate(config, {"data": 1, "fsdp": 4, "tensor": 1}).memory.kept
    cast = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert whole + gathered_head(config) - spread == pytest.approx(cast * 3 / 4, rel=0.02)


@pytest.fixture
def more(shipped):
    """Bytes of temporary buffers over fsdp=4 beyond those over fsdp=1, and beyond the gathered head."""

    def more(name, *settings):
        config = shipped(name, "train.global_batch=64", "train.micro_batch=16", "mesh.shape=data=1", *settings)
        spread, whole = (estimate(config, {"data": 1, "fsdp": n, "tensor": 1}).memory for n in (4, 1))
        head = gathered_head(config) // (2 if config.model.llm.freeze else 1)
        return spread.kept + spread.temporary - whole.kept - whole.temporary - head

    return more


LAYERS = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # parameters


def test_shards_of_unrolled_frozen_layers_are_there_twice_over_fsdp(more):
    """XLA's account for H200s: 0.1875 GiB a layer more over fsdp=2 than over data=2, bf16; in FP8 no more."""
    assert more("pretrain_7b") == pytest.approx(2 * LAYERS / 4, rel=1e-3)
    assert more("pretrain_7b", "train.unroll=1") == more("pretrain_7b", "precision.compute=fp8_delayed") == 0
    assert more("pretrain_7b", "train.remat=full", "train.remat_layers=4") == 0  # groups are a loop
    in_bf16 = ["precision.compute=fp8_delayed", "precision.fp8.quantize_frozen=false"]
    assert more("pretrain_7b", *in_bf16) == pytest.approx(2 * LAYERS / 4, rel=1e-3)


def test_unrolled_trained_layers_are_kept_whole_over_fsdp_if_nothing_is_computed_again(more):
    """XLA's account: each is gathered once; its gradient's shard takes its place, fp32, a quarter here."""
    unrolled = ["finetune_7b", "train.remat=none", "train.unroll=32"]
    assert more(*unrolled) == pytest.approx((2 - 4 / 4) * LAYERS, rel=1e-2)
    assert more(*unrolled, "train.remat=dots") == more(*unrolled, "precision.compute=fp8_delayed") == 0


def test_seventy_billion_on_a_thousand_devices_that_are_not_here(shipped):
    before = len(jax.live_arrays())
    config = shipped(
        "finetune_7b",
        "model.llm.hidden_size=8192",
        "model.llm.intermediate_size=28672",
        "model.llm.num_layers=80",
        "model.llm.num_heads=64",
        "model.llm.num_kv_heads=8",
        "train.global_batch=512",
        "train.remat=full",
        "train.unroll=1",
    )
    plan = estimate(config, {"data": 2, "fsdp": 64, "tensor": 8})
    assert sum(leaf.size for leaf in jax.tree.leaves(plan.layout["llm"])) == pytest.approx(69e9, rel=0.01)
    assert plan.memory.total < 20 * GIB
    assert len(jax.live_arrays()) == before


def test_a_tensor_share_cuts_heads_mlp_and_vocabulary(shipped):
    config = shipped("pretrain_7b")
    shapes = traced(config, 4, "cudnn").parameter_shapes
    assert {(32, 4096, 8, 128), (32, 4096, 2752), (8032, 4096), (24, 1024, 4, 64), (24, 1024, 1024)} <= shapes


def test_meshes_that_do_not_divide_are_said_with_both_numbers(shipped):
    config = shipped("pretrain_7b")
    with pytest.raises(UserError, match=r"num_heads=32 .*tensor=3"):
        estimate(config, {"data": 1, "fsdp": 1, "tensor": 3})
    with pytest.raises(UserError, match=r"global_batch=128 .*= 48"):
        estimate(config, {"data": 3, "fsdp": 1, "tensor": 1})


def test_compiling_needs_the_devices(shipped):
    with pytest.raises(UserError, match="needs 16 devices, but 8 are here"):
        compile_step(shipped("pretrain_7b"), {"data": 16, "fsdp": 1, "tensor": 1})


def test_transformer_engines_kernel_for_packed_rows_keeps_what_cudnns_keeps(shipped):
    rows = ["mesh.shape=data=1", "data.max_length=1024"]
    plain, asked = (estimate(shipped("pretrain_7b", *rows, *more), ONE) for more in ([], ["model.attention=te"]))
    packed = estimate(shipped("pretrain_7b", *rows, "data.pack=true", "model.attention=te"), ONE)
    assert (plain.backend, asked.backend, packed.backend) == ("cudnn", "cudnn", "te")
    assert packed.memory == asked.memory == plain.memory


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["attention=cudnn", "llm.attention_dropout=0.1"], r"cudnn has no dropout \(.*attention_dropout=0\.1\)"),
        (["attention=cudnn", "precision.compute=fp32"], r"cudnn needs bf16 \(here float32\).* \(here 128\)"),
        (["attention=cudnn", "llm.head_dim=256"], r"cudnn needs bf16 \(here bfloat16\).* \(here 256\)"),
        (["attention=te", "data.pack=true", "llm.attention_dropout=0.1"], r"te has no dropout"),
        (["attention=te", "data.pack=true", "precision.compute=fp32"], r"te needs bf16"),
    ],
)
def test_a_kernel_that_training_refuses_is_refused(shipped, overrides, said):
    full = [text if text.startswith(("data.", "precision.")) else f"model.{text}" for text in overrides]
    with pytest.raises(UserError, match=rf"^model\.attention={said}"):
        estimate(shipped("pretrain_7b", *full), ONE)


def test_te_takes_another_kernel_for_rows_of_one_segment_with_dropout(shipped):
    config = shipped("pretrain_7b", "model.attention=te", "model.llm.attention_dropout=0.1")
    assert estimate(config, ONE).backend == "xla"


@pytest.mark.parametrize("name", ["pretrain_7b", "finetune_7b"])
def test_a_moving_average_is_one_more_copy_of_what_is_trained(shipped, name):
    sizes = {"data": 2, "fsdp": 4, "tensor": 1}
    plain, averaged = (
        estimate(shipped(name, "train.global_batch=128", *more), sizes).memory
        for more in ([], ["optimizer.ema_decay=0.9999"])
    )
    assert averaged == dataclasses.replace(plain, average=plain.masters)
    assert averaged.arguments - plain.arguments == averaged.total - plain.total == plain.masters


def test_frozen_weights_in_fp8_take_two_bytes(shipped):
    """Both layouts of a weight, and a few scales."""
    plain, quantized = (
        estimate(shipped("pretrain_7b", f"precision.compute={name}"), ONE).memory.frozen
        for name in ("bf16", "fp8_current")
    )
    assert quantized == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("override", ["data.pack=true", "model.llm.attention_dropout=0.1"])
def test_what_the_fused_attention_kernel_cannot_do_costs_memory(shipped, override):
    plain, other = (
        estimate(shipped("pretrain_7b", "mesh.shape=data=1", "data.max_length=1024", *more), ONE)
        for more in ([], [override])
    )
    assert (plain.backend, other.backend) == ("cudnn", "xla")
    scores = 2 * plain.config.train.micro_batch * 32 * 1024**2  # bf16, of one layer
    assert other.memory.total > plain.memory.total + scores


def test_an_encoder_that_tensor_does_not_split_is_planned_whole(shipped):
    """Also where it has fewer heads than the axis has devices."""
    split, whole = (
        estimate(
            shipped("pretrain_7b", f"mesh.vision_tensor={value}", f"model.vision.num_heads={heads}"),
            {"data": 1, "fsdp": 1, "tensor": 16},
        )
        for value, heads in (("true", 16), ("false", 8))
    )
    assert whole.memory.frozen > split.memory.frozen
