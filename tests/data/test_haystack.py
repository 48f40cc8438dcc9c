"""Retrieval by length and depth: prompts fill their length and no more, and say once what they ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from longspan.data.questions import Question
from longspan.data.synthetic import TooShortError, key_value, needle, passkey
from longspan.data.synthetic.fill import Prompt, Units, fill, unit_cost
from longspan.data.tokenizer import train_bpe

TEXTS = [
    "The cat sat on the mat. It was warm there! Was it? Nobody knew. " * 3,
    "Another text begins here. And ends. " * 5,
]
TASKS: dict[str, tuple[Callable[..., Iterator[Question]], int]] = {
    "passkey": (passkey, 16),
    "needle": (partial(needle, texts=TEXTS), 32),
    "key_value": (key_value, 64),
}


def n_bytes(text: str) -> int:
    return len(text.encode())


def n_words(text: str) -> int:
    return len(text.split())


def prompt(question: Question) -> str:
    return question.before + question.context + question.after


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("count", [n_bytes, n_words])
def test_a_prompt_with_its_answer_fills_the_length_and_no_more(name: str, count: Callable[[str], int]):
    task, room = TASKS[name]
    largest = {"passkey": "The sun is yellow. ", "needle": "Another ", "key_value": f'"{"x" * 36}": "{"x" * 36}",\n '}[
        name
    ]
    # A word less or more moves the needle to another sentence, but no text in or out: an answer's digits do not change.
    spare = count(largest) + (n_bytes("50000") if count is n_bytes and name == "passkey" else 0)
    for question in task(count=count, lengths=(700, 1500, 6000), depths=(0.0, 0.4, 1.0), samples=2):
        total = count(prompt(question)) + room
        length = question.groups["length"]
        assert isinstance(length, int)
        assert length - spare <= total <= length


def test_filling_is_exact_for_a_learned_tokenizer():
    tokenizer = train_bpe(TEXTS, 300)

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    for question in needle(count=count, lengths=(500,), depths=(0.5,), samples=4, texts=TEXTS):
        total = count(prompt(question)) + 32
        assert 500 - 8 < total <= 500


def test_the_key_stands_at_its_depth_and_nowhere_else():
    for question in passkey(count=n_words, lengths=(2000,), depths=(0.0, 0.25, 0.5, 1.0), samples=3):
        (key,) = question.references
        assert 1 <= int(key) <= 50_000
        said = f"The pass key is {key}. Remember it. {key} is the pass key."
        before, after = question.context.split(said)
        depth = question.groups["depth"]
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.01)
        assert question.after.endswith("What is the pass key? The pass key is")


def test_the_needle_stands_between_sentences_at_its_depth():
    for question in needle(count=n_words, lengths=(900,), depths=(0.0, 0.3, 0.7, 1.0), samples=3, texts=TEXTS):
        (value,) = question.references
        assert len(value) == 7
        place = question.context.index("The special magic")
        fact = question.context[place:].partition(":")[0] + f": {value}."
        assert question.context.count("The special magic") == question.context.count(fact) == 1
        before = question.context[:place].strip()
        assert not before or before.endswith((".", "!", "?"))
        assert place / len(question.context) == pytest.approx(question.groups["depth"], abs=0.05)
        assert question.after.endswith(fact.partition(":")[0].removeprefix("T").removeprefix("he ") + ":")


def test_distractors_are_other_cities_with_other_numbers():
    (question,) = needle(count=n_words, lengths=(600,), depths=(0.5,), samples=1, texts=TEXTS, distractors=5)
    facts = question.context.split("The special magic ")[1:]
    cities = [fact.split()[0] for fact in facts]
    values = [fact.split()[3].rstrip(".") for fact in facts]
    assert len(facts) == len(set(cities)) == len(set(values)) == 6
    asked = question.after.split("magic ")[1].split()[0]
    assert values[cities.index(asked)] == question.references[0]
    with pytest.raises(ValueError, match="distractors=78: from 0 to 77"):
        needle(count=n_words, distractors=78)


def test_the_pair_that_is_asked_for():
    for question in key_value(count=n_words, lengths=(400,), depths=(0.0, 0.5, 1.0), samples=2):
        pairs = json.loads(question.context)
        assert len(pairs) > 100
        key = question.after.split('"')[1]
        assert question.references == (pairs[key],)
        depth = question.groups["depth"]
        assert isinstance(depth, float)
        assert list(pairs).index(key) == round(depth * (len(pairs) - 1))


@pytest.mark.parametrize("name", TASKS)
def test_a_question_does_not_depend_on_the_others(name: str):
    task, _ = TASKS[name]
    many = {each.id: each for each in task(count=n_words, lengths=(300, 500), depths=(0.0, 0.5), samples=2, seed=3)}
    assert len(many) == len({each.context + each.after for each in many.values()}) == 8
    (alone,) = (
        each for each in task(count=n_words, lengths=(500,), depths=(0.5,), samples=2, seed=3) if each.id.endswith("-1")
    )
    assert alone == many[alone.id]
    (other,) = task(count=n_words, lengths=(500,), depths=(0.5,), samples=1, seed=4)
    assert other.references != many[other.id].references


def test_another_process_gives_the_same_questions():
    script = (
        "from longspan.data.synthetic import key_value, passkey\n"
        "for task in (passkey, key_value):\n"
        "    (q,) = task(count=lambda text: len(text.split()), lengths=(200,), depths=(0.5,), samples=1, seed=7)\n"
        "    print(q.context + q.after + q.references[0])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = [
        question.context + question.after + question.references[0]
        for task in (passkey, key_value)
        for question in task(count=n_words, lengths=(200,), depths=(0.5,), samples=1, seed=7)
    ]
    assert printed == "\n".join(expected) + "\n"


@pytest.mark.parametrize("name", TASKS)
def test_a_length_too_short_for_the_prompt_is_refused_with_the_least(name: str):
    task, _ = TASKS[name]
    with pytest.raises(TooShortError, match=rf"length=20: {name} takes at least \d+ tokens") as caught:
        list(task(count=n_words, lengths=(20,), depths=(0.5,), samples=1))
    least = caught.value.least
    assert list(task(count=n_words, lengths=(least,), depths=(0.5,), samples=1))
    with pytest.raises(TooShortError):
        list(task(count=n_words, lengths=(least - 1,), depths=(0.5,), samples=1))


def test_wrong_requests():
    with pytest.raises(ValueError, match=r"depth=1.5: from 0"):
        passkey(count=n_words, depths=(0.5, 1.5))
    with pytest.raises(ValueError, match="hold no words"):
        needle(count=n_words, texts=["  "])


class TestFilling:
    def test_the_whole_is_counted_a_few_times_only(self):
        """And texts that join to fewer or more tokens than their units have are corrected."""
        for per_unit in (1, 2, 3):  # what a unit says that it has; really it has two
            counted: list[int] = []

            def make(n: int) -> Prompt:
                return Prompt(before="", context="a b " * n, after="", references=("",), joint="")

            def count(text: str, counted: list[int] = counted) -> int:
                counted.append(len(text))
                return len(text.split())

            units = Units(lambda _: "a b", lambda _, cost=per_unit: cost)
            found = fill(make, units.fitting, task="t", length=10_001, room=0, count=count)
            assert len(found.context.split()) == 10_000
            assert sum(size > 1000 for size in counted) <= (2 if per_unit == 2 else 16)

    def test_no_more_units_than_there_are(self):
        units = Units(lambda _: "a", unit_cost(n_words, " "))

        def make(n: int) -> Prompt:
            return Prompt(before="", context="a " * n, after="", references=("b",))

        found = fill(make, units.fitting, task="t", length=100, room=1, count=n_words, most=7)
        assert found.context.split() == ["a"] * 7

    def test_room_is_kept_for_the_longest_answer(self):
        found = Prompt(before="", context="a", after="", references=("b", "b b b"))
        assert found.tokens(n_words, 2) == 4
        assert found.tokens(n_words, 5) == 6
