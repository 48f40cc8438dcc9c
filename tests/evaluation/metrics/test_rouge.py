"""ROUGE against counts by hand."""

from __future__ import annotations

import sys

import pytest

from longspan.evaluation.metrics import rouge as rouge_module
from longspan.evaluation.metrics.rouge import geometric_mean, rouge

GUESS = "the cat sat on the mat"  # 6 words, 5 pairs
REFERENCE = "the cat lay on a mat."  # 6 words, 5 pairs


def test_by_hand():
    found = rouge(GUESS, [REFERENCE])
    assert found.rouge1 == pytest.approx(4 / 6)  # the cat on mat: 4 of 6 and 4 of 6
    assert found.rouge2 == pytest.approx(1 / 5)  # "the cat" alone
    assert found.rougeL == pytest.approx(4 / 6)  # the cat … on … mat
    assert geometric_mean(found.as_dict()) == pytest.approx((4 / 6 * 1 / 5 * 4 / 6) ** (1 / 3))


def test_lengths_weigh_in_both_directions():
    found = rouge("a b", ["a c a b d a b"])
    assert found.rouge1 == pytest.approx(2 * (2 / 2) * (2 / 7) / (2 / 2 + 2 / 7))
    assert found.rouge2 == pytest.approx(2 * 1 * (1 / 6) / (1 + 1 / 6))
    assert rouge("b a", ["a b"]).rougeL == pytest.approx(1 / 2)  # order counts


def test_the_best_reference_of_each():
    found = rouge("a b c d", ["d c b a", "a b x y z", "q"])
    assert found.rouge1 == pytest.approx(1.0)  # of the first
    assert found.rouge2 == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))  # of the second
    assert found.rougeL == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))


def test_stemming_is_off_unless_asked():
    assert rouge("cats running", ["cat runs"]).rouge1 == 0.0
    assert rouge("cats running", ["cat runs"], stem=True).rouge1 == 1.0


def test_nothing_written():
    assert rouge("", ["a"]).as_dict() == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    assert geometric_mean(rouge("", ["a"]).as_dict()) == 0.0
    with pytest.raises(ValueError, match="there is none"):
        rouge("a", [])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    rouge_module._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"ROUGE needs the package rouge-score .*: pip install longspan\[eval\]"):
        rouge("a", ["a"])
