"""What a grid of conversions found: losses with intervals, gaps to the control, what was recovered, what is noise, and
which number of key/value heads to take. A pure function of the cells' files.

Definitions, for a number of heads G, an initialisation, and alpha > 0; each loss a mean over seeds:

    gap        L(G, alpha) - L(control, alpha): against the parent trained for the same steps, not the parent as it was
    recovered  (L(G, 0) - L(G, alpha)) / (L(G, 0) - L(control, alpha)): 0 is conversion alone, 1 is no gap

Of encoders the loss is a distance to the parent, 1 - cosine, so the parent itself (0) is the control of every alpha.

Noise. With S >= 2 seeds: every cell of an alpha shares its seeds' data with every other, so differences are compared
seed by seed. The variance of what is left after the mean of each point and the effect of each seed are taken out
(randomised blocks), pooled over alphas, is the variance of a difference's two sides; the interval is Student's, 95 %.
The interval of a loss itself has the plain variance over seeds, pooled over points. With one seed there is neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from ..reporting.run_files import number, string

RESULT = "result.json"

# Student's t, 97.5 %, for 1 … 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class CellResult:
    """One measured cell. `record` is its whole file.

    kv_heads, init  None: the control
    seed            None: alpha is 0 and nothing was drawn
    """

    name: str
    kv_heads: int | None
    init: str | None
    alpha: float
    seed: int | None
    steps: int
    loss: float
    record: Mapping[str, object]

    @property
    def point(self) -> Point:
        return Point(self.kv_heads, self.init, self.alpha)


@dataclass(frozen=True, slots=True)
class Point:
    """Cells that differ in their seed alone."""

    kv_heads: int | None
    init: str | None
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Standard deviations over seeds and their degrees of freedom; None where there are too few seeds.

    loss        of a cell's loss
    difference  of one side of a difference between cells with the same seed
    """

    loss: float | None
    loss_df: int
    difference: float | None
    difference_df: int

    def of_loss(self, n: int) -> float | None:
        """Half the 95 % interval of a mean over n seeds."""
        return None if self.loss is None or n < 2 else student(self.loss_df) * self.loss / math.sqrt(n)

    def of_difference(self, n: int) -> float | None:
        """Half the 95 % interval of the difference of two means over the same n seeds."""
        if self.difference is None or n < 2:
            return None
        return student(self.difference_df) * self.difference * math.sqrt(2 / n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A point of the report.

    loss           mean over `n` seeds; `interval` half its 95 % interval; `low`, `high` the extreme seeds
    gap, recovered see the top of this file; None where alpha is 0 or there is no control
    gap_interval   half the 95 % interval of the gap
    """

    kv_heads: int | None
    init: str | None
    alpha: float
    steps: int
    n: int
    loss: float
    low: float
    high: float
    interval: float | None
    gap: float | None
    gap_interval: float | None
    recovered: float | None
    cells: tuple[str, ...]

    @property
    def distinguishable(self) -> bool | None:
        """Whether the gap is more than noise; None where noise is not known."""
        return None if self.gap is None or self.gap_interval is None else abs(self.gap) > self.gap_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """kv_heads, init, cell  None: no cell was trained or converted
    met   whether the rule found one within the tolerance
    why   in a sentence
    """

    kv_heads: int | None
    init: str | None
    cell: str | None
    met: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """measure  "loss" (nats per token) or "distance" (1 - cosine to the parent)"""

    measure: str
    cells: tuple[CellResult, ...]
    rows: tuple[Row, ...]
    noise: Noise
    recommended: Recommendation
    findings: tuple[str, ...]
    tolerance: float

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({row.alpha for row in self.rows}))

    @property
    def heads(self) -> tuple[int, ...]:
        """Numbers of key/value heads, the largest first."""
        return tuple(sorted({row.kv_heads for row in self.rows if row.kv_heads is not None}, reverse=True))

    @property
    def inits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.init for row in self.rows if row.init is not None))

    @property
    def caveat(self) -> str:
        """What the differences at the largest alpha leave open, as a sentence without a full stop; empty: nothing, or
        nothing was trained, so that no seed makes a difference."""
        alpha = self.alphas[-1]
        if alpha == 0 or self.noise.difference is not None:
            return ""
        seeds = max(row.n for row in self.rows if row.alpha == alpha)
        return f"{'one seed: ' if seeds == 1 else ''}how much of it is noise is not known"

    def row(self, kv_heads: int | None, init: str | None, alpha: float) -> Row | None:
        wanted = (kv_heads, init, alpha)
        return next((row for row in self.rows if (row.kv_heads, row.init, row.alpha) == wanted), None)

    def best(self, kv_heads: int, alpha: float) -> Row | None:
        """The initialisation with the lowest loss."""
        found = [row for row in self.rows if row.kv_heads == kv_heads and row.alpha == alpha]
        return min(found, key=lambda row: row.loss, default=None)

    def of(self, row: Row) -> tuple[CellResult, ...]:
        return tuple(cell for cell in self.cells if cell.name in row.cells)

    def to_dict(self) -> dict[str, object]:
        """Plain data for report.json, without the cells' own files."""
        return {
            "measure": self.measure,
            "tolerance": self.tolerance,
            "rows": [{**asdict(row), "distinguishable": row.distinguishable} for row in self.rows],
            "noise": asdict(self.noise),
            "recommended": asdict(self.recommended),
            "findings": list(self.findings),
        }


def read_cells(directory: Path) -> tuple[CellResult, ...]:
    """Every finished cell of a grid, sorted by name."""
    found: list[CellResult] = []
    for file in sorted(directory.glob(f"*/{RESULT}")):
        record = json.loads(file.read_text(encoding="utf-8"))
        heads, seed = number(record, "cell", "kv_heads"), number(record, "cell", "seed")
        found.append(
            CellResult(
                name=file.parent.name,
                kv_heads=None if heads is None else int(heads),
                init=string(record, "cell", "init"),
                alpha=float(number(record, "cell", "alpha") or 0.0),
                seed=None if seed is None else int(seed),
                steps=int(number(record, "cell", "steps") or 0),
                loss=float(record["loss"]),
                record=record,
            )
        )
    return tuple(found)


def summarise(cells: Sequence[CellResult], *, tolerance: float, measure: str = "loss") -> Ablation:
    """Raises ValueError where not even the parent was measured."""
    if not any(cell.kv_heads is None and cell.alpha == 0 for cell in cells):
        raise ValueError("the parent was not measured: there is nothing to compare with")
    groups: dict[Point, list[CellResult]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.alpha, -(cell.kv_heads or 10**9), cell.seed or 0)):
        groups.setdefault(cell.point, []).append(cell)
    noise = _noise(groups)
    rows = tuple(_row(point, group, groups, noise, measure) for point, group in groups.items())
    draft = Ablation(
        measure=measure,
        cells=tuple(cells),
        rows=rows,
        noise=noise,
        recommended=Recommendation(kv_heads=None, init=None, cell=None, met=False, why=""),
        findings=(),
        tolerance=tolerance,
    )
    recommended = _recommend(draft)
    return Ablation(
        measure=measure,
        cells=tuple(cells),
        rows=rows,
        noise=noise,
        recommended=recommended,
        findings=tuple(_findings(draft)),
        tolerance=tolerance,
    )


