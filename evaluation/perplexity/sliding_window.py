"""Sliding-window perplexity with exact accounting: every token of every document is scored once.

The protocol. A document of n tokens gives n predictions when `bos` precedes it (n - 1 without one: its first token has
nothing to be predicted from). A forward pass reads at most `window` tokens. The first window of a document scores all
of its predictions; each later one advances by `stride`, reads the `window` tokens that end there and scores only the
`stride` predictions not yet scored, so each of them has more than `window - stride` tokens before it. The last window
ends with the document and stays full: fewer than `stride` new tokens never mean less context. `bos` stands once, at the
start of the document, not in every window. The loss is the sum of all nll divided by their number: neither windows nor
documents are averaged first, and perplexity is exp of that mean, never the mean of exps.

The prompt of a document (what training reads without loss) is read and not scored: its predictions are left out of the
same windows, and nothing else changes.

Where a prediction cannot depend on more than `reach` tokens before its own and every window but the first gives each of
its new predictions that many, the windows are computed in other passes, which share what they read: the same numbers up
to rounding, without reading `window` tokens for each `stride` new ones.

Published scripts differ in each of these choices by more than the methods that they compare (docs/evaluation.md).

Legend: B windows in a forward pass, T tokens in the longest of them, N scored predictions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longspan.kernels.cross_entropy import token_nll

from ..passes import LanguageModel, Precision, autocast, batches, dtype_name, rotates_by_length
from .documents import EvalDocument, tokens_digest
from .result import DocumentScore, PerplexityResult, ScoringProtocol, summarise

# Merged windows: a pass is so many times what a prediction can see; longer ones read less twice and need more memory.
_PASS = 4
_SHORTEST_PASS = 1024


@dataclass(frozen=True, slots=True)
class ScoredWindow:
    """One forward pass over the predictions [start, end) of a document, of which [scored, end) are new."""

    document: int
    start: int
    scored: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRow:
    """One sequence of a forward pass: prediction i reads inputs[: i + 1] and is asked for targets[i].

    inputs, targets  integer ids [T]
    first            the predictions before this one are not wanted
    """

    inputs: np.ndarray
    targets: np.ndarray
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """The nll of every scored token, in document order.

    nll       float32 [N], nats
    document  int64 [N], index into `documents`
    position  int64 [N], position of the token in its document, from 0
    context   int64 [N], how many tokens the model saw before it, `bos` included
    """

    nll: np.ndarray
    document: np.ndarray
    position: np.ndarray
    context: np.ndarray
    documents: tuple[EvalDocument, ...]
    protocol: ScoringProtocol

    def by_document(self) -> tuple[DocumentScore, ...]:
        """Each document that has a scored token; one without an id is named by its number."""
        n = len(self.documents)
        nll_d = np.bincount(self.document, weights=self.nll.astype(np.float64), minlength=n)
        tokens_d = np.bincount(self.document, minlength=n)
        return tuple(
            DocumentScore(
                id=each.id or str(number), source=each.source, nll=float(nll), tokens=int(tokens), bytes=each.n_bytes
            )
            for number, (each, nll, tokens) in enumerate(zip(self.documents, nll_d, tokens_d, strict=True))
            if tokens
        )

    def summary(self, *, seed: int = 0) -> PerplexityResult:
        """Token-weighted loss with everything derived from it; `seed` is the bootstrap's."""
        return summarise(
            self.nll,
            self.document,
            self.position,
            n_bytes=[document.n_bytes for document in self.documents],
            n_characters=[document.n_characters for document in self.documents],
            sources=[document.source for document in self.documents],
            protocol=self.protocol,
            seed=seed,
        )


def windows_of(n: int, *, window: int, stride: int, document: int = 0, unscored: int = 0) -> Iterator[ScoredWindow]:
    """The windows that score n predictions of one document, each prediction in exactly one of them, the first
    `unscored` in none."""
    end = min(n, window)
    if end > unscored:
        yield ScoredWindow(document, 0, unscored, end)
    while end < n:
        scored, end = end, min(n, end + stride)
        if end > unscored:
            yield ScoredWindow(document, end - window, max(scored, unscored), end)


