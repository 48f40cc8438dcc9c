"""The figure of a suite: rates by case and contender; time and memory over length where a suite has such a series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.evaluation.reporting.plots import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, png

from .rows import Row
from .shapes import CUDNN, FLASH, FLASH_4, FLEX, LONGFORMER, Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {FLASH: MUTED, CUDNN: GREEN, FLEX: ORANGE, LONGFORMER: "#8c6d1f", FLASH_4: PURPLE}  # ours is blue

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "text.color": INK,
    "legend.frameon": False,
    "text.parse_math": False,
}


def draw(rows: Sequence[Row], cases: Sequence[Case], path: Path) -> None:
    """Write a PNG: a row of bar charts (forward, backward), and one of lines where cases form a series over length."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    series = {case.name for case in cases if case.series}
    bars = [row for row in rows if row.case not in series and row.tflops is not None]
    lines = [row for row in rows if row.case in series and row.value is not None]
    panels = [each for each in (bars, lines) if each]
    if not panels:
        return
    n_bars = len({(row.case, row.contender) for row in bars})
    n_cases = len({row.case for row in bars})
    heights = ([0.17 * n_bars + 0.25 * n_cases + 1.0] if bars else []) + ([3.6] if lines else [])
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, sum(heights)), layout="constrained")
        parts = list(figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0])
        if bars:
            part = parts.pop(0)
            for axes, quantity in zip(part.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
                _bars(axes, [row for row in bars if row.quantity == quantity], quantity)
            handles, names = part.axes[0].get_legend_handles_labels()
            part.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)))
        if lines:
            time, memory = parts.pop().subplots(1, 2)
            _over_length(time, lines, ("forward", "backward"), "ms")
            _over_length(memory, lines, ("memory",), "MiB beyond the inputs")
        if rows[0].smoke:
            figure.suptitle("smoke run on a CPU: no speeds", color=ORANGE)
        path.write_bytes(png(figure))


def _bars(axes: Axes, rows: Sequence[Row], title: str) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    at, centres = 0.0, []
    for case in cases:
        group = [row for row in rows if row.case == case]
        for offset, row in enumerate(group):
            label = row.contender if row.contender in names else "_"
            names = [name for name in names if name != row.contender]  # each contender once in the legend
            axes.barh(at + offset, row.tflops or 0.0, height=0.9, color=_colour(row.contender), label=label)
        centres.append(at + (len(group) - 1) / 2)
        at += len(group) + 1.0
    axes.set_yticks(centres, cases)
    axes.set_ylim(at - 1.0, -1.0)  # the first case on top
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("TFLOP/s on the pairs that the mask allows")
    axes.set_title(title)


def _over_length(axes: Axes, rows: Sequence[Row], quantities: Sequence[str], unit: str) -> None:
    for quantity, marker in zip(quantities, ("o", "s"), strict=False):
        points = sorted((row.length, row.value or 0.0) for row in rows if row.quantity == quantity)
        if points:
            at, values = zip(*points, strict=True)
            axes.plot(at, values, marker=marker, color=BLUE if marker == "o" else GREEN, label=quantity)
            first_length, first = points[0]
            axes.plot(at, [first * n / first_length for n in at], color=MUTED, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row.length for row in rows})
    axes.set_xticks(lengths, [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("length (dotted: linear from the first point)")
    axes.set_ylabel(unit)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _colour(contender: str) -> str:
    return _COLOURS.get(contender, BLUE)
