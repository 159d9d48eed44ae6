"""`bench train`: its flags, its batches, and rows whose losses agree between layouts. Nothing here is timed."""

import math

import numpy as np
import pytest

from neva_jax import bench
from neva_jax.benchmarks import batches, steps, timing
from neva_jax.benchmarks.train import TINY, add_flags, configuration
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.errors import CommandParser, UserError

DESIGN = """bench impl stage model precision backend micro_batch image_px tokens_useful tokens_computed step_ms
    step_ms_p10 step_ms_p90 steps samples_per_s peak_gib gpu versions date"""
MORE = """mesh remat attention samples_per_s_per_gpu compile_s first_step_s tflop_per_sample utilisation losses template
    global_batch accumulate data planned_gib compiled_gib"""
FP32 = ["precision.compute=fp32", "train.remat=none", "model.llm.num_layers=2"]


def parsed(*arguments: str):
    parser = CommandParser()
    add_flags(parser)
    return parser.parse_intermixed_args(arguments)


def tiny(*arguments: str, devices: int = 1) -> Config:
    return configuration(parsed("--tiny", *arguments), devices)


def measured(config: Config, **changes) -> dict:
    options = {"steps": 4, "segments": 1, "data": "synthetic", "plan": False, "profile": None, **changes}
    return steps.measure(config, **options)


def test_flags_become_keys():
    config = tiny("--tokens", "24", "--pack", "3", "--micro-batch", "2", "--layers", "5", "--stage", "pretrain",
                  "--mesh-shape", "data=2,tensor=2", "train.remat=full", devices=4)  # fmt: skip
    assert (config.data.max_length, config.data.pack, config.data.images_per_row) == (72, True, 3)
    assert (config.train.micro_batch, config.train.global_batch) == (2, 4)  # one micro batch for each group of data
    assert (config.model.llm.num_layers, config.train.remat) == (5, "full")
    assert (config.model.llm.freeze, config.model.projector.freeze) == (True, False)
    assert tiny("--stage", "finetune", "--global-batch", "32").train.global_batch == 32
    assert tiny("--micro-batch", "8", "train.micro_batch=4").train.micro_batch == 4  # overrides come last


