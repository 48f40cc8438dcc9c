"""What a person sees of a grid: a live table on a terminal, a line a cell elsewhere, and all lines in uptrain.log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from longspan.evaluation.ablation.summary import heads_in_words

from .metrics import clock, read_rows
from .uptrain_cells import Event
from .uptrain_plan import Cell, seconds_left, steps_between
from .uptrain_recipe import Uptraining

logger = logging.getLogger("longspan.training.uptrain")

GridStyle = Literal["table", "lines", "off"]


class GridView:
    """Keeps count of the cells, and of the time that they take. `done`: losses of those that are there already."""

    def __init__(self, grid: Uptraining, style: GridStyle, console: Console, *, done: Mapping[str, float]) -> None:
        self._grid = grid
        self._console = console
        self._style = style
        self._losses = dict(done)
        self._kept = set(done)
        self._begun: dict[str, float] = {}  # when
        self._started = time.monotonic()
        self._stack = ExitStack()
        self._steps = steps_between(grid.chains)
        self._taken: dict[str, float] = {}  # seconds
        self._at_once = 1
        self._live: Live | None = None

    def __enter__(self) -> GridView:
        if self._style == "table":
            self._live = self._stack.enter_context(
                Live(console=self._console, get_renderable=self.table, refresh_per_second=1)
            )
        if self._kept:
            self.say(f"{len(self._kept)} of {len(self._grid.cells)} cells are done already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._live = None

    def tell(self, event: Event, cell: Cell, record: Mapping[str, object]) -> None:
        """What the workshops report."""
        if event == "begun":
            self._begun[cell.name] = time.monotonic()
            self._at_once = max(self._at_once, len(self._begun))
            return
        self._taken[cell.name] = time.monotonic() - self._begun.pop(cell.name, time.monotonic())
        loss = record["loss"]
        self._losses[cell.name] = float(loss) if isinstance(loss, int | float) else float("nan")
        text = f"{len(self._losses)}/{len(self._grid.cells)} {cell.name}: loss {self._losses[cell.name]:.4f}"
        left = self.seconds_left()
        eta = "" if left is None else f", about {clock(left)} left"
        self.say(text + eta)

    def say(self, words: str) -> None:
        """A line of its own, above a table; the runs of cells speak to their own logs."""
        logger.info("%s", words)
        if self._style == "lines" or (self._style == "table" and self._live is None):
            self._console.print(words, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """From what cells took in this session; None before there is one of each kind that is left."""
        waiting = [cell.name for cell in self._grid.cells if cell.name not in self._losses]
        alone = seconds_left(self._steps, waiting, self._taken)
        return None if alone is None else alone / self._at_once

    def table(self) -> Table:
        """A row a model, a column an alpha; losses of the seeds side by side."""
        left = self.seconds_left()
        eta = "" if left is None else f", about {clock(left)} left"
        passed = clock(time.monotonic() - self._started)
        table = Table(title=f"{len(self._losses)} of {len(self._grid.cells)} cells, {passed} passed{eta}")
        table.add_column("model")
        alphas = sorted({cell.alpha for cell in self._grid.cells})
        for alpha in alphas:
            table.add_column(f"alpha {alpha:g}", justify="right")
        rows: dict[str, dict[float, list[str]]] = {}
        for cell in self._grid.cells:
            name = "control" if cell.is_control else f"{heads_in_words(cell.start.kv_heads)}, {cell.start.init}"
            rows.setdefault(name, {}).setdefault(cell.alpha, []).append(self._state(cell))
        for name, row in rows.items():
            table.add_row(name, *("  ".join(row.get(alpha, [])) for alpha in alphas))
        return table

    def _state(self, cell: Cell) -> str:
        if cell.name in self._losses:
            return f"{self._losses[cell.name]:.4f}"
        if cell.name not in self._begun:
            return "·"
        chain = next(chain for chain in self._grid.chains if cell in chain.cells)
        rows = read_rows(self._grid.directory / "runs" / chain.name / "metrics.csv")
        return f"step {rows[-1].step}/{cell.steps}" if rows and rows[-1].step < cell.steps else "…"