def score(
    model: LanguageModel,
    documents: Sequence[EvalDocument],
    *,
    window: int,
    stride: int,
    bos: int | None,
    batch: int,
    device: torch.device | str,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
    documents_available: int | None = None,
    reach: int | None = None,
) -> TokenScores:
    """The nll of every token of `documents` under `model`, by the protocol at the top of this file.

    window               tokens that a forward pass reads at most
    stride               new tokens that each window but the first scores; `window`: disjoint windows
    bos                  token that precedes each document; None: first tokens are context only
    batch                windows in a forward pass. Windows of one length go together; shorter rows are padded on the
                         right, where causal attention never looks
    precision            "bf16": matmuls run in bf16 under autocast; softmax and sums are fp32 either way
    progress             called with (tokens scored, tokens in all) after each forward pass
    documents_available  for the protocol: how many documents these were drawn from
    reach                how many tokens before its own can change a prediction, wherever in a sequence it stands
                         (`DecoderConfig.receptive_field`); None: all, or unknown

    The model is evaluated in eval mode and returned to the mode that it had. Logits exist a chunk at a time only.
    Raises ValueError when nothing can be scored, or a token id lies outside the model's vocabulary.
    """
    check_request(model, documents, window=window, stride=stride, batch=batch, bos=bos)
    inputs, targets = zip(*(_inputs_and_targets(document, bos) for document in documents))
    first_scored = 0 if bos is not None else 1
    # Predictions of a prompt; prediction 0 is asked for the document's token number `first_scored`.
    unscored_d = np.array([max(0, document.prompt - first_scored) for document in documents])
    counts_d = np.array([len(target) for target in targets]) - unscored_d
    n = int(counts_d.sum())
    starts_d = np.cumsum(counts_d) - counts_d - unscored_d  # where prediction 0 of a document would stand
    if n == 0:
        raise ValueError(
            f"nothing to score: {len(documents):,} documents hold no token"
            + ("" if bos is not None else " with another before it; give bos to score first tokens")
            + (", prompts aside" if unscored_d.any() else "")
        )

    def pieces_of(length: int, new: int) -> list[ScoredWindow]:
        return [
            piece
            for document, (target, unscored) in enumerate(zip(targets, unscored_d.tolist()))
            for piece in windows_of(len(target), window=length, stride=new, document=document, unscored=unscored)
        ]

    windows = passes = pieces_of(window, stride)
    if reach is not None and stride + reach <= window:
        length = min(window, max(_PASS * reach, _SHORTEST_PASS))
        merged = pieces_of(length, length - reach)
        passes = min(windows, merged, key=lambda pieces: sum(piece.end - piece.start for piece in pieces))

    nll_N = np.full(n, np.nan, dtype=np.float32)
    context_N = np.zeros(n, dtype=np.int64)
    for piece in windows:
        at = starts_d[piece.document]
        context_N[at + piece.scored : at + piece.end] = np.arange(piece.scored, piece.end) - piece.start + 1
    rows = [
        ScoredRow(
            inputs=inputs[piece.document][piece.start : piece.end],
            targets=targets[piece.document][piece.start : piece.end],
            first=piece.scored - piece.start,
        )
        for piece in passes
    ]
    for piece, nll in zip(
        passes,
        score_rows(model, rows, batch=batch, device=device, precision=precision, progress=progress),
    ):
        at = starts_d[piece.document]
        nll_N[at + piece.scored : at + piece.end] = nll

    first_d = unscored_d + first_scored
    return TokenScores(
        nll=nll_N,
        document=np.repeat(np.arange(len(documents)), counts_d),
        position=np.concatenate([np.arange(first, first + count) for first, count in zip(first_d, counts_d)]),
        context=context_N,
        documents=tuple(documents),
        protocol=ScoringProtocol(
            window=window,
            stride=stride,
            bos=bos,
            precision="bf16 autocast" if precision == "bf16" else dtype_name(model.head_weight.dtype),
            documents=int((counts_d > 0).sum()),
            documents_available=documents_available,
            truncated=sum(document.truncated for document, count in zip(documents, counts_d) if count),
            prompts=sum(document.prompt > 0 for document, count in zip(documents, counts_d) if count),
            merged=passes is not windows,
            tokens_sha256=tokens_digest(documents),
        ),
    )


