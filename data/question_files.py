"""Questions from local files, or from the hub for those who have a connection: found, read, checked, counted.

A row that cannot be used is named with file and line, counted and left out; where more of them than a tolerance are
like that, nothing is read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .files import SourceError, read_rows
from .question_layouts import Layout, Passages, Questions
from .questions import Question
from .refused import Refused
from .sources import SourceSpec, read_table

logger = logging.getLogger("longspan.data")

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".json", ".json.gz")
TOLERANCE = 0.01

_HEADING = re.compile(r" = (?!=)(?P<title>.*[^= ]) = \n")
_NAME = re.compile(r"\b[^\W\d_]*[A-Z][^\W\d_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """Questions as they were read.

    questions  in the order of the file
    source     the file, or `hub:<name>`
    sha256     of the file's bytes; of a hub data set, of its questions
    n_refused  rows that could not be used; `refused` says why, of the first
    """

    questions: Questions
    source: str
    sha256: str
    n_refused: int
    refused: tuple[str, ...]

    def drawn(self, samples: int | None, seed: int) -> Questions:
        """As many of them at random, the same for the same seed, in their order; None, or more than there are: all."""
        if samples is None or samples >= len(self.questions):
            return self.questions
        chosen = sorted(random.Random(seed).sample(range(len(self.questions)), samples))
        return tuple(self.questions[each] for each in chosen)


def find_question_file(directory: Path | None, stem: str, form: str) -> Path:
    """The one file `<directory>/<stem>.<suffix>`.

    form   what must be in it, in words
    Raises SourceError, saying where to put it and in which form, where there is none; and where there are several.
    """
    if directory is None:
        raise SourceError(
            f"no directory of local files is given (files=DIR), and {stem} is read from one: {_wanted(stem, form)}"
        )
    directory = directory.expanduser()
    found = [path for suffix in SUFFIXES if (path := directory / f"{stem}{suffix}").is_file()]
    if not found:
        raise SourceError(f"{directory / stem}.* is missing: {_wanted(stem, form)}")
    if len(found) > 1:
        raise SourceError(f"{directory} has {' and '.join(path.name for path in found)}: keep one of them")
    return found[0]


def read_question_file(path: Path, layout: Layout, *, tolerance: float = TOLERANCE) -> QuestionSet:
    """The questions of a .jsonl, .parquet or .arrow file (.jsonl.gz too), or of SQuAD's .json.

    tolerance   largest share of rows that may be unusable
    Raises SourceError for a file that cannot be read, holds no question, or has too many rows that cannot be used.
    """
    refused = Refused()
    rows = _published(path, layout, refused) if _is_json(path) else read_rows(path, layout, refused)
    groups = list(rows)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _checked(groups, str(path), digest, refused, tolerance)


def read_hub_questions(source: SourceSpec, layout: Layout, *, tolerance: float = TOLERANCE) -> QuestionSet:
    """The same, of a data set on the hub."""
    refused = Refused()
    groups = list(read_table(source, layout, refused))
    content = hashlib.sha256()
    for question in (question for group in groups for question in group):
        content.update(repr((question.id, question.context, question.query, question.references)).encode())
    return _checked(groups, f"hub:{source.path}/{source.split}", content.hexdigest(), refused, tolerance)


def wikitext_articles(path: Path) -> list[str]:
    """The articles of a WikiText file (Merity et al. 2016, arXiv 1609.07843; .gz too), each with its heading.

    An article begins at a heading of the first level, ` = Title = `. Where the file has its blank lines, one stands on
    both sides of a heading, which tells it from a line of mathematics; without them, a title has a name in it.
    Raises SourceError for a file without articles.
    """
    try:
        lines = _bytes_of(path).decode("utf-8").replace("\r\n", "\n").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text (byte {error.start})") from error
    spaced = any(not line.strip() for line in lines[1:-1])
    starts = [at for at in range(len(lines)) if _begins_article(lines, at, spaced=spaced)]
    if not starts:
        raise SourceError(f"{path} has no article: WikiText's begin with a line ' = Title = '")
    return ["".join(lines[begin:end]) for begin, end in zip(starts, [*starts[1:], len(lines)])]


def _begins_article(lines: list[str], at: int, *, spaced: bool) -> bool:
    heading = _HEADING.fullmatch(lines[at])
    if heading is None or " = = " in lines[at]:
        return False
    if spaced:
        around = [lines[near] for near in (at - 1, at + 1) if 0 <= near < len(lines)]
        return not any(line.strip() for line in around)
    return _NAME.search(heading["title"]) is not None


def _wanted(stem: str, form: str) -> str:
    return f"put {stem}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:4])}) there, {form}"


def _is_json(path: Path) -> bool:
    return path.name.endswith((".json", ".json.gz"))


def _bytes_of(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not a complete gzip file ({error})") from error


def _published(path: Path, layout: Layout, refused: Refused) -> Iterator[Questions]:
    if not isinstance(layout, Passages):
        raise SourceError(f"{path}: a single JSON object is the form of SQuAD alone; write one object a line to .jsonl")
    try:
        published = json.loads(_bytes_of(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON ({error})") from error
    for place, row in layout.rows(published, str(path)):
        try:
            yield layout.of_row(row, str(path), place)
        except SourceError as error:
            refused(error)


def _checked(groups: list[Questions], source: str, digest: str, refused: Refused, tolerance: float) -> QuestionSet:
    objection = refused.objection(len(groups), tolerance, what=f"rows of {source}", key="tolerance")
    if objection is not None:
        raise SourceError(objection)
    if refused.count:
        logger.warning("%s: %d rows cannot be used and are left out: %s", source, refused.count, refused.words())
    questions = tuple(_told_apart(question for group in groups for question in group))
    if not questions:
        raise SourceError(f"{source} holds no question")
    return QuestionSet(
        questions=questions, source=source, sha256=digest, n_refused=refused.count, refused=tuple(refused.first)
    )


def _told_apart(questions: Iterable[Question]) -> Iterator[Question]:
    """With ids that are each there once, whatever the file calls them."""
    taken: set[str] = set()
    again: Counter[str] = Counter()
    for question in questions:
        name = question.id
        while name in taken:
            again[question.id] += 1
            name = f"{question.id}#{again[question.id] + 1}"
        taken.add(name)
        yield replace(question, id=name)
