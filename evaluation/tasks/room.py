"""Whether tasks that are made to length can be made to the lengths that were asked for, found out by a question or two
of each: what needs no model can be refused before any model has measured anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from longspan.data.files import SourceError
from longspan.data.synthetic import TooShortError, TooSmallError

from .task import Material, Task

_QUESTIONS = 10  # that the least length has room for: some are a few tokens longer than others


def objections(tasks: Sequence[Task], material: Material) -> list[str]:
    """Every task that some of the material's lengths have no room for, with the least that it takes; and lengths that
    are more than its data fill. Empty: questions can be made. (A later question may still be a little longer than the
    first, which was tried.)"""
    found = []
    for task in tasks:
        if not task.made_to_length:
            continue
        lengths = sorted(material.lengths)
        try:
            short = list(takewhile(lambda length, of=task: _least(of, material, length) is not None, lengths))
            if short:
                least = _room_for_some(task, material, short[-1])
                found.append(f"{task.name} at {', '.join(map(str, short))} (takes at least {least} tokens)")
            if task.bounded and lengths[-1] not in short:
                _least(task, material, lengths[-1])
        except (TooSmallError, SourceError) as error:
            found.append(f"{task.name} at {lengths[-1]} ({error})")
    return found


def _least(task: Task, material: Material, length: int, *, questions: int = 1) -> int | None:
    """None where a length has room for the first questions, else what one of them takes."""
    samples = min(questions, material.samples or questions)
    made = replace(material, lengths=(length,), depths=material.depths[:1], samples=samples)
    try:
        for _ in task.questions(made):
            pass
    except TooShortError as error:
        return error.least
    return None


def _room_for_some(task: Task, material: Material, length: int) -> int:
    """The least length above one without room; a worked example may grow with the length, so it is approached."""
    while (least := _least(task, material, length, questions=_QUESTIONS)) is not None:
        length = max(least, length + 1)
    return length
