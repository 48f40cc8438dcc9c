"""Figures of what a model does with its context, in the style of `reporting.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..reporting.plots import BLUE, GREEN, INK, MUTED, NARROW, ORANGE, PURPLE, panels

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from .effective import ContextPoint, EffectiveContext

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
_LABELS = 8  # of an axis, at most


def loss_by_context(found: Mapping[str, EffectiveContext], *, width: float = NARROW) -> Figure | None:
    """Loss of the same tokens over the length of the window, a line for each model with its 95 % band; a ring marks the
    effective context. None when there is nothing to draw."""
    if not found:
        return None
    with panels(width, 3.5) as (figure, (axes,)):
        for (name, each), colour in zip(found.items(), _cycled(len(found))):
            length = [point.length for point in each.points]
            axes.plot(
                length,
                [point.loss for point in each.points],
                color=colour,
                linewidth=1.8,
                marker="o",
                markersize=4.5,
                markeredgecolor="white",
                label=name,
                zorder=3,
            )
            low, high = _band(each.points)
            axes.fill_between(length, low, high, color=colour, alpha=0.16, linewidth=0)
            if each.length is not None:
                at = next(point for point in each.points if point.length == each.length)
                axes.plot(
                    [at.length],
                    [at.loss],
                    marker="o",
                    markersize=11,
                    markerfacecolor="none",
                    markeredgecolor=colour,
                    markeredgewidth=1.6,
                    linestyle="none",
                    zorder=4,
                )
        ticks = sorted({point.length for each in found.values() for point in each.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(_thinned(ticks))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("window (tokens read, log scale); ring: effective context")
        axes.set_ylabel("loss of the same tokens (nats)")
        if len(found) > 1:
            axes.legend(loc="best")
    return figure


def retrieval_map(
    scores: Mapping[tuple[int, float], float], *, title: str = "", width: float = NARROW
) -> Figure | None:
    """Share of right answers by length of the text (across) and depth of the answer in it (down, 0 its beginning), each
    cell with its per cent. `scores`: (length, depth from 0 to 1) -> share; cells that are missing stay white."""
    if not scores:
        return None
    lengths, depths = (sorted({key[i] for key in scores}) for i in (0, 1))
    grid = np.array([[scores.get((int(length), depth), np.nan) for length in lengths] for depth in depths])
    with panels(width, 1.35 + 0.36 * len(depths)) as (figure, (axes,)):
        image = axes.imshow(grid, cmap=_colours(), vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.tick_params(length=0)
        axes.set_xlabel("length of the text (tokens)")
        axes.set_ylabel("depth of the answer")
        if title:
            axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        if len(lengths) <= 3 * _LABELS * width / NARROW / 2:
            for (row, column), share in np.ndenumerate(grid):
                if np.isfinite(share):
                    colour = "white" if share > 0.68 else INK
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, format=lambda x, _: f"{100 * x:.0f} %")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9, labelcolor=MUTED)
    return figure


def _colours() -> Colormap:
    """From paper to the blue of the other figures: one hue, so that it also reads in print."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#f4ede4", "#a9c3e0", BLUE])


def _band(points: Sequence[ContextPoint]) -> tuple[list[float], list[float]]:
    nothing = (float("nan"), float("nan"))
    low, high = zip(*(point.interval or nothing for point in points))
    return list(low), list(high)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _thinned(ticks: Sequence[int]) -> list[int]:
    every = -(-len(ticks) // _LABELS)
    return [tick for i, tick in enumerate(reversed(ticks)) if i % every == 0][::-1]
