from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.training import run_directory as files
from longspan.training.errors import UserError

HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX)
os.write(handle, f"{os.getpid()}\\n".encode())
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / files.LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        with (
            pytest.raises(UserError, match=rf"output={run}: process {other.pid} is writing this run; wait"),
            files.locked(run),
        ):
            pytest.fail("two processes hold the lock")
        other.kill()
    with files.locked(run):  # the lock died with its process
        assert (run / files.LOCK).read_text() == f"{os.getpid()}\n"


def test_a_directory_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with files.locked(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with files.locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert (tmp_path / "used" / "file").exists()


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    run, other, file = tmp_path / "run", tmp_path / "other", tmp_path / "file"
    for directory in (run, other):
        directory.mkdir()
    (run / files.CONFIG).touch()
    (other / "thesis.tex").touch()
    file.touch()
    files.check_output(tmp_path / "new", resume=False, overwrite=False)
    files.check_output(run, resume=True, overwrite=False)
    files.check_output(run, resume=False, overwrite=True)
    with pytest.raises(
        UserError, match="holds a run already; continue it with resume=auto, replace it with overwrite=tr"
    ):
        files.check_output(run, resume=False, overwrite=False)
    with pytest.raises(
        UserError, match="not empty, and not a run; choose another output; overwrite=true only replaces"
    ):
        files.check_output(other, resume=False, overwrite=True)
    with pytest.raises(UserError, match="is a file; a run needs a directory"):
        files.check_output(file, resume=False, overwrite=True)
    with pytest.raises(UserError, match="cannot be written"), files.locked(file / "below"):
        pass


def test_clear_removes_only_what_a_run_writes(tmp_path: Path) -> None:
    (tmp_path / files.CHECKPOINTS / "step-00000001").mkdir(parents=True)
    for name in (files.CONFIG, files.METRICS, files.LOCK, "notes.txt"):
        (tmp_path / name).touch()
    files.clear(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [files.LOCK, "notes.txt"]


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"path": tmp_path})
    assert files.read_json(tmp_path / "a.json") == {"path": str(tmp_path)}
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="Circular"):
        files.write_json(tmp_path / "a.json", loop)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert files.read_json(tmp_path / "a.json") == {"path": str(tmp_path)}


def test_a_directory_that_is_no_run_is_left_as_it_was(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("hi")
    with files.locked(foreign):
        assert (foreign / ".lock").exists()
    assert [entry.name for entry in foreign.iterdir()] == ["precious"]


def test_a_tree_without_git_says_its_commit_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_COMMIT", "abc123")
    assert files.source_commit() == "abc123"
