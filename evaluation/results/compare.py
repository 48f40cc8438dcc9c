"""Is one checkpoint better than another, on the same documents? A difference, its interval and a p-value.

The units are documents: tokens, and questions about one text, are not independent of each other. Both tests are paired.

* interval: 95 % percentile bootstrap. Documents are drawn with replacement, the same ones for both checkpoints, and the
  difference of the two weighted means is taken again (10,000 times, seeded). None with fewer than ten documents.
* p-value: two-sided sign-flip permutation test. Under the null hypothesis that the checkpoints can be exchanged on any
  document, each document's difference might as well have had the other sign; p is the share of sign patterns whose
  summed difference is at least as far from zero as the one seen (Fisher; Good 2005, Permutation, Parametric and
  Bootstrap Tests of Hypotheses, §3.2.1). All patterns where there are no more of them than resamples (up to thirteen
  documents), else as many random ones and the one seen itself, (1 + hits) / (1 + draws), which never claims 0.

Of a number that is made of several means (a geometric mean of ROUGE, F1), the interval is of that number, made anew
from the means over each draw; and the test exchanges the two checkpoints on documents, and makes both numbers anew.

Several comparisons at once are corrected by Holm's step-down method (Holm 1979, Scand. J. Statistics 6, 65-70).

Legend: d documents, K sums of each document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..bootstrap import chunks, figure_interval, ratio_interval
from ..perplexity.result import DocumentScore
from ..tasks.result import by_document

PER_TOKEN, PER_BYTE = "loss (nats per token)", "bits per byte"
_RESAMPLES = 10_000
_CHANGES_NOTHING = ("merged",)  # fields of a protocol that are about how it was computed
_OF_A_TOKENIZER = ("tokens_sha256", "tokenizer_sha256")  # fields that two tokenizers cannot have in common


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What one checkpoint scored, document by document.

    name      of the checkpoint
    measure   what the numbers are, with their unit
    protocol  how they were measured: numbers with different fields here are not compared
    units     ids of the documents, each once
    totals    float64 [d]: sum of the scores in each (nats, points); with a `figure` [d, K]
    weights   float64 [d]: what they are divided by (tokens, bytes, questions)
    figure    what is made of the K means; None: there is one, and it is the number

    The number is Σ totals / Σ weights, or what `figure` makes of that. Raises ValueError for arrays that don't fit
    together.
    """

    name: str
    measure: str
    protocol: Mapping[str, object]
    units: tuple[str, ...]
    totals: np.ndarray
    weights: np.ndarray
    figure: Callable[[np.ndarray], float] | None = None

    def __post_init__(self) -> None:
        if not self.units:
            raise ValueError(f"{self.name}, {self.measure}: no documents to compare")
        if len(set(self.units)) != len(self.units):
            raise ValueError(f"{self.name}, {self.measure}: a document is named twice; ids tell documents apart")
        if not len(self.units) == len(self.totals) == len(self.weights):
            raise ValueError(
                f"{self.name}, {self.measure}: {len(self.units)} documents, {len(self.totals)} totals and "
                f"{len(self.weights)} weights"
            )
        finite_d = np.isfinite(self.totals.reshape(len(self.units), -1)).all(axis=1)
        if not finite_d.all():
            bad = self.units[int(np.flatnonzero(~finite_d)[0])]
            raise ValueError(f"{self.name}, {self.measure}: document {bad} has a score that is not a number")

    @property
    def value(self) -> float:
        ratio = np.sum(self.totals, axis=0) / np.sum(self.weights)
        return float(ratio) if self.figure is None else self.figure(ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first checkpoint's number minus the second's, on the same documents.

    interval          95 % paired bootstrap over documents; None with fewer than ten
    p_value           two-sided, of a permutation test over documents
    test              which one: signs of the documents' differences are flipped, or, of a number made of several means,
                      the two checkpoints are exchanged on documents
    adjusted_p_value  for the number of comparisons made together (Holm); None: this one was made alone
    differing         fields of the protocols that differ, where the comparison was forced
    """

    first: str
    second: str
    measure: str
    first_value: float
    second_value: float
    difference: float
    interval: tuple[float, float] | None
    p_value: float
    documents: int
    test: Literal["sign-flip", "exchange"]
    method: str
    adjusted_p_value: float | None = None
    differing: tuple[str, ...] = ()


def measured_loss(
    name: str,
    documents: Sequence[DocumentScore],
    protocol: Mapping[str, object],
    *,
    per: Literal["token", "byte"] = "token",
) -> Measured:
    """Loss of each document: nats per token, or bits per byte (for checkpoints with different tokenizers, whose tokens
    are not the same)."""
    if per == "byte":
        documents = [each for each in documents if each.bytes]
        protocol = {key: value for key, value in protocol.items() if key not in _OF_A_TOKENIZER}
        protocol["bos"] = protocol["bos"] is not None  # an id means something within one tokenizer
    nll_d = np.array([each.nll for each in documents], dtype=np.float64)
    return Measured(
        name=name,
        measure=PER_TOKEN if per == "token" else PER_BYTE,
        protocol=protocol,
        units=tuple(f"{each.source}/{each.id}" for each in documents),
        totals=nll_d if per == "token" else nll_d / np.log(2),
        weights=np.array([each.tokens if per == "token" else each.bytes for each in documents], dtype=np.float64),
    )


def measured_scores(
    name: str, measure: str, protocol: Mapping[str, object], documents: Sequence[str], scores: Sequence[float]
) -> Measured:
    """Scores of single questions, of which `documents` names the text; every question weighs the same."""
    units, total_dK, count_d = by_document(documents, [[score] for score in scores])
    return Measured(
        name=name, measure=measure, protocol=protocol, units=units, totals=total_dK[:, 0], weights=count_d.astype(float)
    )


def measured_figure(
    name: str,
    measure: str,
    protocol: Mapping[str, object],
    documents: Sequence[str],
    scores: Sequence[Mapping[str, float]],
    figure: Callable[[Mapping[str, float]], float],
) -> Measured:
    """The number that `figure` makes of the means of several scores of single questions, by name."""
    names = list(scores[0])
    units, total_dK, count_d = by_document(documents, [[each[key] for key in names] for each in scores])
    return Measured(
        name=name,
        measure=measure,
        protocol=protocol,
        units=units,
        totals=total_dK,
        weights=count_d.astype(float),
        figure=lambda mean_K: figure(dict(zip(names, mean_K.tolist()))),
    )


def compare(
    first: Measured, second: Measured, *, force: bool = False, resamples: int = _RESAMPLES, seed: int = 0
) -> Comparison:
    """The paired difference first - second.

    force  compares numbers of different protocols too; the result names the fields that differ

    Raises ValueError for different measures, protocols (unless forced), documents, or amounts of text in a document.
    """
    if first.measure != second.measure:
        raise ValueError(
            f"'{first.measure}' of {first.name} and '{second.measure}' of {second.name} are different measures"
        )
    differing = differing_fields(first.protocol, second.protocol)
    if differing and not force:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])})" if len(differing) > 1 else ""
        raise ValueError(
            f"{first.name} and {second.name} were measured by different protocols: {key} is "
            f"{_shown(first.protocol, key)} and {_shown(second.protocol, key)}{more}; measure both alike, or force=true"
        )
    first_d, second_d, weight_d = _paired(first, second)
    if first.figure is None:
        difference = float((first_d - second_d).sum() / weight_d.sum())
        interval = ratio_interval(first_d - second_d, weight_d, seed=seed, resamples=resamples)
        p_value = _sign_flip(first_d - second_d, resamples, seed)
    else:
        difference = first.value - second.value
        interval = _figure_interval(first_d, second_d, weight_d, first.figure, resamples, seed)
        p_value = _exchange(first_d, second_d, weight_d, first.figure, resamples, seed)
    n = len(weight_d)
    test = "sign-flip" if first.figure is None else "exchange"
    all_patterns = "all sign patterns" if first.figure is None else "all exchanges"
    patterns = all_patterns if n <= int(np.log2(resamples)) else f"{resamples:,} random patterns"
    return Comparison(
        first=first.name,
        second=second.name,
        measure=first.measure,
        first_value=first.value,
        second_value=second.value,
        difference=difference,
        interval=interval,
        p_value=p_value,
        documents=n,
        test=test,
        method=f"paired over {n:,} documents: 95 % percentile bootstrap ({resamples:,} resamples); "
        f"two-sided {test} test over {patterns}",
        differing=differing,
    )


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same, with p-values adjusted for how many were made together."""
    p_values = holm([each.p_value for each in comparisons])
    return [replace(each, adjusted_p_value=p) for each, p in zip(comparisons, p_values, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false positive among them stays below the level that each is held to.

    Raises ValueError for a number that is no probability.
    """
    outside = [p for p in p_values if not 0 <= p <= 1]
    if outside:
        raise ValueError(f"p={outside[0]} is no probability")
    adjusted, reached = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = reached
    return adjusted


def differing_fields(first: Mapping[str, object], second: Mapping[str, object]) -> tuple[str, ...]:
    """Fields that only one protocol has, or that have different values; those that change no number are left out."""
    keys = [*first, *(key for key in second if key not in first)]
    return tuple(
        key
        for key in keys
        if key not in _CHANGES_NOTHING and (key not in first or key not in second or first[key] != second[key])
    )


def _shown(protocol: Mapping[str, object], key: str) -> str:
    value = protocol.get(key)
    if key not in protocol or (value is None and key.endswith("_sha256")):
        return "not stated"
    return f"{str(value)[:12]}…" if key.endswith("_sha256") else str(value)


def _paired(first: Measured, second: Measured) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(totals, totals, weights) in the order of the first one's documents."""
    place = {unit: i for i, unit in enumerate(second.units)}
    alone = [unit for unit in first.units if unit not in place] or [*(place.keys() - set(first.units))]
    if alone:
        raise ValueError(
            f"{first.name} and {second.name} were not measured on the same documents: only one of them has "
            f"'{sorted(alone)[0]}' ({len(first.units):,} and {len(second.units):,} documents)"
        )
    order = [place[unit] for unit in first.units]
    weights = second.weights[order]
    unequal = np.flatnonzero(first.weights != weights)
    if len(unequal):
        i = int(unequal[0])
        raise ValueError(
            f"document '{first.units[i]}' weighs {first.weights[i]:,.0f} with {first.name} and {weights[i]:,.0f} with "
            f"{second.name}: it was cut into other tokens or has other questions"
            + ("; compare bits per byte" if first.measure == PER_TOKEN else "")
        )
    return first.totals, second.totals[order], first.weights


def _figure_interval(
    first_dK: np.ndarray,
    second_dK: np.ndarray,
    weight_d: np.ndarray,
    figure: Callable[[np.ndarray], float],
    resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    k = first_dK.shape[1]
    return figure_interval(
        np.concatenate([first_dK, second_dK], axis=1),
        weight_d,
        lambda ratios: figure(ratios[:k]) - figure(ratios[k:]),
        seed=seed,
        resamples=resamples,
    )


def _exchange(
    first_dK: np.ndarray,
    second_dK: np.ndarray,
    weight_d: np.ndarray,
    figure: Callable[[np.ndarray], float],
    resamples: int,
    seed: int,
) -> float:
    """The sign-flip test of a number that is no mean: on each document the checkpoints' scores are exchanged or not."""
    n, weight = len(weight_d), weight_d.sum()
    first_K, second_K, more_dK = first_dK.sum(axis=0), second_dK.sum(axis=0), second_dK - first_dK

    def hits(exchanged_cd: np.ndarray) -> int:
        moved_cK = exchanged_cd @ more_dK
        values = [(figure((first_K + moved) / weight), figure((second_K - moved) / weight)) for moved in moved_cK]
        return sum(abs(one - other) >= seen for one, other in values)

    a, b = figure(first_K / weight), figure(second_K / weight)
    seen = abs(a - b) - 1e-12 * (abs(a) + abs(b))  # ties but for rounding decide exact p-values
    if 2**n <= resamples:
        return hits(_patterns(n)) / 2**n
    rng = np.random.default_rng([seed, 1])
    found = sum(hits(rng.integers(0, 2, (count, n), dtype=np.int8)) for count in chunks(resamples, n))
    return (1 + found) / (1 + resamples)


def _patterns(n: int) -> np.ndarray:
    """[2^n, n]: every row of n zeros and ones."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


def _sign_flip(difference_d: np.ndarray, resamples: int, seed: int) -> float:
    n = len(difference_d)
    # Sums that are equal but for rounding count as equal: ties decide exact p-values.
    seen = abs(difference_d.sum()) - 1e-12 * np.abs(difference_d).sum()
    if 2**n <= resamples:
        return float(np.mean(np.abs((1 - 2 * _patterns(n)) @ difference_d) >= seen))
    rng = np.random.default_rng([seed, 1])
    hits = 0
    for count in chunks(resamples, n):
        signs = rng.integers(0, 2, (count, n), dtype=np.int8)
        hits += int(np.sum(np.abs((1.0 - 2.0 * signs) @ difference_d) >= seen))
    return (1 + hits) / (1 + resamples)
