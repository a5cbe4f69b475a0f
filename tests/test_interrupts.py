"""
`interrupts.py`: Ctrl-C is not lost, wherever it meets the program.
"""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from dapo_trl.cli import main
from dapo_trl.files import run_once
from dapo_trl.interrupts import noted_interrupts, raise_if_interrupted


@pytest.fixture(autouse=True)
def usual_handler():
    """Whatever the tests were started by."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallow_an_interrupt():
    """What a bare `except` in a library does."""
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_swallowed_interrupt_is_raised_again():
    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        swallow_an_interrupt()
        raise_if_interrupted()
    raise_if_interrupted()  # it is over
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_is_kept_and_is_the_last_one(tmp_path):
    """What was computed is written before the run ends."""

    def compute():
        swallow_an_interrupt()
        return {"a": 1}

    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        run_once(tmp_path / "stage.json", {}, compute)
    assert run_once(tmp_path / "stage.json", {}, lambda: {"a": 2}) == {"a": 1}


def test_the_command_ends(monkeypatch, capsys):
    """With its message and exit code; so it does when nobody swallows the interrupt."""
    for swallowed in (True, False):

        def run(command, arguments, swallowed=swallowed):
            if swallowed:
                swallow_an_interrupt()
                raise_if_interrupted()
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr("dapo_trl.cli._run", run)
        assert main(["env"]) == 130
        assert "stopped. The same command goes on where it was." in capsys.readouterr().err


def test_the_second_interrupt_ends_the_program():
    code = (
        "import contextlib, os, signal, time\n"
        "from dapo_trl.interrupts import noted_interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with noted_interrupts():\n"
        "    for _ in range(3):\n"
        "        with contextlib.suppress(BaseException):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGINT


def test_ignored_interrupts_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    with noted_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        raise_if_interrupted()
