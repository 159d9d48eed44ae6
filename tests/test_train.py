"""Whole runs: what they write, that layouts agree, that nothing is lost by a stop, and what is refused.

Most run in this process through `train.main`; those that are killed are real processes.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
from flax import nnx
from PIL import Image

from neva_jax import train
from neva_jax.configfile import load_config, to_yaml
from neva_jax.data.pipeline import SampleMaker
from neva_jax.data.sources import Sources
from neva_jax.errors import RunError, UserError, exit_with
from neva_jax.models.neva import abstract_model
from neva_jax.training.checkpoint_meta import locate
from neva_jax.training.metrics import RunLog
from tests.conftest import ONE_DEVICE_FLAGS

ROOT = Path(__file__).parent.parent
ROWS, BATCH = 25, 8  # in the training data; in a step

# One step of warm-up, cosine until step 4, then constant: the first steps of a long run are those of a short one.
LR, MIN_LR, WARMUP, COSINE_END = 5e-3, 2e-3, 1, 4


def of_steps(count: int) -> list[str]:
    return [f"train.steps={count}", f"optimizer.constant_steps={count - COSINE_END}"]


# --- starting runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(small_overrides) -> list[str]:
    return [
        *small_overrides,
        "model.llm.num_kv_heads=4",
        "data.val=[]",
        "checkpoint.every=100",
        f"optimizer.lr={LR}",
        f"optimizer.min_lr={MIN_LR}",
        f"optimizer.warmup_steps={WARMUP}",
        *of_steps(4),
    ]


Start = Callable[..., int]


@pytest.fixture
def start(settings) -> Start:
    """Runs `train.main` on one device, or on the 8 of the tests if `mesh` is given; returns the exit status."""

    def start(run_dir: Path, *overrides: str, mesh: str | None = None) -> int:
        arguments = [*settings, f"run.dir={run_dir}", *overrides]
        with pytest.MonkeyPatch.context() as patch:
            if mesh is None:
                patch.setattr(jax, "device_count", lambda: 1)
            return train.main(arguments if mesh is None else [*arguments, "--mesh-shape", mesh])

    return start


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder, and what has been made in it; nobody changes that."""
    return tmp_path_factory.mktemp("shared"), {}


@pytest.fixture
def once(start, shared) -> Callable[..., Path]:
    """Trains when it is first asked for a name."""
    folder, made = shared

    def once(name: str, *overrides: str) -> Path:
        if name not in made:
            assert start(folder / name, *overrides) == 0
            made[name] = folder / name
        return made[name]

    return once


@pytest.fixture
def base(once) -> Path:
    """4 steps from random weights, the vision encoder frozen."""
    return once("base")


@pytest.fixture
def validation(shared, llava_data) -> list[str]:
    """On 5 rows, fewer than a batch."""
    path = shared[0] / "five.json"
    path.write_text(json.dumps(json.loads(llava_data.val_json.read_text())[:5]))
    return [f"data.val=[{{json: {path}, images: {llava_data.images}}}]", "eval.batches=3"]


@pytest.fixture
def whole(once, validation) -> Path:
    """30 steps that begin like `base`, with validation."""
    return once("whole", *of_steps(30), *validation, "eval.every=12", "checkpoint.every=4", "checkpoint.keep=3")


@pytest.fixture
def tuned(once, base) -> Path:
    """4 steps from the weights of `base`."""
    return once("tuned", f"model.init_from={base}")


PRETRAIN = ["model.llm.freeze=true", "model.allow_random_frozen=false"]


@pytest.fixture
def aligned(once, base) -> Path:
    """4 steps of pretraining (projector alone) from the weights of `base`."""
    return once("aligned", *PRETRAIN, f"model.init_from={base}")


# --- reading runs ----------------------------------------------------------------------------------------------------


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path, first: int = 1) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(run_dir) if "loss" in row and row["step"] >= first}


def repeatable(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows without what the clock says."""
    timed = ("samples_per_s", "tokens_per_s", "data_wait_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def said(run_dir: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in (run_dir / "log.txt").read_text().splitlines()]


def state(run_dir: Path, step: int) -> dict[str, Any]:
    """All that Orbax finds in a checkpoint's item `state`, as numpy arrays."""
    folder = run_dir / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def meta(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / str(step) / "meta" / "meta.json").read_text())


