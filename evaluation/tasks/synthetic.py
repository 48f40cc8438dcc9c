"""Tasks whose questions are made of a seed (`longspan.data.synthetic`): how they are asked, what counts as right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from longspan.data import synthetic
from longspan.data.files import SourceError
from longspan.data.questions import Question
from longspan.data.synthetic.haystack import KEY_VALUE_ROOM, NEEDLE_ROOM, PASSKEY_ROOM

from ..metrics.string_match import string_match_all, string_match_mean, string_match_part
from .task import Answer, Material, Task

_START = 1  # the token that a text begins with

QA_FILES: Mapping[str, tuple[str, str]] = {
    "qa_1": ("squad", "SQuAD's published JSON (dev-v2.0.json or dev-v1.1.json)"),
    "qa_2": ("hotpotqa", "HotpotQA's published JSON (hotpot_dev_distractor_v1.json)"),
}


# -- scores -----------------------------------------------------------------------------------------------------------


def first_number(question: Question, answer: Answer) -> Mapping[str, float]:
    """Whether the first number of the answer is the one asked for."""
    found = re.search(r"\d+", answer.text)
    return {"accuracy": float(found is not None and found.group() == question.references[0])}


def said(question: Question, answer: Answer) -> Mapping[str, float]:
    """Whether the answer contains the reference."""
    return {"accuracy": string_match_all(answer.text, question.references)}


def _all_said(question: Question, answer: Answer) -> Mapping[str, float]:
    return {"string_match_all": string_match_all(answer.text, question.references)}


def _any_said(question: Question, answer: Answer) -> Mapping[str, float]:
    """RULER's own score, and the stricter one of lm-evaluation-harness."""
    return {
        "string_match_part": string_match_part(answer.text, question.references),
        "string_match_mean": string_match_mean(answer.text, question.references),
    }


def _chosen(question: Question, answer: Answer) -> Mapping[str, float]:
    return {"accuracy": float(answer.text.strip() in question.references)}


def each_right(question: Question, answer: Answer) -> Mapping[str, float]:
    """Share of the answer's tokens that are right, those before them given; of a text that was written, of its words,
    each in its place."""
    if answer.right is not None:
        right = answer.right
    else:
        wanted, written = question.references[0].split(), answer.text.split()
        right = tuple(word == other for word, other in zip(wanted, written)) + (False,) * (len(wanted) - len(written))
    return {"token_accuracy": sum(right) / len(right), "exact": float(all(right))}


# -- questions --------------------------------------------------------------------------------------------------------

Hidden = Callable[..., Iterable[Question]]  # of the generators of `data.synthetic.haystack`


def _at_depths(make: Hidden, room: int) -> Callable[[Material], Iterable[Question]]:
    return lambda material: make(
        count=material.count,
        lengths=material.lengths,
        depths=material.depths,
        samples=material.samples or 1,
        seed=material.seed,
        room=room + _START,
    )


def _mechanism(make: Hidden) -> Callable[[Material], Iterable[Question]]:
    def questions(material: Material) -> Iterable[Question]:
        for length in material.lengths:
            made = make(
                lengths=(length - _START,), samples=material.samples or 1, seed=material.seed, count=material.count
            )
            for question in made:
                yield replace(question, groups={**question.groups, "length": length})

    return questions


def _ruler(name: str, material: Material) -> Iterable[Question]:
    return synthetic.ruler(
        name,
        count=material.count,
        lengths=material.lengths,
        samples=material.samples or 1,
        seed=material.seed,
        room=synthetic.ROOM[name] + _START,
    )


def qa_file(name: str, files: Path | None) -> Path:
    """The file that qa_1 or qa_2 is made of. Raises SourceError that says where to put it."""
    stem, form = QA_FILES[name]
    path = None if files is None else files / f"{stem}.json"
    if path is None or not path.is_file():
        where = "files=DIR" if files is None else str(files)
        raise SourceError(f"{name}: no {stem}.json in {where}: put it there, {form}")
    return path


def _ruler_qa(name: str, material: Material) -> Iterable[Question]:
    return synthetic.ruler_qa(
        "qa_1" if name == "qa_1" else "qa_2",
        path=qa_file(name, material.files),
        count=material.count,
        lengths=material.lengths,
        samples=material.samples or 1,
        seed=material.seed,
        room=synthetic.ROOM[name] + _START,
    )


