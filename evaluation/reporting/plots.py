"""The figures of a report: one style, readable labels with units, colours that survive colour blindness and print.

matplotlib is imported when a figure is made, never with this module, and without pyplot: no global state, no display.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..perplexity.result import PositionBucket
from .page import SHORTENED, short
from .run_files import Series, StageSpan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#1f5fa8", "#c8590a", "#117a63", "#7a4b9c"
INK, MUTED, GRID = "#1d2733", "#5b6775", "#e4e8ee"
_POINTS = 400  # what a line of this width can show; longer series are drawn as mean and range of equal step bins

WIDE, NARROW = 11.5, 5.6  # inches: a figure across the page, and one in half of it or on a phone

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: figures look alike on every machine
    "font.size": 10.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aab4c0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#aab4c0",
    "ytick.color": "#aab4c0",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "text.parse_math": False,
}


def loss_curves(
    metrics: Mapping[str, Series], *, width: float = NARROW, stages: Sequence[StageSpan] = ()
) -> Figure | None:
    """Training and validation loss over steps, with a line where a stage begins; None when neither was measured."""
    train, validation = metrics.get("loss"), metrics.get("validation_loss")
    if train is None and validation is None:
        return None
    with _axes(width, 3.5) as (figure, axes):
        if train is not None:
            _line(axes, train, BLUE, "training")
        if validation is not None:
            axes.plot(
                validation.step,
                validation.value,
                color=ORANGE,
                marker="o",
                markersize=4.5 if len(validation) <= 60 else 0,
                markeredgecolor="white",
                markeredgewidth=0.8,
                linewidth=1.6,
                label="validation",
                zorder=3,
            )
        _steps(axes)
        axes.set_ylabel("loss (nats per token)")
        values = np.concatenate([series.value for series in (train, validation) if series is not None])
        _clip_outliers(axes, values)
        _boundaries(axes, stages)
        axes.legend(loc="upper right")
    return figure


def _boundaries(axes: Axes, stages: Sequence[StageSpan]) -> None:
    """Where stages meet, and the name of each above its part; names that would run into the next are numbers."""
    if not stages:
        return
    inches = axes.get_figure(root=True).get_size_inches()[0]  # pyright: ignore[reportOptionalMemberAccess] (they are in one)
    total = max(stages[-1].last_step, 1)
    room = [0.11 * inches * 72 * (stage.last_step - stage.first_step + 1) / total for stage in stages]  # letters
    crowded = any(len(stage.name) > letters for stage, letters in zip(stages, room))
    for number, stage in enumerate(stages, start=1):
        if number > 1:
            axes.axvline(stage.first_step - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            str(number) if crowded else stage.name,
            xy=((stage.first_step + stage.last_step) / 2, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=9,
            annotation_clip=False,
        )


def learning_rate(metrics: Mapping[str, Series]) -> Figure | None:
    """The schedule as it was applied."""
    return _single(metrics.get("lr"), GREEN, "learning rate", from_zero=True)


def gradient_norm(metrics: Mapping[str, Series]) -> Figure | None:
    """Norm of the gradient before clipping, on a log scale."""
    return _single(metrics.get("grad_norm"), PURPLE, "gradient norm", log=True)


def throughput(metrics: Mapping[str, Series]) -> Figure | None:
    """Tokens per second."""
    return _single(metrics.get("tokens_per_second"), BLUE, "tokens per second", from_zero=True)


def utilisation(metrics: Mapping[str, Series]) -> Figure | None:
    """Model FLOPs utilisation in per cent of the device's peak; None where the peak is unknown."""
    mfu = metrics.get("mfu")
    if mfu is None:
        return None
    return _single(Series(mfu.step, 100 * mfu.value), ORANGE, "MFU (% of peak)", from_zero=True)


