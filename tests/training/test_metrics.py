"""The logs of a run: metrics.jsonl, log.txt, the plot, TensorBoard, and what is printed."""

import io
import json
import re
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from neva_jax.config import Config, LogConfig
from neva_jax.errors import UserError
from neva_jax.training.metrics import RunLog, check_loggers

QUIET = LogConfig(tensorboard=False)


def train_row(step, **changes):
    numbers = {"loss": 3.0 / step, "lr": 1e-3, "grad_norm": 0.5, "samples_per_s": 12.34, "tokens_per_s": 1234.5}
    return {"step": step, **numbers, "data_wait_s": 0.25, "epoch": step / 10, **changes}


def open_log(run_dir, resumed_step=0, total_steps=10, config=QUIET):
    run_dir.mkdir(exist_ok=True)
    return RunLog(config, run_dir, resumed_step, total_steps, Config())


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_floats_are_read_back_bit_equal(tmp_path):
    draw = np.random.default_rng(0)
    floats = [
        *(float(value) for value in draw.normal(size=40).astype(np.float32)),
        *(float(value) for value in draw.normal(size=40) * 10.0 ** draw.integers(-300, 300, 40)),
        *(0.1, 1 / 3, 1e-45, 5e-324, sys.float_info.max, -0.0, 1e23, float(np.nextafter(np.float32(1), np.float32(2)))),
    ]
    with open_log(tmp_path, total_steps=200) as log:
        for i, value in enumerate(floats):
            log.metrics(train_row(i + 1, grad_norm=value))
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(floats) + 1))
    assert [row["grad_norm"].hex() for row in rows] == [value.hex() for value in floats]
    assert rows[6] == train_row(7, grad_norm=floats[6])


