"""FP8 in whole runs, by XLA's backend: where its state goes, that a resumed run repeats it, and that layouts agree."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from neva_jax import train
from tests.faults.conftest import rows, state

DELAYED = ["precision.compute=fp8_delayed", "precision.fp8.amax_history=3"]
SITES = ("qkv", "o", "gate_up", "down")


@pytest.fixture
def start(small_overrides) -> Callable[..., Path]:
    """Trains; returns the run's directory."""

    def start(run_dir: Path, *overrides: str, mesh: str = "data=1", devices: int = 1) -> Path:
        settings = [*small_overrides, f"run.dir={run_dir}", "data.val=[]", "optimizer.min_lr=5e-3", "optimizer.lr=5e-3"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_count", lambda: devices)
            assert train.main([*settings, *DELAYED, *overrides, "--mesh-shape", mesh]) == 0
        return run_dir

    return start


@pytest.fixture
def plain(start, tmp_path_factory) -> Path:
    """Four steps on one device, with a moving average; made once."""
    run_dir = tmp_path_factory.getbasetemp() / "fp8_on_one_device"
    if not run_dir.exists():
        start(run_dir, "optimizer.ema_decay=0.9")
    return run_dir


def arrays(run_dir: Path, step: int, part: str) -> dict[str, np.ndarray]:
    """The f32 arrays of a part of a checkpoint, by their path in it."""
    saved = {name: value for name, value in state(run_dir, step).items() if name.startswith(f"['{part}']")}
    return {name: np.frombuffer(data, dtype).reshape(shape) for name, (dtype, shape, data) in saved.items()}


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(["model.llm.freeze=true"], id="pretrain", marks=pytest.mark.thorough),
        pytest.param([], id="finetune"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(start, tmp_path, stage):
    whole = start(tmp_path / "whole", *stage, "train.steps=5", "train.micro_batch=4")
    start(tmp_path / "parts", *stage, "train.steps=3", "train.micro_batch=4")
    parts = start(tmp_path / "parts", *stage, "train.steps=5", "train.micro_batch=4")
    assert rows(parts) == rows(whole)
    assert state(parts, 5) == state(whole, 5)
    assert any(name.startswith("['fp8']") for name in state(whole, 5))


def test_the_state_is_saved_apart_and_nothing_else_knows_it(plain):
    """Neither the optimizer's moments nor the parameters have a place for it, so no clip, norm or decay sees it."""
    names = {
        f"['fp8']['{site}']['{tensor}']['{array}']"
        for site in SITES
        for tensor in ("x", "grad", "kernel")
        for array in ("scale", "history")
    }
    saved = state(plain, 4)
    assert {name for name in saved if name.startswith("['fp8']")} == names
    others = [name for name in saved if not name.startswith("['fp8']")]
    assert not any(word in name for name in others for word in ("scale_", "history", "fp8", "gate_up", "qkv"))
    for name, value in arrays(plain, 4, "fp8").items():
        assert value.shape == ((2, 3) if "history" in name else (2,))
        assert "scale" in name or (value[:, 1:] > 0).all(), name


def test_scales_follow_from_the_histories(plain):
    """`history` has rolled: its newest value is at the end."""
    tensors = arrays(plain, 4, "fp8")
    for site in SITES:
        for tensor, largest in (("x", 448), ("kernel", 448), ("grad", 57344)):
            history = tensors[f"['fp8']['{site}']['{tensor}']['history']"]
            # Of three values the oldest has been overwritten by the zero that the next step fills.
            assert (history[:, 0] == 0).all()
            scale = tensors[f"['fp8']['{site}']['{tensor}']['scale']"]
            assert (scale <= np.float32(1.000001) * largest / history.max(1)).all()
            assert (scale > largest / history.max(1) / 10).all()  # far above what a run begins with but for `x`
            assert tensor != "x" or (scale != 1).all()


def test_layers_held_apart_compute_what_a_stack_of_them_does(start, tmp_path, capfd):
    """Unrolled frozen layers are parameters of their own, those that stay in bf16 a stack before them."""
    three = ["model.llm.num_layers=3", "precision.fp8.first_layers_bf16=1", "train.steps=3"]
    weights = start(tmp_path / "weights", *three, "precision.compute=bf16", "train.steps=1")
    frozen = [*three, "model.llm.freeze=true", f"model.init_from={weights}"]
    loop = start(tmp_path / "loop", *frozen)
    apart = start(tmp_path / "apart", *frozen, "train.unroll=3")
    assert capfd.readouterr().err.count("of 2 of 3 layers, weights quantized once") == 2
    np.testing.assert_allclose(losses(apart), losses(loop), rtol=1e-4)
    ours, expected = (arrays(run_dir, 3, "fp8") for run_dir in (apart, loop))
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.shape[0] == 2
        np.testing.assert_allclose(value, expected[name], rtol=0.1, err_msg=name)


def test_each_micro_batch_is_a_step_of_the_history(start, tmp_path):
    """As in Transformer Engine: the last two of 3 places hold the micro batches of a first step, and then one more."""
    one = arrays(start(tmp_path / "one", "train.steps=1"), 1, "fp8")
    two = arrays(start(tmp_path / "two", "train.steps=1", "train.micro_batch=4"), 1, "fp8")
    for site in SITES:
        name = f"['fp8']['{site}']['x']['history']"
        filled = lambda history: (history != 0).sum(1).tolist()  # noqa: E731
        assert (filled(one[name]), filled(two[name])) == ([1, 1], [2, 2])
        # The largest value of the whole batch is the larger one of its halves; but the second half is cast with the
        # scales that the first one left, and an FP8 number stands for all within 6 %.
        np.testing.assert_allclose(two[name].max(1), one[name].max(1), rtol=0.1)


@pytest.mark.parametrize(
    ("mesh", "overlap"),
    [
        pytest.param("tensor=2", False, marks=pytest.mark.thorough),
        ("tensor=2", True),
        pytest.param("fsdp=2", False, marks=pytest.mark.thorough),
        ("data=2", False),
    ],
)
def test_layouts_agree(start, plain, tmp_path, mesh, overlap):
    """Sums in another order round a few values to another FP8 number, so not to 1e-5; the amax is that of all shards:
    of one shard alone it would differ by far more than the bound."""
    rows_each = 8 if mesh == "tensor=2" else 4
    settings = [f"train.micro_batch={rows_each}", f"mesh.overlap={str(overlap).lower()}"]
    many = start(tmp_path / "many", *settings, mesh=mesh, devices=2)
    np.testing.assert_allclose(losses(many), losses(plain), rtol=2e-3)
    expected, found = arrays(plain, 4, "fp8"), arrays(many, 4, "fp8")
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0.15, err_msg=name)
