"""What the forms of an ablation's report share: the grid's files, numbers drawn from them, tables and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..perplexity.result import PositionBucket
from ..reporting import plots
from ..reporting.run_files import mapping, number, position_buckets, string
from . import plots as ablation_plots
from .summary import Ablation, CellResult, Row, heads_in_words, read_cells, summarise

GRID, SPEED = "grid.json", "speed.json"
BYTES_HEAD = ("heads", "KV bytes per token (bf16)", "share")


@dataclass(frozen=True, slots=True)
class AblationFiles:
    """Everything that a report is made of."""

    directory: Path
    grid: Mapping[str, object]
    found: Ablation
    speed: Sequence[Mapping[str, float]]


def read_grid(directory: Path) -> AblationFiles:
    """Raises ValueError where no cell is there, or not even the parent's."""
    grid = json.loads((directory / GRID).read_text(encoding="utf-8"))
    speeds = directory / SPEED
    measure = string(grid, "measure") or "loss"
    asked = mapping(grid, "cells")
    cells = [cell for cell in read_cells(directory / "cells") if cell.name in asked]
    return AblationFiles(
        directory=directory,
        grid=grid,
        found=summarise(cells, tolerance=number(grid, "request", "tolerance") or 0.0, measure=measure),
        speed=json.loads(speeds.read_text(encoding="utf-8")) if speeds.is_file() else [],
    )


# -- numbers that several forms show -----------------------------------------------------------------------------------


def shown_rows(found: Ablation) -> dict[str, Row]:
    """The parent, the control and each number of heads with its best initialisation, at the largest alpha."""
    alpha = found.alphas[-1]
    shown: dict[str, Row] = {}
    if (parent := found.row(None, None, 0.0)) is not None:
        shown["parent"] = parent
    if alpha > 0 and (control := found.row(None, None, alpha)) is not None:
        shown["control"] = control
    for heads in found.heads:
        if (best := found.best(heads, alpha)) is not None:
            shown[f"{heads_in_words(heads)}, {best.init}"] = best
    return shown


def losses_by_position(found: Ablation) -> dict[str, list[PositionBucket]]:
    return {name: buckets for name, row in shown_rows(found).items() if (buckets := _mean_buckets(found.of(row)))}


def _mean_buckets(cells: Sequence[CellResult]) -> list[PositionBucket]:
    """The loss by position, a mean over seeds (all cells score the same tokens)."""
    each = [position_buckets(mapping(cell.record, "perplexity")) for cell in cells]
    if not each or not all(len(buckets) == len(each[0]) for buckets in each):
        return []
    return [
        PositionBucket(
            start=same[0].start,
            end=same[0].end,
            loss=sum(bucket.loss for bucket in same) / len(same),
            standard_error=None,
            tokens=same[0].tokens,
            documents=same[0].documents,
        )
        for same in zip(*each, strict=True)
    ]


def _position_gaps(found: Ablation) -> dict[int, list[tuple[PositionBucket, float]]]:
    """By number of heads: each bucket with its difference to the control (or the parent, where there is none)."""
    positions, shown = losses_by_position(found), shown_rows(found)
    against = positions.get("control") or positions.get("parent") or []
    return {
        row.kv_heads: [(bucket, bucket.loss - base.loss) for bucket, base in zip(positions[name], against, strict=True)]
        for name, row in shown.items()
        if row.kv_heads is not None and name in positions and len(positions[name]) == len(against)
    }


def recall_of(row: Row, found: Ablation) -> list[dict[str, float]]:
    """length, found, guessed: means over seeds."""
    lists = [cell.record.get("retrieval") for cell in found.of(row)]
    rows = [each for each in lists if isinstance(each, list) and each]
    if not rows:
        return []
    return [
        {key: sum(number(each, key) or 0.0 for each in same) / len(same) for key in ("length", "found", "guessed")}
        for same in zip(*rows, strict=True)
    ]