def test_a_row_is_on_disk_at_once(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(train_row(1))
        assert read_rows(tmp_path) == [train_row(1)]
        log.metrics({"step": 1, "val_loss": 2.5})
        assert read_rows(tmp_path) == [train_row(1), {"step": 1, "val_loss": 2.5}]


def test_resuming_drops_later_rows_and_goes_on(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 7):
            log.metrics(train_row(step))
            if step % 2 == 0:
                log.metrics({"step": step, "val_loss": 1.0 / step})
    expected = [row for row in read_rows(tmp_path) if row["step"] <= 4]
    assert len(expected) == 6
    with open_log(tmp_path, resumed_step=4) as log:
        assert read_rows(tmp_path) == expected
        log.metrics(train_row(5, loss=9.0))
    assert read_rows(tmp_path) == [*expected, train_row(5, loss=9.0)]


@pytest.mark.parametrize("kept", [1, 8, -2])
def test_resuming_drops_a_last_line_that_was_cut(tmp_path, kept):
    """A process that is killed may leave any part of its last line, without a line end."""
    lines = [json.dumps(train_row(step)) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:kept]]))
    with open_log(tmp_path, resumed_step=3) as log:
        assert read_rows(tmp_path) == [train_row(1), train_row(2)]
        log.metrics(train_row(4))
    assert read_rows(tmp_path) == [train_row(1), train_row(2), train_row(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_rows.jsonl", "log.txt", "metrics.jsonl", "plots"]


def test_a_fresh_run_drops_every_row_of_a_run_without_checkpoint(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics(train_row(1))
    with open_log(tmp_path, resumed_step=0):
        assert read_rows(tmp_path) == []


# --- log.txt and what is printed -------------------------------------------------------------------------------------


def test_say_prints_and_writes_with_the_time(tmp_path, capsys):
    with open_log(tmp_path) as log:
        log.say("llm: random weights")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d llm: random weights\n", (tmp_path / "log.txt").read_text())
    assert capsys.readouterr() == ("", "llm: random weights\n")
    with open_log(tmp_path) as log:
        log.say("resumed")
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "llm: random weights",
        "resumed",
    ]


def test_without_a_terminal_every_row_is_a_plain_line(tmp_path, capsys):
    with open_log(tmp_path, total_steps=30) as log:
        log.advance(10)
        log.metrics(train_row(10))
        log.metrics({"step": 10, "val_loss": 0.98765})
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(
        r"step 10/30 loss 0\.3000 lr 1\.00e-03 samples/s 12\.3 tokens/s 1234 data wait 0\.25s ETA \d+s", first
    )
    assert second == "step 10: val_loss 0.9877"
    written = [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert written == [first, second]


def test_eta_counts_the_steps_since_the_start_of_this_process(tmp_path, capsys, monkeypatch):
    """Two seconds for two steps after resuming at 10: 10 seconds for the 10 steps left."""
    clock = iter([100.0, *[102.0] * 20])
    monkeypatch.setattr("neva_jax.training.metrics.time.monotonic", lambda: next(clock))
    with open_log(tmp_path, resumed_step=10, total_steps=22) as log:
        log.metrics(train_row(12))
    assert capsys.readouterr().err.endswith("ETA 10s\n")


def test_a_terminal_gets_a_bar_with_the_numbers(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with open_log(tmp_path, total_steps=4) as log:
        log.advance()
        log.metrics(train_row(1))
        log.metrics({"step": 1, "val_loss": 2.5})
    shown = sys.stderr.getvalue()
    assert "1/4" in shown
    assert "loss=3.0000" in shown
    assert "step 1/4" not in shown
    assert "step 1: val_loss 2.5000" in shown


# --- plot ------------------------------------------------------------------------------------------------------------


def test_the_plot_is_a_readable_png(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.metrics(train_row(step))
        log.metrics({"step": 5, "val_loss": 0.7})
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]
    with Image.open(tmp_path / "plots" / "loss.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        # Two lines in matplotlib's first two colours, on white.
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((31, 119, 180), (255, 127, 14)):
        assert (np.abs(pixels - color).max(axis=1) < 20).sum() > 20, color


def test_after_a_resume_the_plot_still_has_the_earlier_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("neva_jax.training.plot.plot_losses", lambda rows, path: drawn.append(list(rows)))
    with open_log(tmp_path) as log:
        log.metrics(train_row(1))
        log.metrics(train_row(2))
    with open_log(tmp_path, resumed_step=1) as log:
        log.metrics(train_row(2, loss=7.0))
    assert drawn[-1] == [train_row(1), train_row(2, loss=7.0)]


def test_without_rows_there_is_no_plot(tmp_path):
    with open_log(tmp_path):
        pass
    assert not (tmp_path / "plots").exists()


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def read_events(path):
    """The records of an event file: length (8 bytes), its CRC (4), the event, its CRC (4)."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event()
        event.ParseFromString(data[12 : 12 + length])
        yield event
        data = data[16 + length :]


def test_tensorboard_events(tmp_path):
    with open_log(tmp_path, config=LogConfig(tensorboard=True)) as log:
        log.metrics(train_row(1))
        log.metrics({"step": 2, "val_loss": 0.75})
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = {
        (value.tag, event.step): value.simple_value for event in read_events(path) for value in event.summary.value
    }
    expected = {(name, 1): value for name, value in train_row(1).items() if name != "step"} | {("val_loss", 2): 0.75}
    assert scalars == pytest.approx(expected, rel=1e-6)


def test_tensorboard_hides_what_a_cut_off_run_wrote(tmp_path):
    with open_log(tmp_path, resumed_step=6, config=LogConfig(tensorboard=True)) as log:
        log.metrics(train_row(7))
    (path,) = (tmp_path / "tensorboard").iterdir()
    starts = [event.step for event in read_events(path) if event.session_log.status == SessionLog.START]
    assert starts == [7]


# --- loggers that are not installed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_is_not_installed(mode, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=rf"^log\.wandb={mode}: the package wandb is not installed; pip install wandb$"):
        check_loggers(LogConfig(wandb=mode))


def test_tensorboard_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        UserError, match=r"^log\.tensorboard=True: .* tensorboardX is not installed; .* log\.tensorboard=false$"
    ):
        check_loggers(LogConfig(tensorboard=True))


def test_loggers_that_are_off_need_no_package(monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    assert check_loggers(LogConfig(tensorboard=False, wandb="off")) is None


def test_wandb_gets_every_row(tmp_path, monkeypatch):
    """A stand-in for the package: one project, a name that resumes, each row at its step, the exit status."""
    calls = []

    class Run:
        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self, exit_code):
            calls.append(exit_code)

    class Package:
        @staticmethod
        def init(**settings):
            calls.append(settings)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    run_dir = tmp_path / "stage-1"
    with open_log(run_dir, config=LogConfig(tensorboard=False, wandb="offline")) as log:
        log.metrics({"step": 3, "val_loss": 0.75})
        log.metrics({"step": 4, "val_loss": 0.5})
    with open_log(run_dir, config=LogConfig(tensorboard=False, wandb="offline")):
        pass
    settings, row, _, status, again, _ = calls
    assert settings["id"] == again["id"] == (run_dir / "wandb_id.txt").read_text()
    assert (row, status) == ((3, {"val_loss": 0.75}), 0)
    assert {name: settings[name] for name in ("project", "name", "mode", "resume")} == {
        "project": "neva_jax",
        "name": "stage-1",
        "mode": "offline",
        "resume": "allow",
    }
    assert settings["config"]["train"]["steps"] == 4650
    with (
        pytest.raises(ZeroDivisionError),
        open_log(run_dir, config=LogConfig(tensorboard=False, wandb="offline", wandb_name="mine")),
    ):
        raise ZeroDivisionError
    assert calls[-2]["name"] == "mine"
    assert calls[-1] == 1
