"""The tasks on documents: questions from files, scores by hand, and what is said where a file is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longspan.data.files import SourceError
from longspan.data.questions import Question
from longspan.evaluation.tasks.documents import DOCUMENT_TASKS, FromFile
from longspan.evaluation.tasks.task import Answer, Material, Task

BY_NAME = {task.name: task for task in DOCUMENT_TASKS}


def material(files: Path | None, **changes) -> Material:
    return Material(
        **{"lengths": (), "depths": (), "samples": None, "seed": 0, "files": files, "count": len, **changes}
    )


def question(*references: str, choices: tuple[str, ...] = ()) -> Question:
    return Question(id="q", document="d", context="c", references=references, choices=choices)


def means(task: Task, scored: list[tuple[Question, Answer]]) -> dict[str, float]:
    found = [task.score(*each) for each in scored]
    mean = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    return {**mean, **(task.combine(mean) if task.combine else {})}


@pytest.mark.parametrize("task", DOCUMENT_TASKS, ids=lambda task: task.name)
def test_missing_files_are_explained(task: Task, tmp_path: Path):
    assert isinstance(task.questions, FromFile)
    stem = task.questions.stem
    with pytest.raises(SourceError) as refusal:
        task.questions(material(tmp_path))
    said = str(refusal.value)
    assert f"{tmp_path / stem}.* is missing: put {stem}.jsonl" in said
    assert task.questions.form in said
    assert ("or say hub=true to read it from hub:" in said) == (task.questions.hub is not None)
    assert task.files == task.questions.words


def test_every_headline_is_a_number_of_the_task(tmp_path: Path):
    answers = {
        "generate": (question("a b c"), Answer(text="a b c")),
        "extract": (question("a"), Answer(text="a")),
        "choose": (question("A", choices=("A", "B")), Answer(text="A", logprobs=(-1.0, -2.0))),
        "classify": (question("no", choices=("no", "yes")), Answer(text="0")),
        "force": (question("w"), Answer(text="w", logprobs=(-1.0,), right=(True,))),
    }
    for task in DOCUMENT_TASKS:
        assert task.headline in means(task, [answers[task.asks[0]]]), task.name


def test_questions_are_drawn(tmp_path: Path):
    rows = [{"text": f"the last {word}"} for word in "abcdefgh"]
    (tmp_path / "lambada_test_openai.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = BY_NAME["lambada"]
    some = list(task.questions(material(tmp_path, samples=3)))
    assert len(some) == 3
    assert some == list(task.questions(material(tmp_path, samples=3)))
    assert len(list(task.questions(material(tmp_path)))) == 8


def test_questions_of_one_id_are_told_apart(tmp_path: Path):
    """Ids name the answers that a run keeps; a file may give one twice, or the name that a second would get."""
    task = BY_NAME["imdb"]
    ids = ("a#2", "a", "a", "b", "a", "a#2")
    rows = [{"id": id, "text": f"review {number}", "label": 1} for number, id in enumerate(ids)]
    (tmp_path / "imdb_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [each.id for each in task.questions(material(tmp_path))]
    assert found == ["a#2", "a", "a#3", "b", "a#4", "a#2#2"]


def test_the_hub_is_asked_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def refuse(source, layout, refused):
        asked.append(source.path)
        raise SourceError("offline")

    monkeypatch.setattr("longspan.data.question_files.read_table", refuse)
    with pytest.raises(SourceError, match="offline"):
        BY_NAME["squad"].questions(material(tmp_path, hub=True))
    with pytest.raises(SourceError, match="is missing"):
        BY_NAME["qmsum"].questions(material(tmp_path, hub=True))
    assert asked == ["rajpurkar/squad"]


def test_questions_from_the_hub(monkeypatch: pytest.MonkeyPatch):
    def rows(source, layout, refused):
        yield layout.of_row({"text": "a b"}, f"hub data set '{source.path}'", "row 0")

    monkeypatch.setattr("longspan.data.question_files.read_table", rows)
    questions = BY_NAME["lambada"].questions
    assert isinstance(questions, FromFile)
    found = questions.read(material(None, hub=True))
    assert (found.source, found.questions[0].references) == ("hub:EleutherAI/lambada_openai/test", ("b",))
    assert len(found.sha256) == 64


def test_answers_out_of_passages():
    task = BY_NAME["squad_v2"]
    cases = [
        (question("Ada Lovelace", "Lovelace"), "the Lovelace", 1.0, 1.0),
        (question("Ada Lovelace"), "Ada", 0.0, 2 / 3),
        (question(""), "Unanswerable.", 1.0, 1.0),
        (question(""), "Ada", 0.0, 0.0),
        (question("Ada"), "unanswerable", 0.0, 0.0),
        (question(""), "", 1.0, 1.0),
    ]
    for asked, text, exact, f1 in cases:
        assert task.score(asked, Answer(text=text)) == pytest.approx({"exact_match": exact, "f1": f1})


def test_the_geometric_mean_is_of_means():
    task = BY_NAME["qmsum"]
    found = means(task, [(question("a b"), Answer(text="a b")), (question("a b"), Answer(text="c"))])
    assert found == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "geometric_mean": 0.5})


def test_classes_by_word_and_by_number():
    task = BY_NAME["hyperpartisan"]
    true, false = question("yes", choices=("no", "yes")), question("no", choices=("no", "yes"))
    said = [(true, "yes"), (true, "1"), (true, "0"), (false, "true"), (false, "no"), (false, "nonsense")]
    found = means(task, [(asked, Answer(text=text)) for asked, text in said])
    assert found["accuracy"] == pytest.approx(3 / 6)  # what is no class is wrong
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert means(task, [(false, Answer(text="no"))])["f1"] == 0.0


def test_last_words():
    task = BY_NAME["lambada"]
    right = Answer(text="w", logprobs=(-1.0,), right=(True, True))
    wrong = Answer(text="", logprobs=(-3.0,), right=(True, False))
    found = means(task, [(question("w"), right), (question("w"), wrong)])
    assert found == pytest.approx({"accuracy": 0.5, "nll": 2.0, "perplexity": math.exp(2.0)})
    with pytest.raises(ValueError, match="no log-probability came back"):
        task.score(question("w"), Answer(text="w"))


def test_options_by_letter():
    score = BY_NAME["quality"].score
    asked = question("B", choices=("A", "B", "C", "D"))
    assert [score(asked, Answer(text=letter))["accuracy"] for letter in "AB"] == [0.0, 1.0]


def test_the_table_of_tasks():
    page = (Path(__file__).parents[3] / "docs" / "tasks-documents.md").read_text(encoding="utf-8")
    for task in DOCUMENT_TASKS:
        assert isinstance(task.questions, FromFile)
        hub = f"`{task.questions.hub.path}`" if task.questions.hub is not None else ""
        row = next(line for line in page.splitlines() if line.startswith(f"| `{task.name}` |"))
        asks, file = f"| {', '.join(task.asks)} |", f"| `{task.questions.stem}` |"
        assert asks in row
        assert file in row
        assert row.endswith(f"| {hub} |" if hub else "| |")
        of_row = next(
            line
            for line in page.splitlines()
            if line.startswith("| `") and f"`{task.name}`" in line[:45] and line != row
        )
        words = {"keep_head": "loses its end", "keep_tail": "loses its beginning", "cut_middle": "loses its middle"}
        assert words.get(task.truncation, "is refused") in of_row
        if "generate" in task.asks:
            assert f"| {task.max_new_tokens} |" in of_row
