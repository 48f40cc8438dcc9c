"""The report of an ablation, as JSON, Markdown, PNG and one self-contained page: a pure function of the grid's files.

grid.json             what was asked for: parent, recipe, schedule
cells/*/result.json   one a measured cell
speed.json            milliseconds by shape; absent where none were measured
"""

from __future__ import annotations

import json
from pathlib import Path

from ..files import finite, write_atomically
from ..reporting import plots
from ..reporting.markdown import markdown_table
from .page import html
from .tables import (
    BYTES_HEAD,
    LOSS_HEAD,
    SPEED_HEAD,
    AblationFiles,
    bytes_by_heads,
    bytes_rows,
    figures_of,
    headline_of,
    loss_rows,
    losses_by_position,
    position_rows,
    protocol_of,
    read_grid,
    recall_of,
    recall_rows,
    recall_words,
    shown_rows,
    speed_rows,
    speed_words,
    title_of,
)

REPORT = "report"


def write_ablation(directory: Path) -> Path:
    """Writes report.json, report.md, report.html and the figures as report-*.png into the grid's directory; returns the
    page's path. Raises as `read_grid`."""
    files = read_grid(directory)
    record = json.dumps(finite(report_record(files)), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / f"{REPORT}.json", (record + "\n").encode())
    for name, (drawn, _) in figures_of(files, width=8.0).items():
        path = directory / f"{REPORT}-{name}.png"
        if drawn is None:
            path.unlink(missing_ok=True)  # of a report with fewer cells
        else:
            write_atomically(path, plots.png(drawn))
    write_atomically(directory / f"{REPORT}.md", markdown(files).encode())
    write_atomically(directory / f"{REPORT}.html", html(files).encode(errors="replace"))
    return directory / f"{REPORT}.html"


def report_record(files: AblationFiles) -> dict[str, object]:
    """report.json: rows with gaps and intervals, and what they are made of."""
    found = files.found
    return {
        **found.to_dict(),
        "parent": files.grid.get("parent"),
        "kv_bytes_per_token": bytes_by_heads(files),
        "by_position": {
            name: [{"positions": bucket.positions, "loss": bucket.loss} for bucket in buckets]
            for name, buckets in losses_by_position(found).items()
        },
        "retrieval": {name: recall_of(row, found) for name, row in shown_rows(found).items()},
        "speed": list(files.speed),
    }


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(files: AblationFiles) -> str:
    """The report for a terminal or a repository."""
    found = files.found
    lines = [f"# {title_of(files)}", "", f"**{headline_of(files)}**", "", found.recommended.why, ""]
    lines += [protocol_of(files), "", "## Loss", "", *markdown_table(LOSS_HEAD, loss_rows(found), left=2)]
    lines += ["", *(f"* {finding}" for finding in found.findings), ""]
    if rows := bytes_rows(files):
        lines += ["## Cache", "", *markdown_table(BYTES_HEAD, rows), ""]
    for title, (head, rows), words in (
        ("Perplexity by position", position_rows(found), ""),
        ("Retrieval, % found (% guessed without the key)", recall_rows(found), recall_words(files)),
        ("Speed", (list(SPEED_HEAD), speed_rows(files)), speed_words(files)),
    ):
        if rows:
            lines += [f"## {title}", "", *([words, ""] if words else []), *markdown_table(head, rows), ""]
    return "\n".join(lines)
