"""evaluation.json, .md and .png."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longspan.evaluation.perplexity.baseline import NgramBaseline, measure_baseline
from longspan.evaluation.perplexity.evaluate import evaluation_record
from longspan.evaluation.perplexity.result import PerplexityResult, ScoringProtocol, summarise
from longspan.evaluation.reporting.run_files import read_run
from longspan.evaluation.reporting.run_report import write_report
from longspan.evaluation.results.evaluation_files import write_evaluation


def result(source: str = "books") -> PerplexityResult:
    return summarise(
        np.array([1.0, 2.0, 3.0], dtype=np.float32),
        np.array([0, 0, 1]),
        np.array([0, 1, 0]),
        n_bytes=[4, 2],
        n_characters=[3, 1],
        sources=[source, "code"],
        protocol=ScoringProtocol(window=8, stride=4, bos=0, precision="fp32", documents=2),
    )


def test_baseline() -> None:
    baseline = measure_baseline(["abab", "é"], ["ab", "é"])
    assert (baseline.order, baseline.trained_bytes, baseline.bytes) == (2, 6, 4)
    assert baseline.bits_per_byte == NgramBaseline(2).fit(["abab", "é"]).bits_per_byte(["ab", "é"])
    with pytest.raises(ValueError, match="fitted on no text"):
        measure_baseline([], ["a"])


def test_files_and_their_numbers(tmp_path: Path) -> None:
    baseline = measure_baseline(["abab"], ["abb"])
    path = write_evaluation(result("a|b<c"), tmp_path / "new" / "dir", baseline=baseline, title="My model")
    assert sorted(p.name for p in path.parent.iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]
    record = json.loads(path.read_text())
    assert record["perplexity"]["loss"] == 2.0
    assert record["perplexity"]["perplexity"] == pytest.approx(math.exp(2))
    assert record["perplexity"]["bits_per_byte"] == pytest.approx(6 / math.log(2) / 6)
    assert record["perplexity"]["bits_per_character"] == pytest.approx(6 / math.log(2) / 4)
    assert set(record["perplexity"]) == {
        *("protocol", "loss", "loss_interval", "perplexity", "bits_per_token", "bits_per_byte", "bits_per_character"),
        *("tokens", "bytes", "characters", "documents", "by_position", "by_length", "by_source"),
    }
    assert set(record["perplexity"]["by_length"][0]) == {
        *("start", "end", "loss", "standard_error", "bits_per_byte", "tokens", "documents")
    }
    assert record["perplexity"]["protocol"]["window"] == 8
    assert "windows of at most 8 tokens that advance by 4" in record["perplexity"]["protocol"]["words"]
    assert record["baseline"]["bits_per_byte"] == baseline.bits_per_byte
    text = path.with_suffix(".md").read_text()
    assert text.startswith("# My model\n")
    assert "| a\\|b&lt;c | 1.5000 |" in text
    assert "Protocol: Each document alone" in text
    assert "| 0 | 2.0000 | 1.0000 | 2 | 2 |" in text
    assert "| bits per character | 2.1640 |" in text
    assert "## By length of the document" in text
    assert "| 2 – 3 | 1.5000 | — | 1.0820 | 2 | 1 |" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_not_finite_become_null() -> None:
    record = evaluation_record(replace(result(), loss=math.nan, perplexity=math.inf))
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text)["perplexity"]["loss"] is None


def test_the_report_reads_what_this_writes(tmp_path: Path) -> None:
    write_evaluation(result(), tmp_path, baseline=measure_baseline(["abab"], ["abb"]))
    assert read_run(tmp_path).evaluation["perplexity"]
    page = write_report(tmp_path).read_text()
    assert "2.000" in page
    assert "evaluation.json is missing" not in page
    assert "No n-gram baseline" not in page
