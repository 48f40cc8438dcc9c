"""Paired tests: exact cases by hand, symmetry, coverage of the interval and uniform p-values on simulated data."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.evaluation.perplexity.documents import EvalDocument
from longspan.evaluation.perplexity.result import ScoringProtocol
from longspan.evaluation.perplexity.sliding_window import TokenScores
from longspan.evaluation.results.compare import (
    Measured,
    adjusted,
    compare,
    differing_fields,
    holm,
    measured_loss,
    measured_scores,
)

few = settings(max_examples=20, deadline=None)


def measured(totals, weights=None, *, name="a", protocol=None, units=None) -> Measured:
    totals = np.asarray(totals, dtype=np.float64)
    return Measured(
        name=name,
        measure="loss (nats per token)",
        protocol={"window": 8} if protocol is None else protocol,
        units=tuple(map(str, range(len(totals)))) if units is None else tuple(units),
        totals=totals,
        weights=np.ones(len(totals)) if weights is None else np.asarray(weights, dtype=np.float64),
    )


def test_difference_and_exact_p_value_by_hand() -> None:
    """Differences 1, 2, -0.5: |sum| = 2.5. Of 8 patterns ±(1+2-0.5) and ±(1+2+0.5) are as far from zero."""
    found = compare(measured([3, 5, 1], [1, 2, 1]), measured([2, 3, 1.5], [1, 2, 1], name="b"))
    assert found.difference == pytest.approx(2.5 / 4)
    assert (found.first_value, found.second_value) == (9 / 4, 6.5 / 4)
    assert found.p_value == pytest.approx(4 / 8)
    assert found.interval is None  # three documents
    assert (found.first, found.second, found.documents) == ("a", "b", 3)
    assert "all sign patterns" in found.method


def test_random_patterns_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 12), rng.normal(0, 1, 12)
    difference = a - b
    every = [abs(np.dot(signs, difference)) for signs in product([1, -1], repeat=12)]
    exact = np.mean(np.array(every) >= abs(difference.sum()) - 1e-12)
    assert compare(measured(a), measured(b), resamples=4096).p_value == pytest.approx(exact)
    drawn = compare(measured(a), measured(b), resamples=4000)
    assert "4,000 random patterns" in drawn.method
    assert drawn.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_interval_is_of_the_weighted_difference() -> None:
    """One heavy document decides: an interval over unweighted means would not reach it."""
    rng = np.random.default_rng(0)
    weights = np.array([1000, *[1] * 19])
    totals = weights * np.array([1.0, *rng.normal(0, 0.1, 19)])
    found = compare(measured(totals, weights), measured(np.zeros(20), weights), resamples=2000)
    assert found.interval is not None
    assert found.difference == pytest.approx(totals.sum() / weights.sum())
    assert found.interval[0] < 0.2 < 0.95 < found.interval[1]  # without it, and with it


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(0, 3),
)
@few
def test_antisymmetric_and_zero_for_itself(rows: list[tuple[float, float, int]], seed: int) -> None:
    a, b, weights = (np.array(column) for column in zip(*rows))
    one, two = measured(a, weights), measured(b, weights, name="b")
    forth, back = (compare(x, y, resamples=500, seed=seed) for x, y in ((one, two), (two, one)))
    assert forth.difference == pytest.approx(-back.difference, abs=1e-12)
    assert forth.p_value == back.p_value
    assert (forth.interval is None) == (len(rows) < 10)
    if forth.interval is not None and back.interval is not None:
        assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-9)
    itself = compare(one, replace(one, name="again"), resamples=500, seed=seed)
    assert (itself.difference, itself.p_value) == (0, 1)
    assert itself.interval in (None, (0, 0))


def simulate(effect: float, seed: int, n: int = 40) -> tuple[Measured, Measured]:
    """Documents of different lengths; both models find the same ones hard."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(50, 500, n)
    hard = rng.normal(3, 1, n)
    a, b = (hard + shift + rng.normal(0, 0.2, n) for shift in (effect, 0.0))
    return measured(a * weights, weights), measured(b * weights, weights, name="b")


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(150):
        interval = compare(*simulate(0.1, seed), resamples=400, seed=seed).interval
        assert interval is not None
        covered += interval[0] <= 0.1 <= interval[1]
    assert 132 <= covered <= 149  # binomial(150, 0.94): 132 and 149 are both beyond three standard deviations