def _listops(material: Material) -> Iterable[Question]:
    return synthetic.listops(samples=material.samples, seed=material.seed)


# -- definitions ------------------------------------------------------------------------------------------------------

_RULER_SUMMARIES = {
    "niah_single_1": "a number in repeated sentences",
    "niah_single_2": "a number in natural text",
    "niah_single_3": "a UUID in natural text",
    "niah_multikey_1": "a number among four of other keys, in natural text",
    "niah_multikey_2": "a number among nothing but such numbers",
    "niah_multikey_3": "a UUID among nothing but pairs of UUIDs",
    "niah_multivalue": "all four numbers of one key",
    "niah_multiquery": "the numbers of four keys",
    "vt": "the variables that have a value, through a chain of four assignments",
    "cwe": "the ten most common words of a list",
    "fwe": "the three most frequent coded words",
    "qa_1": "SQuAD questions, their paragraph among others",
    "qa_2": "HotpotQA questions, their two paragraphs among others",
}


def _ruler_task(name: str) -> Task:
    of_file = name in QA_FILES
    return Task(
        name=name,
        version=1,
        summary=f"RULER (Hsieh et al. 2024): {_RULER_SUMMARIES[name]}",
        asks=("generate",),
        questions=partial(_ruler_qa if of_file else _ruler, name),
        score=_any_said if of_file else _all_said,
        headline="string_match_part" if of_file else "string_match_all",
        max_new_tokens=synthetic.ROOM[name],
        samples=500,
        made_to_length=True,
        bounded=of_file,
        files=f"{QA_FILES[name][0]}.json: {QA_FILES[name][1]}" if of_file else None,
    )


def _hidden_task(name: str, summary: str, make: Hidden, tokens: int, score: Callable[..., Mapping[str, float]]) -> Task:
    return Task(
        name=name,
        version=1,
        summary=summary,
        asks=("generate",),
        questions=_at_depths(make, tokens),
        score=score,
        headline="accuracy",
        max_new_tokens=tokens,
        stop=("\n",),
        samples=10,
        made_to_length=True,
        has_depths=True,
    )


def _mechanism_task(name: str, summary: str, make: Hidden, *, bounded: bool = False) -> Task:
    return Task(
        name=name,
        version=1,
        summary=summary,
        asks=("force", "generate"),
        questions=_mechanism(make),
        score=each_right,
        headline="token_accuracy",
        max_new_tokens=512,
        samples=100,
        made_to_length=True,
        bounded=bounded,
    )


SYNTHETIC_TASKS: tuple[Task, ...] = (
    _hidden_task(
        "passkey",
        "a number among sentences that repeat (Mohtashami & Jaggi 2023), by length and depth",
        synthetic.passkey,
        PASSKEY_ROOM,
        first_number,
    ),
    _hidden_task(
        "needle",
        "a made-up fact in natural text (Kamradt 2023), by length and depth",
        synthetic.needle,
        NEEDLE_ROOM,
        said,
    ),
    _hidden_task(
        "key_value",
        "one value of a JSON object of random identifiers (Liu et al. 2023), by length and depth",
        synthetic.key_value,
        KEY_VALUE_ROOM,
        said,
    ),
    *(_ruler_task(name) for name in synthetic.TASKS),
    Task(
        name="listops",
        version=1,
        summary="values of nested operations on digits (Nangia & Bowman 2018; Long Range Arena's lengths)",
        asks=("classify", "choose"),
        questions=_listops,
        score=_chosen,
        headline="accuracy",
        samples=2000,
    ),
    _mechanism_task("copying", "random letters, to be written again", synthetic.copying),
    _mechanism_task("induction", "the letter that followed a mark (Olsson et al. 2022)", synthetic.induction),
    _mechanism_task(
        "associative_recall",
        "values of keys among many pairs (Arora et al. 2023)",
        synthetic.associative_recall,
        bounded=True,
    ),
    _mechanism_task("selective_copying", "letters among blanks, in order (Gu & Dao 2023)", synthetic.selective_copying),
)