def bits(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {path: (array.dtype, array.shape, array.tobytes()) for path, array in arrays.items()}


def differing(ours: Any, theirs: Any) -> list[str]:
    """The paths at which two trees are not bit-equal."""
    ours, theirs = bits(ours), bits(theirs)
    return [path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)]


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


# --- what a run leaves behind ----------------------------------------------------------------------------------------


def test_metrics_have_a_row_for_every_step(whole):
    rows = [row for row in metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 31))
    names = {"step", "loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait_s", "epoch"}
    assert all(set(row) == names for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["epoch"] for row in rows] == [step * BATCH / ROWS for step in range(1, 31)]
    assert all(row["samples_per_s"] > 0 for row in rows[1:])
    # Every row has an image of 16 tokens or some text; none is longer than data.max_length.
    assert all(16 < row["tokens_per_s"] / row["samples_per_s"] <= 192 for row in rows[1:])


def test_the_learning_rate_is_that_of_the_formula(whole):
    expected = [LR / 2, LR]
    for n in (2, 3, 4):
        expected.append(MIN_LR + (LR - MIN_LR) / 2 * (1 + math.cos(math.pi * (n - WARMUP) / (COSINE_END - WARMUP))))
    expected += [MIN_LR] * 25
    assert [row["lr"] for row in metrics(whole) if "lr" in row] == pytest.approx(expected, rel=1e-6)


def test_the_loss_falls(whole):
    values = list(losses(whole).values())
    assert values[0] == pytest.approx(math.log(400), rel=0.02)
    assert np.mean(values[-3:]) < 0.7 * values[0]


def test_validation_rows_follow_the_steps_they_belong_to(whole):
    rows = metrics(whole)
    places = [i for i, row in enumerate(rows) if "val_loss" in row]
    assert [rows[i]["step"] for i in places] == [rows[i - 1]["step"] for i in places] == [12, 24, 30]
    assert all(set(rows[i]) == {"step", "val_loss"} for i in places)
    assert rows[places[0]]["val_loss"] > rows[places[-1]]["val_loss"]


