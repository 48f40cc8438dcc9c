"""Labelled examples that every machine can make of its own Python library: real source text, labels read off it.

packages    which package a piece of source is from. Pieces are of some forty lines; all pieces of a module are on the
            same side of the split, so that validation asks about modules that were never read
parameters  the parameters of a function, by its name, in a piece of source of some twelve hundred characters: `def
            read(` is asked for, and `self, size=-1` is the answer where it stands. To find the name and to copy what
            follows is all that it takes; nothing has to be understood

outlines    the names of the functions and classes that a piece of source of some four hundred characters defines, in
            their order. To find what follows `def` and `class` and to copy it is all that it takes

All are to try a training with, and no benchmarks: they differ from one Python version to the next.
"""

from __future__ import annotations

import re
import tokenize
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal, get_args

from .example_build import BuiltIn
from .example_records import Answer, ExampleRecord
from .shards import split_hash
from .sources import stdlib_files

BuiltInName = Literal["packages", "parameters", "outlines"]

# In every distribution of Python 3.11 and later, with a dozen modules and thousands of lines each.
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")

_PIECE_LINES = 40
_PIECE_CHARACTERS = 1_200
_OUTLINED_CHARACTERS = 400
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
        name: BuiltIn(name=name, version=1, make=make)
        for name, make in zip(get_args(BuiltInName), (packages, parameters, outlines), strict=True)
    }
)
