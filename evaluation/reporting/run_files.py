"""The files of a run directory, read forgivingly: whatever is missing or damaged becomes a stated gap."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

from ..perplexity.result import PositionBucket


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over optimizer steps; `step` strictly increases and every `value` is finite."""

    step: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What a run directory says about its run. `gaps` names what is missing or unreadable, in words."""

    directory: Path
    config: str | None
    lineage: Mapping[str, object]
    accounting: Mapping[str, object]
    summary: Mapping[str, object]
    evaluation: Mapping[str, object]
    metrics: Mapping[str, Series]
    sample: str | None
    gaps: Mapping[str, str]

    @property
    def name(self) -> str:
        name = self.summary.get("name")
        return name if isinstance(name, str) and name else self.directory.resolve().name


def read_run(directory: Path | str) -> RunFiles:
    """Read a run directory. Raises FileNotFoundError when it is none; its files may all be absent."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a run directory: there is no such directory")
    gaps: dict[str, str] = {}
    return RunFiles(
        directory=directory,
        config=_text(directory, "config.yaml", gaps),
        lineage=_json(directory, "lineage.json", gaps),
        accounting=_json(directory, "accounting.json", gaps),
        summary=_json(directory, "summary.json", gaps),
        evaluation=_json(directory, "evaluation.json", gaps),
        metrics=_metrics(directory, "metrics.csv", gaps),
        sample=_text(directory, "sample.txt", gaps),
        gaps=gaps,
    )


def _text(directory: Path, name: str, gaps: dict[str, str]) -> str | None:
    try:
        return (directory / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        gaps[name] = f"{name} is missing: the run did not get that far, or the part was switched off"
    except OSError as error:
        gaps[name] = f"{name} cannot be read: {error.strerror}"
    return None


def _json(directory: Path, name: str, gaps: dict[str, str]) -> dict[str, object]:
    text = _text(directory, name, gaps)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        gaps[name] = f"{name} is damaged: {error}"
        return {}
    if not isinstance(value, dict):
        gaps[name] = f"{name} holds no table of keys and values"
        return {}
    return value


def _metrics(directory: Path, name: str, gaps: dict[str, str]) -> dict[str, Series]:
    """Columns of metrics.csv over the step column. The file is append-only: where a run was killed and continued from
    a checkpoint, steps occur twice and the later row counts; a row cut short by a kill is skipped."""
    text = _text(directory, name, gaps)
    if text is None:
        return {}
    rows = csv.reader(text.splitlines())
    header = next(rows, [])
    if "step" not in header:
        gaps[name] = f"{name} has no column 'step'"
        return {}
    at_step = header.index("step")
    columns: dict[str, dict[int, float]] = {column: {} for column in header if column != "step"}
    for row in rows:
        step = _number(row[at_step]) if len(row) == len(header) else math.nan
        if not math.isfinite(step):
            continue
        for column, cell in zip(header, row):
            if column != "step" and math.isfinite(value := _number(cell)):
                columns[column][int(step)] = value
    if not any(columns.values()):
        gaps[name] = f"{name} holds no measurement yet"
    return {
        column: Series(np.array(steps := sorted(values), dtype=np.int64), np.array([values[step] for step in steps]))
        for column, values in columns.items()
        if values
    }


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


# -- reading values of unknown shape ----------------------------------------------------------------------------------


def position_buckets(perplexity: Mapping[str, object]) -> list[PositionBucket]:
    """The loss-by-position buckets of an evaluation record; those that are not whole are left out."""
    records = perplexity.get("by_position")
    buckets = []
    for record in records if isinstance(records, Sequence) and not isinstance(records, str) else ():
        if not isinstance(record, Mapping):
            continue
        start, end, loss, tokens, n = (number(record, k) for k in ("start", "end", "loss", "tokens", "documents"))
        if start is None or end is None or loss is None or tokens is None or n is None:
            continue
        buckets.append(
            PositionBucket(
                start=int(start),
                end=int(end),
                loss=loss,
                standard_error=number(record, "standard_error"),
                tokens=int(tokens),
                documents=int(n),
            )
        )
    return buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpan:
    """One stage of a run as accounting.json tells it; what it does not tell is None."""

    name: str
    first_step: int
    last_step: int
    context: float | None
    windows: str | None
    lr: float | None
    global_batch: float | None
    tokens: float | None


def stages(run: RunFiles) -> list[StageSpan]:
    """The stages of a run, in order; none of a run that has none."""
    records = run.accounting.get("stages")
    found = []
    for record in records if isinstance(records, Sequence) and not isinstance(records, str) else ():
        name, first_step, last_step = string(record, "name"), number(record, "first_step"), number(record, "last_step")
        if name is None or first_step is None or last_step is None:
            continue
        found.append(
            StageSpan(
                name=name,
                first_step=int(first_step),
                last_step=int(last_step),
                context=number(record, "context"),
                windows=string(record, "windows"),
                lr=number(record, "lr"),
                global_batch=number(record, "global_batch"),
                tokens=number(record, "tokens"),
            )
        )
    return found


def _at(values: object, *path: str) -> object:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def number(values: object, *path: str) -> float | None:
    """The number at a path of keys into nested tables; None when there is none, or NaN."""
    value = _at(values, *path)
    return value if is_number(value) else None


def string(values: object, *path: str) -> str | None:
    value = _at(values, *path)
    return value if isinstance(value, str) and value else None


def mapping(values: object, *path: str) -> Mapping[str, object]:
    value = _at(values, *path)
    return value if isinstance(value, Mapping) else {}


def steps(run: RunFiles) -> float | None:
    for key in ("final_step", "step", "steps"):
        if (value := number(run.summary, key)) is not None:
            return value
    return max((float(series.step[-1]) for series in run.metrics.values()), default=None)


def last(run: RunFiles, key: str) -> float | None:
    """From the summary, else the last one measured."""
    if (value := number(run.summary, key)) is not None:
        return value
    return float(run.metrics[key].value[-1]) if key in run.metrics else None


def typical(run: RunFiles, key: str) -> float | None:
    """From the summary, else the median over the run (the first rows hold compilation and warm-up)."""
    if (value := number(run.summary, key)) is not None:
        return value
    if key not in run.metrics:
        return None
    values = sorted(run.metrics[key].value)
    return float(values[len(values) // 2])
