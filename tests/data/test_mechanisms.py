"""Copying, induction, recall: each answer by looking it up in the prompt, each length kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

from longspan.data.questions import Question
from longspan.data.synthetic import (
    TooShortError,
    TooSmallError,
    associative_recall,
    copying,
    induction,
    selective_copying,
    words,
)

TASKS = (copying, induction, associative_recall, selective_copying)


def n_bytes(text: str) -> int:
    return len(text.encode())


def whole(question: Question) -> str:
    return question.before + question.context + question.after + question.joint + question.references[0]


def answered(name: str, question: Question) -> str:
    """What a reader of the prompt answers."""
    prompt = (question.context + question.after).split()
    if name == "copying":
        assert prompt[-1] == "="
        return " ".join(prompt[:-1])
    if name == "induction":
        assert prompt[-1] == "#"
        assert prompt.count("#") == 2
        return prompt[prompt.index("#") + 1]
    if name == "associative_recall":
        assert prompt[-2] == "="
        pairs = dict(zip(prompt[:-2:2], prompt[1:-2:2], strict=True))
        assert len(pairs) == (len(prompt) - 2) // 2, "a key stands twice"
        return pairs[prompt[-1]]
    return " ".join(word for word in prompt[:-1] if word != ".")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize(("count", "spare"), [(words, 1), (n_bytes, 6)], ids=["words", "bytes"])
def test_answers_are_in_the_prompt_and_lengths_are_kept(task: Callable, count: Callable[[str], int], spare: int):
    for question in task(lengths=(80, 301), samples=3, count=count):
        assert answered(task.__name__, question) == question.references[0]
        length = question.groups["length"]
        assert isinstance(length, int)
        assert length - spare <= count(whole(question)) <= length


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_question_does_not_depend_on_the_others(task: Callable):
    many = {each.id: each for each in task(lengths=(64, 128), samples=3, seed=5)}
    last = list(task(lengths=(128,), samples=3, seed=5))[-1]
    assert many[last.id] == last
    assert [whole(each) for each in task(lengths=(128,), samples=3, seed=6)] != [
        whole(each) for each in task(lengths=(128,), samples=3, seed=5)
    ]


def test_recall_asks_for_several_keys_of_one_list():
    of_document = defaultdict(list)
    for question in associative_recall(lengths=(64,), samples=2, queries=4):
        of_document[question.document].append(question)
    assert [len(each) for each in of_document.values()] == [4, 4]
    for questions in of_document.values():
        assert len({each.context for each in questions}) == 1
        assert len({each.after for each in questions}) == 4


def test_selected_letters_are_scattered():
    (question,) = selective_copying(lengths=(200,), samples=1, letters=8)
    places = [place for place, word in enumerate(question.context.split()) if word != "."]
    assert len(places) == 8
    assert places[-1] - places[0] > 60


def test_lengths_that_cannot_be():
    with pytest.raises(TooShortError, match="length=2: copying takes at least 3 tokens"):
        list(copying(lengths=(2,)))
    with pytest.raises(TooShortError, match="length=32: selective_copying takes at least 33"):
        list(selective_copying(lengths=(32,)))
    with pytest.raises(TooSmallError, match="takes all 2,205 different keys"):
        list(associative_recall(lengths=(10_000,), samples=1))
    with pytest.raises(ValueError, match="queries=0"):
        list(associative_recall(queries=0))