def recall_words(files: AblationFiles) -> str:
    parent = recall_of(shown_rows(files.found)["parent"], files.found)
    if not parent:
        return "Not measured."
    best = max(each["found"] - each["guessed"] for each in parent)
    what = (
        "Sixteen random tokens stand early in a text; the first eight of them come again at its end, and the others "
        "are asked for. "
    )
    if best < 0.05:
        return what + (
            f"The parent itself cannot do this (at most {100 * best:.1f} % more than it guesses without the key in the "
            "text), so nothing about grouped heads follows from it."
        )
    return what + f"The parent finds up to {100 * best:.0f} % more of them than it guesses without the key in the text."


def bytes_by_heads(files: AblationFiles) -> dict[str, float]:
    """KV bytes per token, bf16, by number of heads; the parent's first."""
    found: dict[str, float] = {}
    for row in (files.found.row(None, None, 0.0), *(files.found.best(heads, 0.0) for heads in files.found.heads)):
        if row is None:
            continue
        cell = files.found.of(row)[0]
        if (value := number(cell.record, "kv_bytes_per_token")) is not None:
            found[str(int(number(cell.record, "model_kv_heads") or 0))] = value
    return found


# -- tables, as rows of text -------------------------------------------------------------------------------------------

LOSS_HEAD = (
    "heads",
    "init",
    "alpha",
    "steps",
    "seeds",
    "loss",
    "± 95 %",
    "perplexity",
    "gap to control",
    "± 95 %",
    "recovered",
)


def loss_rows(found: Ablation) -> list[tuple[str, ...]]:
    rows = sorted(found.rows, key=lambda row: (-(row.kv_heads or 10**9), str(row.init), row.alpha))
    return [
        (
            "all" if row.kv_heads is None else str(row.kv_heads),
            "control"
            if row.kv_heads is None and row.alpha > 0
            else "parent"
            if row.kv_heads is None
            else str(row.init),
            f"{row.alpha:g}",
            f"{row.steps:,}",
            str(row.n),
            f"{row.loss:.4f}",
            _optional(row.interval, "{:.4f}"),
            f"{_perplexity(row.loss):,.2f}" if found.measure == "loss" else "—",
            _optional(row.gap, "{:+.4f}"),
            _optional(row.gap_interval, "{:.4f}"),
            _optional(None if row.recovered is None else 100 * row.recovered, "{:.1f} %"),
        )
        for row in rows
    ]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def bytes_rows(files: AblationFiles) -> list[tuple[str, ...]]:
    by_heads = bytes_by_heads(files)
    most = max(by_heads.values(), default=0.0)
    return [(heads, f"{value:,.0f}", f"{value / most:.3f}") for heads, value in by_heads.items()]


def position_rows(found: Ablation) -> tuple[list[str], list[tuple[str, ...]]]:
    positions = losses_by_position(found)
    columns = list(positions.values())
    if not columns or not all(len(each) == len(columns[0]) for each in columns):
        return [], []
    rows = [
        (same[0].positions, *(f"{_perplexity(bucket.loss):,.2f}" for bucket in same))
        for same in zip(*columns, strict=True)
    ]
    return ["position", *positions], rows


def recall_rows(found: Ablation) -> tuple[list[str], list[tuple[str, ...]]]:
    results = {name: each for name, row in shown_rows(found).items() if (each := recall_of(row, found))}
    if not results:
        return [], []
    lengths = [each["length"] for each in next(iter(results.values()))]
    rows = [
        (
            f"{length:,.0f}",
            *(f"{100 * each[i]['found']:.1f} ({100 * each[i]['guessed']:.1f})" for each in results.values()),
        )
        for i, length in enumerate(lengths)
    ]
    return ["tokens", *results], rows


SPEED_HEAD = (
    "batch",
    "context",
    "heads",
    "prefill ms",
    "decode ms",
    "20 – 80 %",
    "limit ms",
    "× limit",
    "faster than all heads",
    "KV MiB",
)


