"""
`files.py`: what a run leaves is there completely or not at all, what is damaged is named with its cure, and one command
at a time works in a folder.
"""

import json
import logging
import subprocess
import sys
import time

import pytest

import dapo_trl.files
from dapo_trl.files import (
    clear_temporary_files,
    numbered_folders,
    only_one,
    run_once,
    temporary_file,
    wait_for,
    write_atomically,
)


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    write_atomically(path, json.dumps({"new": 1}))
    assert json.loads(path.read_text()) == {"new": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["file.json"]


def test_what_is_being_written_is_not_cleared_away(tmp_path):
    """What a killed process left is."""
    left = tmp_path / ".b.1.2.tmp"
    left.write_text("half")
    with temporary_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
        clear_temporary_files(tmp_path, "*")
        assert not left.exists()
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "stage.json is damaged: .* Delete it to do this step again"),
        ('{"results": {}}', "stage.json is damaged: it does not hold 'config'. Delete it"),
        ("[1]", "stage.json is damaged: it does not hold 'config', 'results'. Delete it"),
    ],
)
def test_a_damaged_record(tmp_path, content, message):
    (tmp_path / "stage.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_once(tmp_path / "stage.json", {}, dict)


# ---- One command at a time ----

HOLD = "import sys; from pathlib import Path; from dapo_trl.files import only_one\n"
HOLD += "with only_one(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"


def test_a_second_command_is_refused(tmp_path):
    """With the first one's process and machine; the first one's end, even by SIGKILL, gives the folder free."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=rf"works in .* already: process {first.pid} on \S+\. Wait for it"):
            with only_one(tmp_path):
                pass
        assert subprocess.run(command, capture_output=True).returncode == 1
    finally:
        first.kill()
        first.communicate()
    with only_one(tmp_path):
        pass
    with only_one(tmp_path):  # left as well
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """There is a warning, and work goes on; what a killed process left stays, as nobody knows whose it is."""

    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(dapo_trl.files.fcntl, "lockf", fail)
    monkeypatch.setattr(dapo_trl.files.fcntl, "flock", fail)
    with only_one(tmp_path):
        write_atomically(tmp_path / "a", "whole")
    assert "cannot be locked" in caplog.text
    (tmp_path / ".b.1.2.tmp").write_text("half")
    clear_temporary_files(tmp_path, "*")
    assert (tmp_path / "a").read_text() == "whole"
    assert (tmp_path / ".b.1.2.tmp").exists()


def test_waiting_says_what_for(monkeypatch, caplog):
    """Now and then."""
    monkeypatch.setattr(dapo_trl.files, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(dapo_trl.files, "_SECONDS_BETWEEN_MESSAGES", 0.1)
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        wait_for(lambda: time.monotonic() > begin + 0.25, lambda: "shard 4")
    assert len(caplog.messages) == 2
    assert caplog.messages[0] == "Still waiting for shard 4, which is another process's work."


def test_numbered_folders(tmp_path):
    """By their numbers; copies, files and others are left alone."""
    for name in ("iteration-10", "iteration-9", "iteration-2.bak", "iteration-", "iteration-x", "other-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "iteration-3").touch()
    assert [number for number, _ in numbered_folders(tmp_path, "iteration")] == [9, 10]
