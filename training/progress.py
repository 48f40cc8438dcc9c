"""What a person sees of a run: a bar on a terminal, a line every few seconds elsewhere, and all lines in train.log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .metrics import Row, clock, format_row, short_count
from .stages import Stage

logger = logging.getLogger("longspan.training")

Style = Literal["bar", "lines", "off"]


def choose_style(progress: Literal["auto", "bar", "lines", "off"], console: Console) -> Style:
    if progress != "auto":
        return progress
    return "bar" if console.is_terminal else "lines"


class _ConsoleHandler(logging.Handler):
    """Prints records above the bar, whole lines wherever the terminal ends."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):  # a bar shows it already, or nothing is to be shown
            return
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        raise


@contextmanager
def logging_to(path: Path | None, console: Console | None) -> Iterator[None]:
    """Sends every `longspan` log record of level INFO and above to a file and a console for the block's duration."""
    parent = logging.getLogger("longspan")
    former = parent.level, parent.propagate
    handlers: list[logging.Handler] = []
    if path is not None:
        file = _LogFile(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(file)
    if console is not None:
        handlers.append(_ConsoleHandler(console))
    try:
        parent.setLevel(logging.INFO)
        parent.propagate = False
        for handler in handlers:
            parent.addHandler(handler)
        yield
    finally:
        for handler in handlers:
            parent.removeHandler(handler)
            handler.close()
        parent.setLevel(former[0])
        parent.propagate = former[1]


class ProgressView:
    """Shows each step as the style asks. Whatever the style, train.log gets the lines.

    steps  of the whole run
    stage  which part of them is taken: with a name it has a bar of its own above the run's, which goes when it ends
    """

    def __init__(
        self, style: Style, console: Console, *, steps: int, seconds: float, stage: Stage | None = None
    ) -> None:
        self._style: Style = style
        self._steps = steps
        self._stage = stage if stage is not None and stage.name is not None else None
        self._seconds = seconds
        self._last_line = 0.0
        self._bar = _bar(console) if style == "bar" else None
        self._run: TaskID | None = None
        self._part: TaskID | None = None
        self._stack = ExitStack()
        self._file_only = style != "lines"

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None and self._run is not None and self._stage is not None:
            last = self._stage.number == self._stage.of
            if error is None and not last:
                self._bar.remove_task(self._run)
        self._stack.close()

    @property
    def live(self) -> bool:
        """Whether there is a bar that every step moves."""
        return self._bar is not None

    def due(self) -> bool:
        """Whether enough time has passed for another line."""
        return time.monotonic() - self._last_line >= self._seconds

    def show(self, row: Row, *, memory_bytes: int | None, eta_seconds: float | None, line: bool) -> None:
        """The state after a step; `line` asks for a log line now."""
        if self._bar is not None:
            self._move(self._bar, row, eta_seconds)
        if line:
            self._last_line = time.monotonic()
            text = format_row(row, steps=self._steps, memory_bytes=memory_bytes, eta_seconds=eta_seconds)
            logger.info(text, extra={"file_only": self._file_only})

    def _move(self, bar: Progress, row: Row, eta_seconds: float | None) -> None:
        if self._run is None:
            if self._stage is not None:
                name = f"{self._stage.number}/{self._stage.of} {self._stage.name}"
                self._part = bar.add_task(name, total=self._stage.steps, words="")
            self._run = bar.add_task("train", total=self._steps, words="")
        loss = "" if row.loss is None else f"loss {row.loss:.3f}"
        speed = "" if row.tokens_per_second is None else f"{short_count(row.tokens_per_second)} tok/s"
        mfu = "" if row.mfu is None else f"mfu {row.mfu:.2f}"
        eta = "" if eta_seconds is None else f"eta {clock(eta_seconds)}"
        now = " ".join(word for word in (loss, speed, mfu) if word)
        if self._stage is None or self._part is None:
            bar.update(self._run, completed=row.step, words=f"{now} {eta}".strip())
            return
        bar.update(self._part, completed=row.step - self._stage.start, words=now)
        bar.update(self._run, completed=row.step, words=eta)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
        console=console,
    )
