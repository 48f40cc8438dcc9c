"""Every task by its name, and the questions of one with what they were made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from longspan.data.question_files import find_question_file
from longspan.data.questions import Question
from longspan.data.synthetic import TASKS as RULER
from longspan.data.synthetic import TooShortError

from .documents import DOCUMENT_TASKS, FromFile
from .synthetic import QA_FILES, SYNTHETIC_TASKS, qa_file
from .task import Asked, Material, Task

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (*SYNTHETIC_TASKS, *DOCUMENT_TASKS)})
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"ruler": RULER, "ruler_synthetic": tuple(name for name in RULER if name not in QA_FILES)}
)


def chosen(names: Iterable[str]) -> list[Task]:
    """The tasks of these names and groups, each once; names of what is no task of questions are left out."""
    single = dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,)))
    return [TASKS[name] for name in single if name in TASKS]


def gather(task: Task, material: Material, *, shorten: bool = False) -> Asked:
    """The task's questions. `samples` of the material, where it says none, are the task's own.

    shorten   lengths that the task has no room in are left out, where at least one is long enough
    Raises SourceError for files that are missing or unusable, TooShortError for lengths without room.
    """
    material = replace(material, samples=task.samples if material.samples is None else material.samples)
    asked = Asked(questions=(), samples=material.samples, seed=material.seed)
    if isinstance(task.questions, FromFile):
        found = task.questions.read(material)
        return replace(
            asked,
            questions=tuple(found.drawn(material.samples, material.seed)),
            files={found.source if found.source.startswith("hub:") else Path(found.source).name: found.sha256},
            n_refused=found.n_refused,
        )
    if not task.made_to_length:
        return replace(asked, questions=tuple(task.questions(material)))
    by_length = _by_length(task, material, shorten=shorten)
    return replace(
        asked,
        questions=tuple(question for questions in by_length.values() for question in questions),
        lengths=tuple(by_length),
        depths=material.depths if task.has_depths else (),
        files=_files(task, material),
    )


def _by_length(task: Task, material: Material, *, shorten: bool) -> dict[int, list[Question]]:
    """The questions of each length that has room for all of them."""
    made: dict[int, list[Question]] = {}
    error: TooShortError | None = None
    for length in material.lengths:
        try:
            made[length] = list(task.questions(replace(material, lengths=(length,))))
        except TooShortError as found:
            if not shorten:
                raise
            error = found
    if not made and error is not None:
        raise error
    return made


def _files(task: Task, material: Material) -> dict[str, str]:
    if task.name not in QA_FILES:
        return {}
    path = qa_file(task.name, material.files)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def check_files(tasks: Sequence[Task], files: Path | None, *, hub: bool) -> None:
    """Looks for what tasks read, before anything is loaded. Raises SourceError that says where to put which file."""
    for task in tasks:
        if isinstance(task.questions, FromFile) and not (hub and task.questions.hub is not None):
            find_question_file(files, task.questions.stem, task.questions.form)
        elif task.name in QA_FILES:
            qa_file(task.name, files)