def test_p_values_are_uniform_where_nothing_differs_and_small_where_something_does() -> None:
    nothing = np.array([compare(*simulate(0.0, seed), resamples=400, seed=seed).p_value for seed in range(200)])
    assert abs(nothing - 0).min() > 0
    worst = max(abs(np.mean(nothing <= level) - level) for level in np.linspace(0.05, 0.95, 19))
    assert worst < 1.63 / math.sqrt(200)  # Kolmogorov-Smirnov at 1 %
    something = [compare(*simulate(0.2, seed), resamples=400, seed=seed).p_value for seed in range(30)]
    assert np.mean(np.array(something) < 0.05) > 0.8


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"p=1\.5 is no probability"):
        holm([0.5, 1.5])


def test_all_pairs_are_adjusted_together() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 12)
    three = [
        measured(base + shift + rng.normal(0, 0.1, 12), name=name) for name, shift in (("a", 0), ("b", 0), ("c", 1))
    ]
    found = adjusted([compare(*pair, resamples=4096) for pair in combinations(three, 2)])
    assert [(each.first, each.second) for each in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [each.adjusted_p_value for each in found] == pytest.approx(holm([each.p_value for each in found]))
    assert found[1].adjusted_p_value == pytest.approx(3 * 2 / 4096)
    assert compare(three[0], three[1]).adjusted_p_value is None


# -- what may be compared --------------------------------------------------------------------------------------------


def test_different_protocols_are_refused_by_field_unless_forced() -> None:
    one = measured([1, 2], protocol={"window": 8, "stride": 4, "merged": False})
    two = measured([1, 3], name="b", protocol={"window": 16, "stride": 4, "merged": True, "extra": 1})
    message = "a and b were measured by different protocols: window is 8 and 16 (and extra); measure both alike"
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(one, two)
    forced = compare(one, two, force=True)
    assert forced.differing == ("window", "extra")
    assert forced.difference == -0.5
    assert compare(one, replace(two, protocol=one.protocol)).differing == ()
    assert differing_fields({"merged": 1}, {}) == ()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"units": ("0", "x")}, "not measured on the same documents: only one of them has '1'"),
        ({"weights": [1, 2]}, "document '1' weighs 1 with a and 2 with b: it was cut into other tokens"),
    ],
)
def test_different_documents_are_refused(other: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(measured([1, 2]), measured([1, 2], name="b", **other), force=True)
    with pytest.raises(ValueError, match="are different measures"):
        compare(measured([1]), replace(measured([1]), measure="bits per byte"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"totals": [], "weights": []}, "no documents"),
        ({"totals": [1, 2], "units": ["x", "x"]}, "named twice"),
        ({"totals": [1, 2], "weights": [1]}, "2 documents, 2 totals and 1 weights"),
        ({"totals": [1, math.nan]}, "document 1 has a score that is not a number"),
    ],
)
def test_measurements_that_make_no_sense(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(**fields)


def test_order_of_documents_does_not_matter() -> None:
    one, two = measured([1, 2, 3], [1, 2, 3]), measured([30, 10, 20], [3, 1, 2], name="b", units=["2", "0", "1"])
    assert compare(one, two).difference == pytest.approx((6 - 60) / 6)


# -- where numbers come from -----------------------------------------------------------------------------------------


def test_loss_of_token_scores() -> None:
    documents = [EvalDocument(tokens=np.zeros(n, dtype=int), n_bytes=3 * n, source="s", id=str(n)) for n in (2, 0, 1)]
    scores = TokenScores(
        nll=np.array([1, 2, 5], dtype=np.float32),
        document=np.array([0, 0, 2]),
        position=np.array([0, 1, 0]),
        context=np.array([1, 2, 1]),
        documents=tuple(documents),
        protocol=ScoringProtocol(window=8, stride=4, bos=0, precision="fp32", documents=2),
    )
    loss = measured_loss("a", scores.by_document(), asdict(scores.protocol))
    assert loss.units == ("s/2", "s/1")  # the empty document is no unit
    assert loss.totals.tolist() == [3, 5]
    assert loss.value == pytest.approx(scores.summary().loss)
    per_byte = measured_loss("a", scores.by_document(), asdict(scores.protocol), per="byte")
    assert per_byte.value == pytest.approx(scores.summary().bits_per_byte)
    assert per_byte.protocol["bos"] is True
    assert loss.protocol["window"] == 8


def test_scores_of_questions_are_grouped_by_their_text() -> None:
    found = measured_scores("a", "F1", {"task": "qa"}, ["x", "y", "x"], [1.0, 0.0, 0.5])
    assert found.units == ("x", "y")
    assert (found.totals.tolist(), found.weights.tolist()) == ([1.5, 0.0], [2, 1])
    assert found.value == pytest.approx(0.5)
