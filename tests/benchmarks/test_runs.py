"""Runs that benchmarks train before they measure."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from longspan.benchmarks.runs import train_once


def test_a_finished_run_is_kept_for_the_keys_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    run = tmp_path / "run"

    def trained(command: list[str], check: bool) -> SimpleNamespace:
        commands.append(command)
        run.mkdir(exist_ok=True)
        (run / "summary.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", trained)
    train_once(run, "tiny", ["seed=1", "trainer.steps=5"])
    assert commands[0][3:] == ["train", "experiment=tiny", "seed=1", "trainer.steps=5", f"output={run}", "resume=auto"]
    train_once(run, "tiny", ["seed=1", "trainer.steps=5"])
    assert len(commands) == 1
    assert f"{run}: trained already" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"other keys \(trainer.steps=5 → trainer.steps=7\); give those again, or choose"
    ):
        train_once(run, "tiny", ["seed=1", "trainer.steps=7"])
    with pytest.raises(SystemExit, match=r"other keys \(trainer.steps=5 → none\)"):
        train_once(run, "tiny", ["seed=1"])
    (run / "asked.json").unlink()  # of a version that did not write it
    train_once(run, "tiny", ["seed=1"])
    assert len(commands) == 1