def speed_rows(files: AblationFiles) -> list[tuple[str, ...]]:
    whole = {
        (each["batch"], each["context"]): each["decode_ms"]
        for each in sorted(files.speed, key=lambda each: each["kv_heads"])
    }
    return [
        (
            f"{each['batch']:g}",
            f"{each['context']:,.0f}",
            f"{each['kv_heads']:g}",
            f"{each['prefill_ms']:.2f}",
            f"{each['decode_ms']:.3f}",
            f"{each['decode_low_ms']:.3f} – {each['decode_high_ms']:.3f}",
            f"{each['limit_ms']:.3f}",
            f"{each['decode_ms'] / each['limit_ms']:.1f}",
            f"{whole[each['batch'], each['context']] / each['decode_ms']:.2f}×",
            f"{each['kv_bytes'] / 2**20:.2f}",
        )
        for each in files.speed
    ]


def speed_words(files: AblationFiles) -> str:
    if not files.speed:
        return "Not measured."
    each = files.speed[0]
    return (
        f"Measured on {each['device']} in {each['dtype']} with random weights of the model's shape: medians of "
        f"{each['repetitions']:g} prefills and {each['steps']:g} steps, with the range of most of them; where those "
        "overlap, nothing was measured to be faster. The limit is the time to read the step's weights, keys and values "
        f"once at the rate of a copy, {each['copy_gb_per_s']:.0f} GB/s read and written."
    )


def _optional(value: float | None, form: str) -> str:
    return "—" if value is None else form.format(value)


def figures_of(files: AblationFiles, *, width: float) -> dict[str, tuple[plots.Figure | None, str]]:
    """By name: drawing and caption."""
    found = files.found
    recalls = {
        name: [(int(each["length"]), each["found"]) for each in results]
        for name, row in shown_rows(found).items()
        if (results := recall_of(row, found))
    }
    guessed = [(int(each["length"]), each["guessed"]) for each in recall_of(shown_rows(found)["parent"], found)]
    bars, gap_bars = "bars: 95 % over seeds", "bars: 95 % of the difference"
    if found.noise.loss is None:
        bars = gap_bars = "one seed, so without intervals"
    elif found.noise.difference is None:
        gap_bars = "without intervals"
    return {
        "alpha": (ablation_plots.loss_by_alpha(found, width=width), f"Loss against alpha ({bars})"),
        "heads": (ablation_plots.gap_by_heads(found, width=width), f"Gap to the control ({gap_bars})"),
        "position": (
            ablation_plots.by_position(_position_gaps(found), width=width),
            "Loss by position, less the control's",
        ),
        "retrieval": (ablation_plots.recall(recalls, guessed, width=width), "Retrieval by length"),
        "speed": (ablation_plots.speed(files.speed, width=width), "A decoding step, measured and at the limit"),
    }


def title_of(files: AblationFiles) -> str:
    return f"From {number(files.grid, 'parent', 'kv_heads'):g} key/value heads to {_list(files.found.heads)}"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def headline_of(files: AblationFiles) -> str:
    chosen = files.found.recommended
    if chosen.kv_heads is None:
        return "Nothing was converted."
    verb = "Recommended" if chosen.met else "Nothing recommended; nearest"
    known = f" ({files.found.caveat})" if files.found.caveat else ""
    return f"{verb}: {heads_in_words(chosen.kv_heads)}, init={chosen.init}{known}"


def protocol_of(files: AblationFiles) -> str:
    """What was trained, and how it was measured."""
    parent, request = mapping(files.grid, "parent"), mapping(files.grid, "request")
    cell = files.found.cells[0].record
    scored = string(cell, "perplexity", "protocol", "words") or string(cell, "protocol") or ""
    return (
        f"Parent: {string(parent, 'checkpoint')}, {number(parent, 'steps') or 0:,.0f} steps. Each cell trains for "
        f"alpha of those with schedule={string(request, 'schedule')} at {number(files.grid, 'lr') or 0:.3g} "
        f"({number(request, 'lr_fraction') or 0:g} of the parent's peak), "
        f"{number(files.grid, 'tokens_per_step') or 0:,.0f} tokens a step. {scored}"
    )
