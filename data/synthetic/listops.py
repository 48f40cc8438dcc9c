"""ListOps: nested operations on lists of digits, with a digit as value (Nangia & Bowman 2018, arXiv 1804.06028), as
Long Range Arena has it (Tay et al. 2020, arXiv 2011.04006): trees of at most ten levels, two to ten arguments, more
than 500 and fewer than 2,000 symbols, 96,000 / 2,000 / 2,000 of them for training, validation and test.

    [MIN … ]  [MAX … ]   smallest and largest
    [MED … ]             median; of an even number the mean of the middle two, rounded down
    [SM … ]              sum modulo 10

A node is an operation with probability ¼ (never on the last level), else a digit; operations, numbers of arguments and
digits are uniform; trees outside the lengths are drawn again. So values are far from uniform: 0 and 9 are a sixth each.
Expressions are written without the parentheses that the published files have and the published training throws away:
15 different symbols with spaces between them. Not the published files but as many from the same distribution.

Example n of a split depends on (seed, split, n) and the settings alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from ..questions import Question
from .fill import generator

ListOpsSplit = Literal["train", "validation", "test"]

SIZES: Mapping[ListOpsSplit, int] = MappingProxyType({"train": 96_000, "validation": 2_000, "test": 2_000})
CLASSES = tuple("0123456789")
OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*OPERATIONS, "]", *CLASSES)

_OPERATION = 0.25  # probability of a node
_ATTEMPTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOpsSettings:
    """max_depth      levels of a tree; digits alone on the last
    max_arguments  of an operation, at least 2
    longer_than    symbols, brackets included
    shorter_than   symbols
    """

    max_depth: int = 10
    max_arguments: int = 10
    longer_than: int = 500
    shorter_than: int = 2000

    def __post_init__(self) -> None:
        if self.max_depth < 2 or self.max_arguments < 2:
            raise ValueError(
                f"max_depth={self.max_depth}, max_arguments={self.max_arguments}: an operation takes two levels and "
                "two arguments at least"
            )
        if self.shorter_than - self.longer_than < 2:
            raise ValueError(
                f"longer_than={self.longer_than}, shorter_than={self.shorter_than}: no length lies between them"
            )


LRA = ListOpsSettings()


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression, its value from 0 to 9, and how many symbols it has."""

    text: str
    value: int
    n_symbols: int


def listops_expression(
    split: ListOpsSplit, index: int, *, seed: int = 0, settings: ListOpsSettings = LRA
) -> Expression:
    """Raises ValueError where trees of such settings never have such lengths."""
    rng = generator(seed, f"listops {split}", index)
    for _ in range(_ATTEMPTS):
        levels = _tree(rng, settings)
        if levels is not None:
            return _written(levels, rng)
    raise ValueError(
        f"longer_than={settings.longer_than}, shorter_than={settings.shorter_than}: none of {_ATTEMPTS:,} trees with "
        f"max_depth={settings.max_depth} and max_arguments={settings.max_arguments} has so many symbols"
    )


def listops(
    *, split: ListOpsSplit = "test", samples: int | None = None, seed: int = 0, settings: ListOpsSettings = LRA
) -> Iterator[Question]:
    """The first examples of a split as questions with ten choices; None: all of Long Range Arena's number."""
    for index in range(SIZES[split] if samples is None else samples):
        made = listops_expression(split, index, seed=seed, settings=settings)
        name = f"listops-{split}-{index}"
        yield Question(
            id=name,
            document=name,
            context=made.text,
            after="",
            joint=" = ",
            references=(CLASSES[made.value],),
            choices=CLASSES,
            groups={"symbols": made.n_symbols // 500 * 500},
        )


@dataclass(frozen=True, slots=True)
class _Level:
    """The nodes of one level in order: whether each is an operation, and the arguments of those that are."""

    is_operation: np.ndarray
    arguments: np.ndarray


def _tree(rng: np.random.Generator, settings: ListOpsSettings) -> list[_Level] | None:
    """The shape of a tree, level by level; None: it has not the length. The root is an operation: digits are too
    short."""
    levels: list[_Level] = []
    n_nodes, n_symbols = 1, 0
    for depth in range(1, settings.max_depth + 1):
        if depth == 1:
            is_operation = np.ones(1, dtype=bool)
        elif depth == settings.max_depth:
            is_operation = np.zeros(n_nodes, dtype=bool)
        else:
            is_operation = rng.random(n_nodes) < _OPERATION
        n_operations = int(is_operation.sum())
        arguments = rng.integers(2, settings.max_arguments + 1, size=n_operations)
        levels.append(_Level(is_operation, arguments))
        n_symbols += n_nodes + n_operations  # an operation has two: its name and its bracket
        n_nodes = int(arguments.sum())
        if n_symbols + n_nodes >= settings.shorter_than:
            return None
        if not n_nodes:
            break
    return levels if n_symbols > settings.longer_than else None


def _written(levels: list[_Level], rng: np.random.Generator) -> Expression:
    """From the lowest level up: texts and values of its nodes."""
    texts: list[str] = []
    values: list[int] = []
    n_symbols = 0
    for level in reversed(levels):
        n_nodes, n_operations = len(level.is_operation), len(level.arguments)
        below_texts, below_values, begin = texts, values, 0
        values = rng.integers(10, size=n_nodes).tolist()  # an operation's takes its place below
        texts = [CLASSES[value] for value in values]
        places = np.flatnonzero(level.is_operation).tolist()
        operations = rng.integers(len(OPERATIONS), size=n_operations).tolist()
        for place, operation, n_arguments in zip(places, operations, level.arguments.tolist(), strict=True):
            end = begin + n_arguments
            texts[place] = f"{OPERATIONS[operation]} {' '.join(below_texts[begin:end])} ]"
            values[place] = _value(operation, below_values[begin:end])
            begin = end
        n_symbols += n_nodes + n_operations
    return Expression(texts[0], values[0], n_symbols)


def _value(operation: int, arguments: list[int]) -> int:
    if operation == 0:
        return min(arguments)
    if operation == 1:
        return max(arguments)
    if operation == 2:
        ordered, middle = sorted(arguments), len(arguments) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return sum(arguments) % 10
