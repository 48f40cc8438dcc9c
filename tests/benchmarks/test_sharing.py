"""What grouped-query surgery costs before any training."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from longspan.benchmarks.sharing import main, measure, surgeries_of
from longspan.data.tokenizer import byte_level
from longspan.model.build import build_from
from longspan.model.checkpoint import save_model
from longspan.model.config import DecoderConfig, EncoderConfig
from longspan.model.surgery import GroupedQuery
from longspan.model.zoo import configure

CONFIG = DecoderConfig(vocab_size=257, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=48, init_std=0.2)
ALL = ("mean", "first", "random", "aligned", "svd")


def test_a_decoder_is_scored_by_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build_from(CONFIG, seed=0), tmp_path / "model", byte_level())
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    keys = [f"checkpoint={tmp_path / 'model'}", f"data={tmp_path / '*.txt'}", "kv_heads=2,1", "inits=mean,random"]
    assert main([*keys, "texts=5", "length=40", f"output={tmp_path / 'out'}"]) == 0
    with (tmp_path / "out/sharing.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    found = [(row["kv_heads"], row["init"], row["grouping"]) for row in rows]
    assert found == [
        ("4", "", ""),
        ("2", "mean", "contiguous"),
        ("2", "mean", "similar"),
        ("2", "random", "contiguous"),
        ("1", "mean", "contiguous"),
        ("1", "random", "contiguous"),
    ]
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert all(row["checkpoint"] == "model" and str(tmp_path) not in row["command"] for row in rows)
    with pytest.raises(SystemExit, match="2"):
        main([*keys[:2], "heads=2"])
    assert "unknown: heads" in capsys.readouterr().err


def test_scores_are_losses_and_cosines() -> None:
    tokens_BT = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    model = build_from(CONFIG, seed=0).eval()
    before, same, after = measure(model, tokens_BT, [GroupedQuery(kv_heads=4), GroupedQuery(kv_heads=1)])
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert before.score == pytest.approx(float(loss), abs=1e-4)
    assert same.score == before.score != after.score
    config = configure("bert-tiny", {"vocab_size": 257, "init_std": 0.2})
    assert isinstance(config, EncoderConfig)
    itself, pooled = measure(build_from(config, seed=0).eval(), tokens_BT, [GroupedQuery(kv_heads=1)])
    assert itself.score == pytest.approx(1.0, abs=1e-6)
    assert pooled.score < 0.999


def test_every_combination_that_there_is() -> None:
    found = surgeries_of([2, 1], ALL, ("contiguous", "similar"), None)
    assert len(found) == 2 * 5 + 4
    with_texts = surgeries_of([2, 1], ALL, ("contiguous", "similar"), "moments")
    assert [surgery for surgery in with_texts if surgery.statistics is None] == found
    assert sum(surgery.statistics is not None for surgery in with_texts) == 2 * 2 + 4
