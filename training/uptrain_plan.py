"""The grid of an uptraining: its cells, what each of them is a function of, and which of them share a run.

A cell is one model that gets measured: a number of key/value heads, how its heads were made, a share alpha of the
parent's steps, a seed. alpha = 0 is conversion alone. The controls are the parent itself, all heads kept, trained for
the same steps. Under a schedule that is the same for every alpha (constant, t5) the cells of one conversion and seed
lie on one run, whose steps are those of the largest alpha; under `rewarm` each has a run of its own. (No torch here.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from .errors import UserError
from .schema_sections import ScheduleConfig
from .schema_uptrain import Init, UptrainSchedule


class Grid(Protocol):
    """What spans a grid (`UptrainConfig` has it)."""

    @property
    def kv_heads(self) -> tuple[int, ...]: ...
    @property
    def init(self) -> tuple[Init, ...]: ...
    @property
    def alpha(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def control(self) -> bool: ...
    @property
    def schedule(self) -> UptrainSchedule: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The weights that a cell begins with.

    kv_heads  None: the parent's, all of them
    init      None: the parent itself
    seed      of heads that are drawn; None: nothing is drawn
    """

    kv_heads: int | None = None
    init: Init | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        if self.kv_heads is None:
            return "control"
        return f"kv{self.kv_heads}-{self.init}" + ("" if self.seed is None else f"-draw{self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """seed  None: alpha is 0, and nothing is drawn that could differ
    steps    optimizer steps after the conversion
    """

    start: Start
    alpha: float
    steps: int
    seed: int | None = None

    @property
    def is_control(self) -> bool:
        return self.start.kv_heads is None

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"-seed{self.seed}"
        kind = "control" if self.is_control else f"kv{self.start.kv_heads}-{self.start.init}"
        return f"{kind}-a{self.alpha:g}{seed}"

    def key(self) -> dict[str, object]:
        """Plain data, for its file."""
        return {
            "kv_heads": self.start.kv_heads,
            "init": self.start.init,
            "alpha": self.alpha,
            "seed": self.seed,
            "steps": self.steps,
            "control": self.is_control,
        }


@dataclass(frozen=True, slots=True)
class Chain:
    """Cells that are made one after the other, each from the one before it: alphas in rising order, one run.

    A chain of conversion alone has a single cell without steps.
    """

    name: str
    cells: tuple[Cell, ...]

    @property
    def start(self) -> Start:
        return self.cells[0].start

    @property
    def steps(self) -> int:
        return self.cells[-1].steps

    @property
    def seed(self) -> int | None:
        return self.cells[0].seed


def chains_of(grid: Grid, parent_steps: int) -> tuple[Chain, ...]:
    """Every chain of the grid: the parent and conversions first, controls before the cells compared with them, large
    numbers of heads before small ones. Raises UserError for an alpha that is less than a step."""
    alphas = sorted({0.0, *grid.alpha})
    steps = {alpha: steps_of(alpha, parent_steps) for alpha in alphas}
    trained = [alpha for alpha in alphas if alpha > 0]
    starts = [Start()] if grid.control else []
    heads = sorted(set(grid.kv_heads), reverse=True)
    converted = [
        Start(kv_heads=count, init=init, seed=seed)
        for count in heads
        for init in grid.init
        for seed in (sorted(set(grid.seeds)) if init == "random" else (None,))
    ]
    chains = [
        Chain(cell.name, (cell,))
        for start in (Start(), *converted)
        for cell in (Cell(start=start, alpha=0.0, steps=0, seed=start.seed),)
    ]
    for seed in sorted(set(grid.seeds)):
        for start in (*starts, *(start for start in converted if start.seed in (None, seed))):
            cells = [Cell(start=start, alpha=alpha, steps=steps[alpha], seed=seed) for alpha in trained]
            if grid.schedule == "rewarm":
                chains += [Chain(cell.name, (cell,)) for cell in cells]
            elif cells:
                kind = "control" if start.kv_heads is None else f"kv{start.kv_heads}-{start.init}"
                chains.append(Chain(f"{kind}-seed{seed}", tuple(cells)))
    return tuple(chains)


def steps_of(alpha: float, parent_steps: int) -> int:
    """alpha × the parent's steps, to the nearest whole one. Raises UserError where that is none at all."""
    steps = math.floor(alpha * parent_steps + 0.5)
    if alpha > 0 and steps == 0:
        raise UserError(
            f"alpha={alpha:g}: is less than one of the parent's {parent_steps:,} steps; give at least "
            f"{1 / parent_steps:.2g}"
        )
    return steps


def schedule_of(
    kind: UptrainSchedule, *, parent_steps: int, warmup: float, final_ratio: float, shortest: int
) -> ScheduleConfig:
    """The learning rate over a run's steps, as a share of its peak.

    Warm-up is counted in the parent's steps, so that it is the same for every alpha: a run's beginning does not depend
    on its end, but for the decay of `rewarm`. T5 trained with 1/sqrt(max(n, k)), k = 10,000 of its million steps
    (Raffel et al. 2020, §3.1.2), and Ainslie et al. 2023 went on from there: from step N = `parent_steps` on that is
    sqrt(N / (N + s)) of the rate at N.
    shortest  steps of the shortest run. Raises UserError where the warm-up is longer.
    """
    steps = round(warmup * parent_steps) if warmup < 1 else int(warmup)
    if steps > shortest > 0:
        raise UserError(
            f"warmup={warmup:g}: {steps} steps of warm-up are more than the {shortest} of the smallest alpha; lower it"
        )
    # In a ScheduleConfig a single step of warm-up is a number of steps, and no step is 0.
    if kind == "rewarm":
        return ScheduleConfig(name="cosine", warmup=float(steps), final_ratio=final_ratio)
    if kind == "t5":
        return ScheduleConfig(name="rsqrt", warmup=float(steps), offset=parent_steps)
    return ScheduleConfig(name="constant", warmup=float(steps))


def steps_between(chains: Sequence[Chain]) -> dict[str, int]:
    """By cell: the steps that it takes from the cell before it in its run."""
    found: dict[str, int] = {}
    for chain in chains:
        before = 0
        for cell in chain.cells:
            found[cell.name], before = cell.steps - before, cell.steps
    return found


def seconds_left(steps: Mapping[str, int], waiting: Iterable[str], taken: Mapping[str, float]) -> float | None:
    """What the waiting cells will take one after the other, from the seconds that others took: a measurement as long as
    those without steps took, and each step its share of what the others took beyond that. None as long as no cell of a
    kind that is waiting is done.
    """
    measuring = [seconds for name, seconds in taken.items() if not steps[name]]
    trained = [name for name in taken if steps[name]]
    each = fmean(measuring) if measuring else 0.0
    per_step = None
    if trained:
        beyond = sum(max(0.0, taken[name] - each) for name in trained)
        per_step = beyond / sum(steps[name] for name in trained)
    left = list(waiting)
    if (any(steps[name] for name in left) and per_step is None) or not taken:
        return None
    return sum(each + steps[name] * (per_step or 0.0) for name in left)