def test_without_a_file_it_is_llama_2_7b():
    llm = configuration(parsed("--tokens", "320"), None).model.llm
    assert (llm.hidden_size, llm.num_layers, llm.vocab_size) == (4096, 32, 32008)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "tokens=8,x"], "tokens needs whole numbers"),
        (["--sweep", "width=8"], "NAME one of tokens, micro-batch, layers, pack or a key"),
        (["--sweep", "tokens="], "write it as NAME=A,B"),
        (["--steps", "0"], "--steps must be above 0, not 0"),
        (["--limit", "-1"], "--limit must be above 0, not -1"),
        (["--baseline", "hf", "--pack", "2"], "--baseline: goes with neither --pack"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train.remta=dots"], "train.remta"),
        (["--sweep", "train.remat=dots,never"], "train.remat"),
        (["--tiny", "--mesh-shape", "data=3"], "data=3: the sizes make 3 devices, but 8 are there"),  # by the child
    ],
)
def test_bad_usage(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(["train", *arguments])


def test_a_run_past_its_limit_is_a_row(capsys):
    assert bench.main(["train", "--tiny", "--tokens", "16", "--sweep", "layers=3", "--limit", "0.1"]) == 0
    row = bench.json.loads(capsys.readouterr().out)
    assert row["error"] == "more than 0.1 s"
    assert [row[name] for name in ("impl", "layers", "tokens_computed", "sweep")] == [
        "neva_jax",
        3,
        16,
        {"layers": "3"},
    ]


@pytest.mark.thorough  # tests/training/test_layouts.py has the step
def test_layouts_see_the_same_losses(monkeypatch):
    """One device with two micro batches, and two devices with one each: the same batches, the same losses."""
    monkeypatch.setattr(steps.jax, "device_count", lambda: 1)
    one = measured(tiny("--tokens", "16", "--global-batch", "8", "train.micro_batch=4", *FP32), plan=True)
    monkeypatch.setattr(steps.jax, "device_count", lambda: 2)
    two = measured(tiny("--tokens", "16", "--global-batch", "8", "train.micro_batch=8", "mesh.shape=tensor=2", *FP32,
                        devices=2))  # fmt: skip
    assert set(DESIGN.split()) | set(MORE.split()) <= set(one)
    assert (one["mesh"], one["accumulate"], one["gpus"]) == ({}, 2, 1)
    assert (two["mesh"], two["accumulate"], two["gpus"]) == ({"tensor": 2}, 1, 2)
    assert len(one["losses"]) == steps.WARMUP + 4 and one["steps"] == 4
    assert np.allclose(one["losses"], two["losses"], rtol=2e-5)
    assert one["losses"][0] == pytest.approx(math.log(4480), rel=0.02) and one["planned_gib"] > 0
    assert (one["tokens_useful"], one["tokens_labelled"], one["tokens_computed"]) == (16, 12, 16)
    assert two["samples_per_s"] == pytest.approx(8e3 / two["step_ms"], rel=1e-3)
    assert two["samples_per_s_per_gpu"] == pytest.approx(two["samples_per_s"] / 2, rel=1e-3)


@pytest.fixture
def few_photographs(monkeypatch):
    monkeypatch.setattr(steps.jax, "device_count", lambda: 1)
    monkeypatch.setattr(batches, "PHOTOGRAPHS", 3)
    monkeypatch.setattr(batches, "SOURCE_SIZE", (40, 30))


def test_photographs_through_the_real_loader(few_photographs):
    config = tiny("--tokens", "24", "--micro-batch", "4", *FP32, "data.template=plain")
    row = measured(config, data="jpeg")
    assert row["data"] == "jpeg" and row["tokens_computed"] == 24
    assert 4 < row["tokens_labelled"] < row["tokens_useful"] <= 24


def test_rows_that_do_not_fit(few_photographs, tmp_path):
    config = batches.with_made_up_files(tiny("--tokens", "24", "--micro-batch", "4", "data.template=v1"), tmp_path)
    run = steps._Run(None, None, {}, batches.loaded(config, 1), None, 1)
    with pytest.raises(UserError, match=r"rows\.json: row .*measure with rows that fit the template"):
        run.start(0)  # the template's system prompt alone is longer


def test_own_rows_need_a_tokenizer():
    with pytest.raises(UserError, match=r"--data config: set data\.train and model\.tokenizer"):
        batches.loaded(tiny(), 1)


def test_made_up_rows():
    config = load_config(None, [*TINY, "data.max_length=20", "data.images_per_row=2", "train.global_batch=3"])
    stream = batches.made_up(config, 2)
    batch = next(stream)
    arrays = batch.arrays
    assert batch.samples == 6
    assert arrays["image_slots"][1].tolist() == [0, 1, 2, 3, *[-1] * 6, 4, 5, 6, 7, *[-1] * 6]
    assert arrays["positions"][2].tolist() == [*range(10), *range(10)]
    assert arrays["segment_ids"][0].tolist() == [1] * 10 + [2] * 10
    assert np.array_equal(arrays["loss_weights"] > 0, arrays["image_slots"] < 0)
    assert arrays["images"].shape == (3, 2, 28, 28, 3) and arrays["images"].std() > 50
    assert np.array_equal(arrays["targets"][:, :-1], arrays["tokens"][:, 1:])
    pool = [next(stream).arrays["tokens"] for _ in range(batches.POOL)]
    assert np.array_equal(pool[-1], arrays["tokens"]) and not np.array_equal(pool[0], arrays["tokens"])
    again = next(batches.made_up(config, 2)).arrays
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    assert batches.tokens_per_sample(batch) == {"tokens_useful": 10, "tokens_labelled": 6, "tokens_computed": 10}
    with pytest.raises(UserError, match="5 samples of 4 tokens do not hold"):
        next(batches.made_up(config, 5))


def test_made_up_rows_with_a_prefix():
    config = load_config(None, [*TINY, "data.max_length=20", "train.global_batch=3", "train.constant_prefix=5"])
    stream = batches.made_up(config, 1)
    several = [next(stream).arrays for _ in range(batches.POOL)]
    for arrays in several:
        assert arrays["image_slots"][1].tolist() == [-1] * 5 + [0, 1, 2, 3] + [-1] * 11
        assert np.count_nonzero(arrays["loss_weights"], axis=1).tolist() == [11] * 3
        assert (arrays["tokens"][:, :5] == several[0]["tokens"][0, :5]).all()
    with pytest.raises(UserError, match="1 samples of 20 tokens do not hold"):
        next(batches.made_up(load_config(None, [*TINY, "data.max_length=20", "train.constant_prefix=16"]), 1))


def test_steps_are_started_before_the_last_is_waited_for():
    order = []

    def start(step: int) -> int:
        order.append(f"start {step}")
        return step

    def wait(step: int) -> float:
        order.append(f"wait {step}")
        return 1.0 / (step + 1)

    times, losses = timing.run_steps(start, wait, 2, 1)
    assert order == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]
    assert len(times) == 2 and losses == [1.0, 0.5, pytest.approx(1 / 3)]
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
        timing.run_steps(lambda step: step, lambda step: math.nan if step else 1.0, 2, 1)
    assert timing.spread([3.0, 1.0, 2.0]) == {"step_ms": 2.0, "step_ms_p10": 1.2, "step_ms_p90": 2.8, "steps": 3}


def test_baseline():
    pytest.importorskip("torch")
    from neva_jax.benchmarks.hf_torch import measure

    config = tiny("--tokens", "16", "--micro-batch", "2", "--global-batch", "4", "--stage", "finetune",
                  "optimizer.lr=0.01", "optimizer.min_lr=0", *FP32)  # fmt: skip
    row = measure(config, 7, checkpointing=True)
    assert set(DESIGN.split()) <= set(row)
    assert (row["impl"], row["remat"], row["accumulate"]) == ("hf_torch", "full", 2)
    assert len(row["losses"]) == 10 and row["losses"][-1] < row["losses"][0] - 0.1
