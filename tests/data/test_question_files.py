"""Questions from files: every layout, in our form and as published; what is refused, counted, drawn and hashed."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longspan.data.files import SourceError
from longspan.data.question_files import find_question_file, read_question_file, wikitext_articles
from longspan.data.question_layouts import (
    Choices,
    Labelled,
    LastWords,
    Layout,
    Meetings,
    Papers,
    Passages,
    Stories,
    Wording,
)

WORDING = Wording(before="Read.\n", after="\nQ: {query}\nA:")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions_of(tmp_path: Path, layout: Layout, *rows: object):
    return read_question_file(write(tmp_path / "rows.jsonl", *rows), layout).questions


class TestMeetings:
    ours = {  # noqa: RUF012
        "id": "m1",
        "document": "A: hi\nB: ho",
        "queries": [
            {"kind": "general", "query": "Summarize", "answer": "They greet.", "spans": []},
            {"kind": "specific", "query": "What did B say?", "answer": "Ho.", "spans": [[0, 1]]},
        ],
    }

    def test_a_question_for_each_query(self, tmp_path: Path):
        first, second = questions_of(tmp_path, Meetings(WORDING), self.ours)
        assert (first.id, second.id) == ("m1/0", "m1/1")
        assert first.before + first.context + first.after == "Read.\nA: hi\nB: ho\nQ: Summarize\nA:"
        assert (second.references, second.query, second.joint) == (("Ho.",), "What did B say?", " ")
        assert (first.groups, second.groups) == ({"kind": "general"}, {"kind": "specific"})
        assert first.document == second.document

    def test_as_published(self, tmp_path: Path):
        published = {
            "topic_list": [],
            "general_query_list": [{"query": "Summarize", "answer": "They greet."}],
            "specific_query_list": [
                {"query": "What did B say?", "answer": "Ho.", "relevant_text_span": [["0", "1"]]},
            ],
            "meeting_transcripts": [{"speaker": "A", "content": "hi"}, {"speaker": "B", "content": "ho"}],
        }
        layout = Meetings(WORDING)
        mine, theirs = (questions_of(tmp_path, layout, row) for row in (self.ours, published))
        assert [(each.context, each.after, each.references, each.groups) for each in mine] == [
            (each.context, each.after, each.references, each.groups) for each in theirs
        ]
        assert theirs[0].document == mine[0].document
        assert theirs[1].id == "line 1/1"

    def test_parquet_with_other_columns(self, tmp_path: Path):
        path = tmp_path / "m.parquet"
        pq.write_table(pa.Table.from_pylist([{**self.ours, "license": "MIT"}]), path)
        assert read_question_file(path, Meetings(WORDING)).questions == questions_of(
            tmp_path, Meetings(WORDING), self.ours
        )
        pq.write_table(pa.table({"text": ["a"]}), path)
        with pytest.raises(SourceError, match=r"m\.parquet has no column 'meeting_transcripts': it has text"):
            read_question_file(path, Meetings(WORDING))


class TestStories:
    def test_several_references(self, tmp_path: Path):
        ours = {"id": "s", "document": "Once.", "questions": ["Plot?", "Who?"], "summaries": [["a", "b"], ["c"]]}
        published = {
            "metadata": {"passage_id": "1"},
            "document": "Once.",
            "questions": [
                {"question_text": "Plot?", "responses": [{"response_text": "a"}, {"response_text": "b"}]},
                {"question_text": "Who?", "responses": [{"response_text": "c"}]},
            ],
        }
        for row in (ours, published):
            plot, who = questions_of(tmp_path, Stories(WORDING), row)
            assert (plot.references, who.references) == (("a", "b"), ("c",))
            assert (plot.query, who.query) == ("Plot?", "Who?")
            assert (plot.groups, who.groups) == ({"kind": "plot"}, {"kind": "specific"})

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"summaries": [["a"]]}, "line 1: 2 questions and 'summaries' for 1"),
            ({"summaries": [["a"], []]}, "line 1: the question 'Who[?]' has no summary"),
            ({"questions": "Plot?"}, "line 1: 'questions' holds 'Plot[?]', not a list"),
            ({"document": " "}, "line 1: 'document' holds ' ', not a text"),
            ({"document": None}, "line 1 has no column 'document'"),
            ({"document": "\ud800"}, "half a surrogate pair"),
        ],
    )
    def test_refusals(self, tmp_path: Path, change: dict[str, object], sentence: str):
        row = {"document": "Once.", "questions": ["Plot?", "Who?"], "summaries": [["a"], ["b"]], **change}
        with pytest.raises(SourceError, match=sentence):
            questions_of(tmp_path, Stories(WORDING), row)


class TestPassages:
    published = {  # noqa: RUF012
        "version": "1.1",
        "data": [
            {
                "title": "T",
                "paragraphs": [
                    {
                        "context": "Ada wrote it.",
                        "qas": [
                            {
                                "id": "q1",
                                "question": "Who?",
                                "answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada", "answer_start": 0}],
                            },
                            {"id": "q2", "question": "When?", "answers": [], "is_impossible": True},
                        ],
                    }
                ],
            }
        ],
    }

    def test_as_published_and_flat(self, tmp_path: Path):
        path = tmp_path / "squad.json"
        path.write_text(json.dumps(self.published))
        found = read_question_file(path, Passages(WORDING))
        who, when = found.questions
        assert (who.id, who.context, who.query, who.references) == ("q1", "Ada wrote it.", "Who?", ("Ada",))
        assert (when.references, when.groups) == (("",), {"answerable": "no"})
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        flat = questions_of(
            tmp_path,
            Passages(WORDING),
            {
                "id": "q1",
                "context": "Ada wrote it.",
                "question": "Who?",
                "answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]},
            },
            {"id": "q2", "context": "Ada wrote it.", "question": "When?", "answers": None},
        )
        assert flat == found.questions

    def test_an_answer_that_is_not_there(self, tmp_path: Path):
        wrong = json.loads(json.dumps(self.published))
        wrong["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 4
        path = tmp_path / "squad.json.gz"
        path.write_bytes(gzip.compress(json.dumps(wrong).encode()))
        with pytest.raises(SourceError, match=r"data\[0\].paragraphs\[0\].qas\[0\]: the answer 'Ada' is not in"):
            read_question_file(path, Passages(WORDING))
        assert len(read_question_file(path, Passages(WORDING), tolerance=0.5).questions) == 1

    def test_other_json(self, tmp_path: Path):
        path = tmp_path / "squad.json"
        path.write_text('{"data": 3}')
        with pytest.raises(SourceError, match="is not in the form of SQuAD"):
            read_question_file(path, Passages(WORDING))
        with pytest.raises(SourceError, match="the form of SQuAD alone; write one object a line"):
            read_question_file(path, LastWords())
        path.write_text('{"data": ')
        with pytest.raises(SourceError, match="is not valid JSON"):
            read_question_file(path, Passages(WORDING))


class TestChoices:
    def test_letters_and_the_hard_subset(self, tmp_path: Path):
        flat = {"article": "Story.", "question": "Why?", "options": ["x", "y", "z"], "gold_label": 2, "difficult": 1}
        (hard,) = questions_of(tmp_path, Choices(WORDING), {**flat, "question_unique_id": "u"})
        assert (hard.id, hard.choices, hard.references) == ("u", ("A", "B", "C"), ("B",))
        assert hard.after == "\nQ: Why?\n(A) x\n(B) y\n(C) z\nA:"
        assert (hard.groups, hard.query) == ({"subset": "hard"}, "Why?")
        rest = {name: value for name, value in flat.items() if name != "article"}
        published = {"article_id": "1", "article": "Story.", "questions": [rest, {**rest, "difficult": 0}]}
        one, other = questions_of(tmp_path, Choices(WORDING), published)
        assert (one.after, one.references, one.groups) == (hard.after, hard.references, hard.groups)
        assert (other.groups, one.id, other.id) == ({"subset": "easy"}, "line 1/0", "line 1/1")

    @pytest.mark.parametrize("gold", [0, 5, None, True, "x"])
    def test_an_answer_that_is_no_choice(self, tmp_path: Path, gold: object):
        row = {"article": "s", "question": "q", "options": ["a", "b", "c", "d"], "gold_label": 1}
        with pytest.raises(SourceError, match=r"line 2(: gold_label=.* is none of the 4| has no column 'gold)"):
            questions_of(tmp_path, Choices(WORDING), row, {**row, "gold_label": gold})


class TestLastWords:
    def test_the_last_word(self, tmp_path: Path):
        one, two = questions_of(
            tmp_path, LastWords(), {"text": "a stone. I care about signs"}, {"text": "it is\n 'so' "}
        )
        assert (one.context, one.joint, one.references, one.after) == ("a stone. I care about", " ", ("signs",), "")
        assert (two.context, two.joint, two.references) == ("it is", "\n ", ("'so'",))
        with pytest.raises(SourceError, match="line 1: column 'text' is a single word"):
            questions_of(tmp_path, LastWords(), {"text": "alone"})


class TestLabelled:
    def test_numbers_words_and_splits(self, tmp_path: Path):
        layout = Labelled(Wording(after="\nGood? It is"), ("bad", "good"), split="test")
        labels = [0, "good", "1", " Bad ", True, "false"]
        rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
        rows += [{"text": "t", "label": 1, "split": "train"}, {"text": "u", "label": 1, "split": "test"}]
        found = questions_of(tmp_path, layout, *rows)
        assert [each.references[0] for each in found] == ["bad", "good", "good", "bad", "good", "bad", "good"]
        assert found[0].choices == ("bad", "good")
        assert found[0].after == "\nGood? It is"

    @pytest.mark.parametrize("label", [2, -1, "great", 0.5])
    def test_unknown_classes(self, tmp_path: Path, label: object):
        with pytest.raises(SourceError, match=r"line 1: label=.* is none of the classes: 0 or bad, 1 or good"):
            questions_of(tmp_path, Labelled(WORDING, ("bad", "good")), {"text": "t", "label": label})


def test_papers(tmp_path: Path):
    layout = Papers(Wording(before="Title: {title}\n", after="\nSummary:"), split="test")
    row = {"id": "p", "title": "{query}", "document": "Body.", "summary": "Short.", "split": "test"}
    (paper,) = questions_of(tmp_path, layout, row, {**row, "split": "val"})
    assert (paper.before, paper.context, paper.after) == ("Title: {query}\n", "Body.", "\nSummary:")
    assert paper.references == ("Short.",)


class TestReading:
    def test_corrupt_lines_are_named_counted_and_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        path = write(tmp_path / "l.jsonl", *({"text": f"last word {number}"} for number in range(18)))
        with path.open("a") as file:
            file.write('{"text": "cut off\n{"text": 3}\n')
        with caplog.at_level(logging.WARNING, logger="longspan.data"):
            found = read_question_file(path, LastWords(), tolerance=0.1)
        assert (len(found.questions), found.n_refused) == (18, 2)
        assert "l.jsonl line 19: not valid JSON" in found.refused[0]
        assert "l.jsonl line 20: 'text' holds 3, not a text" in found.refused[1]
        assert "2 rows cannot be used and are left out" in caplog.text
        with pytest.raises(SourceError, match=r"2 of 20 rows of .*l\.jsonl cannot be used, more than tolerance=0.09"):
            read_question_file(path, LastWords(), tolerance=0.09)

    def test_the_same_draw_for_the_same_seed(self, tmp_path: Path):
        found = read_question_file(
            write(tmp_path / "l.jsonl", *({"text": f"a {number}"} for number in range(50))), LastWords()
        )
        some = found.drawn(10, seed=3)
        assert len({each.id for each in some}) == 10
        assert some == found.drawn(10, seed=3) != found.drawn(10, seed=4)
        assert [int(each.references[0]) for each in some] == sorted(int(each.references[0]) for each in some)
        assert found.drawn(None, 0) == found.drawn(50, 0) == found.questions

    def test_ids_are_each_there_once(self, tmp_path: Path):
        row = {"id": "same", "text": "t", "label": 0}
        assert [each.id for each in questions_of(tmp_path, Labelled(WORDING, ("a", "b")), row, row, row)] == [
            "same",
            "same#2",
            "same#3",
        ]

    def test_what_is_missing_is_said(self, tmp_path: Path):
        with pytest.raises(SourceError, match=r"x\.\* is missing: put x\.jsonl \(or .*parquet.*\) there, one a row"):
            find_question_file(tmp_path, "x", "one a row")
        with pytest.raises(SourceError, match=r"given \(files=DIR\), and x is read from one: put"):
            find_question_file(None, "x", "one a row")
        path = write(tmp_path / "x.jsonl", {"text": "a b"})
        assert find_question_file(tmp_path, "x", "") == path
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert len(read_question_file(tmp_path / "x.jsonl.gz", LastWords()).questions) == 1
        with pytest.raises(SourceError, match=r"has x\.jsonl and x\.jsonl\.gz: keep one of them"):
            find_question_file(tmp_path, "x", "")

    def test_nothing_to_ask(self, tmp_path: Path):
        with pytest.raises(SourceError, match="holds no question"):
            questions_of(tmp_path, Papers(WORDING, split="test"), {"document": "d", "summary": "s", "split": "train"})


class TestWikiText:
    spaced = (
        " \n = First Man = \n \n The First Man . \n \n = = Life = = \n \n"
        " A frequency of w \n = 1 rad / s and k = \n 1 Ohm . \n"
        " \n = 2nd = \n \n More . \n"
    )

    def test_an_article_begins_at_a_heading_of_the_first_level(self, tmp_path: Path):
        path = tmp_path / "wiki.txt"
        path.write_text(self.spaced)
        first, second = wikitext_articles(path)
        assert first.startswith(" = First Man = \n \n The")
        assert first.endswith(" 1 Ohm . \n \n")
        assert second == " = 2nd = \n \n More . \n"

    def test_without_blank_lines(self, tmp_path: Path):
        path = tmp_path / "wiki.txt.gz"
        text = "".join(line for line in self.spaced.splitlines(keepends=True) if line.strip())
        text = text.replace("2nd", "2nd Storm").replace("\n", "\r\n")
        path.write_bytes(gzip.compress(text.encode()))
        first, second = wikitext_articles(path)
        assert (first.count("\n"), second) == (6, " = 2nd Storm = \n More . \n")

    def test_other_text(self, tmp_path: Path):
        path = tmp_path / "wiki.txt"
        path.write_text("Some text.\n")
        with pytest.raises(SourceError, match="has no article"):
            wikitext_articles(path)
