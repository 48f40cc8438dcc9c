"""A checkpoint's perplexity with its protocol and baseline: evaluation.json, evaluation.md and evaluation.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from ..perplexity.baseline import BaselineResult
from ..perplexity.evaluate import evaluation_record
from ..perplexity.protocols import ProtocolResult
from ..perplexity.result import PerplexityResult
from ..reporting import plots
from ..reporting.markdown import markdown_cell


def write_evaluation(
    result: PerplexityResult,
    directory: Path | str,
    *,
    baseline: BaselineResult | None = None,
    protocols: Sequence[ProtocolResult] = (),
    title: str = "Evaluation",
) -> Path:
    """Write evaluation.json, evaluation.md and evaluation.png (loss by position) into a directory, made if missing.

    Returns the path of the JSON file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    record = json.dumps(evaluation_record(result, baseline, protocols), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / "evaluation.json", (record + "\n").encode())
    write_atomically(directory / "evaluation.md", markdown(result, baseline, protocols, title=title).encode())
    figure = plots.loss_by_position(result.by_position, width=8.0)
    if figure is not None:
        write_atomically(directory / "evaluation.png", plots.png(figure))
    return directory / "evaluation.json"


def markdown(
    result: PerplexityResult,
    baseline: BaselineResult | None = None,
    protocols: Sequence[ProtocolResult] = (),
    *,
    title: str = "Evaluation",
) -> str:
    """The result for people: headline table, protocol in words, by protocol, by source, by position."""
    interval = ""
    if result.loss_interval is not None:
        interval = f" (95 % interval {result.loss_interval[0]:.4f} – {result.loss_interval[1]:.4f} over documents)"
    rows = [
        ("loss", f"{result.loss:.4f} nats per token{interval}"),
        ("perplexity", f"{result.perplexity:,.3f} per token"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        ("bits per byte", _optional(result.bits_per_byte)),
        ("bits per character", _optional(result.bits_per_character)),
        ("scored", f"{result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} documents"),
    ]
    if baseline is not None:
        measured = "" if baseline.bytes == result.bytes else f" on {baseline.bytes:,} bytes (the text as decoded)"
        note = f"{baseline.bits_per_byte:.4f} bits per byte{measured}, fitted on {baseline.trained_bytes:,} bytes"
        if result.bits_per_byte is not None:
            change = 100 * (result.bits_per_byte / baseline.bits_per_byte - 1)
            note += f"; the model differs by {change:+.1f} %"
        rows.append((baseline.name, note))
    lines = [
        f"# {markdown_cell(title)}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
    ]
    lines += [f"Protocol: {result.protocol.words}", ""]
    if protocols:
        lines += [
            "## By protocol",
            "",
            "| protocol | loss | perplexity | scored | what it does |",
            "|---|--:|--:|--:|---|",
        ]
        lines += [
            f"| {each.name} | {each.loss:.4f} | {each.perplexity:,.3f} | {each.tokens:,} "
            f"| {markdown_cell(each.words)} |"
            for each in protocols
        ]
        lines += [""]
    if len(result.by_source) > 1:
        lines += ["## By source", "", "| source | loss | perplexity | bits per byte | tokens | documents |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        lines += [
            f"| {markdown_cell(name)} | {s.loss:.4f} | {s.perplexity:,.3f} | {_optional(s.bits_per_byte)} "
            f"| {s.tokens:,} | {s.documents:,} |"
            for name, s in result.by_source.items()
        ]
        lines += [""]
    if len(result.by_length) > 1:
        lines += ["## By length of the document", "", "| tokens in the document | loss | ± s.e. | bits per byte "]
        lines[-1] += "| tokens | documents |"
        lines += ["|---|--:|--:|--:|--:|--:|"]
        lines += [
            f"| {b.lengths} | {b.loss:.4f} | {_optional(b.standard_error)} | {_optional(b.bits_per_byte)} "
            f"| {b.tokens:,} | {b.documents:,} |"
            for b in result.by_length
        ]
        lines += [""]
    lines += ["## By position in the document", "", "| position | loss | ± s.e. | tokens | documents |"]
    lines += ["|---|--:|--:|--:|--:|"]
    lines += [
        f"| {b.positions} | {b.loss:.4f} | {_optional(b.standard_error)} | {b.tokens:,} | {b.documents:,} |"
        for b in result.by_position
    ]
    return "\n".join(lines) + "\n"


def _optional(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