def loss_limits(curves: Sequence[Sequence[PositionBucket]]) -> tuple[float, float] | None:
    """From the least to the greatest of several curves by position, their errors included, with some room; None where
    there is nothing."""
    values = np.concatenate([np.empty(0), *(each for buckets in curves for each in _with_errors(buckets))])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _with_errors(buckets: Sequence[PositionBucket]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses, and two standard errors below and above; NaN where there is no error."""
    loss = np.array([b.loss for b in buckets])
    error = np.array([np.nan if b.standard_error is None else 2 * b.standard_error for b in buckets])
    return loss, loss - error, loss + error


def loss_by_position(
    buckets: Sequence[PositionBucket], *, width: float = NARROW, limits: tuple[float, float] | None = None
) -> Figure | None:
    """Mean loss over log-spaced positions in the document, with two standard errors over documents each way.

    limits  of the loss, for figures that are looked at beside each other; None: its own
    """
    if not buckets:
        return None
    centre = np.array([np.sqrt((b.start + 1) * b.end) for b in buckets])  # counted from 1: the axis is logarithmic
    loss, low, high = _with_errors(buckets)
    with _axes(width, 3.5) as (figure, axes):
        axes.fill_between(centre, low, high, color=BLUE, alpha=0.16, linewidth=0)
        axes.plot(centre, loss, color=BLUE, linewidth=1.8, marker="o", markersize=4.5, markeredgecolor="white")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: tick(x))
        axes.set_xlabel("position in the document (tokens, first = 1, log scale)")
        axes.set_ylabel("loss (nats per token)")
        if limits is not None:
            axes.set_ylim(*limits)
    return figure


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def png_data_uri(figure: Figure, *, dpi: int = 150) -> str:
    """The figure as a data: address for an <img>."""
    return "data:image/png;base64," + base64.b64encode(png(figure, dpi=dpi)).decode()


def svg(figure: Figure, *, label: str, css: str = "") -> str:
    """The figure as an <svg> element that scales with its container; `label` is for screen readers and must be plain
    words (no markup characters), `css` a class. Ids carry both, so that several figures can share a page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": label + css}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    view_box = re.search(r'viewBox="([-\d. ]+)"', head)
    if view_box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    # Ids are the page's, not the drawing's: without a prefix the first drawing would lend its glyphs to all others.
    prefix = re.sub(r"[^a-z]+", "-", f"{label} {css}".lower())
    body = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    # Inside HTML neither namespace needs an address, and the page then holds no URL at all.
    return f'<svg class="{css}" viewBox="{view_box[1]}" role="img" aria-label="{label}">{body}'


# -- the style in one place -------------------------------------------------------------------------------------------


@contextmanager
def panels(
    width: float, height: float, columns: int = 1, rows: int = 1, *, one_scale: bool = True
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with axes side by side, row by row; sizes in inches. What is drawn inside the block has the style of
    this file. `one_scale`: all have the same vertical scale."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharey=one_scale, squeeze=False)
        yield figure, list(axes.flat)


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes."""
    with panels(width, height) as (figure, (axes,)):
        yield figure, axes


def _single(
    series: Series | None, colour: str, label: str, *, from_zero: bool = False, log: bool = False
) -> Figure | None:
    if series is None or (log and not (series.value > 0).any()):
        return None
    with _axes(NARROW, 2.7) as (figure, axes):
        _line(axes, series, colour, label)
        _steps(axes)
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
            _log_ticks(axes)
        else:
            axes.yaxis.set_major_formatter(lambda y, _: tick(y))
        if from_zero:
            axes.set_ylim(0, max(1.1 * float(series.value.max()), 1e-12))
    return figure


def _line(axes: Axes, series: Series, colour: str, label: str) -> None:
    """Every point where they fit; else the mean of equal step bins over their range."""
    if len(series) <= _POINTS:
        marker = "o" if len(series) <= 30 else None
        axes.plot(series.step, series.value, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
        return
    step, mean, low, high = binned(series, _POINTS)
    axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0, label=f"{label}: range")
    axes.plot(step, mean, color=colour, linewidth=1.4, label=f"{label}: mean")


def binned(series: Series, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mean step, mean, least, greatest value) of the non-empty ones of `bins` equal parts of the step axis."""
    first, last = series.step[0], series.step[-1]
    part = np.minimum((series.step - first) * bins // max(last - first, 1), bins - 1)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    count = np.diff(np.append(starts, len(series)))
    return (
        np.add.reduceat(series.step, starts) / count,
        np.add.reduceat(series.value, starts) / count,
        np.minimum.reduceat(series.value, starts),
        np.maximum.reduceat(series.value, starts),
    )


def _clip_outliers(axes: Axes, values: np.ndarray) -> None:
    """Keep one spike from flattening the curve: when the top 0.5 % are far above the rest, they leave the frame."""
    low, high, top = values.min(), np.quantile(values, 0.995), values.max()
    if len(values) > 200 and top - low > 1.5 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
        axes.annotate(
            f"highest: {top:.3g}", xy=(0.01, 0.97), xycoords="axes fraction", va="top", color=MUTED, fontsize=9
        )


def _steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))


def _log_ticks(axes: Axes) -> None:
    """Labels at 1, 2 and 5 times powers of ten, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: tick(y))


def tick(x: float) -> str:
    """15000 -> 15k; small numbers as they are."""
    return short(x).replace(" ", "") if abs(x) >= SHORTENED else f"{x:.4g}"
