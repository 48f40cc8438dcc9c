"""Labelled examples that every machine can make: of its own Python library, real source text with labels read off it,
or of nothing but a seed.

packages    which package a piece of source is from. Pieces are of some forty lines; all pieces of a module are on the
            same side of the split, so that validation asks about modules that were never read
parameters  the parameters of a function, by its name, in a piece of source of some twelve hundred characters: `def
            read(` is asked for, and `self, size=-1` is the answer where it stands. To find the name and to copy what
            follows is all that it takes; nothing has to be understood

outlines    the names of the functions and classes that a piece of source of some four hundred characters defines, in
            their order. To find what follows `def` and `class` and to copy it is all that it takes

same_document  whether two pieces of some four thousand bytes are from the same module (`synthetic.retrieval`)

These are to try a training with, and no benchmarks: they differ from one Python version to the next.

listops     the value of a nested operation on digits: Long Range Arena's (`synthetic.listops`), the same everywhere

main_points  the numbered sentences of a report of up to 1,000 words (`synthetic.main_points`), the same everywhere
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal

from .example_build import BuiltIn
from .example_records import Answer, ExampleRecord
from .shards import split_hash
from .sources import stdlib_files
from .synthetic.listops import SIZES, listops_expression
from .synthetic.main_points import SIZES as REPORTS
from .synthetic.main_points import main_points
from .synthetic.retrieval import Document, pair_records
from .writer import Split

BuiltInName = Literal["packages", "parameters", "outlines", "same_document", "listops", "main_points"]

# In every distribution of Python 3.11 and later, with a dozen modules and thousands of lines each.
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")

_PIECE_LINES = 40
_PIECE_CHARACTERS = 1_200
_OUTLINED_CHARACTERS = 400
_PAIRS: Mapping[Split, int] = MappingProxyType({"train": 4_000, "validation": 500})
_QUESTIONS = 2  # asked of a piece at most
_SIGNATURE = re.compile(r"^ *(?:async )?def (\w+)\(([^()\n]{2,40},[^()\n]{2,40})\)", re.MULTILINE)

_DEFINITION = re.compile(r"^ *(?:async )?(?:def|class) (\w+)", re.MULTILINE)


def packages() -> Iterator[ExampleRecord]:
    """Pieces of source, labelled with their package."""
    for name, text in _modules():
        package = name.partition("/")[0]
        if package in PACKAGES:
            lines = text.splitlines(keepends=True)
            for start in range(0, len(lines), _PIECE_LINES):
                piece = "".join(lines[start : start + _PIECE_LINES])
                if len(piece.split()) >= _PIECE_LINES:  # not the last few lines of a module, nor a table of blanks
                    yield ExampleRecord(
                        place=f"{name} line {start + 1}", texts={"text": piece}, label=package, group=name
                    )


def parameters() -> Iterator[ExampleRecord]:
    """Functions of a piece of source, with their parameters as the answer."""
    for name, text in _modules():
        for number, piece in enumerate(_pieces(text)):
            found = list(_SIGNATURE.finditer(piece))
            names = [match[1] for match in found]
            asked = [match for match in found if names.count(match[1]) == 1]
            asked.sort(key=lambda match: split_hash(match[1]))  # any, but always the same
            for match in asked[:_QUESTIONS]:
                yield ExampleRecord(
                    place=f"{name} piece {number} {match[1]}",
                    texts={"question": f"def {match[1]}(", "context": piece},
                    answers=(Answer(match[2], match.start(2)),),
                    group=name,
                )


def outlines() -> Iterator[ExampleRecord]:
    """Pieces of source, with the names that each defines."""
    for name, text in _modules():
        for number, piece in enumerate(_pieces(text, _OUTLINED_CHARACTERS)):
            defined = _DEFINITION.findall(piece)
            if defined:
                yield ExampleRecord(
                    place=f"{name} piece {number}", texts={"source": piece, "target": " ".join(defined)}, group=name
                )


def same_document(split: Split) -> Iterator[ExampleRecord]:
    """Pairs of pieces of modules, and whether they are of the same one; a tenth of the modules is held out."""
    modules = (Document(name, text) for name, text in _modules())
    mine = (each for each in modules if (split_hash(each.name) % 10 == 0) == (split == "validation"))
    return pair_records(mine, n=_PAIRS[split])


def list_operations(split: Split) -> Iterator[ExampleRecord]:
    """Nested operations and their values: Long Range Arena's numbers of them."""
    for index in range(SIZES[split]):
        made = listops_expression(split, index)
        yield ExampleRecord(place=f"listops {split} {index}", texts={"text": made.text}, label=str(made.value))


def reports(split: Split) -> Iterator[ExampleRecord]:
    """Reports and their summaries."""
    for index in range(REPORTS[split]):
        made = main_points(split, index)
        yield ExampleRecord(place=f"report {split} {index}", texts={"source": made.source, "target": made.target})


def _modules() -> Iterator[tuple[str, str]]:
    found = stdlib_files()
    for name in found.names:
        with tokenize.open(found.root / name) as file:  # honours a coding cookie (PEP 263)
            yield name, file.read()


def _pieces(text: str, most: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """The text cut at line breaks into pieces of at most so many characters, lines that are longer left whole."""
    held = ""
    for line in text.splitlines(keepends=True):
        if held and len(held) + len(line) > most:
            yield held
            held = ""
        held += line
    if held.strip():
        yield held


BUILT_IN: Mapping[BuiltInName, BuiltIn] = MappingProxyType(
    {
        "packages": BuiltIn(name="packages", version=1, make=packages),
        "parameters": BuiltIn(name="parameters", version=1, make=parameters),
        "outlines": BuiltIn(name="outlines", version=1, make=outlines),
        "same_document": BuiltIn(name="same_document", version=1, make=partial(same_document, "train")),
        "listops": BuiltIn(name="listops", version=1, make=partial(list_operations, "train"), of_library=False),
        "main_points": BuiltIn(name="main_points", version=1, make=partial(reports, "train"), of_library=False),
    }
)

HELD_OUT: Mapping[BuiltInName, BuiltIn] = MappingProxyType(
    {
        "same_document": BuiltIn(name="same_document validation", version=1, make=partial(same_document, "validation")),
        "listops": BuiltIn(
            name="listops validation", version=1, make=partial(list_operations, "validation"), of_library=False
        ),
        "main_points": BuiltIn(
            name="main_points validation", version=1, make=partial(reports, "validation"), of_library=False
        ),
    }
)
"""What is validated on where a share of the training examples would not do."""
