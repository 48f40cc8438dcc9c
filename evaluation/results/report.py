"""results.json, results.md and results.html: every number of an evaluation, with its protocol, and checkpoints beside
each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..context.plots import loss_by_context, retrieval_map
from ..context.records import context_record, retrieval_record
from ..files import finite, write_atomically
from ..perplexity.result import PositionBucket
from ..reporting import plots
from ..reporting.markdown import markdown_cell, markdown_table
from ..reporting.page import Html, details, document, element, facts, figure, gap, joined, section, table, text
from ..reporting.run_files import mapping
from .compare import Comparison
from .directory import RESULTS, CheckpointResults
from .tables import (
    Table,
    comparison_table,
    comparison_words,
    effective_table,
    harness_table,
    length_table,
    metric_rows,
    perplexity_table,
    protocol_tables,
    score_table,
    task_names,
)

FORMAT = 1


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


def write_results(results: Results, output: Path) -> None:
    """The page and the text first: where results.json is, everything is."""
    write_atomically(output / "results.md", markdown(results).encode())
    write_atomically(output / "results.html", html(results).encode(errors="replace"))
    content = json.dumps(results.record(), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output / RESULTS, (content + "\n").encode())


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    lines = [f"# Evaluation of {markdown_cell(results.title)}", ""]
    for title, (head, rows), words in _sections(results):
        if rows:
            lines += [f"## {title}", "", *([words, ""] if words else []), *markdown_table(head, rows), ""]
    refused = [(each.name, name, why) for each in results.measured for name, why in each.refused.items()]
    if refused:
        lines += ["## Not measured", "", *(f"* {name}, {task}: {why}" for name, task, why in refused), ""]
    if results.not_compared:
        lines += ["## Not compared", "", *(f"* {why}" for why in results.not_compared), ""]
    protocols = protocol_words(results)
    if protocols:
        lines += ["## Protocols", "", *(f"* {words}" for words in protocols), ""]
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
        if each.harness:
            found[_harness_words(each.harness)] = None
    return list(found)


def _harness_words(found: Mapping[str, object]) -> str:
    """How the harness asked; what is not stated (by other versions of this file) is left out."""
    asked = mapping(found, "harness")
    limit, shots, context = asked.get("limit"), asked.get("num_fewshot"), asked.get("max_length")
    said = [
        f"lm-evaluation-harness {asked.get('lm_eval', '')}".rstrip(),
        "all documents of each task" if limit is None else f"at most {limit:,} documents of each task",
        "examples as each task has them" if shots is None else f"{shots} examples in each prompt",
        *([f"{context:,} tokens at most"] if isinstance(context, int) else []),
        *([f"{asked['precision']}"] if "precision" in asked else []),
        *([f"seed {asked['seed']}"] if "seed" in asked else []),
    ]
    return f"{said[0]}: {', '.join(said[1:])}"


def _sections(results: Results) -> list[tuple[str, Table, str]]:
    measured = results.measured
    sections = [
        (
            "Scores",
            score_table(measured),
            "Per cent where a number is a share; intervals: 95 %, documents resampled.",
        ),
        ("Perplexity", perplexity_table(measured), ""),
        *(
            (f"Perplexity of {name} by protocol", found, "The same model and text, counted as others count.")
            for name, found in protocol_tables(measured)
        ),
        ("Effective context", effective_table(measured), ""),
        ("lm-evaluation-harness", harness_table(measured), "As the harness counts."),
        (
            "By length",
            length_table(measured),
            "Headline metric, per cent, by tokens of the prompt with its answer.",
        ),
        (
            "Comparison",
            comparison_table(results.comparisons),
            comparison_words(results.comparisons),
        ),
    ]
    return [each for each in sections if each[1][1]]


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
    n_tasks = len(task_names(results.measured))
    said = [f"{n_tasks} task{'s' * (n_tasks > 1)}, {questions:,} questions"] if n_tasks else []
    for each in results.measured:
        found = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(found, Mapping) and found["perplexity"] is not None:
            said.append(f"{each.name}: perplexity {found['perplexity']:,.2f}")
    return " · ".join(said)


def _curves(results: Results) -> list[Html]:
    """Loss by position of each checkpoint, all on one scale."""
    curves: list[tuple[str, list[PositionBucket]]] = []
    for each in results.measured:
        record = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(record, Mapping):
            curves.append((each.name, [PositionBucket(**bucket) for bucket in record["by_position"]]))
    limits = plots.loss_limits([buckets for _, buckets in curves])
    return [
        _figure(lambda width, of=buckets: plots.loss_by_position(of, width=width, limits=limits), name)
        for name, buckets in curves
    ]


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
    protocols = [element("li", words) for words in protocol_words(results)]
    content = [element("div", element("ul", *protocols), css="card")] if protocols else []
    for each in results.measured:
        content.append(details(f"Checkpoint {each.name}", facts(each.facts)))
        for name, result in each.tasks.items():
            if len(result.metrics) > 1:
                rows = metric_rows(result)
                content.append(details(f"{each.name}, {name}: all metrics", table(["metric", "value"], rows)))
    content.append(details("The request", facts({k: v for k, v in results.request.items() if v is not None})))
    content.append(details("Versions", facts(results.about)))
    return content