def test_val_loss_is_the_mean_over_the_tokens_of_each_row_once(whole, tokenizer):
    """Against the softmax of all logits in float64, with the parameters of the checkpoint."""
    config = load_config(whole / "config.yaml")
    make = SampleMaker(Sources(config.data, "val", 0, shuffle=False), config, tokenizer)
    rows = [make(index) for index in range(5)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in ("bad_rows", "refs")}
    graphdef, _ = abstract_model(config.model, config.precision)

    @jax.jit
    def all_logits(params, batch):
        neva = nnx.merge(graphdef, params)
        return neva.llm.logits(neva(batch)[0])

    logits = np.asarray(all_logits(state(whole, 30)["params"], batch), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    expected = (nll * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    assert metrics(whole)[-1] == {"step": 30, "val_loss": pytest.approx(expected, rel=1e-5)}


def test_config_yaml_is_the_configuration_with_the_vocabulary_filled_in(base, settings):
    expected = load_config(None, [*settings, f"run.dir={base}", "model.llm.vocab_size=400"])
    assert load_config(base / "config.yaml") == expected


def test_log_txt_tells_what_was_run(base):
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state(base, 4)["params"].items()}
    lines = said(base)
    assert lines[:2] == [
        "vision, projector, llm: random weights from run.seed=1234",
        f"training projector+llm ({(counts['projector'] + counts['llm']) / 1e6:.2f}M), "
        f"frozen vision ({counts['vision'] / 1e6:.2f}M); 25 rows, 8 per step in 1 micro batches; "
        "mesh data=1,fsdp=1,tensor=1 on cpu; fp32",
    ]
    assert lines[2].startswith("attention: xla (")
    first = re.fullmatch(r"step 1: the first, (\d+\.\d) s after the start; itself (\d+\.\d) s", lines[3])
    assert 0 < float(first[2]) < float(first[1])
    assert [line.split()[:2] for line in lines[4:-2]] == [["step", f"{step}/4"] for step in range(1, 5)]
    assert re.fullmatch(r"checkpoint 4: \d+\.\d MiB in \d+\.\d\d s; training waited \d+ ms", lines[-2])
    assert lines[-1] == f"done: step 4, checkpoint in {base}/checkpoints/4"


def test_the_plot_is_a_picture(base):
    with Image.open(base / "plots" / "loss.png") as image:
        assert image.format == "PNG"
        image.load()


def test_the_newest_checkpoints_are_kept(whole, base):
    assert checkpoints(whole) == [24, 28, 30]
    assert checkpoints(base) == [4]


def test_rows_are_logged_every_so_often_and_at_the_end(start, base, tmp_path):
    assert start(tmp_path / "run", "log.every=3") == 0
    assert losses(tmp_path / "run") == {step: loss for step, loss in losses(base).items() if step in (3, 4)}
    assert all(row["samples_per_s"] > 0 for row in metrics(tmp_path / "run"))


@pytest.fixture
def profiler_off() -> Iterator[None]:
    """A trace that is left open would break the next one of this process."""
    yield
    with suppress(RuntimeError):
        jax.profiler.stop_trace()


def test_a_trace_that_reaches_the_end_of_the_run_is_written(start, profiler_off, tmp_path):
    assert start(tmp_path / "run", "profile.start_step=3", "profile.steps=2") == 0
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1


# --- the same numbers on every layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "largest_micro_batch"),
    [
        ("data=2,tensor=4", 4),
        pytest.param("fsdp=8", 1, marks=pytest.mark.thorough),
        pytest.param("data=8", 1, marks=pytest.mark.thorough),
    ],
)
def test_eight_devices_train_like_one(mesh, largest_micro_batch, start, tuned, base, tmp_path):
    overrides = [f"model.init_from={base}", f"train.micro_batch={largest_micro_batch}"]
    assert start(tmp_path / "run", *overrides, mesh=mesh) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tuned), rel=1e-5)


def test_the_settings_of_the_mesh_change_no_number(start, tuned, base, tmp_path):
    settings = ["mesh.sequence_parallel=true", "mesh.zero1=true", "mesh.vision_tensor=false"]
    overrides = [f"model.init_from={base}", "train.micro_batch=4", *settings]
    assert start(tmp_path / "run", *overrides, mesh="data=2,tensor=4") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tuned), rel=1e-5)


def test_eight_devices_pretrain_like_one(start, aligned, base, tmp_path):
    overrides = [*PRETRAIN, f"model.init_from={base}", "train.micro_batch=4"]
    assert start(tmp_path / "run", *overrides, mesh="data=2,tensor=4") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(aligned), rel=1e-5)


def test_four_micro_batches_train_like_one(start, tuned, base, tmp_path):
    assert start(tmp_path / "run", f"model.init_from={base}", "train.micro_batch=2") == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tuned), rel=1e-5)
    assert any("8 per step in 4 micro batches" in line for line in said(tmp_path / "run"))


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.fixture
def sigterm_expected() -> Iterator[None]:
    """A signal that nobody took would end the test run."""

    def unexpected(number, frame):
        raise AssertionError("SIGTERM after the run")

    before = signal.signal(signal.SIGTERM, unexpected)
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm_before_data(patch: pytest.MonkeyPatch, step: int = 3) -> None:
    """Before the batch of a step is there."""
    real, calls = train.Meter.next, []

    def next_batch(self, stream):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, stream)

    patch.setattr(train.Meter, "next", next_batch)


