"""What lm-evaluation-harness asks of a model: log-likelihoods of continuations, and of whole texts.

Computed as everywhere here: softmax in fp32, a rolling log-likelihood by `perplexity.sliding_window.score` with
disjoint windows. Where a number depends on how a text begins, we follow the harness: nothing precedes a context (but a
foreign tokenizer's own start tokens), and for an empty one stands the `prefix` token.

Legend: B rows, T tokens of the longest of them, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longspan.kernels.cross_entropy import CHUNK_LOGITS
from longspan.model.decoder import Decoder

from ..passes import Precision, autocast, batches, rotates_by_length
from ..perplexity.documents import EvalDocument
from ..perplexity.sliding_window import score

logger = logging.getLogger("longspan.evaluation")

Progress = Callable[[int], object]  # told how many further requests are done


@dataclass(frozen=True, slots=True)
class _Row:
    """An input, and the requests that are scored on it: (number of the request, its continuation)."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, Sequence[int]]]


@torch.no_grad()
def continuations(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int,
    batch: int,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Of each (context, continuation): the log-likelihood of the continuation in nats, and whether each of its tokens
    is the likeliest one. What does not fit into `max_length` tokens is left out at the context's beginning.

    Inputs that are the same are computed once; rows of like length go together, longest first.
    Raises ValueError for an empty context or continuation, and for a continuation that does not fit.
    """
    rows: dict[tuple[int, ...], _Row] = {}
    n_cut = 0
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"request {number}: a continuation of at least 1 token follows a context of at least 1")
        if len(continuation) > max_length:
            raise ValueError(
                f"request {number}: its continuation has {len(continuation):,} tokens, the model reads {max_length:,}"
            )
        tokens = (*context, *continuation)[-(max_length + 1) : -1]
        n_cut += len(context) + len(continuation) > max_length + 1
        rows.setdefault(tokens, _Row(tokens, [])).asked.append((number, continuation))
    warn_cut(n_cut, len(pairs), max_length)
    found: dict[int, tuple[float, bool]] = {}
    distinct = list(rows.values())
    was_training = model.training
    model.eval()
    try:
        for chosen in batches([len(row.tokens) for row in distinct], batch, alike=rotates_by_length(model)):
            of_batch = _scored(model, [distinct[i] for i in chosen], precision)
            found |= of_batch
            if progress is not None:
                progress(len(of_batch))
    finally:
        model.train(was_training)
    return [found[number] for number in range(len(pairs))]


def _scored(model: Decoder, rows: Sequence[_Row], precision: Precision) -> dict[int, tuple[float, bool]]:
    device = model.head_weight.device
    tokens_BT = torch.zeros(len(rows), len(rows[0].tokens), dtype=torch.int64)
    row_n: list[int] = []
    place_n: list[int] = []
    target_n: list[int] = []
    sizes: list[tuple[int, int]] = []  # (request, tokens of its continuation)
    for row, each in enumerate(rows):
        tokens_BT[row, : len(each.tokens)] = torch.tensor(each.tokens)
        for number, continuation in each.asked:
            row_n += [row] * len(continuation)
            place_n += range(len(each.tokens) - len(continuation), len(each.tokens))
            target_n += continuation
            sizes.append((number, len(continuation)))
    with autocast(device, precision):
        hidden_BTD = model.hidden(tokens_BT.to(device))  # causal: what stands behind a row is never seen from it
        rows_N, places_N, targets_N = (torch.tensor(each, device=device) for each in (row_n, place_n, target_n))
        logprobs, rights = [], []
        at_a_time = max(1, CHUNK_LOGITS.get(device.type, 2**20) // model.config.vocab_size)
        for part in torch.arange(len(target_n), device=device).split(at_a_time):
            logits_nV = model.logits(hidden_BTD[rows_N[part], places_N[part]]).float()
            target_n1 = targets_N[part, None]
            logprobs.append((logits_nV.gather(1, target_n1)[:, 0] - logits_nV.logsumexp(-1)).double())
            rights.append(logits_nV.argmax(-1) == target_n1[:, 0])
    logprob_N, right_N = torch.cat(logprobs).cpu(), torch.cat(rights).cpu()
    lengths = [size for _, size in sizes]
    return {
        number: (float(logprob.sum()), bool(right.all()))
        for (number, _), logprob, right in zip(sizes, logprob_N.split(lengths), right_N.split(lengths), strict=True)
    }


def warn_cut(n_cut: int, n: int, max_length: int) -> None:
    """Says how many of n requests lost the beginning of their context."""
    if n_cut:
        logger.warning("%d of %d contexts lose their beginning: the model reads %d tokens", n_cut, n, max_length)


def rolling(
    model: Decoder,
    texts: Sequence[Sequence[int]],
    *,
    prefix: int,
    max_length: int,
    batch: int,
    precision: Precision = "fp32",
) -> list[float]:
    """The log-likelihood of each text in nats, every token predicted once: windows of `max_length` tokens side by side,
    the first behind `prefix`, the last ending with the text and full."""
    documents = [EvalDocument(tokens=np.array(text, dtype=np.int64), n_bytes=0) for text in texts]
    if not any(len(text) for text in texts):
        return [0.0] * len(texts)
    scores = score(
        model,
        documents,
        window=max_length,
        stride=max_length,
        bos=prefix,
        batch=batch,
        device=model.head_weight.device,
        precision=precision,
    )
    nll = np.bincount(scores.document, weights=scores.nll.astype(np.float64), minlength=len(texts))
    return [-float(each) for each in nll]
