"""The ends of a command that tests/test_commands.py does not reach: interrupts, and a reader that goes away."""

import subprocess
import sys
from pathlib import Path

import pytest

from neva_jax.errors import CommandParser, UserError, exit_with

ROOT = Path(__file__).parent.parent


def test_an_interrupt_ends_with_130_and_one_word(capsys):
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_reader_that_goes_away_ends_a_command_in_silence():
    """As in `python -m neva_jax… | head -1`."""
    program = """
from neva_jax.errors import exit_with
def main():
    while True:
        print("line")
exit_with(main)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_a_wrong_argument_is_a_user_error_that_names_the_way_to_help():
    parser = CommandParser(prog="python -m neva_jax.train")
    parser.add_argument("--steps", type=int)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["--steps", "many"])
    assert str(caught.value) == (
        "argument --steps: invalid int value: 'many'; python -m neva_jax.train --help lists the flags"
    )


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: CommandParser(prog="command", description="What it does.").parse_args(["--help"]))
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert "What it does." in out
    assert err == ""


STUCK = """
import os, sys, threading, time
from neva_jax.errors import UserError, ends_with, exit_with
file = open(sys.argv[1], "w")
ends_with(file, sys.argv[1])
def main():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    if sys.argv[2] == "error":
        raise UserError("key: is wrong")
    if sys.argv[2] == "defect":
        raise ZeroDivisionError
    return 143
exit_with(main)
"""


@pytest.mark.parametrize(("how", "status", "said"), [
    ("error", 2, "error: key: is wrong"), ("defect", 1, "ZeroDivisionError"), ("signal", 143, ""),
])  # fmt: skip
def test_a_thread_that_hangs_is_not_waited_for_and_no_file_is_left(how, status, said, tmp_path):
    command = [sys.executable, "-c", STUCK, str(tmp_path / "shared"), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stderr.rstrip().endswith(said)
    assert list(tmp_path.iterdir()) == []
