"""How right answers are: classes by accuracy and macro-F1, texts by exact match and token F1 as SQuAD counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """accuracy  share of right ones
    macro_f1  mean over the classes that occur (as truth or as guess) of 2·right / (guessed + true)
    majority  accuracy of always naming the most frequent class
    n         examples
    """

    accuracy: float
    macro_f1: float
    majority: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScores:
    """exact_match  share whose normalised text equals that of an accepted answer
    f1           mean F1 of normalised words, against the accepted answer that gives most
    n            questions
    """

    exact_match: float
    f1: float
    n: int


def score_classes(truths: Sequence[int], guesses: Sequence[int], *, n_classes: int) -> ClassScores:
    """Raises ValueError for no examples."""
    if not truths or len(truths) != len(guesses):
        raise ValueError(f"{len(truths)} classes and {len(guesses)} guesses: as many of each, and at least one")
    confusion = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(confusion, (np.asarray(truths), np.asarray(guesses)), 1)
    right, true, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occur = true + guessed > 0
    return ClassScores(
        accuracy=float(right.sum() / len(truths)),
        macro_f1=float((2 * right[occur] / (true + guessed)[occur]).mean()),
        majority=float(true.max() / len(truths)),
        n=len(truths),
    )


def score_answers(guesses: Sequence[str], accepted: Sequence[Sequence[str]]) -> AnswerScores:
    """`accepted`: the answers of each question that count as right; of a question without an answer none, or ("",).

    Raises ValueError for no questions.
    """
    if not guesses or len(guesses) != len(accepted):
        raise ValueError(f"{len(guesses)} guesses for {len(accepted)} questions: as many of each, and at least one")
    pairs = [(guess, list(answers) or [""]) for guess, answers in zip(guesses, accepted)]
    return AnswerScores(
        exact_match=sum(max(exact_match(guess, answer) for answer in answers) for guess, answers in pairs) / len(pairs),
        f1=sum(max(token_f1(guess, answer) for answer in answers) for guess, answers in pairs) / len(pairs),
        n=len(pairs),
    )


def normalized(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces: SQuAD's comparison (Rajpurkar et al. 2016,
    arXiv 1606.05250, §6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(guess: str, answer: str) -> float:
    return float(normalized(guess) == normalized(answer))


def token_f1(guess: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, as bags. Where one text has no words, 1 if neither has."""
    guessed, wanted = normalized(guess).split(), normalized(answer).split()
    if not guessed or not wanted:
        return float(guessed == wanted)
    shared = sum((Counter(guessed) & Counter(wanted)).values())
    return 2 * shared / (len(guessed) + len(wanted))