def _inputs_and_targets(document: EvalDocument, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Prediction i reads inputs[: i + 1] and is asked for targets[i]."""
    tokens = np.asarray(document.tokens, dtype=np.int64)
    if bos is None:
        return tokens[:-1], tokens[1:]
    return np.concatenate([[bos], tokens[:-1]])[: len(tokens)], tokens


@torch.no_grad()
def score_rows(
    model: LanguageModel,
    rows: Sequence[ScoredRow],
    *,
    batch: int,
    device: torch.device | str,
    precision: Precision = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The nll of the wanted predictions of each row, float32 [T - first] nats, in the order of `rows`.

    batch     rows in a forward pass. Rows of one length go together; shorter ones are padded on the right, where causal
              attention never looks (where padding changes the rotation of keys, rows of one length only)
    progress  called with (predictions scored, predictions in all) after each forward pass

    The model is evaluated in eval mode and returned to the mode that it had. Logits exist a chunk at a time only.
    """
    found: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows)
    done, total = 0, sum(len(row.inputs) - row.first for row in rows)
    was_training = model.training
    model.train(False)
    try:
        for chosen in batches([len(row.inputs) for row in rows], batch, alike=rotates_by_length(model)):
            wanted = [len(rows[i].inputs) - rows[i].first for i in chosen]
            nll_N = _score_batch(model, [rows[i] for i in chosen], torch.device(device), precision)
            for i, part in zip(chosen, np.split(nll_N, np.cumsum(wanted)[:-1])):
                found[i] = part
            done += len(nll_N)
            if progress is not None:
                progress(done, total)
    finally:
        model.train(was_training)
    return found


def _score_batch(
    model: LanguageModel, rows: Sequence[ScoredRow], device: torch.device, precision: Precision
) -> np.ndarray:
    """nll of the wanted predictions of each row, one after the other."""
    length = max(len(row.inputs) for row in rows)
    tokens_BT = np.zeros((len(rows), length), dtype=np.int64)
    wanted_BT = np.zeros((len(rows), length), dtype=bool)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row.inputs)] = row.inputs
        wanted_BT[i, row.first : len(row.inputs)] = True
    targets_N = np.concatenate([row.targets[row.first :] for row in rows])

    with autocast(device, precision):
        hidden_BTD = model.hidden(torch.from_numpy(tokens_BT).to(device))
        hidden_ND = hidden_BTD[torch.from_numpy(wanted_BT).to(device)]
        nll_N = token_nll(hidden_ND, model.head_weight, torch.from_numpy(targets_N).to(device))
    return nll_N.float().cpu().numpy()


def check_request(
    model: LanguageModel,
    documents: Sequence[EvalDocument],
    *,
    window: int,
    stride: int,
    batch: int,
    bos: int | None,
) -> None:
    """Raises ValueError, in one line, for documents, windows and tokens that cannot be scored."""
    if not documents:
        raise ValueError("no documents to evaluate")
    if window < 1:
        raise ValueError(f"window={window}: a forward pass reads at least 1 token")
    if not 1 <= stride <= window:
        raise ValueError(
            f"stride={stride} with window={window}: the stride is between 1 and the window, "
            "or tokens would be skipped (equal: disjoint windows)"
        )
    if batch < 1:
        raise ValueError(f"batch={batch}: at least 1 window per forward pass")
    vocabulary = model.head_weight.shape[0]
    if bos is not None and not 0 <= bos < vocabulary:
        raise ValueError(f"bos={bos} is outside the model's vocabulary of {vocabulary:,} tokens")
    for document in documents:
        if len(document.tokens) and not 0 <= int(document.tokens.min()) <= int(document.tokens.max()) < vocabulary:
            raise ValueError(
                f"document '{document.id}' ({document.source}) holds token id {int(document.tokens.max())}, but the "
                f"model's vocabulary has {vocabulary:,}: the text was tokenised with another tokenizer"
            )
