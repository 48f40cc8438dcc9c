"""Every pair of checkpoints of an evaluation, by every number that both have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Literal

from ..context.effective import ContextCurve
from ..reporting.run_files import mapping
from ..tasks.registry import TASKS
from .compare import (
    PER_BYTE,
    Comparison,
    Measured,
    adjusted,
    compare,
    differing_fields,
    measured_figure,
    measured_loss,
    measured_scores,
)
from .directory import CheckpointResults

_OF_A_BUDGET = frozenset({"documents", "truncated", "prompts", "text_sha256"})  # fields that what a budget buys decides


def compare_checkpoints(
    results: Sequence[CheckpointResults], *, seed: int, force: bool
) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """The comparisons, their p-values adjusted for the number of all of them; and why others were not made.

    force   compares numbers of different protocols, too
    """
    found: list[Comparison] = []
    refused: list[str] = []
    for first, second in combinations(results, 2):
        for pair in _pairs(first, second):
            try:
                found.append(compare(*pair, force=force, seed=seed))
            except ValueError as error:
                budget = "; two tokenizers make two texts of one budget: set evaluation.max_tokens=null"
                refused.append(f"{pair[0].measure}: {error}" + (budget if _spent_apart(*pair) else ""))
    return tuple(adjusted(found)), tuple(refused)


def _pairs(first: CheckpointResults, second: CheckpointResults) -> Iterator[tuple[Measured, Measured]]:
    if first.perplexity is not None and second.perplexity is not None:
        same = first.facts["tokenizer_sha256"] == second.facts["tokenizer_sha256"]
        yield _loss(first, "token" if same else "byte"), _loss(second, "token" if same else "byte")
    if first.curve is not None and second.curve is not None:
        yield _curve(first.name, first.curve), _curve(second.name, second.curve)
    for name in first.tasks:
        if name in second.tasks:
            yield _scores(first, name), _scores(second, name)


def _spent_apart(first: Measured, second: Measured) -> bool:
    """Whether two tokenizers had one budget of tokens, and nothing else tells the protocols apart."""
    return (
        first.measure == PER_BYTE
        and first.protocol["max_tokens"] is not None
        and _OF_A_BUDGET.issuperset(differing_fields(first.protocol, second.protocol))
    )


def _loss(results: CheckpointResults, per: Literal["token", "byte"]) -> Measured:
    protocol = mapping(mapping(results.perplexity or {}, "perplexity"), "protocol")
    fields = {key: value for key, value in protocol.items() if key != "words"}
    return measured_loss(results.name, results.documents, fields, per=per)


def _curve(name: str, curve: ContextCurve) -> Measured:
    """Loss with the longest window: what all of the context is worth to each."""
    return Measured(
        name=name,
        measure="loss with all of the context (nats per token)",
        protocol=curve.protocol,
        units=curve.units,
        totals=curve.nll_dL[:, -1],
        weights=curve.count_d.astype(float),
    )


def _scores(results: CheckpointResults, name: str) -> Measured:
    """By the task's headline, be it a mean over questions or made of several."""
    result, samples = results.tasks[name], results.samples[name]
    metric, combine = result.headline, TASKS[name].combine
    protocol = asdict(result.protocol)
    documents = [each.document for each in samples]
    if metric in samples[0].scores:
        scores = [each.scores[metric] for each in samples]
        return measured_scores(results.name, f"{name}, {metric}", protocol, documents, scores)
    if combine is None:
        raise ValueError(f"{name} has no {metric}: neither do its questions, nor is it made of what they have")
    return measured_figure(
        results.name,
        f"{name}, {metric}",
        protocol,
        documents,
        [each.scores for each in samples],
        lambda means: combine(means)[metric],
    )
