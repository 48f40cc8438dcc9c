"""results.json, results.md and results.html: every number of an evaluation, with its protocol, and checkpoints beside
each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from . import plots
from .compare import Comparison
from .context_plots import loss_by_context, retrieval_map
from .files import write_atomically
from .page import Html, details, document, element, facts, figure, gap, joined, section, table, text
from .record import finite, markdown_cell
from .result import PositionBucket
from .suite import RESULTS, CheckpointResults
from .suite_context import context_record, retrieval_record
from .task_result import Metric, TaskResult

FORMAT = 1
_NO_SHARES = ("nll", "perplexity")  # metrics that are shown as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """about   versions, command, commit, when: plain data"""

    about: Mapping[str, object]
    request: Mapping[str, object]
    measured: tuple[CheckpointResults, ...]
    comparisons: tuple[Comparison, ...] = ()
    not_compared: tuple[str, ...] = ()

    def record(self) -> dict[str, object]:
        """results.json; numbers that are not finite are null."""
        return {
            "format": FORMAT,
            **{key: finite(value) for key, value in self.about.items()},
            "request": self.request,
            "checkpoints": [
                {
                    "name": each.name,
                    **each.facts,
                    "perplexity": each.perplexity,
                    "effective_context": {
                        "by_loss": None if each.effective is None else finite(context_record(each.effective)),
                        "by_retrieval": {
                            name: finite(retrieval_record(found)) for name, found in each.retrieves.items()
                        },
                    },
                    "tasks": {name: finite(result.to_dict()) for name, result in each.tasks.items()},
                    "refused": dict(each.refused),
                    "harness": finite(each.harness),
                }
                for each in self.measured
            ],
            "comparisons": [finite(asdict(each)) for each in self.comparisons],
            "not_compared": list(self.not_compared),
        }

    @property
    def title(self) -> str:
        return " and ".join(each.name for each in self.measured)

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(name for each in self.measured for name in each.tasks))


def write_results(results: Results, output: Path) -> None:
    """The page and the text first: where results.json is, everything is."""
    write_atomically(output / "results.md", markdown(results).encode())
    write_atomically(output / "results.html", html(results).encode(errors="replace"))
    content = json.dumps(results.record(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output / RESULTS, (content + "\n").encode())


# -- tables -----------------------------------------------------------------------------------------------------------

Table = tuple[Sequence[str], list[list[str]]]


def score_table(results: Results) -> Table:
    """Task × checkpoint: the headline number of each."""
    rows = []
    for name in results.task_names:
        found = [each.tasks.get(name) for each in results.measured]
        headline = next(result.headline for result in found if result is not None)
        questions = max(result.questions for result in found if result is not None)
        shortened = max(result.truncated for result in found if result is not None)
        rows.append(
            [
                name,
                headline,
                f"{questions:,}",
                f"{shortened:,}",
                *("–" if result is None else _metric(headline, result.score) for result in found),
            ]
        )
    return ["task", "metric", "questions", "shortened", *(each.name for each in results.measured)], rows


def length_table(results: Results) -> Table:
    """Task × length, of each checkpoint."""
    made = [
        (each.name, name, result)
        for each in results.measured
        for name, result in each.tasks.items()
        if result.by("length")
    ]
    lengths = sorted({int(cell.groups["length"]) for _, _, result in made for cell in result.by("length")})
    rows = []
    for checkpoint, name, result in made:
        at = {int(cell.groups["length"]): cell.metrics[result.headline] for cell in result.by("length")}
        rows.append([f"{checkpoint}: {name}", *(_percent(at[length]) if length in at else "–" for length in lengths)])
    return ["task", *(f"{length:,}" for length in lengths)], rows


def metric_rows(result: TaskResult) -> list[list[str]]:
    return [[name, _metric(name, metric)] for name, metric in result.metrics.items()]


def perplexity_table(results: Results) -> Table:
    rows = []
    for each in results.measured:
        found = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(found, Mapping):
            numbers = (found["loss"], found["perplexity"], found["bits_per_byte"], found["bits_per_character"])
            rows.append([each.name, *(_number(number) for number in numbers), f"{found['tokens']:,}"])
    return ["checkpoint", "loss (nats/token)", "perplexity", "bits/byte", "bits/character", "tokens"], rows


def protocol_tables(results: Results) -> list[tuple[str, Table]]:
    """One model's perplexity by each protocol that was asked for, of each checkpoint."""
    found = []
    for each in results.measured:
        protocols = each.perplexity.get("protocols") if each.perplexity is not None else None
        if isinstance(protocols, list) and protocols:
            ours = (each.perplexity or {})["perplexity"]
            base = ours["perplexity"] if isinstance(ours, Mapping) else None
            rows = [
                [
                    entry["name"],
                    _number(entry["perplexity"]),
                    _number(entry["loss"]),
                    f"{100 * (entry['perplexity'] / base - 1):+.1f} %" if base and entry["perplexity"] else "–",
                    f"{entry['tokens']:,}",
                    _number(entry["mean_context"], digits=0),
                ]
                for entry in protocols
            ]
            head = ["protocol", "perplexity", "loss", "against ours", "scored", "mean context"]
            found.append((each.name, (head, rows)))
    return found


