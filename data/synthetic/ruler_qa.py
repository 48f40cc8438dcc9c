"""RULER's two tasks of questions about documents: qa_1 of a file in SQuAD's form, qa_2 of one in HotpotQA's.

    SQuAD     {"data": [{"paragraphs": [{"context": …, "qas": [{"question": …, "answers": [{"text": …}],
              "is_impossible": …}]}]}]}: paragraphs are the documents, those of the same article the first distractors
    HotpotQA  [{"question": …, "answer": …, "context": [[title, [sentence, …]], …]}]: each paragraph is a document

Questions are taken in the order of the file, those without an answer left out, as the published scripts do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import SourceError
from ..questions import Question
from .fill import Count, Prompt, TooShortError, TooSmallError, Units, fill, generator, unit_cost
from .ruler import LENGTHS, ROOM, SAMPLES

_FORMS: dict[str, str] = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, its answers, and the numbers of the documents that hold them and of those that are near."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


def ruler_qa(
    task: Literal["qa_1", "qa_2"],
    *,
    path: Path | str,
    count: Count,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    room: int | None = None,
) -> Iterator[Question]:
    """Questions about documents among others of the same file; the unit of filling is a document.

    path     a JSON file in the form of SQuAD (qa_1) or HotpotQA (qa_2)
    samples  questions of each length: the first whose documents fit into it

    Any of a question's references is right: `evaluation.string_match.string_match_part` scores them.
    Raises SourceError for a file of another form, TooShortError where no question fits, and ValueError where the
    documents of the file do not fill a length.
    """
    asked, documents = _read(task, Path(path))
    return _questions(task, asked, documents, Path(path), count, lengths, samples, seed, room)


def _questions(
    task: str,
    asked: Sequence[_Asked],
    documents: list[str],
    path: Path,
    count: Count,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    room: int | None,
) -> Iterator[Question]:
    cost = unit_cost(count, "\n\nDocument 10:\n")
    for length in lengths:
        made, least = 0, None
        for index, question in enumerate(asked):
            if made == samples:
                break
            rng = generator(seed, f"ruler {task}", length, index)
            try:
                prompt, used = _prompt(
                    task, question, documents, length, ROOM[task] if room is None else room, count, cost, rng
                )
            except TooShortError as error:  # its own documents are too long: the next question
                least = error.least if least is None else min(least, error.least)
                continue
            if used == len(documents):
                raise TooSmallError(
                    f"length={length}: all {used} documents of {path} take {prompt.tokens(count, 0)} tokens; give a "
                    "file with more, or a smaller length"
                )
            made += 1
            name = f"{task}-{length}-{index}"
            yield Question(
                id=name,
                document=name,
                before=prompt.before,
                context=prompt.context,
                after=prompt.after,
                references=prompt.references,
                groups={"length": length},
            )
        if not made and least is not None:
            raise TooShortError(task, length, least)


def _prompt(
    task: str,
    question: _Asked,
    documents: list[str],
    length: int,
    room: int,
    count: Count,
    cost: Count,
    rng: np.random.Generator,
) -> tuple[Prompt, int]:
    """The prompt, and how many documents it has."""
    near = [question.near[place] for place in rng.permutation(len(question.near))]
    known = {*question.needed, *near}
    shuffled = rng.permutation(len(documents)).tolist()
    order = [*question.needed, *near, *(place for place in shuffled if place not in known)]
    seed = int(rng.integers(2**32))
    made: dict[int, int] = {}
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )

    def make(n: int) -> Prompt:
        places = np.random.default_rng(seed).permutation(n)
        texts = [f"Document {i}:\n{documents[order[place]]}" for i, place in enumerate(places.tolist(), 1)]
        prompt = Prompt(
            before=f"{instruction}\n\nThe following are given documents.\n\n",
            context="\n\n".join(texts),
            after=f"\n\n{instruction}\n\nQuestion: {question.text} Answer:",
            references=question.answers,
        )
        made[id(prompt)] = n
        return prompt

    def document(n: int) -> str:
        return documents[order[n % len(order)]]

    units = Units(document, cost)
    least = len(question.needed)
    prompt = fill(make, units.fitting, task=task, length=length, room=room, count=count, least=least, most=len(order))
    return prompt, made[id(prompt)]


def _read(task: str, path: Path) -> tuple[list[_Asked], list[str]]:
    if not path.is_file():
        raise SourceError(f"{path} is not a file: {task} reads a JSON file in the form of {_FORMS[task]}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error})") from error
    try:
        asked, documents = _of_squad(content) if task == "qa_1" else _of_hotpot(content)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError(f"{path} has not the form of {_FORMS[task]}: {type(error).__name__} {error}") from error
    if not asked:
        raise SourceError(f"{path} has no question with an answer")
    return asked, documents


def _of_squad(content: Any) -> tuple[list[_Asked], list[str]]:
    articles = [article["paragraphs"] for article in content["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    numbers = {text: number for number, text in enumerate(documents)}
    asked = []
    for article in articles:
        of_article = tuple(dict.fromkeys(numbers[paragraph["context"]] for paragraph in article))
        for paragraph in article:
            own = numbers[paragraph["context"]]
            near = tuple(number for number in of_article if number != own)
            for each in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in each["answers"]))
                if answers and not each.get("is_impossible", False):
                    asked.append(_Asked(each["question"].strip(), answers, (own,), near))
    return asked, documents


def _of_hotpot(content: Any) -> tuple[list[_Asked], list[str]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in each["context"]] for each in content]
    documents = sorted({text for each in texts for text in each})
    numbers = {text: number for number, text in enumerate(documents)}
    asked = [
        _Asked(each["question"].strip(), (each["answer"],), tuple(dict.fromkeys(numbers[text] for text in mine)))
        for each, mine in zip(content, texts, strict=True)
    ]
    return asked, documents
