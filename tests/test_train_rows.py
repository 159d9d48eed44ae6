"""Whole runs with packed rows, with length buckets, and with rows that cannot be used."""

import json

import jax
import pytest

from neva_jax import train
from neva_jax.errors import UserError

PACK = ["data.pack=true", "data.images_per_row=4", "data.segments_per_row=4", "data.max_length=400", "data.val=[]"]
SMALL = ["train.global_batch=4", "train.micro_batch=4", "train.steps=6", "checkpoint.keep=null", "checkpoint.every=2"]


@pytest.fixture
def start(small_overrides, tmp_path):
    """Runs `train.main` on one device; returns the exit status."""

    def start(name, *overrides):
        arguments = [*small_overrides, *SMALL, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / name}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "device_count", lambda: 1)
            return train.main([*arguments, *overrides])

    return start


def rows(folder):
    """The logged rows without what the clock says."""
    timed = ("samples_per_s", "tokens_per_s", "data_wait_s")
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in read]


def said(folder):
    return [line.split(" ", 1)[1] for line in (folder / "log.txt").read_text().splitlines()]


def cut(folder, step):
    """As if the run had been killed after `step` was saved."""
    import shutil

    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)


def test_a_packed_run_counts_samples_and_goes_on_exactly(start, tmp_path):
    """25 samples an epoch, about 3 in a row: the run passes the end of an epoch."""
    assert start("whole", *PACK) == 0
    whole = rows(tmp_path / "whole")
    metadata = [tmp_path / "whole" / "checkpoints" / str(step) / "data" / "metadata" for step in (2, 4, 6)]
    consumed = [json.loads(path.read_text())["samples"] for path in metadata]
    assert [row["epoch"] for row in whole][1::2] == [samples / 25 for samples in consumed]
    assert consumed[0] > 2 * 4
    assert consumed[2] > 25
    for step in (2, 4):
        cut(tmp_path / "whole", step)
        assert start("whole", *PACK, "data.workers=0") == 0
        assert rows(tmp_path / "whole") == whole
    assert any("samples packed into" in line for line in said(tmp_path / "whole"))


def test_a_packed_run_is_refused_another_plan_within_an_epoch(start, tmp_path):
    assert start("run", *PACK) == 0
    cut(tmp_path / "run", 2)
    for change in ("data.max_length=300", "data.segments_per_row=3", "data.pack=false"):
        with pytest.raises(UserError, match=r"^data\.pack=\w+: the checkpoint stands \d+ samples into an epoch"):
            start("run", *PACK, change)


def test_a_packed_run_validates_each_sample_once(start, tmp_path):
    """The loss of one epoch of validation rows does not depend on how they are packed."""
    losses = []
    for name, overrides in (("packed", PACK[:-1]), ("plain", ["data.max_length=400", "data.images_per_row=4"])):
        settings = ["train.steps=1", "eval.batches=50", "optimizer.lr=0.0", "optimizer.min_lr=0.0"]
        assert start(name, *overrides, *settings, "optimizer.warmup_steps=0") == 0
        losses += [row["val_loss"] for row in rows(tmp_path / name) if "val_loss" in row]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_with_shortcuts_has_the_losses_of_one_without(start, tmp_path):
    """Some rows have more labels than are asked for; a run that goes on ends as one that was not stopped."""
    frozen = ["model.llm.freeze=true", "data.val=[]", "train.micro_batch=2"]
    shortcuts = ["train.constant_prefix=8", "train.labelled_positions=12", "train.unroll=2"]
    assert start("plain", *frozen) == start("short", *frozen, *shortcuts) == 0
    plain, short = rows(tmp_path / "plain"), rows(tmp_path / "short")
    assert [row["loss"] for row in short] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    taken = [row["short"] for row in short]
    assert set(taken) <= {0, 0.5, 1} and 0 < sum(taken) < len(taken)
    cut(tmp_path / "short", 2)
    assert start("short", *frozen, *shortcuts) == 0
    assert rows(tmp_path / "short") == short
    with pytest.raises(UserError, match=r"train\.constant_prefix=150: the first training row has \d+ tokens before"):
        start("long", *frozen, "train.constant_prefix=150")


def test_each_bucket_is_compiled_once(start, tmp_path, monkeypatch):
    """And the losses are those of one length."""
    steps = []
    make = train.configured_step

    def remember(*arguments):
        steps.append(make(*arguments))
        return steps[-1]

    placed, place = [], train.place_batch

    def note(mesh, arrays, accumulate):
        placed.append(arrays["tokens"].shape[1])
        return place(mesh, arrays, accumulate)

    monkeypatch.setattr(train, "configured_step", remember)
    monkeypatch.setattr(train, "place_batch", note)
    plain = ["train.global_batch=1", "train.micro_batch=1", "train.steps=12", "data.val=[]", "checkpoint.every=100"]
    assert start("one", *plain) == 0
    placed.clear()
    assert start("buckets", *plain, "data.length_buckets=[110, 150]") == 0
    first, second = (rows(tmp_path / name) for name in ("one", "buckets"))
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], rel=1e-5)
    compiling = [line for line in said(tmp_path / "buckets") if "compiling" in line]
    lengths = [int(line.split(" tokens")[0].split()[-1]) for line in compiling]
    assert sorted(lengths) == sorted(set(placed) - {192})  # of the longest nothing is said: it was compiled ahead
    assert set(placed) <= {110, 150, 192} and len(set(placed)) >= 2
    # Its first call is cached twice, for the state that was made elsewhere: what counts is the difference.
    assert steps[1]._cache_size() - steps[0]._cache_size() == len(set(placed)) - 1
