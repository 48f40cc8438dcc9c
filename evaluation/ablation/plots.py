"""The figures of an ablation, in the style of `reporting.plots`: one colour an initialisation, or a number of heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..perplexity.result import PositionBucket
from ..reporting.plots import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, panels, tick
from .summary import Ablation, Row, heads_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#a3263a", "#8a7a1a", "#3f8fa8", "#b5649b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_TOO_FEW = 64  # tokens of a position: their mean is noise that hides everything else
_AXIS = {"loss": "loss (nats per token)", "distance": "1 − cosine to the parent"}


def loss_by_alpha(found: Ablation, *, width: float) -> Figure | None:
    """A panel for each number of heads: loss over alpha, a line an initialisation, the control dashed."""
    if len(found.alphas) < 2 or not found.heads:
        return None
    wide = width > 8
    columns = min(len(found.heads), 4 if wide else 1)
    rows = -(-len(found.heads) // columns)
    with panels(width, 2.9 * rows + 0.4, columns, rows) as (figure, axes):
        for i, (each, heads) in enumerate(zip(axes, found.heads, strict=False)):
            for init, colour, marker in zip(found.inits, COLOURS, MARKERS, strict=False):
                line = [row for alpha in found.alphas if (row := found.row(heads, init, alpha)) is not None]
                _line(each, line, colour, marker, init)
            control = [row for alpha in found.alphas if (row := found.row(None, None, alpha)) is not None]
            each.plot(
                [row.alpha for row in control],
                [row.loss for row in control],
                color=INK,
                linestyle="--",
                linewidth=1.3,
                label="control (all heads)" if len(control) > 1 else None,
                marker=None if len(control) > 1 else "_",
                markersize=12,
            )
            each.set_title(heads_in_words(heads), fontsize=10.5, color=INK)
            each.set_xticks(list(found.alphas), [f"{alpha:g}" for alpha in found.alphas])
            each.set_xlabel("alpha (share of the parent's steps)")
            if i % columns == 0:
                each.set_ylabel(_AXIS[found.measure])
        for each in axes[len(found.heads) :]:
            each.set_visible(False)
        axes[0].legend(fontsize=9)
    return figure


def _line(axes: Axes, rows: Sequence[Row], colour: str, marker: str, label: str) -> None:
    axes.errorbar(
        [row.alpha for row in rows],
        [row.loss for row in rows],
        yerr=_bars([row.interval for row in rows]),
        color=colour,
        marker=marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.6,
        capsize=2.5,
        elinewidth=1.1,
        label=label,
    )


def _bars(intervals: Sequence[float | None]) -> list[float] | None:
    """Halves of intervals, none where they are not known; None: no bars at all."""
    if all(interval is None for interval in intervals):
        return None
    return [math.nan if interval is None else interval for interval in intervals]


def gap_by_heads(found: Ablation, *, width: float) -> Figure | None:
    """What is left of the difference to the control at the largest alpha, over the number of heads."""
    alpha = found.alphas[-1]
    lines = {
        init: [row for heads in reversed(found.heads) if (row := found.row(heads, init, alpha)) and row.gap is not None]
        for init in found.inits
    }
    if alpha == 0 or not any(lines.values()):
        return None
    with panels(width, 3.5) as (figure, (axes,)):
        axes.axhspan(0, found.tolerance, color=GREEN, alpha=0.1, linewidth=0, label=f"tolerance {found.tolerance:g}")
        axes.axhline(0, color=INK, linestyle="--", linewidth=1.2)
        places = {heads: i for i, heads in enumerate(reversed(found.heads))}
        for i, (init, rows) in enumerate(lines.items()):
            shift = 0.08 * (i - (len(lines) - 1) / 2)  # error bars side by side
            axes.errorbar(
                [places[row.kv_heads or 0] + shift for row in rows],
                [row.gap or 0.0 for row in rows],
                yerr=_bars([row.gap_interval for row in rows]),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5.5,
                markeredgecolor="white",
                linewidth=1.5,
                capsize=2.5,
                label=init,
            )
        axes.set_xticks(list(places.values()), [str(heads) for heads in places])
        axes.set_xlabel("key/value heads")
        axes.set_ylabel(
            f"gap to the control at alpha={alpha:g}\n({'nats per token' if found.measure == 'loss' else '1 − cosine'})"
        )
        # Beside no line: error bars may be anywhere.
        axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(lines) + 1, frameon=False)
    return figure


def by_position(gaps: Mapping[int, Sequence[tuple[PositionBucket, float]]], *, width: float) -> Figure | None:
    """Difference of the loss to the control's over log-spaced positions, a line a number of heads; `gaps` by number of
    heads: each bucket with its difference. Positions of few tokens are left out where there are others."""
    if not gaps:
        return None
    gaps = {heads: [each for each in line if each[0].tokens >= _TOO_FEW] or line for heads, line in gaps.items()}
    with panels(width, 3.5) as (figure, (axes,)):
        axes.axhline(0, color=INK, linestyle="--", linewidth=1.2)
        for (heads, line), colour, marker in zip(gaps.items(), COLOURS, MARKERS, strict=False):
            centre = [float(np.sqrt((bucket.start + 1) * bucket.end)) for bucket, _ in line]
            axes.plot(
                centre,
                [gap for _, gap in line],
                color=colour,
                marker=marker,
                markersize=4.5,
                markeredgecolor="white",
                linewidth=1.5,
                label=heads_in_words(heads),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tick(x))
        axes.set_xlabel("position in the document (tokens, first = 1, log scale)")
        axes.set_ylabel("loss − control's (nats per token)")
        axes.legend(fontsize=9)
    return figure


def recall(
    lines: Mapping[str, Sequence[tuple[int, float]]], guessed: Sequence[tuple[int, float]], *, width: float
) -> Figure | None:
    """Share of hidden tokens found over the length of the text; by name of the model."""
    if not lines:
        return None
    with panels(width, 3.3) as (figure, (axes,)):
        for (name, line), colour, marker in zip(lines.items(), (INK, *COLOURS), ("x", *MARKERS), strict=False):
            axes.plot(
                [length for length, _ in line],
                [100 * found for _, found in line],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
                label=name,
            )
        axes.plot(
            [length for length, _ in guessed],
            [100 * found for _, found in guessed],
            color=MUTED,
            linestyle=":",
            linewidth=1.3,
            label="parent, key not in the text",
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tick(x))
        axes.set_ylim(0, None)
        axes.set_xlabel("tokens of the text (log scale)")
        axes.set_ylabel("found (% of asked tokens)")
        axes.legend(fontsize=9)
    return figure


def speed(rows: Sequence[Mapping[str, float]], *, width: float) -> Figure | None:
    """Milliseconds of a decoding step over the number of heads, a panel a (batch, context); the limit of memory dotted.

    rows   batch, context, kv_heads, decode_ms, decode_low_ms, decode_high_ms, limit_ms
    """
    shapes = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    if not shapes:
        return None
    wide = width > 8
    columns = min(len(shapes), 4 if wide else 2)
    n_rows = -(-len(shapes) // columns)
    with panels(width, 2.7 * n_rows + 0.4, columns, n_rows, one_scale=False) as (figure, axes):
        for i, (each, (batch, context)) in enumerate(zip(axes, shapes, strict=False)):
            line = sorted(
                (row for row in rows if (row["batch"], row["context"]) == (batch, context)), key=lambda r: r["kv_heads"]
            )
            places = range(len(line))
            each.fill_between(
                places,
                [row["decode_low_ms"] for row in line],
                [row["decode_high_ms"] for row in line],
                color=BLUE,
                alpha=0.16,
                linewidth=0,
            )
            each.plot(
                places, [row["decode_ms"] for row in line], color=BLUE, marker="o", linewidth=1.6, label="measured"
            )
            each.plot(
                places,
                [row["limit_ms"] for row in line],
                color=MUTED,
                marker=".",
                linestyle=":",
                linewidth=1.3,
                label="time to read the bytes",
            )
            each.set_xticks(list(places), [f"{row['kv_heads']:g}" for row in line])
            each.set_title(f"batch {batch:g}, context {context:,.0f}", fontsize=10, color=INK)
            each.set_xlabel("key/value heads")
            if i % columns == 0:
                each.set_ylabel("ms per step")
            each.set_ylim(0, None)
        for each in axes[len(shapes) :]:
            each.set_visible(False)
        axes[0].legend(fontsize=9)
    return figure
