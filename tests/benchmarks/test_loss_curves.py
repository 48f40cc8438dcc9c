"""The comparison of training runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from longspan.benchmarks import loss_curves
from longspan.benchmarks.loss_curves import Curve, distance, main


def test_noise_averages_out_and_a_bias_does_not() -> None:
    steps = np.arange(300)
    curve = 4 * np.exp(-steps / 100)
    noisy = curve + 0.02 * (-1.0) ** steps
    assert distance(noisy, curve).raw == pytest.approx(0.02)
    assert distance(noisy, curve).smoothed < 1e-12
    assert distance(noisy, curve).met
    drift = curve + 0.006 * (steps >= 290)
    assert distance(drift, curve).smoothed == pytest.approx(0.006)
    assert not distance(drift, curve).met


@pytest.mark.parametrize("other", [np.ones(9), np.full(10, np.nan)])
def test_curves_that_cannot_be_compared_are_refused(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        distance(np.ones(10), other)


def test_all_are_compared_with_sdpa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def train(backend: str, arguments: list[str], directory: Path) -> Curve:
        asked.append((backend, arguments))
        return Curve(backend, np.full(20, {"a": 3.001, "sdpa": 3.0, "b": 3.01}[backend]), 2**30)

    monkeypatch.setattr(loss_curves, "train", train)
    assert main(["backends=a,sdpa,b", f"output={tmp_path}", "data.path=x.txt"]) == 1
    assert asked == [("a", ["data.path=x.txt"]), ("sdpa", ["data.path=x.txt"]), ("b", ["data.path=x.txt"])]
    rows = list(csv.DictReader((tmp_path / "loss_curves.csv").read_text().splitlines()))
    assert [(row["backend"], row["against"], row["met"]) for row in rows] == [
        ("a", "sdpa", "True"),
        ("b", "sdpa", "False"),
    ]
    assert rows[0]["peak_gib"] == "1.0"
    assert json.loads((tmp_path / "loss_curves.jsonl").read_text())["loss"]["b"] == [3.01] * 20


def test_a_backend_named_twice_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    losses = iter((3.0, 3.002))
    monkeypatch.setattr(loss_curves, "train", lambda backend, *_: Curve(backend, np.full(20, next(losses)), None))
    assert main(["backends=sdpa,sdpa", f"output={tmp_path}"]) == 0
    (row,) = csv.DictReader((tmp_path / "loss_curves.csv").read_text().splitlines())
    assert (row["backend"], row["against"], row["largest_difference"]) == ("sdpa#2", "sdpa", "0.002")


@pytest.mark.slow
def test_two_backends_train_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two real runs of a tiny model on a CPU, each in a process of its own."""
    monkeypatch.chdir(tmp_path)
    tiny = ["experiment=tiny", "trainer.steps=12", "trainer.precision=fp32", "trainer.accelerator=cpu"]
    assert (
        main(["backends=reference,sdpa", f"output={tmp_path / 'out'}", f"data.cache={tmp_path / 'cache'}", *tiny]) == 0
    )
    (row,) = csv.DictReader((tmp_path / "out/loss_curves.csv").read_text().splitlines())
    assert row["steps"] == "12"
    assert 0 < float(row["largest_difference"]) < 1e-4 or row["largest_difference"] == "0.0"
    assert float(row["final_loss"]) > 1
