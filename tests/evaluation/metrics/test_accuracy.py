"""Scores on cases worked out by hand."""

from __future__ import annotations

import pytest

from longspan.evaluation.metrics.accuracy import exact_match, normalized, score_answers, score_classes, token_f1


def test_classes_by_hand():
    scores = score_classes([0, 0, 0, 1, 2], [0, 0, 1, 1, 0], n_classes=4)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.majority == pytest.approx(3 / 5)
    # class 0: 2·2/(3+3); class 1: 2·1/(1+2); class 2: never guessed right; class 3 does not occur
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores.n == 5
    with pytest.raises(ValueError, match="at least one"):
        score_classes([], [], n_classes=2)


def test_normalisation():
    assert normalized(" The  Cat's, an Apple-tree!\n") == "cats appletree"
    assert normalized("theatre another") == "theatre another"


def test_answers_by_hand():
    assert exact_match("The cat.", "cat") == 1
    assert exact_match("cats", "cat") == 0
    assert token_f1("the big black cat", "a cat") == pytest.approx(2 * 1 / (3 + 1))
    assert token_f1("cat cat", "cat") == pytest.approx(2 * 1 / 3)
    assert token_f1("", "") == 1
    assert token_f1("the", "cat") == 0
    scores = score_answers(["cat", "", "dog", "x"], [["black cat", "cat"], [], ["the dog", "dogs"], ["y z"]])
    assert scores.exact_match == pytest.approx(3 / 4)
    assert scores.f1 == pytest.approx(3 / 4)
    assert scores.n == 4
    with pytest.raises(ValueError, match="as many of each"):
        score_answers(["a"], [])