def student(df: int) -> float:
    """The 97.5 % quantile of Student's t, to a hundredth beyond 30 degrees of freedom."""
    return _T[df - 1] if df <= len(_T) else 1.96 + 2.45 / df


# -- noise ------------------------------------------------------------------------------------------------------------


def _noise(groups: Mapping[Point, Sequence[CellResult]]) -> Noise:
    trained = {point: group for point, group in groups.items() if point.alpha > 0}
    spread = [(_squares([cell.loss for cell in group]), len(group) - 1) for group in trained.values()]
    loss, loss_df = _pooled(spread)
    blocks: list[tuple[float, int]] = []
    for alpha in {point.alpha for point in trained}:
        losses = [{cell.seed: cell.loss for cell in group} for point, group in trained.items() if point.alpha == alpha]
        seeds = sorted({seed for each in losses for seed in each}, key=str)
        whole = [[each[seed] for seed in seeds] for each in losses if set(each) == set(seeds)]
        if len(whole) > 1 and len(seeds) > 1:
            blocks.append((_residual_squares(whole), (len(whole) - 1) * (len(seeds) - 1)))
    difference, difference_df = _pooled(blocks)
    return Noise(loss=loss, loss_df=loss_df, difference=difference, difference_df=difference_df)


def _pooled(parts: Iterable[tuple[float, int]]) -> tuple[float | None, int]:
    parts = list(parts)
    df = sum(each for _, each in parts)
    return (math.sqrt(sum(squares for squares, _ in parts) / df), df) if df else (None, 0)


def _squares(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)


def _residual_squares(table: Sequence[Sequence[float]]) -> float:
    """Of points × seeds, after the mean of each point and of each seed."""
    points = [fmean(row) for row in table]
    seeds = [fmean(column) for column in zip(*table, strict=True)]
    all_ = fmean(points)
    return sum(
        (value - point - seed + all_) ** 2
        for row, point in zip(table, points, strict=True)
        for value, seed in zip(row, seeds, strict=True)
    )


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(
    point: Point, group: Sequence[CellResult], groups: Mapping[Point, Sequence[CellResult]], noise: Noise, measure: str
) -> Row:
    losses = [cell.loss for cell in group]
    mean, gap, recovered, gap_interval = fmean(losses), None, None, None
    control = groups.get(Point(None, None, 0.0 if measure == "distance" else point.alpha))
    if control is not None and point.kv_heads is not None:
        against = fmean(cell.loss for cell in control)
        gap = mean - against
        if point.alpha > 0:
            gap_interval = noise.of_difference(len(group))
            start = groups.get(Point(point.kv_heads, point.init, 0.0))
            if start is not None:
                damage = fmean(cell.loss for cell in start) - against
                recovered = (damage - gap) / damage if damage > 0 else None
    return Row(
        kv_heads=point.kv_heads,
        init=point.init,
        alpha=point.alpha,
        steps=group[0].steps,
        n=len(group),
        loss=mean,
        low=min(losses),
        high=max(losses),
        interval=noise.of_loss(len(group)) if point.alpha > 0 else None,
        gap=gap,
        gap_interval=gap_interval,
        recovered=recovered,
        cells=tuple(cell.name for cell in group),
    )


