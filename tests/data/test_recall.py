"""Texts whose facts come back: each is said before it is asked for, always with the same value, as `needle`, `passkey`
and RULER ask for theirs."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import pytest

from longspan.data.synthetic import MADE_TASKS, needle, passkey, recall_text, ruler
from longspan.data.synthetic.haystack import natural_text

SAID = {
    "needle": r"The special magic (?P<key>\S+) number is: (?P<value>\d{7})\.",
    "niah_multikey_1": r"One of the special magic numbers for (?P<key>\S+) is: (?P<value>\d{7})\.",
    "passkey": r"The pass key is (?P<value>\d+)\. Remember it\. (?P=value) is the pass key\.",
}
ASKED = {
    "needle": r"Question: What is the special magic (?P<key>\S+) number\?\n"
    r"Answer: The special magic (?P=key) number is: (?P<value>\d{7})\n",
    "niah_multikey_1": r"What is the special magic number for (?P<key>\S+) mentioned in the provided text\? "
    r"The special magic number for (?P=key) mentioned in the provided text is (?P<value>\d{7})\n",
    "passkey": r"What is the pass key\? The pass key is (?P<value>\d+)\n",
}
DOCUMENTS = [recall_text(150, 5, again=3, seed=0, index=index) for index in range(40)]


def mentions(document: str) -> list[tuple[int, bool, tuple[str, str | None], str]]:
    """(place, whether it is asked for, (form, key), value), in their order."""
    return sorted(
        (found.start(), asked, (form, found.groupdict().get("key")), found["value"])
        for asked, forms in ((False, SAID), (True, ASKED))
        for form, pattern in forms.items()
        for found in re.finditer(pattern, document)
    )


def test_a_fact_is_said_first_and_comes_back_with_its_value():
    forms, asked = Counter[str](), 0
    for document in DOCUMENTS:
        values: dict[tuple[str, str | None], str] = {}
        for _, is_question, fact, value in mentions(document):
            assert fact in values or not is_question
            assert values.setdefault(fact, value) == value
            asked += is_question
        assert Counter(fact for _, _, fact, _ in mentions(document)) == dict.fromkeys(values, 4)
        assert len(values) == len(set(values.values())) == 5
        forms.update(form for form, _ in values)
    assert forms.total() == 200
    assert forms["needle"] > forms["niah_multikey_1"] > forms["passkey"] > 0
    assert 240 < asked < 360  # of 600 times that facts come back


def test_the_rest_is_natural_text_of_so_many_words():
    words = " ".join(natural_text().words * 2)
    for document in DOCUMENTS:
        rest = document
        for pattern in (*ASKED.values(), *SAID.values()):
            rest = re.sub(pattern, " ", rest)
        assert len(rest.split()) == 150
        assert " ".join(rest.split()) in words


def test_questions_are_those_of_the_tasks():
    tasks = {"needle": partial(needle, depths=(0.5,)), "passkey": partial(passkey, depths=(0.5,))}
    assert "niah_multikey_1" in MADE_TASKS
    for form, pattern in ASKED.items():
        make = tasks.get(form, partial(ruler, "niah_multikey_1"))
        for question in make(count=lambda text: len(text.split()), lengths=(400,), samples=3):
            asked = question.after + question.joint + question.references[0] + "\n"
            assert re.fullmatch(r"\n+" + pattern, asked)
            assert re.search(SAID[form], question.context)


def test_an_answer_is_a_function_of_the_arguments():
    first = recall_text(30, 2, seed=1, index=7)
    assert first == recall_text(30, 2, seed=1, index=7)
    assert len({first, recall_text(30, 2, seed=2, index=7), recall_text(30, 2, seed=1, index=8)}) == 3
    assert mentions(recall_text(0, 1, again=0, seed=0, index=0))[0][1] is False


@pytest.mark.parametrize(("words", "facts", "again"), [(-1, 1, 1), (0, 0, 1), (0, 1, -1)])
def test_impossible_texts_are_refused(words: int, facts: int, again: int):
    with pytest.raises(ValueError, match=r"facts=.*at least 1 fact"):
        recall_text(words, facts, again=again, seed=0, index=0)
