"""python -m neva_jax.prepare: its flags, and that an interrupted one leaves nothing that looks whole."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neva_jax.config import DataConfig, SourceConfig
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import UserError
from neva_jax.prepare import main


def arguments(llava_data, out, *more):
    return ["records", "--json", str(llava_data.json), "--images", str(llava_data.images), "--out", str(out), *more]


@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_records(llava_data, tmp_path, capsys, kind):
    assert main(arguments(llava_data, tmp_path / "out", "--format", kind, "--shard-rows", "10")) == 0
    assert f"{tmp_path / 'out'}: 25 rows, 24 images (0.0 MiB), 0 bad rows left out" in capsys.readouterr().out
    made, plain = (
        Sources(DataConfig(train=[source]), "train", 0, shuffle=False)
        for source in (
            SourceConfig(records=str(tmp_path / "out")),
            SourceConfig(json=str(llava_data.json), images=str(llava_data.images)),
        )
    )
    for i in range(25):
        row = plain.read(RowRef(0, i))
        assert made.read(RowRef(0, i)) == row
        for name in row.images:
            assert made.read_image(RowRef(0, i), name) == plain.read_image(RowRef(0, i), name)


def test_bad_rows_are_told(llava_data, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*json.loads(llava_data.json.read_text()), *range(12)]))
    options = ["records", "--json", str(path), "--images", str(llava_data.images), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"row 25: must be an object, not 0; mend the row, or add --skip-bad$"):
        main(options)
    assert not (tmp_path / "out").exists()
    assert main([*options, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "25 rows, 24 images (0.0 MiB), 12 bad rows left out" in said.out
    assert f"left out {path}: row 25: must be an object, not 0" in said.err
    assert "… and 2 more" in said.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard-rows", "0"], "--shard-rows 0: must be at least 1"),
        (["--name", "My Data"], "--name My Data: must be small letters, digits and _, as TFDS wants it"),
        (["--format", "tfrecord"], "argument --format: invalid choice: 'tfrecord'"),
        (["--json", "absent.json"], "absent.json: cannot be read (No such file or directory)"),
    ],
)
def test_wrong_flags(llava_data, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        main(arguments(llava_data, tmp_path / "out", *more))
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_without_force(llava_data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="exists; name another folder, or add --force"):
        main(arguments(llava_data, tmp_path / "out"))
    assert (tmp_path / "out/mine").read_text() == "x"
    assert main(arguments(llava_data, tmp_path / "out", "--force")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["records.json", "rows-00000.array_record"]


@pytest.fixture
def interruptible():
    """Processes that are started here do not ignore SIGINT, as they would where a script runs the tests with `&`.

    What is ignored is so for all children, too; a handler becomes the default action in them.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "array_record"),
        (signal.SIGKILL, "tfds"),
        pytest.param(signal.SIGINT, "tfds", marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, "array_record", marks=pytest.mark.thorough),
    ],
)
def test_an_interrupted_one_leaves_nothing_that_looks_whole(llava_data, tmp_path, number, kind):
    rows = json.loads(llava_data.json.read_text()) * 20_000
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [
        sys.executable,
        "-m",
        "neva_jax.prepare",
        *arguments(llava_data, tmp_path / "data/out", "--format", kind),
    ]
    command[command.index("--json") + 1] = str(tmp_path / "rows.json")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    while running.poll() is None and not list(tmp_path.glob("data/.out.tmp/**/*.array_record*")):
        time.sleep(0.02)
    running.send_signal(number)
    running.wait()
    assert running.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    left = [path.name for path in (tmp_path / "data").iterdir()]
    assert left == ([] if number == signal.SIGINT else [".out.tmp"])
