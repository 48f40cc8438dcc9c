"""What one record of a data set says: named texts, and a class or answers, out of the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from .files import SourceError


@dataclass(frozen=True, slots=True)
class Answer:
    """A text and the character at which it begins in what it was found in; None: looked for there, or nowhere."""

    text: str
    start: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRecord:
    """One record. `answers`: the first is what a model is trained on, each counts as right; (): the text has none.
    `group`: what must not be on both sides of a split together; None: the texts themselves."""

    place: str
    texts: Mapping[str, str]
    label: str | None = None
    answers: tuple[Answer, ...] = ()
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleColumns:
    """Which columns of a row are the texts, the class and the answers of an example.

    texts         pairs of (name of the text, column)
    label         column of the class: text, a whole number or a truth value
    answer        column of the answers: a text, a list of texts (null or an empty list: there is none), or an object
                  with `text` and `answer_start`, as SQuAD has it
    answer_start  column of the first character of each answer; None: the answer's first occurrence
    answered      the text that answers are in
    group         column of what must not be on both sides of a split
    """

    texts: tuple[tuple[str, str], ...]
    label: str | None = None
    answer: str | None = None
    answer_start: str | None = None
    answered: str = "context"
    group: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        extra = (self.label, self.answer, self.answer_start, self.group)
        return tuple(dict.fromkeys([*(column for _, column in self.texts), *(name for name in extra if name)]))

    def check(self, present: list[str], where: str) -> None:
        for name in self.names:
            if name not in present:
                raise SourceError(f"{where} has no column '{name}': it has {', '.join(present) or 'none'}")

    def of_row(self, row: object, where: str, place: str) -> ExampleRecord:
        """Raises SourceError for a row that lacks something, or whose first answer is not in the text."""
        here = f"{where} {place}"
        if not isinstance(row, Mapping):
            raise SourceError(f"{here}: expected an object with the columns {', '.join(self.names)}")
        row = cast("Mapping[str, object]", row)
        self.check(list(row), here)
        texts = {name: _text(row[column], column, here) for name, column in self.texts}
        answers = ()
        if self.answer is not None:
            starts = None if self.answer_start is None else row[self.answer_start]
            answers = _located(_answers(row[self.answer], starts, f"{here}: column '{self.answer}'"), texts, self, here)
        return ExampleRecord(
            place=here,
            texts=texts,
            label=None if self.label is None else _label(row[self.label], self.label, here),
            answers=answers,
            group=None if self.group is None else str(row[self.group]),
        )


def _text(value: object, column: str, here: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{here}: column '{column}' holds {'nothing' if value is None else 'no text'}")
    if not value.strip():
        raise SourceError(f"{here}: column '{column}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{here}: column '{column}' has half a surrogate pair, which is not UTF-8 text") from None
    return value


def _label(value: object, column: str, here: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value.strip()):
        return str(value).strip()
    raise SourceError(f"{here}: column '{column}' holds {value!r}, which names no class (text or a whole number does)")


def _answers(value: object, starts: object, here: str) -> tuple[Answer, ...]:
    if isinstance(value, Mapping):
        value = cast("Mapping[str, object]", value)
        if "text" not in value:
            raise SourceError(f"{here}: an object without 'text'")
        value, starts = value["text"], value.get("answer_start", starts)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise SourceError(f"{here}: expected a text or a list of texts")
    if starts is None:
        return tuple(Answer(text) for text in texts)
    places = [starts] if isinstance(starts, int) else starts
    whole = isinstance(places, Sequence) and all(isinstance(place, int) for place in places)
    if not whole or len(cast("Sequence[int]", places)) != len(texts):
        raise SourceError(f"{here}: expected {len(texts)} first characters, one for each answer")
    return tuple(Answer(text, place) for text, place in zip(texts, cast("Sequence[int]", places)))


def _located(
    answers: tuple[Answer, ...], texts: Mapping[str, str], columns: ExampleColumns, here: str
) -> tuple[Answer, ...]:
    """The answers, the first with its place in the text."""
    if not answers:
        return ()
    first, text = answers[0], texts[columns.answered]
    start = text.find(first.text) if first.start is None else first.start
    if start < 0 or text[start : start + len(first.text)] != first.text:
        where = "" if first.start is None else f" at character {first.start}"
        shown = first.text if len(first.text) <= 40 else first.text[:37] + "..."
        raise SourceError(f"{here}: the answer '{shown}' is not in '{columns.answered}'{where}")
    return (Answer(first.text, start), *answers[1:])


def token_span(chars_T2: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """First and last of the tokens that share a character with [start, end) of the text; None where no token does.

    chars_T2   characters [start, end) of each token, in order
    """
    inside = np.flatnonzero((chars_T2[:, 0] < end) & (chars_T2[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None
