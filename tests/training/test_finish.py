"""A run's own evaluation: its file, its summary, its report, and where it says that its data came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import resolve_checkpoint
from longspan.training.held_out import training_store
from longspan.training.run import train
from longspan.training.schema import validate


def test_evaluation_report_and_lineage_of_a_run(
    request_of: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / f"texts/{i}.txt").write_text("déjà vu " * (i + 5))
    (tmp_path / "texts/scan.pdf").write_bytes(b"no text")
    train(
        validate(
            request_of(
                trainer__steps=2,
                data__path="texts",
                data__cache="cache",
                evaluation={"enabled": True, "max_tokens": 100},
                callbacks={"progress": "off", "report": True},
            )
        )
    )
    run = tmp_path / "run"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse)
    assert record["checkpoint"] == "step-00000002"
    assert record["perplexity"]["protocol"]["max_tokens"] == record["perplexity"]["tokens"] == 100
    assert record["baseline"]["bytes"] == record["perplexity"]["bytes"] > 0
    summary = json.loads((run / "summary.json").read_text(), parse_constant=refuse)
    assert summary["bits_per_byte"] == record["perplexity"]["bits_per_byte"]
    assert summary["baseline_bits_per_byte"] == record["baseline"]["bits_per_byte"]
    page = (run / "report.html").read_text()
    assert "No n-gram baseline" not in page
    assert f"{record['baseline']['bits_per_byte']:.3f}" in page
    assert "(at most 100 tokens, drawn with seed 0)" in page

    facts = json.loads((run / "lineage.json").read_text())["data"]
    assert os.path.isabs(facts["store"])
    assert facts["left out: texts"] == "skipped 1 file of other kinds"
    assert "data: texts: skipped 1 file of other kinds" in (run / "train.log").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoint = resolve_checkpoint(run)
    store = training_store(checkpoint, Tokenizer.load(checkpoint))
    assert sum(len(store.documents(split)) for split in ("train", "validation")) == 20