def effective_table(results: Results) -> Table:
    rows = []
    for each in results.measured:
        if each.effective is not None:
            rows.append(
                [
                    each.name,
                    "loss",
                    *_length_cells(each.effective.length, each.effective.interval, none="fewer than ten documents"),
                ]
            )
        for name, found in each.retrieves.items():
            cells = _length_cells(found.length, found.interval, none=f"below {found.by_length[0][0]:,}")
            rows.append([each.name, f"{name} ≥ {100 * found.threshold:g} %", *cells])
    return ["checkpoint", "by", "effective context (tokens)", "95 % interval"], rows


def _length_cells(
    length: int | None, interval: tuple[int | None, int | None] | None, none: str = "not measurable"
) -> list[str]:
    shown = [none if each is None else f"{each:,}" for each in (length, *(interval or ()))]
    return [shown[0], f"{shown[1]} – {shown[2]}" if interval is not None else "–"]


def harness_table(results: Results) -> Table:
    rows = []
    for each in results.measured:
        found = each.harness.get("results")
        for task, metrics in (found if isinstance(found, Mapping) else {}).items():
            rows += [
                [each.name, task, name.removesuffix(",none"), _number(value)]
                for name, value in metrics.items()
                if isinstance(value, int | float) and "stderr" not in name
            ]
    return ["checkpoint", "task", "metric", "value"], rows


def comparison_table(results: Results) -> Table:
    rows = [
        [
            f"{each.measure}: {each.first} less {each.second}" + (" (forced)" if each.differing else ""),
            _signed(each, each.difference),
            f"{_signed(each, each.interval[0])} … {_signed(each, each.interval[1])}" if each.interval else "–",
            _p(each.p_value),
            _p(each.adjusted_p_value),
            f"{each.documents:,}",
        ]
        for each in results.comparisons
    ]
    return ["what", "difference", "95 % interval", "p", "p (Holm)", "documents"], rows


def _metric(name: str, metric: Metric) -> str:
    """Shares as per cent, other numbers as they are."""
    shown = _plain_number if name in _NO_SHARES else _percent
    if metric.interval is None:
        return shown(metric.mean)
    low, high = metric.interval
    return f"{shown(metric.mean)} ({shown(low)} – {shown(high)})"


def _plain_number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: object, *, digits: int = 4) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "–"


def _signed(comparison: Comparison, value: float) -> str:
    """Differences of a task's shares in points of a hundred, as the shares are shown; of losses as they are."""
    _, _, metric = comparison.measure.partition(", ")
    return f"{100 * value:+.1f}" if metric and metric not in _NO_SHARES else f"{value:+.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    lines = [f"# Evaluation of {markdown_cell(results.title)}", ""]
    for title, (head, rows), words in _sections(results):
        if rows:
            lines += [f"## {title}", "", *([words, ""] if words else []), *_markdown_table(head, rows), ""]
    refused = [(each.name, name, why) for each in results.measured for name, why in each.refused.items()]
    if refused:
        lines += ["## Not measured", "", *(f"* {name}, {task}: {why}" for name, task, why in refused), ""]
    if results.not_compared:
        lines += ["## Not compared", "", *(f"* {why}" for why in results.not_compared), ""]
    lines += ["## Protocols", "", *(f"* {words}" for words in protocol_words(results)), ""]
    return "\n".join(lines)


def protocol_words(results: Results) -> list[str]:
    """Each protocol once, in words."""
    found: dict[str, None] = {}
    for each in results.measured:
        perplexity = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(perplexity, Mapping):
            found[f"perplexity: {perplexity['protocol']['words']}"] = None
        if each.effective is not None:
            found[f"effective context: {each.effective.words}"] = None
        for result in each.tasks.values():
            found[result.protocol.words] = None
    return list(found)


