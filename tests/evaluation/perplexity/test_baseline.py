"""The n-gram baseline against a dictionary implementation in exact fractions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.evaluation.perplexity import baseline
from longspan.evaluation.perplexity.baseline import NgramBaseline

few = settings(max_examples=25, deadline=None)
texts = st.lists(st.binary(max_size=12) | st.text("abé", max_size=12), min_size=1, max_size=6)


class Exact:
    """Witten-Bell written out over dictionaries."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        self.order = order
        self.counts: dict[bytes, Counter[int]] = defaultdict(Counter)
        for document in documents:
            for i, byte in enumerate(document):
                for k in range(min(i, order) + 1):
                    self.counts[document[i - k : i]][byte] += 1

    def probability(self, byte: int, history: bytes) -> Fraction:
        lower = self.probability(byte, history[1:]) if history else Fraction(1, 256)
        seen = self.counts[history]
        n, kinds = seen.total(), len(seen)
        return (seen[byte] + kinds * lower) / (n + kinds) if n else lower

    def bits_per_byte(self, documents: list[bytes]) -> float:
        bits = [
            -math.log2(self.probability(byte, document[max(0, i - self.order) : i]))
            for document in documents
            for i, byte in enumerate(document)
        ]
        return sum(bits) / len(bits)


def raw(documents: list[bytes | str]) -> list[bytes]:
    return [d.encode() if isinstance(d, str) else d for d in documents]


@given(texts.filter(any), texts.filter(any), st.integers(0, 2))
@few
def test_equals_exact_arithmetic(train: list, held_out: list, order: int) -> None:
    baseline = NgramBaseline(order).fit(train)
    assert baseline.trained_bytes == sum(map(len, raw(train)))
    expected = Exact(raw(train), order).bits_per_byte(raw(held_out))
    assert baseline.bits_per_byte(held_out) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    documents = ["abrabra", b"\x00\xff\x00\xff", "", "a", "ab"]
    whole = NgramBaseline(2).fit(documents)
    expected = whole.bits_per_byte(documents)
    monkeypatch.setattr(baseline, "_CHUNK", chunk)
    pieces = NgramBaseline(2).fit(documents)
    for history in (b"", b"a", b"ab", b"\x00\xff", b"zz"):
        np.testing.assert_array_equal(whole.distribution(history), pieces.distribution(history))
    assert pieces.bits_per_byte(documents) == pytest.approx(expected, rel=1e-12)


@given(texts.filter(any), st.binary(max_size=4), st.integers(0, 2))
@few
def test_probabilities_are_proper(train: list, history: bytes, order: int) -> None:
    p = NgramBaseline(order).fit(train).distribution(history)
    assert p.shape == (256,)
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1, rel=1e-12)
    exact = Exact(raw(train), order)
    for byte in (0, 97, 195):
        assert p[byte] == pytest.approx(float(exact.probability(byte, history[max(0, len(history) - order) :])))


def test_hand_computed() -> None:
    """Trained on 'ab': P(a) = (1 + 2/256) / 4; P(b | a) = (1 + P(b)) / 2, and both bytes of 'ab' are measured."""
    p = (1 + 2 / 256) / 4
    expected = -(math.log2(p) + math.log2((1 + p) / 2)) / 2
    assert NgramBaseline(2).fit(["ab"]).bits_per_byte(["ab"]) == pytest.approx(expected, rel=1e-12)


def test_a_deterministic_text_costs_little_and_noise_eight_bits() -> None:
    assert NgramBaseline(2).fit(["abc" * 2000]).bits_per_byte(["abc" * 2000]) < 0.02
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 60_000, dtype=np.uint8).tobytes()
    assert NgramBaseline(0).fit([noise]).bits_per_byte([noise]) == pytest.approx(8, abs=0.01)
    assert NgramBaseline(2).fit([noise[:30_000]]).bits_per_byte([noise[30_000:]]) > 7.9


def test_histories_stay_inside_documents() -> None:
    together, apart = NgramBaseline(1).fit(["ab"]), NgramBaseline(1).fit(["a", "b"])
    assert together.distribution(b"a")[ord("b")] > 0.5
    assert apart.distribution(b"a")[ord("b")] == pytest.approx((1 + 2 / 256) / 4)


@given(texts.filter(any), texts.filter(any), st.data(), st.integers(0, 2))
@few
def test_what_comes_before_is_history_and_not_measured(train: list, held_out: list, data: st.DataObject, order: int):
    before = [data.draw(st.text("abé", max_size=3)) for _ in held_out]
    exact = Exact(raw(train), order)
    bits = [
        -math.log2(exact.probability(byte, (prompt + text)[: len(prompt) + i][-order:] if order else b""))
        for prompt, text in zip(raw(before), raw(held_out), strict=True)
        for i, byte in enumerate(text)
    ]
    found = NgramBaseline(order).fit(train).bits_per_byte(held_out, after=before)
    assert found == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_fitting_in_parts_equals_fitting_at_once() -> None:
    a = NgramBaseline(2).fit(["hello"]).fit(["world"])
    b = NgramBaseline(2).fit(["hello", "world"])
    assert a.bits_per_byte(["hold"]) == b.bits_per_byte(["hold"])


def test_requests_that_are_refused() -> None:
    with pytest.raises(ValueError, match="order=3"):
        NgramBaseline(3)
    with pytest.raises(ValueError, match="fitted on no text"):
        NgramBaseline(2).bits_per_byte(["a"])
    with pytest.raises(ValueError, match="hold no byte"):
        NgramBaseline(2).fit(["a"]).bits_per_byte([""])
