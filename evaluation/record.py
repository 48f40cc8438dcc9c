"""evaluation.json: what an evaluation found, with its protocol and baseline; as JSON, Markdown and a figure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import plots
from .files import write_atomically
from .ngram import NgramBaseline
from .protocols import ProtocolResult
from .result import PerplexityResult


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """What a byte n-gram fitted on training text costs on the held-out text.

    bytes  of held-out text that it was measured on: the same as the model's for a fair comparison
    """

    name: str
    order: int
    trained_bytes: int
    bytes: int
    bits_per_byte: float


def measure_baseline(
    train: Iterable[str], held_out: Iterable[str], *, after: Iterable[str] | None = None, order: int = 2
) -> BaselineResult:
    """Fit the n-gram on training documents and measure it on held-out ones, each of which may come after a prompt.

    Raises ValueError when either is empty.
    """
    texts = list(held_out)
    model = NgramBaseline(order).fit(train)
    return BaselineResult(
        name=f"order-{order} byte n-gram",
        order=order,
        trained_bytes=model.trained_bytes,
        bytes=sum(len(text.encode()) for text in texts),
        bits_per_byte=model.bits_per_byte(texts, after=after),
    )


def evaluation_record(
    result: PerplexityResult, baseline: BaselineResult | None = None, protocols: Sequence[ProtocolResult] = ()
) -> dict[str, object]:
    """Plain data for evaluation.json: {"perplexity": …, "baseline": …, "protocols": […]}, the last two where they were
    measured; numbers that are not finite become null."""
    record: dict[str, object] = {"perplexity": result.to_dict()}
    if baseline is not None:
        record["baseline"] = asdict(baseline)
    if protocols:
        record["protocols"] = [asdict(each) for each in protocols]
    return {key: finite(value) for key, value in record.items()}


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


def markdown_cell(text: str) -> str:
    """Text from a user, safe inside a Markdown table. A < that begins no tag stays: `< 0.001` is read in a terminal."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped)


def finite(value: object) -> object:
    """Plain data in which numbers that are not finite are None: JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return finite_or_none(value) if isinstance(value, float) else value


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else value
