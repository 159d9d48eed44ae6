"""`python -m neva_jax.checkpoint`: what it says of a run's checkpoints, and that it deletes what it is told to."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from neva_jax import checkpoint
from neva_jax.config import CheckpointConfig, Config, OptimizerConfig, TrainConfig
from neva_jax.errors import UserError, exit_with
from neva_jax.training.checkpoint import Checkpoints
from neva_jax.training.checkpoint_meta import Meta
from neva_jax.training.manifest import files_of
from neva_jax.training.retention import steps_in

CONFIG = Config(
    train=TrainConfig(steps=100), checkpoint=CheckpointConfig(keep=None), optimizer=OptimizerConfig(ema_decay=0.9)
)
LOSSES = {10: 3.0, 20: 2.0, 30: 2.5}
ALL = ("vision", "projector", "llm")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    params = {name: {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)} for name in ALL}
    with Checkpoints(run, None) as checkpoints:
        for step in (10, 20, 30, 40):
            known = {at: loss for at, loss in LOSSES.items() if at < step}  # validated after it was saved
            meta = Meta(step, CONFIG, ALL, None, tokenizer, ema=True)
            averages = {"projector": params["projector"]}
            checkpoints.save(step, params, {}, {"samples": 8 * step, "val_losses": known}, meta, averages)
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def ask(capsys):
    def ask(*arguments) -> list[str]:
        assert checkpoint.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return ask


def damage(step_dir: Path) -> Path:
    path = max((step_dir / name for name in files_of(step_dir)), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    return path


def test_list(run, ask):
    lines = ask("list", "--run", run)
    assert lines[0].split() == ["step", "size", "saved", "val_loss", "files", "resumes"]
    row = r"{}  +0\.\d MiB +\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  {} *good +step {} of 100, training projector, llm"
    for line, (step, loss) in zip(lines[1:], ((10, "3"), (20, "2 best"), (30, "2.5"), (40, "")), strict=True):
        assert re.fullmatch(row.format(step, re.escape(loss), step + 1), line), line
    # A loss of the last checkpoint is known from the log alone.
    (run / "metrics.jsonl").write_text(json.dumps({"step": 40, "val_loss": 1.5}) + "\n{cut")
    assert "1.5 best" in ask("list", "--run", run)[4]


def test_list_names_what_is_missing_and_what_cannot_be_resumed(run, ask):
    step_dir = run / "checkpoints" / "20"
    name = files_of(step_dir)[0]
    (step_dir / name).unlink()
    shutil.rmtree(run / "checkpoints" / "30")
    lines = ask("list", "--run", run / "checkpoints")
    assert lines[2].endswith(f"damaged  {step_dir / name}: is missing")
    assert len(lines) == 4


def test_verify_reads_every_byte(run, ask, capsys):
    assert ask("verify", "--run", run) == [f"{step}  good" for step in (10, 20, 30, 40)]
    assert ask("verify", "--run", run, "--step", 20) == ["20  good"]
    assert ask("verify", "--run", run / "checkpoints" / "30") == ["30  good"]
    path = damage(run / "checkpoints" / "20")
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: checkpoint.main(["verify", "--run", str(run)]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out.splitlines()[1].startswith(f"20  damaged  {path}: its contents are not what was saved")
    assert err == (
        f"error: {run}: damaged: 20; restore the named files from a copy, or move the step away (train "
        "--allow-fallback does, and goes on from a good one)\n"
    )


def test_show(run, ask, tokenizer):
    lines = dict(line.split(maxsplit=1) for line in ask("show", "--run", run))
    assert lines["checkpoint"] == str(run / "checkpoints" / "40")
    assert lines["step"] == "40 of 100"
    assert lines["format"].startswith("2, neva_jax ")
    assert lines["resumes"] == "step 41 of 100, training projector, llm"
    assert lines["base"] == "none"
    assert lines["tokenizer"] == f"tokenizer.model, 400 tokens, sha256 {tokenizer.sha256}"
    assert lines["data"] == "320 samples consumed"
    assert lines["projector"] == "2 arrays, 0.00M parameters, and its average"
    assert lines["vision"] == "2 arrays, 0.00M parameters"
    assert "step        10 of 100" in ask("show", "--run", run, "--step", 10)


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--keep", 1], [40]),
        (["--keep", 2], [30, 40]),
        (["--keep", 1, "--keep-best", 1], [20, 40]),
        (["--keep", 1, "--keep-every", 15], [30, 40]),
        (["--keep", 9], [10, 20, 30, 40]),
    ],
)
def test_prune(flags, left, run, ask):
    gone = [step for step in (10, 20, 30, 40) if step not in left]
    said = ask("prune", "--run", run, *flags, "--dry-run")
    assert [line.split()[0] for line in said] == [str(step) for step in gone]
    assert all(line.endswith("would go") for line in said)
    assert steps_in(run / "checkpoints") == [10, 20, 30, 40]
    assert all(line.endswith("deleted") for line in ask("prune", "--run", run, *flags))
    assert steps_in(run / "checkpoints") == left == sorted(int(p.name) for p in (run / "checkpoints").iterdir())


def test_nothing_is_pruned_while_the_newest_is_damaged(run):
    path = damage(run / "checkpoints" / "40")
    with pytest.raises(UserError, match=f"^nothing is deleted, since the newest checkpoint is damaged: {path}: "):
        checkpoint.main(["prune", "--run", str(run), "--keep", "1"])
    assert steps_in(run / "checkpoints") == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list --run {run}/nope", "--run {run}/nope: holds no checkpoint; name a run's directory, or a step in its"),
        ("verify --run {run} --step 15", "--step 15: {run} has the steps 10, 20, 30, 40"),
        ("prune --run {run} --keep 0", "--keep 0: must be at least 1"),
        ("prune --run {run} --keep 1 --keep-every 0", "--keep-every 0: must be at least 1"),
        ("prune --run {run} --keep 1 --keep-best -1", "--keep-best -1: must be at least 0"),
        ("prune --run {run}", "the following arguments are required: --keep"),
        ("prune --run {run}/checkpoints/10 --keep 1", "--run {run}/checkpoints/10: is one checkpoint; name the run"),
        ("lst --run {run}", "argument command: invalid choice: 'lst'"),
    ],
)
def test_wrong_usage(arguments, message, run):
    with pytest.raises(UserError) as caught:
        checkpoint.main(arguments.format(run=run).split(" "))
    assert str(caught.value).startswith(message.format(run=run))


def test_what_is_shown_is_not_changed(run, ask):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in ("list", "show", "verify"):
        ask(command, "--run", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