def sigterm_after_loss(patch: pytest.MonkeyPatch) -> None:
    """When the loss of step 2 is logged: too late for that step."""
    real = RunLog.metrics

    def log(self, row):
        real(self, row)
        if row["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(RunLog, "metrics", log)


def sigterm_before_step_1(patch: pytest.MonkeyPatch) -> None:
    real = train.initialise_parameters

    def initialise(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    patch.setattr(train, "initialise_parameters", initialise)


@pytest.fixture
def validated(once, validation) -> Path:
    """`base` with validation after steps 3 and 4."""
    return once("validated", *validation, "eval.every=3")


@pytest.mark.parametrize("arrange", [sigterm_before_data, pytest.param(sigterm_after_loss, marks=pytest.mark.thorough)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(arrange, start, validated, validation, sigterm_expected, tmp_path):
    run, settings = tmp_path / "run", [*validation, "eval.every=3"]
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch)
        assert start(run, *settings) == 143
    assert said(run)[-1] == "stopped by signal 15 after step 3, saved; the same command continues"
    assert checkpoints(run) == [3]
    assert list(losses(run)) == [1, 2, 3]
    assert start(run, *settings, "run.resume=must") == 0
    assert "resumed from step 3" in said(run)
    assert repeatable(run) == repeatable(validated)
    assert [(row["step"], "val_loss" in row) for row in metrics(run)[2:]] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert differing(state(run, 4), state(validated, 4)) == []


def test_host_memory_for_all_that_is_saved_is_taken_before_the_first_step(start, tmp_path, monkeypatch):
    taken, order = [], []
    real_save, real_next = train.Checkpoints.save, train.Meter.next

    class Reservation(train.Reservation):
        def __init__(self, state):
            super().__init__(state)
            taken.extend(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

        def wait(self, unless):
            super().wait(unless)
            order.append("waited")
            self.said = "pinned something"

    def save(self, step, params, optimizer, data, meta, ema, fp8):
        saved = sorted(leaf.nbytes for leaf in jax.tree.leaves((params, optimizer, ema)))
        order.append(saved == sorted(taken))
        real_save(self, step, params, optimizer, data, meta, ema, fp8)

    def next_batch(self, stream):
        order.append("step")
        return real_next(self, stream)

    monkeypatch.setattr(train, "Reservation", Reservation)
    monkeypatch.setattr(train.Checkpoints, "save", save)
    monkeypatch.setattr(train.Meter, "next", next_batch)
    assert start(tmp_path, "optimizer.ema_decay=0.9") == 0
    assert order == ["waited", *["step"] * 4, True]
    assert "pinned something" in said(tmp_path)


@pytest.mark.thorough  # so does the run of tests/faults/test_checkpoints.py
def test_a_run_with_dropout_goes_on_bit_for_bit(start, base, sigterm_expected, tmp_path):
    dropout = [f"model.llm.{name}_dropout=0.2" for name in ("hidden", "attention", "ffn")]
    assert start(tmp_path / "whole", *dropout) == 0
    with pytest.MonkeyPatch.context() as patch:
        sigterm_before_data(patch)
        assert start(tmp_path / "run", *dropout) == 143
    assert start(tmp_path / "run", *dropout, "run.resume=must") == 0
    assert repeatable(tmp_path / "run") == repeatable(tmp_path / "whole")
    assert differing(state(tmp_path / "run", 4), state(tmp_path / "whole", 4)) == []
    assert losses(tmp_path / "whole")[1] != losses(base)[1]


def test_a_stop_during_the_last_step_loses_nothing(start, validated, validation, sigterm_expected, tmp_path):
    run, settings = tmp_path / "run", [*validation, "eval.every=3"]
    with pytest.MonkeyPatch.context() as patch:
        sigterm_before_data(patch, step=4)
        assert start(run, *settings) in (0, 143)
    assert start(run, *settings) == 0
    assert repeatable(run) == repeatable(validated)


def test_a_run_that_was_stopped_before_its_first_step_starts_anew(start, base, sigterm_expected, tmp_path):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sigterm_before_step_1(patch)
        assert start(run) == 143
    assert said(run)[-1] == "stopped by signal 15 before step 1; the same command continues"
    assert checkpoints(run) == []
    assert start(run) == 0
    assert repeatable(run) == repeatable(base)


def test_a_run_goes_on_on_another_mesh(start, base, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    assert start(run, *of_steps(6), "train.micro_batch=2", mesh="data=2,fsdp=2,tensor=2") == 0
    lines = said(run)
    resumed = lines.index("resumed from step 4")
    assert [line.removeprefix("changed since then: ") for line in lines[resumed + 1 : resumed + 6]] == [
        f"run.dir={run}, was {base}",
        "mesh.shape=data=2,fsdp=2,tensor=2, was data=1",
        "train.steps=6, was 4",
        "train.micro_batch=2, was 8",
        "optimizer.constant_steps=2, was 0",
    ]
    assert lines[resumed + 6].startswith("training ")
    assert {step: loss for step, loss in losses(run).items() if step <= 4} == losses(base)
    expected = {step: loss for step, loss in losses(whole).items() if step in (5, 6)}
    assert losses(run, first=5) == pytest.approx(expected, rel=1e-5)


def test_a_complete_run_is_left_as_it_is(start, base, capfd):
    before = contents(base)
    capfd.readouterr()
    assert start(base) == 0
    assert capfd.readouterr() == ("", f"{base}: complete, step 4 of train.steps=4\n")
    assert start(base, "run.resume=must", "train.steps=2") == 0
    assert contents(base) == before


@pytest.fixture
def other_tokenizer(tokenizer_path, tmp_path) -> Path:
    """Another tokenizer of the same size."""
    model = sentencepiece_model.ModelProto()
    model.ParseFromString(tokenizer_path.read_bytes())
    model.pieces[-1].score -= 1
    path = tmp_path / "other.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ("run.seed=1", ["run.seed: before 1234, now 1"]),
        ("data.template=plain", ["data.template: before v1, now plain"]),
        ("data.val_fraction=0.5", ["data.val_fraction: before 0.0, now 0.5"]),
        ("data.sampling=replacement", ["data.sampling: before epochs, now replacement"]),
        ("model.vision.select_layer=-1", ["model.vision.select_layer: before -2, now -1"]),
        ("model.tokenizer={other}", ["model.tokenizer: before tokenizer.model 53cc769ab368, 400 tokens, now .*"]),
        (
            "run.seed=1 data.image_position=front data.train={fewer}",
            ["run.seed: before .*", "data.train: before .*", "data.image_position: before in_place, now front"],
        ),
    ],
)
def test_all_that_would_make_another_run_is_told_with_the_way_to_allow_it(change, lines, start, base, other_tokenizer):
    before = contents(base)
    config = load_config(base / "config.yaml").data.train[0]
    fewer = f"[{{json: {config.json}, images: {config.images}, weight: 0.5}}]"
    changes = change.replace("{other}", str(other_tokenizer)).replace("{fewer}", fewer).split(" ", 2)
    keys = [line.split(":")[0] for line in lines]
    allow = " ".join(f"--allow-changed {key}" for key in keys)
    with pytest.raises(UserError) as caught:
        start(base, *of_steps(6), *changes)
    first, *others = str(caught.value).splitlines()
    assert first == f"{base}: was trained with other settings; use a new run.dir, or add {allow} if that is meant"
    assert len(others) == len(lines)
    for line, expected in zip(others, lines, strict=True):
        assert re.fullmatch(f"  {expected}", line), line
    assert contents(base) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.llm.intermediate_size=128", "model.llm.intermediate_size: before 64, now 128"),
        ("model.llm.vocab_size=401", "model.llm.vocab_size: before 400, now 401"),
        ("model.projector.kind=linear", "model.projector.kind: before mlp2x_gelu, now linear"),
        ("model.llm.freeze=true", "model.llm.freeze: before False, now True"),
    ],
)
def test_what_the_arrays_do_not_fit_cannot_be_allowed(change, line, start, base):
    before, key = contents(base), change.split("=")[0]
    with pytest.raises(UserError) as caught:
        start(base, *of_steps(6), change, "--allow-changed", key)
    assert str(caught.value).splitlines() == [
        f"{base}: was trained with other settings; use a new run.dir ({key} cannot change: the saved arrays would not "
        "fit)",
        f"  {line}",
    ]
    assert contents(base) == before


def test_an_allowed_difference_is_told_and_the_run_goes_on(start, base, llava_data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    rows = tmp_path / "fewer.json"
    rows.write_text(json.dumps(json.loads(llava_data.json.read_text())[:20]))
    change = f"data.train=[{{json: {rows}, images: {llava_data.images}}}]"
    assert start(run, *of_steps(5), change, "--allow-changed", "data.train", "--allow-changed", "run.seed") == 0
    assert any(line.startswith("--allow-changed data.train: ") for line in said(run))
    assert max(losses(run)) == 5


def test_rows_that_were_added_to_a_file_are_a_difference(start, base, llava_data, tmp_path):
    run, rows = tmp_path / "run", tmp_path / "rows.json"
    train = f"data.train=[{{json: {rows}, images: {llava_data.images}}}]"
    shutil.copy(llava_data.json, rows)
    assert start(run, train, "checkpoint.every=2", *of_steps(5)) == 0
    rows.write_text(json.dumps(json.loads(rows.read_text())[:20]))
    with pytest.raises(UserError, match=r"\n  data.train: before files of 25 rows, now files of 20 rows$"):
        start(run, train, *of_steps(6))


def test_a_run_that_may_not_go_on_says_why(start, base):
    with pytest.raises(UserError) as caught:
        start(base, *of_steps(6), "run.resume=never")
    assert str(caught.value) == f"run.resume=never, but {base} holds a checkpoint of step 4; name another run.dir"


# --- real processes --------------------------------------------------------------------------------------------------

SECONDS = 120  # until a process is given up


def vanishes(group: int) -> bool:
    """Whether the last process of a group ends soon."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.thorough  # tests/faults has each of its parts
def test_a_process_that_is_killed_and_terminated_ends_like_one_that_is_not(settings, tmp_path):
    """The killed one leaves no worker behind, the terminated one saves the step that is under way."""
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE_FLAGS}
    config = load_config(None, [*settings, *of_steps(24), "checkpoint.every=3", "mesh.shape=data=-1"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    run, calm = tmp_path / "run", tmp_path / "calm"

    @contextmanager
    def process(run_dir: Path = run, workers: int = 1) -> Iterator[subprocess.Popen]:
        command = [sys.executable, "-m", "neva_jax.train", "--config", str(tmp_path / "config.yaml")]
        command += [f"run.dir={run_dir}", f"data.workers={workers}"]
        with (tmp_path / "stderr").open("w") as stderr:
            started = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr, start_new_session=True)
        try:
            yield started
            started.wait(SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()

    def stderr() -> str:
        return (tmp_path / "stderr").read_text()

    def wait_for(started: subprocess.Popen, step: int) -> None:
        limit = time.monotonic() + SECONDS
        while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
            assert started.poll() is None, stderr()
            assert time.monotonic() < limit, stderr()
            time.sleep(0.01)

    with process() as started:
        wait_for(started, 5)
        started.kill()
        started.wait()
        assert vanishes(started.pid)
    before = checkpoints(run)

    with process() as started:
        wait_for(started, 10)
        started.terminate()
    assert started.returncode == 143, stderr()
    assert f"resumed from step {before[-1]}" in stderr().splitlines()
    last = max(losses(run))
    assert 10 <= last < 24
    assert checkpoints(run)[-1] == last
    assert stderr().splitlines()[-1] == f"stopped by signal 15 after step {last}, saved; the same command continues"

    for run_dir, workers in ((run, 1), (calm, 0)):
        with process(run_dir, workers) as started:
            pass
        assert started.returncode == 0, stderr()
        assert (f"resumed from step {last}" in stderr().splitlines()) == (run_dir == run)
    assert repeatable(run) == repeatable(calm)
    assert differing(state(run, 24), state(calm, 24)) == []


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def test_training_changes_the_trained_components_alone(base, whole):
    before, after = state(base, 4)["params"], state(whole, 30)["params"]
    assert differing(after["vision"], before["vision"]) == []
    for name in ("projector", "llm"):
        assert len(differing(after[name], before[name])) == len(bits(before[name]))


def test_pretraining_saves_the_projector_alone_and_refers_to_its_base(aligned, base):
    saved = state(aligned, 4)
    assert set(saved["params"]) == {"projector"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(saved["params"])}
    assert {leaf.shape for leaf in jax.tree.leaves(saved["optimizer"])} <= {*shapes, ()}
    assert meta(aligned, 4)["components"] == ["projector"]
    assert locate(meta(aligned, 4)["base"]) == base / "checkpoints" / "4"
    assert differing(saved["params"], {"projector": state(base, 4)["params"]["projector"]}) != []


def test_a_run_from_random_weights_saves_all_of_them(base):
    assert set(state(base, 4)["params"]) == {"vision", "projector", "llm"}
    assert meta(base, 4)["base"] is None


def test_full_contents_in_bf16(start, base, tmp_path):
    """Frozen weights are kept in bf16, trained ones and their moments in fp32."""
    run = tmp_path / "run"
    overrides = [*PRETRAIN, f"model.init_from={base}", "checkpoint.contents=full", "precision.compute=bf16"]
    assert start(run, *overrides) == 0
    saved, before = state(run, 4), state(base, 4)["params"]
    assert meta(run, 4)["base"] is None
    for name in ("vision", "llm"):
        expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), before[name])
        assert differing(saved["params"][name], expected) == []
    assert {leaf.dtype for leaf in jax.tree.leaves(saved["params"]["projector"])} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(saved["optimizer"]) if leaf.ndim} == {np.dtype(np.float32)}
    assert len(differing(saved["params"]["projector"], before["projector"])) == len(bits(before["projector"]))


@pytest.fixture
def chained(once, aligned) -> Path:
    """Finetuning from a pretrained projector, whose other parts lie in its base."""
    overrides = ["checkpoint.every=2", "checkpoint.keep=null", "model.allow_random_frozen=false"]
    return once("chained", f"model.init_from={aligned}", *overrides)


def test_finetuning_starts_with_the_pretrained_projector_and_its_base(chained, aligned, base):
    assert [line.split() for line in said(chained)[:4]] == [
        ["weights", "loaded", "random", "skipped", "from"],
        ["vision", "23", "0", "0", f"{base}/checkpoints/4"],
        ["projector", "4", "0", "0", f"{aligned}/checkpoints/4"],
        ["llm", "12", "0", "0", f"{base}/checkpoints/4"],
    ]
    assert set(state(chained, 4)["params"]) == {"projector", "llm"}
    assert locate(meta(chained, 4)["base"]) == aligned / "checkpoints" / "4"


def test_finetuning_from_a_pretrained_projector_goes_on_bit_for_bit(chained, start, aligned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chained, run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert start(run, f"model.init_from={aligned}", "checkpoint.every=2", "checkpoint.keep=null") == 0
    assert "resumed from step 2" in said(run)
    assert repeatable(run) == repeatable(chained)
    assert differing(state(run, 4), state(chained, 4)) == []


def test_a_base_that_is_gone_is_named(start, base, tmp_path):
    gone, run = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(base, gone)
    overrides = [*PRETRAIN, f"model.init_from={gone}"]
    assert start(run, *overrides) == 0
    before = contents(run / "checkpoints")
    shutil.rmtree(gone)
    gone.mkdir()
    with pytest.raises(UserError, match=rf"{gone}\S*: holds no checkpoint"):
        start(run, *overrides, *of_steps(6))
    assert contents(run / "checkpoints") == before
    with pytest.raises(UserError, match=rf"^{run}/checkpoints/4: its base cannot be read: {gone}\S*: holds no check"):
        start(tmp_path / "finetune", f"model.init_from={run}")


def test_contents_that_would_lose_weights_are_refused(start, aligned, tmp_path):
    """Random frozen weights are in no base."""
    with pytest.raises(UserError, match=r"^checkpoint\.contents=trained would lose the frozen random weights"):
        start(tmp_path / "run", "checkpoint.contents=trained")
    assert not (tmp_path / "run").exists()


# --- bad rows --------------------------------------------------------------------------------------------------------


@dataclass
class Damaged:
    """The training data without one image; its row is met in the steps 2 to 4, and in 5 or 6."""

    train: str  # override
    replaced: str  # override: the next row stands in for the bad one
    images: Path
    image: str  # the missing one, relative to `images`
    message: str
    first_met: int  # step


@pytest.fixture
def damaged(settings, llava_data, tmp_path) -> Damaged:
    rows = json.loads(llava_data.json.read_text())
    order = Sources(load_config(None, settings).data, "train", 1234, shuffle=True).order
    met: dict[int, list[int]] = {}  # row -> steps, if it has an image
    for i in range(6 * BATCH):
        if "image" in rows[order(i).row]:
            met.setdefault(order(i).row, []).append(i // BATCH + 1)
    bad = next(row for row, steps in met.items() if 1 < steps[0] <= 4 < steps[-1])

    images, path, replaced = tmp_path / "images", tmp_path / "rows.json", tmp_path / "replaced.json"
    shutil.copytree(llava_data.images, images)
    image = rows[bad]["image"]
    (images / image).unlink()
    path.write_text(json.dumps(rows))
    replaced.write_text(json.dumps([*rows[:bad], rows[bad + 1], *rows[bad + 1 :]]))
    return Damaged(
        f"data.train=[{{json: {path}, images: {images}}}]",
        f"data.train=[{{json: {replaced}, images: {images}}}]",
        images,
        image,
        f"{path}: row {bad} (id '{rows[bad]['id']}'): field image: {image} is not in {images}",
        met[bad][0],
    )


def test_a_skipped_row_is_replaced_by_the_next_and_told_once(damaged, start, tmp_path):
    run, expected = tmp_path / "run", tmp_path / "expected"
    skip = [damaged.train, "data.on_bad_row=skip", "data.max_bad_fraction=0.04"]  # one of 25
    assert start(run, *skip) == 0
    saved = json.loads((run / "checkpoints" / "4" / "data" / "metadata").read_text())
    assert (saved["samples"], saved["plan"], saved["rows"]) == (4 * BATCH, None, [25])
    listed = (run / "bad_rows.jsonl").read_text()
    assert start(run, *skip, *of_steps(6)) == 0
    assert [line for line in said(run) if line.startswith("skipped")] == [f"skipped {damaged.message}"]
    assert (run / "bad_rows.jsonl").read_text() == listed
    (record,) = map(json.loads, listed.splitlines())
    assert (record["step"], record["split"], record["kind"]) == (damaged.first_met, "train", "bad")
    assert record["sample"] // BATCH + 1 == damaged.first_met
    told = f"{record['file']}: row {record['row']} (id '{record['id']}'): {record['message']}"
    assert told == damaged.message
    assert start(expected, damaged.replaced, *of_steps(6)) == 0
    assert repeatable(run) == repeatable(expected)


def test_a_bad_row_stops_the_run_which_goes_on_when_it_is_mended(damaged, start, base, llava_data, capfd, tmp_path):
    run, settings = tmp_path / "run", [damaged.train, "checkpoint.every=1", "checkpoint.keep=null"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: start(run, *settings))
    assert ended.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"error: {damaged.message}; mend the row, or set data.on_bad_row=skip"
    assert checkpoints(run) == list(range(1, damaged.first_met))
    shutil.copy(llava_data.images / damaged.image, damaged.images / damaged.image)
    assert start(run, *settings) == 0
    assert repeatable(run) == repeatable(base)


# --- a loss that is no number ----------------------------------------------------------------------------------------

EXPLODE = ["optimizer.lr=1e30", "optimizer.min_lr=1e30", "optimizer.clip_norm=null"]


def test_losses_that_are_no_numbers_stop_the_run_and_leave_the_checkpoint(start, base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    before = contents(run / "checkpoints")
    with pytest.raises(
        RunError, match=r"^5 bad steps in a row, the last is step 10 .* nothing is saved after step 4, "
    ):
        start(run, *of_steps(12), *EXPLODE)
    assert contents(run / "checkpoints") == before
    assert all(math.isfinite(loss) for loss in losses(run).values())
    assert start(run, *of_steps(5)) == 0
    assert max(losses(run)) == 5


def test_no_checkpoint_holds_parameters_that_are_no_numbers(start, base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    with pytest.raises(RunError, match="nothing is saved after step 5"):
        start(run, *of_steps(12), *EXPLODE, "log.every=10", "checkpoint.every=1")
    for step in checkpoints(run):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state(run, step)["params"])), step
