"""The `key=value` arguments of benchmarks that are started as modules."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence


def read_arguments(arguments: Sequence[str], known: Collection[str], required: Collection[str] = ()) -> dict[str, str]:
    """Values by key. Ends the program (exit code 2, one line) for a key that is not known, or one that is missing."""
    given, others = split_arguments(arguments, known)
    missing = [name for name in required if name not in given]
    if others or missing:
        names = [each.partition("=")[0] for each in others] or missing
        print(f"{'unknown' if others else 'missing'}: {', '.join(names)}; keys are {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    return given


def split_arguments(arguments: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Values of the keys that are one's own, and the other arguments as they are."""
    pairs = [each.partition("=") for each in arguments]
    given = {name: value for name, _, value in pairs if name in own}
    return given, [each for each, (name, _, _) in zip(arguments, pairs) if name not in own]
