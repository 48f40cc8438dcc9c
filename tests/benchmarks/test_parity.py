"""The parity table, of three families: its numbers, and that it would notice a difference."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspan.benchmarks import parity

pytest.importorskip("transformers")


def rows(directory: Path) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in csv.DictReader((directory / "parity.csv").read_text().splitlines())}


def test_three_families_are_alike_in_both_directions(tmp_path: Path) -> None:
    assert parity.main(["families=gpt2,longformer,led", "tokens=70", f"output={tmp_path}"]) == 0
    found = rows(tmp_path)
    assert list(found) == ["gpt2", "longformer, window 64", "led, window 64"]
    for row in found.values():
        assert 0 < float(row["difference"]) < 1e-4
        assert float(row["back"]) < 1e-6
        assert float(row["spread"]) > 0.3


def test_a_model_that_sees_another_token_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = parity.ours

    def other(model: torch.nn.Module, batch: parity.Batch, target_BT: Tensor) -> Tensor:
        tokens_BT = batch.tokens_BT.clone()
        tokens_BT[0, 0] = 3 + (tokens_BT[0, 0] - 2) % 900
        return honest(model, parity.Batch(tokens_BT, batch.lengths_B, batch.is_global_BT), target_BT)

    monkeypatch.setattr(parity, "ours", other)
    assert parity.main(["families=bert", "tokens=70", f"output={tmp_path}"]) == 0
    assert float(rows(tmp_path)["bert"]["difference"]) > 0.1


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("families=gpt3,bert", "families=gpt3: known are bart, bert,"),
        ("checkpoint=none", "checkpoint=none: no directory"),
    ],
)
def test_what_cannot_be_compared_is_said(typed: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=line):
        parity.main([typed, f"output={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_directory_of_ones_own_is_compared_and_not_where_it_lies(family: str, tmp_path: Path) -> None:
    parity.random_model(parity.FAMILIES[family]).save_pretrained(tmp_path / "mine")  # type: ignore[operator]
    assert parity.main([f"checkpoint={tmp_path / 'mine'}", "tokens=24", f"output={tmp_path}"]) == 0
    row = rows(tmp_path)["mine"]
    assert float(row["difference"]) < 1e-4
    assert row["command"] == "python -m longspan.benchmarks.parity tokens=24"
