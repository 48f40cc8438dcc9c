"""What every reader is: a model that answers the questions of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from longspan.data.questions import Question

from ..tasks.task import Answer, Ask, Task, Truncation
from .prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, and how much was read for it: `dropped` tokens of the text were left out."""

    question: Question
    answer: Answer
    prompt_tokens: int
    dropped: int

    @classmethod
    def to(cls, prompt: Prompt, answer: Answer) -> Reply:
        return cls(question=prompt.question, answer=answer, prompt_tokens=len(prompt.tokens), dropped=prompt.dropped)


class Reader(Protocol):
    """asks        what this model can be asked, see `Ask`
    max_tokens  that it reads, a decoder with its answer
    start       tokens that begin all that it reads
    """

    @property
    def asks(self) -> frozenset[Ask]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def start(self) -> tuple[int, ...]: ...

    def new_tokens(self, task: Task) -> int:
        """That an answer of the task may have: as many as the task says, or as there is room for."""
        ...

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        """A reply to each question, as soon as there is one, in any order. Questions of a document stand together.

        truncation   instead of the task's own rule for texts that are too long
        Raises `prompts.TooLong`.
        """
        ...
