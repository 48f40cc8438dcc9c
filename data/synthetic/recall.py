"""Texts that retrieval can be learned from: what `needle`, `passkey` and RULER's needles hide and ask for, often."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .fill import generator
from .haystack import ASKED_FOR_KEY, city_fact, city_question, hidden, natural_text, pass_key
from .ruler import ruler_fact, ruler_question
from .words import CITIES, compound, distinct, number

PASS_KEYS = 0.25  # share of texts that hold one


@dataclass(frozen=True, slots=True)
class _Fact:
    """`question`: up to where `answer` begins, with the line breaks before it."""

    said: str
    question: str
    answer: str


def recall_text(words: int, facts: int, *, again: int = 1, seed: int, index: int) -> str:
    """`words` words of natural text, and at random places of it `facts` facts, each of which comes back `again` times
    further on: said once more or asked for and answered, either as likely. A prompt of `needle` has one answer in
    thousands of tokens; here many tokens are answers, near what they answer and far from it.

    A fact is a number of `needle`'s cities, one of a pair of words in the sentence of `needle` or of RULER, or, one at
    most in a text and in a quarter of texts, a pass key.

    Raises ValueError for no facts and negative numbers.
    """
    if facts < 1 or words < 0 or again < 0:
        raise ValueError(f"words={words}, facts={facts}, again={again}: at least 1 fact, and nothing below 0")
    rng = generator(seed, "recall", words, facts, again, index)
    text = natural_text()
    start = text.beginnings[int(rng.integers(len(text.beginnings)))]
    placed: list[tuple[float, str]] = []
    for fact in _facts(facts, rng):
        depth = rng.random()
        placed.append((depth, fact.said))
        for _ in range(again):
            asked = f"{fact.question} {fact.answer}\n"
            placed.append((depth + (1 - depth) * rng.random(), asked if rng.random() < 0.5 else fact.said))
    parts = hidden([text.word(start + n) for n in range(words)], sorted(placed, key=lambda each: each[0]))
    lines = re.sub(r" *\n *", "\n", " ".join(parts))
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def _facts(n: int, rng: np.random.Generator) -> list[_Fact]:
    found = [
        _fact(key, value, rng) for key, value in zip(distinct(_key, n, rng), distinct(number, n, rng), strict=True)
    ]
    if rng.random() < PASS_KEYS:
        key = str(rng.integers(1, 50_001))
        found[0] = _Fact(pass_key(key), f"\n{ASKED_FOR_KEY}", key)
    return found


def _key(rng: np.random.Generator) -> str:
    return CITIES[int(rng.integers(len(CITIES)))] if rng.random() < 0.5 else compound(rng)


def _fact(key: str, value: str, rng: np.random.Generator) -> _Fact:
    if key in CITIES or rng.random() < 0.5:
        return _Fact(city_fact(key, value), f"\n\n{city_question(key)}", value)
    return _Fact(ruler_fact("numbers", key, value), f"\n{ruler_question('number', 'is', key)}", value)
