"""Filling a prompt to a length in tokens, and the random numbers of one question.

Tokens of two texts rarely add up exactly to those of the texts joined. So the units that fill a prompt are counted once
each and added up to find about how many fit, the whole prompt is then counted, and what is left is corrected: two or
three counts of the whole, whatever the length.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Count = Callable[[str], int]
"""Tokens of a text."""


class TooSmallError(ValueError):
    """What fills a length does not hold enough for it."""


class TooShortError(ValueError):
    """A prompt does not fit into a length even without what fills it. `least` is the length that it takes."""

    def __init__(self, task: str, length: int, least: int) -> None:
        super().__init__(
            f"length={length}: {task} takes at least {least} tokens, prompt and answer together; raise the length"
        )
        self.least = least


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The texts of a question, before it has a name: as `data.questions.Question` has them."""

    before: str
    context: str
    after: str
    references: tuple[str, ...]
    joint: str = " "

    def tokens(self, count: Count, room: int) -> int:
        """Of the prompt and the room for an answer, or the longest answer where that is longer."""
        answer = max(count(self.joint + reference) for reference in self.references)
        return count(self.before + self.context + self.after) + max(room, answer)


class Units:
    """What fills a text, unit by unit, each with its own tokens.

    unit  the n-th unit, the same each time
    cost  tokens of a unit, at least 1; asked once for each of them
    """

    def __init__(self, unit: Callable[[int], str], cost: Count) -> None:
        self._unit, self._cost = unit, cost
        self._texts: list[str] = []
        self._ends: list[int] = []  # tokens of all units up to and with each

    def first(self, n: int) -> Sequence[str]:
        """The first n units."""
        self._extend(n)
        return self._texts[:n]

    def fitting(self, n: int, room: int) -> int:
        """How many units after the first n fit into `room` tokens, by their own counts."""
        self._extend(n)
        begin = self._ends[n - 1] if n else 0
        while not self._ends or self._ends[-1] <= begin + room:
            self._extend(len(self._ends) + 1)
        return bisect_right(self._ends, begin + room) - n

    def _extend(self, n: int) -> None:
        while len(self._texts) < n:
            text = self._unit(len(self._texts))
            self._texts.append(text)
            self._ends.append((self._ends[-1] if self._ends else 0) + self._cost(text))


def unit_cost(count: Count, separator: str) -> Count:
    """Tokens of a unit with the separator before it, remembered for each text and never 0."""
    known: dict[str, int] = {}

    def cost(text: str) -> int:
        if text not in known:
            known[text] = max(1, count(separator + text))
        return known[text]

    return cost


def fill(
    make: Callable[[int], Prompt],
    fitting: Callable[[int, int], int],
    *,
    task: str,
    length: int,
    room: int,
    count: Count,
    least: int = 0,
    most: int | None = None,
) -> Prompt:
    """The prompt with as many units as `length` tokens take, the room for the answer included; never more tokens.

    make     the prompt with n units
    fitting  about how many units after n fit into so many tokens: `Units.fitting`
    least    units that there must be
    most     units that there are; None: as many as are asked for

    Raises TooShortError where `least` units do not fit.
    """
    n, prompt = least, make(least)
    tokens = prompt.tokens(count, room)
    if tokens > length:
        raise TooShortError(task, length, tokens)
    limit = None if most is None else most + 1  # so many are known not to fit
    while True:
        more = fitting(n, length - tokens)
        if limit is not None:
            more = min(more, limit - 1 - n)
        if more <= 0:
            return prompt
        tried, larger = n + more, make(n + more)
        total = larger.tokens(count, room)
        while total > length and tried > n + 1:
            limit = tried
            mean = max(1.0, (total - tokens) / (tried - n))
            tried = max(n + 1, min(tried - 1, tried - round((total - length) / mean)))
            larger = make(tried)
            total = larger.tokens(count, room)
        if total > length:
            return prompt
        n, prompt, tokens = tried, larger, total


def generator(seed: int, task: str, *place: int | float) -> np.random.Generator:
    """Random numbers of one question of a task: another stream for each place (length, depth, index), the same in each
    process, so that a question does not depend on which others are asked for."""
    parts = [round(part * 1_000_000) if isinstance(part, float) else part for part in place]
    return np.random.default_rng([seed, zlib.crc32(task.encode()), *parts])
