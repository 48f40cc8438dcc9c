"""The tables of an evaluation's results, cell by cell: what results.md and results.html both show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..tasks.result import Metric, TaskResult
from .compare import Comparison
from .directory import CheckpointResults

Table = tuple[Sequence[str], list[list[str]]]
"""Head and rows."""

_NO_SHARES = ("nll", "perplexity")  # metrics that are shown as they are
_NEVER = "none of the lengths"  # reaches the threshold, whichever questions are drawn
_NO_METRICS = ("sample_len", "sample_len,none")  # what the harness has beside its metrics: how many documents it asked


def task_names(measured: Sequence[CheckpointResults]) -> list[str]:
    """Each task that any checkpoint was asked, once."""
    return list(dict.fromkeys(name for each in measured for name in each.tasks))


def score_table(measured: Sequence[CheckpointResults]) -> Table:
    """Task × checkpoint: the headline number of each."""
    rows = []
    for name in task_names(measured):
        found = [each.tasks.get(name) for each in measured]
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
    return ["task", "metric", "questions", "shortened", *(each.name for each in measured)], rows


def length_table(measured: Sequence[CheckpointResults]) -> Table:
    """Task × length, of each checkpoint."""
    made = [
        (each.name, name, result) for each in measured for name, result in each.tasks.items() if result.by("length")
    ]
    lengths = sorted({int(cell.groups["length"]) for _, _, result in made for cell in result.by("length")})
    rows = []
    for checkpoint, name, result in made:
        at = {int(cell.groups["length"]): cell.metrics[result.headline] for cell in result.by("length")}
        rows.append([f"{checkpoint}: {name}", *(_percent(at[length]) if length in at else "–" for length in lengths)])
    return ["task", *(f"{length:,}" for length in lengths)], rows


def metric_rows(result: TaskResult) -> list[list[str]]:
    """Every metric of a task."""
    return [[name, _metric(name, metric)] for name, metric in result.metrics.items()]


def perplexity_table(measured: Sequence[CheckpointResults]) -> Table:
    rows = []
    for each in measured:
        found = each.perplexity.get("perplexity") if each.perplexity is not None else None
        if isinstance(found, Mapping):
            numbers = (found["loss"], found["perplexity"], found["bits_per_byte"], found["bits_per_character"])
            rows.append([each.name, *(_number(number) for number in numbers), f"{found['tokens']:,}"])
    return ["checkpoint", "loss (nats/token)", "perplexity", "bits/byte", "bits/character", "tokens"], rows


def protocol_tables(measured: Sequence[CheckpointResults]) -> list[tuple[str, Table]]:
    """One model's perplexity by each protocol that was asked for, of each checkpoint."""
    found = []
    for each in measured:
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


def effective_table(measured: Sequence[CheckpointResults]) -> Table:
    """By loss, and by each retrieval task."""
    rows = []
    for each in measured:
        if each.effective is not None:
            rows.append(
                [
                    each.name,
                    "loss",
                    *_length_cells(each.effective.length, each.effective.interval, none="fewer than ten documents"),
                ]
            )
        for name, found in each.retrieves.items():
            cells = _length_cells(found.length, found.interval, none=f"below {found.by_length[0][0]:,}", never=_NEVER)
            rows.append([each.name, f"{name} ≥ {100 * found.threshold:g} %", *cells])
    return ["checkpoint", "by", "effective context (tokens)", "95 % interval"], rows


def _length_cells(
    length: int | None, interval: tuple[int | None, int | None] | None, *, none: str, never: str = ""
) -> list[str]:
    """none   what stands where there is no length
    never  what stands for an interval that has none from end to end
    """
    shown = [none if each is None else f"{each:,}" for each in (length, *(interval or ()))]
    if interval is None:
        return [shown[0], "–"]
    if interval == (None, None):
        return [shown[0], never]
    return [shown[0], f"{shown[1]} – {shown[2]}"]


def harness_table(measured: Sequence[CheckpointResults]) -> Table:
    """Every metric of lm-evaluation-harness, as it counts; without standard errors."""
    rows = []
    for each in measured:
        found = each.harness.get("results")
        for task, metrics in (found if isinstance(found, Mapping) else {}).items():
            rows += [
                [each.name, task, name.removesuffix(",none"), _number(value)]
                for name, value in metrics.items()
                if isinstance(value, int | float) and "stderr" not in name and name not in _NO_METRICS
            ]
    return ["checkpoint", "task", "metric", "value"], rows


def comparison_words(comparisons: Sequence[Comparison]) -> str:
    """What the numbers of the table are."""
    exchanged = [each.measure for each in comparisons if each.test == "exchange"]
    flips = "signs of the documents' differences flipped"
    if exchanged:
        names = ", ".join(dict.fromkeys(name.replace(", ", " ") for name in exchanged))
        exchange = f"the two checkpoints exchanged on documents ({names}: made of several means)"
        flips = exchange if len(exchanged) == len(comparisons) else f"{flips}, or {exchange}"
    return f"First less second over the same documents; interval: paired bootstrap; p, two-sided: {flips}."


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    rows = [
        [
            f"{each.measure}: {each.first} less {each.second}" + (" (forced)" if each.differing else ""),
            _signed(each, each.difference),
            f"{_signed(each, each.interval[0])} … {_signed(each, each.interval[1])}" if each.interval else "–",
            _p(each.p_value),
            _p(each.adjusted_p_value),
            f"{each.documents:,}",
        ]
        for each in comparisons
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
