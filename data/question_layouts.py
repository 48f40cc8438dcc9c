"""Forms in which data sets of questions come, and the `Question`s that a row of each becomes.

A layout is `files.Columns`: it says which columns it reads and makes questions of a row, or refuses it, naming file and
line. How a question is put (`Wording`) is the task's. docs/tasks-documents.md lists the columns of each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

from .example_records import ExampleColumns
from .files import SourceError
from .questions import GroupValue, Question

Questions = tuple[Question, ...]
Row = Mapping[str, object]
T = TypeVar("T")

_LAST_WORD = re.compile(r"(?P<text>.*\S)(?P<joint>\s+)(?P<word>\S+)\s*", re.DOTALL)
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """What stands around a text. `{query}` in `after` is the question (with its options, where it has some), `{title}`
    in `before` the text's title."""

    before: str = ""
    after: str = ""

    def asked(self, query: str) -> str:
        return self.after.replace("{query}", query)

    def headed(self, title: str) -> str:
        return self.before.replace("{title}", title)


class Layout(Protocol):
    """`files.Columns` of questions."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def check(self, present: list[str], where: str) -> None: ...
    def of_row(self, row: object, where: str, place: str) -> Questions | None: ...


@dataclass(frozen=True, slots=True)
class Meetings:
    """QMSum (Zhong et al. 2021, arXiv 2104.05938): a meeting and queries about it, each with one answer.

    One row a meeting: `id`, `document`, `queries`, a list of {`query`, `answer`, `kind`}; or as its authors publish it:
    `meeting_transcripts`, a list of {`speaker`, `content`}, and `general_query_list` and `specific_query_list`.
    """

    wording: Wording
    names = ("id", "document", "queries", "meeting_transcripts", "general_query_list", "specific_query_list")

    def check(self, present: list[str], where: str) -> None:
        wanted = ("document", "queries") if "document" in present else self.names[3:]
        _require(wanted, present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions:
        row, here = _opened(self, row, where, place)
        if "document" in row:
            text = _text(row, "document", here)
            queries = [(str(each.get("kind", "")), each) for each in _objects(row, "queries", here)]
        else:
            turns = _objects(row, "meeting_transcripts", here)
            text = "\n".join(f"{_text(turn, 'speaker', here)}: {_text(turn, 'content', here)}" for turn in turns)
            kinds = ("general", "specific")
            queries = [(kind, each) for kind in kinds for each in _objects(row, f"{kind}_query_list", here)]
        before = self.wording.headed("")
        return tuple(
            Question(
                id=f"{_id(row, place)}/{number}",
                document=digest(before + text),
                before=before,
                context=text,
                after=self.wording.asked(_text(each, "query", here)),
                references=(_text(each, "answer", here),),
                groups={"kind": kind} if kind else {},
                query=_text(each, "query", here),
            )
            for number, (kind, each) in enumerate(queries)
        )


@dataclass(frozen=True, slots=True)
class Stories:
    """SQuALITY (Wang et al. 2022, arXiv 2205.11465): a story and questions, each answered by several summaries.

    One row a story: `id`, `document`, `questions` (texts) and `summaries` (for each question a list of texts); or as
    its authors publish it: `questions`, a list of {`question_text`, `responses`: a list of {`response_text`}}.
    The first question asks for the plot: group `kind` = plot, of the others: specific.
    """

    wording: Wording
    names = ("id", "document", "questions", "summaries")

    def check(self, present: list[str], where: str) -> None:
        _require(("document", "questions"), present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions:
        row, here = _opened(self, row, where, place)
        text, asked = _text(row, "document", here), _list(row, "questions", here)
        if "summaries" in row:
            queries = [_string(each, "questions", here) for each in asked]
            answers = [_strings(each, "summaries", here) for each in _list(row, "summaries", here)]
            if len(answers) != len(queries):
                raise SourceError(f"{here}: {len(queries)} questions and 'summaries' for {len(answers)}")
        else:
            each_asked = _objects(row, "questions", here)
            queries = [_text(each, "question_text", here) for each in each_asked]
            answers = [
                tuple(_text(response, "response_text", here) for response in _objects(each, "responses", here))
                for each in each_asked
            ]
        before = self.wording.headed("")
        for query, of_query in zip(queries, answers):
            if not of_query:
                raise SourceError(f"{here}: the question {_short(query)} has no summary")
        return tuple(
            Question(
                id=f"{_id(row, place)}/{number}",
                document=digest(before + text),
                before=before,
                context=text,
                after=self.wording.asked(query),
                references=of_query,
                groups={"kind": "specific" if number else "plot"},
                query=query,
            )
            for number, (query, of_query) in enumerate(zip(queries, answers))
        )


@dataclass(frozen=True, slots=True)
class Passages:
    """SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250; 2018, arXiv 1806.03822): questions that a passage answers.

    One row a question: `id`, `context`, `question` and `answers`, {`text`: texts, `answer_start`: characters} (or a
    text, or a list of texts), each standing in the passage; null or no texts: the passage does not answer it, and the
    one reference is "". The files of its authors are one JSON object, which `rows` takes apart.
    """

    wording: Wording
    names = ("id", "context", "question", "answers")
    _columns: ExampleColumns = field(
        default=ExampleColumns(texts=(("context", "context"), ("question", "question")), answer="answers"), repr=False
    )

    def check(self, present: list[str], where: str) -> None:
        _require(self._columns.names, present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions:
        record = self._columns.of_row(row, where, place)
        text, query = record.texts["context"], record.texts["question"]
        before = self.wording.headed("")
        answers = tuple(dict.fromkeys(answer.text for answer in record.answers))
        question = Question(
            id=_id(cast("Row", row), place),
            document=digest(before + text),
            before=before,
            context=text,
            after=self.wording.asked(query),
            references=answers or ("",),
            groups={"answerable": "yes" if answers else "no"},
            query=query,
        )
        return (question,)

    def rows(self, published: object, where: str) -> Iterator[tuple[str, object]]:
        """(where it stands, row) of each question of a published file. Raises SourceError for one of another form."""
        if not isinstance(published, Mapping) or not isinstance(published.get("data"), list):
            raise SourceError(f'{where} is not in the form of SQuAD: an object {{"data": [{{"paragraphs": …}}]}}')
        for a, article in enumerate(published["data"]):
            for p, paragraph in enumerate(_objects(_object(article, where), "paragraphs", f"{where} data[{a}]")):
                here = f"data[{a}].paragraphs[{p}]"
                for q, asked in enumerate(_objects(paragraph, "qas", f"{where} {here}")):
                    answers = asked.get("answers")
                    several = isinstance(answers, list) and all(isinstance(each, Mapping) for each in answers)
                    keys = ("text", "answer_start")
                    row = {
                        "id": asked.get("id"),
                        "context": paragraph.get("context"),
                        "question": asked.get("question"),
                        "answers": {key: [each.get(key) for each in cast("list[Row]", answers)] for key in keys}
                        if several
                        else answers,
                    }
                    yield f"{here}.qas[{q}]", row


@dataclass(frozen=True, slots=True)
class Choices:
    """QuALITY (Pang et al. 2022, arXiv 2112.08608): a story and questions with options, one of them right. A model
    chooses among the options' letters.

    One row a question: `article`, `question`, `options`, `gold_label` (1 is the first option) and, as it likes,
    `difficult` (1: fewer than half of the annotators under time pressure were right) and `question_unique_id`; or as
    its authors publish it: one row an article, with `questions`, a list of such objects.
    """

    wording: Wording
    names = ("article", "questions", "question", "options", "gold_label", "difficult", "question_unique_id")

    def check(self, present: list[str], where: str) -> None:
        wanted = ("article", "questions") if "questions" in present else self.names[:1] + self.names[2:5]
        _require(wanted, present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions:
        row, here = _opened(self, row, where, place)
        text = _text(row, "article", here)
        asked = _objects(row, "questions", here) if "questions" in row else [row]
        numbers = [f"/{number}" if len(asked) > 1 else "" for number in range(len(asked))]
        return tuple(self._one(text, each, here, f"{place}{number}") for number, each in zip(numbers, asked))

    def _one(self, text: str, row: Row, here: str, place: str) -> Question:
        options = _strings(_list(row, "options", here), "options", here)
        gold = row.get("gold_label")
        if not 2 <= len(options) <= len(LETTERS):
            raise SourceError(f"{here}: {len(options)} options; a question has 2 to {len(LETTERS)}")
        if isinstance(gold, bool) or not isinstance(gold, int) or not 1 <= gold <= len(options):
            raise SourceError(
                f"{here}: gold_label={gold!r} is none of the {len(options)} options; it is 1 for the first, "
                f"{len(options)} for the last"
            )
        query, letters = _text(row, "question", here), LETTERS[: len(options)]
        before = self.wording.headed("")
        listed = "\n".join([query, *(f"({letter}) {option}" for letter, option in zip(letters, options))])
        name = row.get("question_unique_id")
        groups: dict[str, GroupValue] = {}
        if row.get("difficult") is not None:
            groups["subset"] = "hard" if row["difficult"] else "easy"
        return Question(
            id=name if isinstance(name, str) else place,
            document=digest(before + text),
            before=before,
            context=text,
            after=self.wording.asked(listed),
            references=(letters[gold - 1],),
            choices=letters,
            groups=groups,
            query=query,
        )


@dataclass(frozen=True, slots=True)
class LastWords:
    """LAMBADA (Paperno et al. 2016, arXiv 1606.06031): a passage whose last word is to be said. One row: `text`."""

    names = ("text",)

    def check(self, present: list[str], where: str) -> None:
        _require(self.names, present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions:
        row, here = _opened(self, row, where, place)
        parts = _LAST_WORD.fullmatch(_text(row, "text", here))
        if parts is None:
            raise SourceError(f"{here}: column 'text' is a single word, so nothing precedes the last one")
        text = parts["text"]
        question = Question(
            id=place, document=digest(text), context=text, joint=parts["joint"], references=(parts["word"],)
        )
        return (question,)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts with a class. One row: `text`, `label` (the class's number, or its word) and, as it likes, `id`, `split`.

    classes   the word of each class, by its number
    split     rows whose `split` is another one are left out; None: none are
    """

    wording: Wording
    classes: tuple[str, ...]
    split: str | None = None
    names = ("id", "text", "label", "split")

    def check(self, present: list[str], where: str) -> None:
        _require(("text", "label"), present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions | None:
        row, here = _opened(self, row, where, place)
        if _elsewhere(row, self.split):
            return None
        text, label = _text(row, "text", here), row["label"]
        numbers = {**{word: number for number, word in enumerate(self.classes)}, "false": 0, "true": 1}
        number = numbers.get(label.strip().lower(), label) if isinstance(label, str) else label
        number = int(number) if isinstance(number, str) and number.strip().isdecimal() else number
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            known = ", ".join(f"{number} or {word}" for number, word in enumerate(self.classes))
            raise SourceError(f"{here}: label={label!r} is none of the classes: {known}")
        before = self.wording.headed("")
        question = Question(
            id=_id(row, place),
            document=digest(before + text),
            before=before,
            context=text,
            after=self.wording.after,
            references=(self.classes[number],),
            choices=self.classes,
            groups={"class": self.classes[number]},
        )
        return (question,)


@dataclass(frozen=True, slots=True)
class Papers:
    """Papers and their summaries (ScisummNet: Yasunaga et al. 2019, arXiv 1909.01716). One row: `document`, `summary`
    and, as it likes, `id`, `title` and `split`.

    split   rows whose `split` is another one are left out; None: none are
    """

    wording: Wording
    split: str | None = None
    names = ("id", "title", "document", "summary", "split")

    def check(self, present: list[str], where: str) -> None:
        _require(("document", "summary"), present, where)

    def of_row(self, row: object, where: str, place: str) -> Questions | None:
        row, here = _opened(self, row, where, place)
        if _elsewhere(row, self.split):
            return None
        title = row.get("title")
        before, text = self.wording.headed(title if isinstance(title, str) else ""), _text(row, "document", here)
        question = Question(
            id=_id(row, place),
            document=digest(before + text),
            before=before,
            context=text,
            after=self.wording.after,
            references=(_text(row, "summary", here),),
            query=title if isinstance(title, str) else "",
        )
        return (question,)


def digest(text: str) -> str:
    """What names a text: the same for the same one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- rows -------------------------------------------------------------------------------------------------------------


def _opened(layout: Layout, row: object, where: str, place: str) -> tuple[Row, str]:
    """The row without empty columns (a table has them all in every row), and where it stands."""
    here = f"{where} {place}"
    row = {name: value for name, value in _object(row, here).items() if value is not None}
    layout.check(list(row), here)
    return row, here


def _require(wanted: Sequence[str], present: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in present:
            raise SourceError(f"{where} has no column '{name}': it has {', '.join(present) or 'none'}")


def _object(value: object, here: str) -> Row:
    if not isinstance(value, Mapping):
        raise SourceError(f"{here}: expected an object, found {_short(value)}")
    return cast("Row", value)


def _list(row: Row, name: str, here: str) -> Sequence[object]:
    value = row.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise SourceError(f"{here}: '{name}' holds {_short(value)}, not a list")
    return value


def _objects(row: Row, name: str, here: str) -> list[Row]:
    return [_object(each, f"{here}: '{name}'") for each in _list(row, name, here)]


def _text(row: Row, name: str, here: str) -> str:
    return _string(row.get(name), name, here)


def _strings(value: object, name: str, here: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise SourceError(f"{here}: '{name}' holds {_short(value)}, not a list of texts")
    return tuple(_string(each, name, here) for each in value)


def _string(value: object, name: str, here: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SourceError(f"{here}: '{name}' holds {_short(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SourceError(f"{here}: '{name}' has half a surrogate pair, which is not UTF-8 text") from None
    return value


def _id(row: Row, place: str) -> str:
    name = row.get("id")
    return str(name) if isinstance(name, str | int) else place


def _elsewhere(row: Row, split: str | None) -> bool:
    return split is not None and row.get("split", split) != split


def _short(value: object) -> str:
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