# -- what follows -----------------------------------------------------------------------------------------------------


def _recommend(found: Ablation) -> Recommendation:
    """The fewest heads whose best initialisation at the largest alpha is within the tolerance of the control."""
    alpha = found.alphas[-1]
    best = [row for heads in sorted(found.heads) if (row := found.best(heads, alpha)) is not None]
    if not best:
        return Recommendation(kv_heads=None, init=None, cell=None, met=False, why="No model was converted.")
    parent = found.row(None, None, 0.0)
    if parent is None:
        raise ValueError("the parent was not measured: there is nothing to compare with")
    control = found.row(None, None, alpha) if alpha > 0 else None
    reference, against = ("the parent", parent) if control is None else ("the control", control)
    gaps = {row.kv_heads: row.loss - against.loss for row in best}
    within = [row for row in best if gaps[row.kv_heads] <= found.tolerance]
    row = within[0] if within else min(best, key=lambda each: gaps[each.kv_heads])
    rule = (
        f"the fewest heads whose loss at alpha={alpha:g} is at most {found.tolerance:g} {_unit(found.measure)} above "
        f"{reference}'s"
    )
    choice = f"{heads_in_words(row.kv_heads)} with init={row.init}: {gaps[row.kv_heads]:+.4f}"
    if not within:
        more = f"None meets it. Nearest is {choice}; more training or a higher tolerance would be needed."
    elif fewer := [each for each in best if (each.kv_heads or 0) < (row.kv_heads or 0)]:
        more = f"{choice}; {fewer[-1].kv_heads} would be {gaps[fewer[-1].kv_heads]:+.4f}."
    else:
        more = f"{choice}, and fewer were not tried."
    sentences = [f"Rule: {rule}.", more]
    if control is not None and (harm := round(control.loss - parent.loss, 4)) > 0:
        width = "" if control.interval is None else f" ± {control.interval:.4f}"
        sentences.append(
            f"The control, with all heads and trained as long, ended worse than the parent, {harm:+.4f}{width}; to the "
            f"parent the difference is {row.loss - parent.loss:+.4f}."
        )
    if found.caveat:
        sentences.append(f"{found.caveat[0].upper()}{found.caveat[1:]}.")
    cell = min(found.of(row), key=lambda cell: cell.loss).name
    return Recommendation(kv_heads=row.kv_heads, init=row.init, cell=cell, met=bool(within), why=" ".join(sentences))


def heads_in_words(kv_heads: int | None) -> str:
    return "all heads" if kv_heads is None else f"{kv_heads} key/value head{'s' if kv_heads != 1 else ''}"


def _unit(measure: str) -> str:
    return "nats per token" if measure == "loss" else "(1 - cosine)"


def _findings(found: Ablation) -> Iterable[str]:
    """What can and what cannot be told apart, at the largest alpha."""
    alpha = found.alphas[-1]
    if alpha == 0:
        yield "Nothing was trained (alpha=0): these are conversions alone, and no seed makes a difference to them."
        return
    width = found.noise.of_difference(max((row.n for row in found.rows if row.alpha == alpha), default=1))
    if width is None:
        one = "One seed: h" if found.caveat.startswith("one seed") else "H"
        yield (
            f"{one}ow much of a difference is noise is not known. Differences between initialisations, and small "
            "gaps, are not to be read; two seeds or more of several models tell."
        )
        return
    yield f"Differences below ±{width:.4f} at the same alpha are within noise (95 %, over seeds)."
    for heads in found.heads:
        rows = sorted((row for row in found.rows if row.kv_heads == heads and row.alpha == alpha), key=lambda r: r.loss)
        ties = [str(row.init) for row in rows if row.loss - rows[0].loss <= width]
        worse = [f"{row.init} ({row.loss - rows[0].loss:+.4f})" for row in rows if row.loss - rows[0].loss > width]
        label = heads_in_words(heads)
        if len(rows) > 1:
            tied = f"{', '.join(ties)} are within noise of each other" if len(ties) > 1 else f"{ties[0]} is best"
            yield f"{label}: {tied}" + (f"; worse: {', '.join(worse)}." if worse else ".")
        gap = rows[0].gap
        if gap is not None:
            verdict = "within noise of" if abs(gap) <= width else "worse than" if gap > 0 else "better than"
            yield f"{label}: the best ({rows[0].init}) is {verdict} the control, {gap:+.4f} ± {width:.4f}."
