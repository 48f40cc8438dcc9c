"""The encoder benchmark on a CPU: the same model twice, and a wrong one is void."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from longspan.benchmarks import longformer
from longspan.benchmarks.longformer import OURS, THEIRS, Measured, main, measure
from longspan.benchmarks.timing import HostClock

pytest.importorskip("transformers")

SMALL = ["layers=2", "width=32", "heads=2", "window=16", "vocabulary=64", "lengths=64,128", "repetitions=3"]


def test_both_are_measured_at_every_length(tmp_path: Path) -> None:
    assert main([*SMALL, "device=cpu", f"output={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "longformer.csv").read_text().splitlines()))
    assert [(row["length"], row["pass"], row["contender"]) for row in rows] == [
        (length, kind, name)
        for length in ("64", "128")
        for kind in ("forward", "forward and backward")
        for name in (THEIRS, OURS)
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["ms_p50"]) > 0 and row["n"] == "3" for row in rows)
    assert all(row["times_ours"] == "1" for row in rows if row["contender"] == OURS)
    assert float(rows[0]["fp32_difference"]) < 1e-5


def test_what_computes_something_else_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(longformer, "first_token", lambda tokens: torch.zeros_like(tokens, dtype=torch.bool))
    theirs = longformer.their_forward
    monkeypatch.setattr(longformer, "their_forward", lambda model: lambda tokens: theirs(model)(tokens) + 0.01)
    assert main([*SMALL, "device=cpu", f"output={tmp_path}"]) == 1
    assert "void" in capsys.readouterr().out
    assert not (tmp_path / "longformer.csv").exists()


def test_a_contender_that_fails_leaves_the_race_and_the_others_go_on() -> None:
    weight = torch.ones(3, requires_grad=True)

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of\nmemory")

    found = measure(
        {"good": lambda tokens: weight * tokens, "broken": broken},
        torch.ones(3),
        training=True,
        clock=HostClock(),
        repetitions=2,
    )
    assert found["broken"] == Measured(failure="RuntimeError: out of memory")
    assert len(found["good"].milliseconds) == 2
    assert weight.grad is not None
    assert weight.grad.tolist() == [pytest.approx(2 / 3 * 5)] * 3  # three to warm up, two timed


def test_an_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian=1"])
    assert "unknown: trian; keys are lengths" in capsys.readouterr().err
