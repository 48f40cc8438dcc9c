"""What several verbs print alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from longspan.training.errors import UserError

_SECONDS = 10.0  # between lines about progress, where there is no terminal


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""


_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, dict | list) for item in items)
    ),
)


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as the YAML that would compose to it."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def refuse_occupied(output: Path, *, overwrite: bool) -> None:
    """Raises UserError, before any work is done, where `output` would be overwritten without leave."""
    if output.exists() and not (output.is_dir() and (overwrite or not any(output.iterdir()))):
        raise UserError(f"output={output}: exists and is not an empty directory; choose another, or set overwrite=true")


class Progress:
    """What a long job of several parts shows: bars with the time left on a terminal; elsewhere a line now and then, and
    one when a part is done. All of it on stderr."""

    def __init__(self, name: str, bars: Bars) -> None:
        self._name, self._bars = name, bars

    def labelled(self, prefix: str) -> Callable[[str], AbstractContextManager[Callable[[int, int], None]]]:
        """`part`, of parts whose labels begin so."""
        return lambda label: self.part(prefix + label)

    @contextmanager
    def part(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A function to call with (done, total), as often as one likes."""
        bar = self._bars.add_task(label, total=None)
        said = time.monotonic()
        first: tuple[int, float] | None = None  # what was done when, at the first call: the time left goes by the rest

        def advance(done: int, total: int) -> None:
            nonlocal said, first
            self._bars.update(bar, completed=done, total=total)
            now = time.monotonic()
            resumed, begun = first = (done, now) if first is None else first
            if self._bars.disable and (now - said > _SECONDS or done == total):
                said = now
                left = (total - done) * (now - begun) / (done - resumed) if done > resumed else None
                eta = "" if left is None or done == total else f", {_clock(left)} left"
                print(f"{self._name}: {label} {done:,} of {total:,}{eta}", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def progress(name: str) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Progress(name, bars)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def progress_bars() -> Bars:
    """Bars on stderr that vanish when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Bars(console=console, transient=True, disable=not console.is_terminal)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; those that hold numbers throughout stand to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell.replace(",", "").isdigit() for cell in column[1:]) and bool(rows) for column in columns]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell, width, right in zip(row, widths, numeric)
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
