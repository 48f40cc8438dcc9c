"""How much of its context a model uses: two figures, each a length with the distribution of what it might have been.

By loss. The same target tokens, the last block of each long document, are predicted from windows of growing length
that all end with them. The effective context is the longest window whose loss is surely below that of every shorter
one: the paired improvement over the best of the shorter windows (of a curve that falls, the one before it) has a 95 %
interval over documents that lies above zero. Where no longer window helps it is the shortest that was tried.
The figure's own uncertainty: the same decision on documents drawn with replacement, again and again.

By retrieval. The longest length at which questions whose answer stands in the text are still answered right in at least
85 % of cases, and at every shorter length too. RULER (Hsieh et al. 2024, arXiv 2404.06654, §4) takes 85.6 %, what
Llama-2-7B reaches at 4K; a longer length that passes after one that failed counts there and does not here.

Both depend on the text, the targets and the lengths that were tried, which results carry.

Legend: L lengths, d documents, N questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..bootstrap import FEWEST_DOCUMENTS
from ..journal import keep, kept_records
from ..passes import LanguageModel, Precision, dtype_name
from ..perplexity.documents import EvalDocument, tokens_digest
from ..perplexity.sliding_window import ScoredRow, check_request, score_rows

TARGETS = 128  # tokens of a block
THRESHOLD = 0.85
_RESAMPLES = 2000
_OUTER, _INNER = 500, 400  # of the decision itself: in each of the outer draws it is made anew


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContextCurve:
    """The nll of the same tokens read with growing windows.

    lengths      tokens of a window, ascending; the last `targets` of them are predictions that count. Nothing stands
                 before a window
    blocks       of targets, at most, in a document
    nll_dL       float64 [d, L], nats, summed over a document's targets
    count_d      int64 [d], targets of each document
    units        names of the documents, which are those with a block behind the longest window
    left_out     how many were too short, or have a prompt
    tokens_sha256  of the documents that were read (`perplexity.documents.tokens_digest`); `tokenizer_sha256` says whose
                 tokens. None: not stated
    """

    lengths: tuple[int, ...]
    targets: int
    blocks: int
    nll_dL: np.ndarray
    count_d: np.ndarray
    units: tuple[str, ...]
    left_out: int
    precision: str
    tokens_sha256: str | None = None
    tokenizer_sha256: str | None = None

    @property
    def protocol(self) -> dict[str, object]:
        """What the losses depend on, the model aside: plain data."""
        return {
            "lengths": list(self.lengths),
            "targets": self.targets,
            "blocks": self.blocks,
            "precision": self.precision,
            "tokens_sha256": self.tokens_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPoint:
    """One length. Improvement: how far the loss is below the best of the shorter lengths, nats per token.

    Intervals are 95 % bootstrap intervals over documents; None with fewer than ten. The shortest improves on nothing.
    """

    length: int
    loss: float
    interval: tuple[float, float] | None
    improvement: float | None
    improvement_interval: tuple[float, float] | None

    @property
    def helps(self) -> bool:
        return self.improvement_interval is not None and self.improvement_interval[0] > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveContext:
    """length        the longest window that helps; None with fewer than ten documents, where no interval says so
    interval         95 %, of the length itself
    distribution     (length, share of the resamples that would have named it), ascending
    longest          whether it is the longest length tried, so that the true one may be greater
    tokens_sha256    of the documents that were read, in tokens; `tokenizer_sha256` says whose. None: not stated
    """

    length: int | None
    interval: tuple[int, int] | None
    distribution: tuple[tuple[int, float], ...]
    points: tuple[ContextPoint, ...]
    targets: int
    blocks: int
    documents: int
    left_out: int
    precision: str
    tokens_sha256: str | None = None
    tokenizer_sha256: str | None = None

    @property
    def longest(self) -> bool:
        return self.length == self.points[-1].length

    @property
    def words(self) -> str:
        """The definition with its numbers."""
        windows = ", ".join(f"{point.length:,}" for point in self.points)
        return (
            f"The longest of the windows {windows} that lowers the loss of the same tokens (at most {self.blocks} "
            f"blocks of {self.targets:,} in a document, each at the end of its window) below that of every shorter "
            f"window, with a 95 % paired bootstrap interval over {self.documents:,} documents above zero; "
            f"{self.left_out:,} documents left out, no longer than the longest window or with a prompt; "
            f"{self.precision}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalContext:
    """length     the longest at which it and every shorter one reach `threshold`; None: not even the shortest
    interval      95 %, of the length itself (None: below the shortest); None with fewer than ten documents at a length
    distribution  (length or None, share of the resamples that would have named it)
    by_length     (length, share of right answers, questions), ascending
    """

    length: int | None
    threshold: float
    interval: tuple[int | None, int | None] | None
    distribution: tuple[tuple[int | None, float], ...]
    by_length: tuple[tuple[int, float, int], ...]

    @property
    def longest(self) -> bool:
        return self.length == self.by_length[-1][0]

    @property
    def words(self) -> str:
        """The definition with its numbers."""
        return (
            f"The longest of {', '.join(f'{length:,}' for length, _, _ in self.by_length)} tokens at which, as at "
            f"every shorter one, at least {100 * self.threshold:g} % of the answers are right."
        )


def doubling_lengths(longest: int, *, shortest: int = 256) -> tuple[int, ...]:
    """shortest, twice that, …, and `longest` itself. Raises ValueError where there are not two."""
    if longest <= shortest:
        raise ValueError(f"contexts from {shortest:,} to {longest:,} tokens: nothing to compare; lower the shortest")
    lengths = [shortest]
    while 2 * lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return (*lengths, longest)


def measure_context_curve(
    model: LanguageModel,
    documents: Sequence[EvalDocument],
    *,
    lengths: Sequence[int],
    batch: int,
    device: torch.device | str,
    precision: Precision = "fp32",
    targets: int = TARGETS,
    blocks: int = 1,
    tokenizer_sha256: str | None = None,
    kept: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ContextCurve:
    """Read the last `targets` tokens of each document with each window length.

    lengths   tokens of a forward pass, in any order
    blocks    blocks of targets in a document: the last one and others, evenly spread over what lies behind the longest
              window, apart from each other, as many as there are; a document is one unit whatever their number
    kept      file of JSON lines that each forward pass is appended to, and whose passes are not computed again; it
              begins with what they depend on, the model's weights aside: something else there is refused
    tokenizer_sha256   of the tokenizer.json that the tokens are of, to be stated there and in the result
    progress  called with (tokens read, tokens to read) before the first forward pass and after each

    A window holds no other token than the document's: one that reaches back to the beginning is not preceded by any.
    Documents with prompts are left out: their first tokens are not to be scored.
    Raises ValueError for fewer than two lengths, blocks that don't fit into the shortest, and when every document is
    too short.
    """
    ordered = tuple(sorted(set(lengths)))
    if len(ordered) < 2:
        raise ValueError(f"lengths={list(lengths)}: effective context compares at least two lengths")
    if not 1 <= targets <= ordered[0] // 2:
        raise ValueError(
            f"targets={targets} with a shortest window of {ordered[0]:,}: blocks have at least 1 token and at most "
            "half the shortest window, or its predictions would have next to no context"
        )
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: at least 1 block of targets in a document")
    check_request(model, documents, window=ordered[-1], stride=ordered[-1], batch=batch, bos=None)
    whole = [document for document in documents if not document.prompt]
    long = [document for document in whole if len(document.tokens) > ordered[-1]]
    if not long:
        most = max((len(document.tokens) for document in whole), default=0)
        raise ValueError(
            f"lengths up to {ordered[-1]:,} tokens: no document without a prompt is longer than that (the longest has "
            f"{most:,} tokens); lower the longest length, or give longer documents"
        )
    ends_d = [_block_ends(len(document.tokens), ordered[-1], targets, blocks) for document in long]
    curve = ContextCurve(
        lengths=ordered,
        targets=targets,
        blocks=blocks,
        nll_dL=np.empty((len(long), len(ordered))),
        count_d=np.array([targets * len(ends) for ends in ends_d]),
        units=tuple(f"{document.source}/{document.id}" for document in long),
        left_out=len(documents) - len(long),
        precision="bf16 autocast" if precision == "bf16" else dtype_name(model.head_weight.dtype),
        tokens_sha256=tokens_digest(long),
        tokenizer_sha256=tokenizer_sha256,
    )
    placed = [(document.tokens, end) for document, ends in zip(long, ends_d) for end in ends]
    nll_Lb = np.full((len(ordered), len(placed)), np.nan)
    for record in kept_records(kept, curve.protocol) if kept is not None else []:
        nll_Lb[ordered.index(record["length"]), record["blocks"]] = record["nll"]
    missing_Lb = np.isnan(nll_Lb)
    length_L1 = np.array(ordered)[:, None]
    total = int(length_L1.sum()) * len(placed)
    if progress is not None:
        progress(total - int((missing_Lb * length_L1).sum()), total)
    for i, length in reversed([*enumerate(ordered)]):  # what does not fit into memory fails first
        missing = np.flatnonzero(missing_Lb[i]).tolist()
        for first in range(0, len(missing), batch):
            chosen = missing[first : first + batch]
            rows = [_row(*placed[block], length, targets) for block in chosen]
            nll = score_rows(model, rows, batch=batch, device=device, precision=precision)
            nll_Lb[i, chosen] = [each.sum(dtype=np.float64) for each in nll]
            missing_Lb[i, chosen] = False
            if kept is not None:
                keep(kept, curve.protocol, {"length": length, "blocks": chosen, "nll": nll_Lb[i, chosen].tolist()})
            if progress is not None:
                progress(total - int((missing_Lb * length_L1).sum()), total)
    first_block_d = np.cumsum([0, *(len(ends) for ends in ends_d[:-1])])
    return replace(curve, nll_dL=np.add.reduceat(nll_Lb, first_block_d, axis=1).T)


def _row(tokens: np.ndarray, end: int, length: int, targets: int) -> ScoredRow:
    """The block of targets that ends before token `end`, at the end of its window."""
    read = np.asarray(tokens[end - 1 - length : end], dtype=np.int64)
    return ScoredRow(inputs=read[:-1], targets=read[1:], first=length - targets)


def _block_ends(n: int, longest: int, targets: int, blocks: int) -> list[int]:
    """Where the blocks of a document of n tokens end: the last at its end, each behind a whole window."""
    room = 1 + (n - longest - 1) // targets
    return sorted({int(end) for end in np.linspace(n, longest + 1, min(blocks, room))}) if blocks > 1 else [n]


def effective_context(curve: ContextCurve, *, seed: int = 0) -> EffectiveContext:
    """The figure by loss, from a measured curve (the top of this file has the definition)."""
    n = len(curve.count_d)
    loss_L = curve.nll_dL.sum(axis=0) / curve.count_d.sum()
    enough = n >= FEWEST_DOCUMENTS
    rng = np.random.default_rng(seed)
    drawn_RL = _resampled(curve.nll_dL, curve.count_d, _RESAMPLES, rng) if enough else None
    points = []
    for i, length in enumerate(curve.lengths):
        best = int(np.argmin(loss_L[:i])) if i else None
        points.append(
            ContextPoint(
                length=length,
                loss=float(loss_L[i]),
                interval=None if drawn_RL is None else _interval(drawn_RL[:, i]),
                improvement=None if best is None else float(loss_L[best] - loss_L[i]),
                improvement_interval=None
                if drawn_RL is None or best is None
                else _interval(drawn_RL[:, best] - drawn_RL[:, i]),
            )
        )
    length, interval, distribution = None, None, ()
    if enough:
        length = max((point.length for point in points if point.helps), default=curve.lengths[0])
        named = np.array([curve.lengths[i] for i in _decisions(curve, rng)])
        low, high = np.quantile(named, [0.025, 0.975], method="inverted_cdf")
        interval = (int(low), int(high))
        distribution = tuple((each, float(np.mean(named == each))) for each in curve.lengths)
    return EffectiveContext(
        length=length,
        interval=interval,
        distribution=distribution,
        points=tuple(points),
        targets=curve.targets,
        blocks=curve.blocks,
        documents=n,
        left_out=curve.left_out,
        precision=curve.precision,
        tokens_sha256=curve.tokens_sha256,
        tokenizer_sha256=curve.tokenizer_sha256,
    )


def _decisions(curve: ContextCurve, rng: np.random.Generator) -> list[int]:
    """Which length would have been named, from other draws of as many documents."""
    n, found = len(curve.count_d), []
    for _ in range(_OUTER):
        drawn = rng.integers(0, n, n)
        nll_dL, count_d = curve.nll_dL[drawn], curve.count_d[drawn]
        loss_L = nll_dL.sum(axis=0)
        losses_RL = _resampled(nll_dL, count_d, _INNER, rng)
        best = [int(np.argmin(loss_L[:i])) for i in range(1, len(loss_L))]
        low = np.quantile(losses_RL[:, best] - losses_RL[:, 1:], 0.025, axis=0)
        found.append(max((i + 1 for i in np.flatnonzero(low > 0)), default=0))
    return [int(each) for each in found]


def _resampled(nll_dL: np.ndarray, count_d: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, L]: the losses on documents drawn with replacement, the same ones for every length."""
    n = len(count_d)
    times_Rd = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    return (times_Rd @ nll_dL) / (times_Rd @ count_d)[:, None]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def retrieval_context(
    lengths: Sequence[int],
    scores: Sequence[float],
    documents: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> RetrievalContext:
    """The figure by retrieval, from single questions: the length of each, its score (0 to 1) and the text it is about.

    documents  resampled together within a length; None: each question is about a text of its own
    threshold  share of right answers that counts as retrieval (RULER: 0.856)

    Raises ValueError for no questions, arrays of different lengths, and a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a share of right answers above 0, at most 1")
    texts = [str(i) for i in range(len(lengths))] if documents is None else list(documents)
    if not lengths or not len(lengths) == len(scores) == len(texts):
        raise ValueError(f"{len(lengths)} lengths, {len(scores)} scores and {len(texts)} texts: one of each a question")
    length_N, score_N = np.asarray(lengths), np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    by_length, shares_LR, enough = [], [], True
    for length in sorted(set(lengths)):
        here = np.flatnonzero(length_N == length)
        _, unit_n = np.unique([texts[i] for i in here], return_inverse=True)
        total_d, count_d = np.bincount(unit_n, weights=score_N[here]), np.bincount(unit_n)
        by_length.append((int(length), float(score_N[here].mean()), len(here)))
        shares_LR.append(_resampled(total_d[:, None], count_d, _RESAMPLES, rng)[:, 0])
        enough = enough and len(count_d) >= FEWEST_DOCUMENTS

    def named(shares: Sequence[float]) -> int:
        """How many lengths pass before one fails."""
        # A share that equals the threshold passes, whatever its last bit.
        return next((i for i, share in enumerate(shares) if share < threshold - 1e-9), len(shares))

    names = [None, *(length for length, _, _ in by_length)]
    drawn = np.array([named(shares) for shares in np.array(shares_LR).T])
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    return RetrievalContext(
        length=names[named([share for _, share, _ in by_length])],
        threshold=threshold,
        interval=(names[int(low)], names[int(high)]) if enough else None,
        distribution=tuple((name, float(np.mean(drawn == i))) for i, name in enumerate(names)) if enough else (),
        by_length=tuple(by_length),
    )
