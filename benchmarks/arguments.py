"""The `key=value` arguments of benchmarks that are started as modules."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn


def read_arguments(arguments: Sequence[str], known: Collection[str], required: Collection[str] = ()) -> dict[str, str]:
    """Values by key. Ends the program (exit code 2, one line) for a key that is not known, or one that is missing."""
    given, others = split_arguments(arguments, known)
    missing = [name for name in required if name not in given]
    if others or missing:
        names = [each.partition("=")[0] for each in others] or missing
        refuse(f"{'unknown' if others else 'missing'}: {', '.join(names)}; keys are {', '.join(known)}")
    return given


def split_arguments(arguments: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Values of the keys that are one's own, and the other arguments as they are."""
    pairs = [each.partition("=") for each in arguments]
    given = {name: value for name, _, value in pairs if name in own}
    return given, [each for each, (name, _, _) in zip(arguments, pairs) if name not in own]


def whole(given: Mapping[str, str], key: str, default: int, *, least: int) -> int:
    """A whole number. Ends the program (exit code 2, one line) for anything else, as those below do."""
    found = _wholes(given.get(key, str(default)))
    if len(found) != 1 or found[0] < least:
        refuse(f"{key}={given[key]}: expected a whole number, at least {least}")
    return found[0]


def wholes(given: Mapping[str, str], key: str, default: Sequence[int], *, least: int) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    found = _wholes(given[key]) if key in given else tuple(default)
    if not found or min(found) < least:
        refuse(f"{key}={given[key]}: expected whole numbers with commas between them, each at least {least}")
    return found


def part(given: Mapping[str, str], key: str, default: float) -> float:
    """A share of something that is divided: above 0 and below 1."""
    try:
        found = float(given.get(key, default))
    except ValueError:
        found = math.nan
    if not 0 < found < 1:
        refuse(f"{key}={given[key]}: expected a number above 0 and below 1")
    return found


def refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(2)


def started(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Ends the program that a module is. What a checkpoint, data or a surgery has against its arguments is told in a
    line, with exit code 2, as `longspan` does; LONGSPAN_TRACEBACK=1 shows where."""
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        if os.environ.get("LONGSPAN_TRACEBACK") == "1":
            raise
        refuse(f"{error} (LONGSPAN_TRACEBACK=1 shows where)")


def _wholes(text: str) -> tuple[int, ...]:
    """None of them where one is no whole number."""
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        return ()
