"""What one measurement leaves behind: rows of a CSV file, the same as JSON lines, and a Markdown table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .environment import append
from .shapes import Quantity

Status = Literal["ok", "inaccurate", "void", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity of one contender in one case.

    status    ok; inaccurate (a peer beyond the error budget, timed all the same); void (ours beyond it, not timed);
              failed (it raised); skipped (it cannot)
    reason    of every status but ok
    value     milliseconds of the median repetition, or MiB beyond the inputs; p20 and p80 beside it, over n repetitions
    scratch_mib  memory without output and gradients
    tflops    on the pairs that the mask allows
    ratio     this contender's value over ours: above 1, ours is faster or smaller
    target    the bound that this row answers, what it bounds (`figure`) and whether it is met
    *_worst, *_relative  error against fp64: largest absolute, and norm over norm
    yardstick whose errors, twice, are the budget
    smoke     a run on a CPU that shows that everything works, and no speed
    """

    date: str
    command: str
    suite: str
    case: str
    contender: str
    quantity: Quantity | Literal[""]
    status: Status
    reason: str = ""
    unit: str = ""
    n: int = 0
    p20: float | None = None
    value: float | None = None
    p80: float | None = None
    scratch_mib: float | None = None
    tflops: float | None = None
    ratio: float | None = None
    target: str = ""
    figure: float | None = None
    target_met: Literal["", "yes", "no"] = ""
    out_worst: float | None = None
    out_relative: float | None = None
    dq_worst: float | None = None
    dq_relative: float | None = None
    dk_worst: float | None = None
    dk_relative: float | None = None
    dv_worst: float | None = None
    dv_relative: float | None = None
    yardstick: str = ""
    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    pairs: float
    gemm_tflops: float | None = None
    copy_tb_per_s: float | None = None
    smoke: bool = False


def save(rows: Sequence[Row], facts: Mapping[str, str], suite: str, directory: Path) -> None:
    """Append to `<suite>.csv` and `<suite>.jsonl`."""
    plain = [{**asdict(row), **facts} for row in rows]
    shown = [{name: "" if value is None else value for name, value in row.items()} for row in plain]
    append(f"{suite}.csv", shown, directory)
    with (directory / f"{suite}.jsonl").open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in plain)


# -- for people --------------------------------------------------------------------------------------------------------


def markdown(
    rows: Sequence[Row], *, title: str, facts: Mapping[str, str], stopped: str, left_out: Sequence[str]
) -> str:
    """The whole run on a page: what was measured, the targets, what did not run."""
    lines = [f"# {title}", "", _machine(rows, facts), "", *_measurements(rows)]
    bounds = [row for row in rows if row.target]
    if bounds:
        met = sum(row.target_met == "yes" for row in bounds)
        lines += [
            "",
            f"## Targets: {met} of {len(bounds)} met",
            "",
            "| target | case | | figure | |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.target} | {row.case} | {row.quantity} | {_number(row.figure)} | {_verdict(row)} |"
            for row in bounds
        ]
    missing = [row for row in rows if row.status != "ok" and not row.quantity]
    if missing:
        lines += ["", "## Not measured", ""]
        lines += _grouped(missing)
    if stopped:
        lines += ["", "## Left out", "", f"{stopped}.", "", *(f"- {name}" for name in left_out)]
    return "\n".join(lines) + "\n"


def _machine(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("none", "unknown"))
    if not rows:
        return told
    first = rows[0]
    if first.smoke:
        return f"**Smoke run on a CPU in {first.dtype}: it shows that everything works, and no speed.** {told}"
    return (
        f"{told}. In this run an 8192³ bf16 product reached {_number(first.gemm_tflops)} TFLOP/s and a copy "
        f"{_number(first.copy_tb_per_s)} TB/s. ms: median (p20 – p80) of n interleaved repetitions with cold L2."
    )


def _measurements(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| case | contender | n | forward ms (TFLOP/s) | backward ms (TFLOP/s) | both ms | × ours: fwd / bwd / both | "
        "MiB (scratch) | relative error out / dq / dk / dv | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, contender), group in _by_contender(row for row in rows if row.quantity).items():
        first = next(iter(group.values()))
        times = [_time(group.get(name)) for name in ("forward", "backward", "both")]
        ratios = " / ".join(_number(_ratio(group.get(name))) for name in ("forward", "backward", "both"))
        memory = group.get("memory")
        space = "" if memory is None else f"{_number(memory.value)} ({_number(memory.scratch_mib)})"
        errors = (first.out_relative, first.dq_relative, first.dk_relative, first.dv_relative)
        told = " / ".join("–" if error is None else f"{error:.1e}" for error in errors)
        note = "" if first.status == "ok" else f"{first.status}: {first.reason}"
        lines.append(
            f"| {case} | {contender} | {first.n} | {' | '.join(times)} | {ratios} | {space} | {told} | {note} |"
        )
    return lines


def _by_contender(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.contender), {})[row.quantity] = row
    return groups


def _grouped(rows: Sequence[Row]) -> list[str]:
    """One line a contender and reason, with its cases."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        cases.setdefault(f"{row.contender}, {row.status}: {row.reason}", []).append(row.case)
    return [f"- {what} ({', '.join(names)})" for what, names in cases.items()]


def _time(row: Row | None) -> str:
    if row is None or row.value is None:
        return ""
    rate = "" if row.tflops is None or row.quantity == "both" else f" ({_number(row.tflops)})"
    return f"{_number(row.value)} ({_number(row.p20)} – {_number(row.p80)}){rate}"


def _ratio(row: Row | None) -> float | None:
    return None if row is None else row.ratio


def _verdict(row: Row) -> str:
    return {"yes": "met", "no": "**missed**", "": "unanswered"}[row.target_met]


def _number(value: float | None) -> str:
    """Three significant digits, whole from 1,000 on."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