def _sections(results: Results) -> list[tuple[str, Table, str]]:
    sections = [
        ("Scores", score_table(results), "Per cent where a number is a share; intervals: 95 %, documents resampled."),
        ("Perplexity", perplexity_table(results), ""),
        *(
            (f"Perplexity of {name} by protocol", found, "The same model and text, counted as others count.")
            for name, found in protocol_tables(results)
        ),
        ("Effective context", effective_table(results), ""),
        ("lm-evaluation-harness", harness_table(results), "As the harness counts."),
        ("By length", length_table(results), "Headline metric, per cent, by tokens of the prompt with its answer."),
        (
            "Comparison",
            comparison_table(results),
            "First less second over the same documents; interval: paired bootstrap; p: sign flips of documents, "
            "two-sided.",
        ),
    ]
    return [each for each in sections if each[1][1]]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("--:" for _ in head[1:])]
    cells = [[markdown_cell(cell) for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


# -- the page ---------------------------------------------------------------------------------------------------------


def html(results: Results) -> str:
    """One page that opens offline and requests nothing."""
    parts: list[tuple[str, str, list[Html]]] = []
    for number, (title, (head, rows), words) in enumerate(_sections(results)):
        content = [element("p", words, css="protocol")] if words else []
        parts.append((f"table-{number}", title, [element("div", *content, table(head, rows), css="card")]))
    positions = _curves(results)
    if positions:
        parts.append(("position", "Loss by position", positions))
    contexts = {each.name: each.effective for each in results.measured if each.effective is not None}
    if contexts:
        drawn = _figure(lambda width: loss_by_context(contexts, width=width), "Loss of the same tokens by context")
        parts.append(("context", "Loss by context", [drawn]))
    maps = _maps(results)
    if maps:
        parts.append(("retrieval", "Retrieval by length and depth", maps))
    refused = [f"{each.name}, {name}: {why}" for each in results.measured for name, why in each.refused.items()]
    if refused:
        parts.append(("refused", "Not measured", [gap(why) for why in refused]))
    if results.not_compared:
        parts.append(("not-compared", "Not compared", [gap(why) for why in results.not_compared]))
    parts.append(("how", "How it was measured", _how(results)))
    links = (Html(f'<a href="#{anchor}">{text(title)}</a>') for anchor, title, _ in parts)
    header = element(
        "header",
        element(
            "div",
            element("p", "Longspan evaluation", css="kind"),
            element("h1", results.title),
            element("p", _headline(results), css="facts"),
        ),
    )
    body = joined(
        [
            header,
            Html(f"<nav><div>{joined(links)}</div></nav><main>"),
            *(section(title, *content, anchor=anchor) for anchor, title, content in parts),
            Html("</main>"),
            element("footer", "Written by Longspan. This page requests nothing."),
        ]
    )
    return document(f"{results.title} · Longspan evaluation", body)


def _headline(results: Results) -> str:
    questions = sum(result.questions for each in results.measured for result in each.tasks.values())
    n_tasks = len(results.task_names)
    said = [f"{n_tasks} task{'s' * (n_tasks > 1)}, {questions:,} questions"] if n_tasks else []
    for each in results.measured:
        found = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(found, Mapping) and found["perplexity"] is not None:
            said.append(f"{each.name}: perplexity {found['perplexity']:,.2f}")
    return " · ".join(said)


def _curves(results: Results) -> list[Html]:
    found = []
    for each in results.measured:
        record = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(record, Mapping):
            buckets = [PositionBucket(**bucket) for bucket in record["by_position"]]
            found.append(_figure(lambda width, of=buckets: plots.loss_by_position(of, width=width), each.name))
    return found


def _maps(results: Results) -> list[Html]:
    found = []
    for each in results.measured:
        for name, result in each.tasks.items():
            cells = result.by("length", "depth")
            if cells:
                at = {
                    (int(cell.groups["length"]), float(cell.groups["depth"])): cell.metrics[result.headline]
                    for cell in cells
                }
                caption = f"{name}: {result.headline}, {each.name}"
                found.append(_figure(lambda width, of=at: retrieval_map(of, width=width), caption))
    return found


def _figure(draw: Callable[[float], plots.Figure | None], caption: str) -> Html:
    """Drawn twice: across a page, and for a phone."""
    label = caption.replace("%", "per cent")
    drawn = ((draw(width), css) for width, css in ((plots.WIDE, "wide"), (plots.NARROW, "narrow")))
    return figure([plots.svg(each, label=label, css=css) for each, css in drawn if each], caption, "nothing to draw")


def _how(results: Results) -> list[Html]:
    content = [
        element("div", element("ul", *(element("li", words) for words in protocol_words(results))), css="card"),
    ]
    for each in results.measured:
        content.append(details(f"Checkpoint {each.name}", facts(each.facts)))
        for name, result in each.tasks.items():
            if len(result.metrics) > 1:
                rows = metric_rows(result)
                content.append(details(f"{each.name}, {name}: all metrics", table(["metric", "value"], rows)))
    content.append(details("The request", facts({k: v for k, v in results.request.items() if v is not None})))
    content.append(details("Versions", facts(results.about)))
    return content
