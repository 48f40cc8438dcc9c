"""Every pair of checkpoints of an evaluation, by every number that both have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np

from .compare import Comparison, Measured, compare, holm, measured_scores
from .suite import CheckpointResults

PER_BYTE = "bits per byte"


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
                refused.append(f"{pair[0].measure}: {error}" + (budget if pair[0].measure == PER_BYTE else ""))
    adjusted = holm([each.p_value for each in found])
    return tuple(replace(each, adjusted_p_value=p) for each, p in zip(found, adjusted)), tuple(refused)


def _pairs(first: CheckpointResults, second: CheckpointResults) -> Iterator[tuple[Measured, Measured]]:
    if first.perplexity is not None and second.perplexity is not None:
        per_byte = first.facts["tokenizer_sha256"] != second.facts["tokenizer_sha256"]
        yield _loss(first, per_byte=per_byte), _loss(second, per_byte=per_byte)
    for name in first.tasks:
        if name in second.tasks:
            yield _scores(first, name), _scores(second, name)


def _loss(results: CheckpointResults, *, per_byte: bool) -> Measured:
    """Nats per token; of checkpoints with different tokenizers, whose tokens are not the same, bits per byte."""
    record = results.perplexity or {}
    perplexity = record["perplexity"]
    if not isinstance(perplexity, Mapping):
        raise TypeError("the record of a perplexity is a mapping")
    protocol = {key: value for key, value in perplexity["protocol"].items() if key != "words"}
    documents = [each for each in results.documents if each.bytes or not per_byte]
    nll_d = np.array([each.nll for each in documents])
    if per_byte:
        protocol["bos"] = protocol["bos"] is not None  # an id means something within one tokenizer
    return Measured(
        name=results.name,
        measure=PER_BYTE if per_byte else "loss (nats per token)",
        protocol=protocol,
        units=tuple(f"{each.source}/{each.id}" for each in documents),
        totals=nll_d / math.log(2) if per_byte else nll_d,
        weights=np.array([each.bytes if per_byte else each.tokens for each in documents], dtype=np.float64),
    )


def _scores(results: CheckpointResults, name: str) -> Measured:
    result, samples = results.tasks[name], results.samples[name]
    metric = result.headline if result.headline in samples[0].scores else next(iter(samples[0].scores))
    return measured_scores(
        results.name,
        f"{name}, {metric}",
        asdict(result.protocol),
        [each.document for each in samples],
        [each.scores[metric] for each in samples],
    )
