"""RULER: prompts mean what the published ones mean, answers are in them, lengths are kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.data.questions import Question
from longspan.data.sources import SourceError
from longspan.data.synthetic import MADE_TASKS, NEEDLES, ROOM, TASKS, TooShortError, ruler, ruler_qa

TEXTS = ["The cat sat on the mat. It was warm there! Was it? Nobody knew of any. " * 5]
SAID = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def n_bytes(text: str) -> int:
    return len(text.encode())


def n_words(text: str) -> int:
    return len(text.split())


def prompt(question: Question) -> str:
    return question.before + question.context + question.after


def made(task: str, **changes: object) -> list[Question]:
    settings = {"count": n_words, "lengths": (2000,), "samples": 2, "texts": TEXTS, **changes}
    return list(ruler(task, **settings))


def test_there_are_thirteen_with_the_published_answer_room():
    assert len(TASKS) == 13
    assert TASKS[:8] == tuple(NEEDLES)
    assert [ROOM[task] for task in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")] == [128, 30, 120, 50, 32]


def test_settings_are_the_published_ones():
    table = {name: (n.haystack, n.key, n.value, n.keys, n.values, n.queries) for name, n in NEEDLES.items()}
    assert table == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }


@pytest.mark.parametrize("task", MADE_TASKS)
@pytest.mark.parametrize("count", [n_bytes, n_words])
def test_lengths_are_kept(task: str, count: Callable[[str], int]):
    unit = {"cwe": 80, "fwe": 60}.get(task, 140)  # of the largest unit, in bytes
    if count is n_words:
        unit = {"cwe": 7, "fwe": 8}.get(task, 20)
    for question in made(task, count=count, lengths=(2100, 7000)):
        length = question.groups["length"]
        assert isinstance(length, int)
        total = count(prompt(question)) + ROOM[task]
        assert length - unit <= total <= length


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_are_in_the_text_with_what_is_asked_for(task: str):
    settings = NEEDLES[task]
    for question in made(task):
        said = SAID.findall(question.context)
        assert {kind for kind, _, _ in said} == {settings.value}
        wanted = re.search(r"for (.+?) mentioned", question.after)
        assert wanted is not None
        keys = wanted[1].replace("and ", "").split(", ")
        assert len(keys) == settings.queries
        found = [[value for _, key, value in said if key == asked] for asked in keys]
        assert all(len(values) == settings.values for values in found)
        assert sorted(value for values in found for value in values) == sorted(question.references)
        if settings.haystack == "needle":
            assert len(said) > 50
            assert not SAID.sub("", question.context).strip()
        else:
            assert len(said) == settings.keys * settings.values
        if settings.haystack == "noise":
            assert set(question.context.split("\n")) == {
                NOISE,
                "One of the special magic numbers for {} is: {}.".format(*said[0][1:]),
            }
        pattern = (
            r"\d{7}"
            if settings.value == "numbers"
            else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        )
        assert all(re.fullmatch(pattern, value) for value in question.references)


def test_singular_and_plural():
    single, several = made("niah_single_3")[0], made("niah_multiquery")[0]
    assert single.before.startswith("A special magic uuid is hidden within the following text.")
    assert single.after.startswith("\nWhat is the special magic uuid for ")
    assert single.after.endswith(" mentioned in the provided text is")
    assert several.before.startswith("Some special magic numbers are hidden within the following text.")
    assert re.match(r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned", several.after)
    assert several.after.endswith(" mentioned in the provided text are")


def test_variables_are_tracked_from_the_value():
    for question in made("vt"):
        value = re.search(r"assigned the value (\d{5}) in the text above", question.after)
        assert value is not None
        known: dict[str, str] = {}
        for line in question.context.split("\n"):
            if line != NOISE:
                name, source = line.removeprefix("VAR ").split(" = ")
                known[name] = source if source.isdigit() else known[source.removeprefix("VAR ")]
        assert known == dict.fromkeys(question.references, value[1])
        assert len(known) == 5
        # A worked example of the same form stands before, with its answer.
        example, _, instruction = question.before.rpartition("\n\nMemorize")
        assert instruction.strip() == "and track the chain(s) of variable assignment hidden in the following text."
        assert n_words(example) <= 500
        assert re.search(r"they are: [A-Z]{3}( [A-Z]{3}){4}$", example)


@pytest.mark.parametrize(("length", "common", "other"), [(2400, 6, 1), (4200, 30, 3)])
def test_the_common_words_are_common(length: int, common: int, other: int):
    (question,) = made("cwe", lengths=(length,), samples=1)
    listed = re.findall(r"(\d+)\. (\S+)", question.context)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counted = Counter(word for _, word in listed)
    assert {word for word, n in counted.items() if n == common} == set(question.references)
    assert {n for word, n in counted.items() if word not in question.references} == {other}
    assert len(question.references) == 10
    answers = re.findall(r"list are: 1\. (\S+) 2\. ", question.before)
    assert len(answers) == 1


def test_more_words_than_are_plain_are_pairs_of_words():
    (question,) = made("cwe", lengths=(9000,), samples=1)
    words = {word for _, word in re.findall(r"(\d+)\. (\S+)", question.context)}
    assert len(words) > 743
    assert all("-" in word for word in words)


def test_frequent_words_follow_a_zeta_distribution():
    for question in made("fwe", lengths=(4000,)):
        counted = Counter(question.context.split())
        ranked = [word for word, _ in counted.most_common(4)]
        assert ranked[0] == "..."
        assert tuple(ranked[1:]) == question.references
        total = sum(counted.values())
        assert counted[ranked[1]] / counted["..."] == pytest.approx(1 / 4, rel=0.01)
        assert counted[ranked[2]] / counted["..."] == pytest.approx(1 / 9, rel=0.02)
        assert 0.6 < counted["..."] / total < 0.65
        assert all(len(word) == 6 for word in counted if word != "...")


def test_a_question_does_not_depend_on_the_others():
    for task in ("niah_multikey_2", "vt", "cwe", "fwe"):
        many = made(task, lengths=(1900, 2000), samples=3)
        assert made(task, lengths=(2000,), samples=3) == many[3:]
        assert len({prompt(each) for each in many}) == 6


def test_wrong_requests():
    with pytest.raises(ValueError, match="task=niah: one of niah_single_1, "):
        ruler("niah", count=n_words)
    with pytest.raises(ValueError, match="ruler_qa makes it"):
        ruler("qa_1", count=n_words)
    for task in MADE_TASKS:
        with pytest.raises(TooShortError, match=f"length=100: {task} takes at least") as caught:
            made(task, lengths=(100,))
        assert made(task, lengths=(caught.value.least,), samples=1)


class TestQuestionsAboutDocuments:
    @pytest.fixture
    def squad(self, tmp_path: Path) -> Path:
        articles = [
            {
                "paragraphs": [
                    {
                        "context": f"Article {a} paragraph {p} says {a}{p}. " + "More words follow. " * 10,
                        "qas": [
                            {
                                "question": f"What says {a} {p}?",
                                "answers": [{"text": f"{a}{p}"}, {"text": f"says {a}{p}"}],
                            },
                            {"question": "Nothing?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for p in range(4)
                ]
            }
            for a in range(30)
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"data": articles}))
        return path

    def test_squad(self, squad: Path):
        questions = list(ruler_qa("qa_1", path=squad, count=n_words, lengths=(600,), samples=6))
        assert [each.references for each in questions[:2]] == [("00", "says 00"), ("01", "says 01")]
        assert len({each.id for each in questions}) == 6
        places = []
        for number, question in enumerate(questions):
            documents = re.split(r"(?:^|\n\n)Document \d+:\n", question.context)[1:]
            assert len(set(documents)) == len(documents) > 10
            article = number // 4
            places += [place for place, text in enumerate(documents) if f"says {question.references[0]}." in text]
            # What is from the same article comes first of all distractors.
            assert sum(text.startswith(f"Article {article} ") for text in documents) == 4
            total = n_words(prompt(question)) + 32
            assert 600 - 38 < total <= 600
            assert question.after.endswith(f"Question: What says {article} {number % 4}? Answer:")
        assert len(places) == 6
        assert len(set(places)) > 2

    def test_hotpot(self, tmp_path: Path):
        content = [
            {
                "question": f"Who is {i}?",
                "answer": f"name {i}",
                "context": [[f"Title {i} {k}", [f"Sentence {i}{k}. ", "And more of it. " * 5]] for k in range(3)],
            }
            for i in range(20)
        ]
        path = tmp_path / "hotpot.json"
        path.write_text(json.dumps(content))
        for index, question in enumerate(ruler_qa("qa_2", path=path, count=n_words, lengths=(500,), samples=4)):
            assert question.references == (f"name {index}",)
            assert all(f"Title {index} {k}\nSentence {index}{k}. And" in question.context for k in range(3))

    def test_files_that_do_not_do(self, squad: Path, tmp_path: Path):
        def asked(path: Path, task: str = "qa_1", length: int = 600) -> list[Question]:
            return list(ruler_qa(task, path=path, count=n_words, lengths=(length,), samples=1))  # pyright: ignore[reportArgumentType]  any name

        with pytest.raises(SourceError, match="is not a file: qa_1 reads a JSON file in the form of SQuAD"):
            asked(tmp_path / "none.json")
        with pytest.raises(SourceError, match=r"has not the form of HotpotQA: TypeError"):
            asked(squad, "qa_2")
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(SourceError, match="is not JSON"):
            asked(tmp_path / "bad.json")
        (tmp_path / "empty.json").write_text('{"data": []}')
        with pytest.raises(SourceError, match="no question with an answer"):
            asked(tmp_path / "empty.json")
        with pytest.raises(TooShortError, match=r"length=90: qa_1 takes at least \d+ tokens"):
            asked(squad, length=90)
        with pytest.raises(ValueError, match=r"length=9000: all 120 documents of .*squad.json take \d+ tokens"):
            asked(squad, length=9000)
