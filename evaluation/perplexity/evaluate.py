"""One evaluation, for the end of a run and for `longspan evaluate`: which documents, which protocol, against what.

A run and a later evaluation of its checkpoint agree to the last digit because both come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch

from longspan.data.store import Documents
from longspan.data.tokenizer import Tokenizer

from ..files import finite, finite_or_none
from ..names import ProtocolName
from ..passes import LanguageModel, Precision
from .baseline import BaselineResult, measure_baseline
from .documents import SAMPLE_SEED, EvalDocument, StoredDocuments, documents_from, in_full_windows, text_digest
from .protocols import ProtocolResult, measure_protocols
from .result import DocumentScore, PerplexityResult, Scored
from .sliding_window import score

BASELINE_BYTES = 50_000_000  # of training text: beyond that three bytes have nothing more to learn


class Scoring(Protocol):
    """The choices that a user makes (`evaluation.*` of a configuration).

    max_tokens     score at most this many; None: all
    window         tokens that a forward pass sees; None: the context that the model was trained with
    stride         new tokens scored per window; None: half the window
    batch          windows in a forward pass
    scored         every token, or the last `stride` of each full window
    merge_windows  several windows in one pass, where that changes no number
    protocols      other ways to count that are measured beside it (`protocols.measure_protocols`)
    """

    @property
    def max_tokens(self) -> int | None: ...
    @property
    def window(self) -> int | None: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def batch(self) -> int: ...
    @property
    def scored(self) -> Scored: ...
    @property
    def merge_windows(self) -> bool: ...
    @property
    def protocols(self) -> tuple[ProtocolName, ...]: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model costs on held-out documents, and what a byte n-gram does on the same text (None: not measured)."""

    result: PerplexityResult
    baseline: BaselineResult | None
    documents: tuple[DocumentScore, ...] = ()
    protocols: tuple[ProtocolResult, ...] = ()

    def record(self) -> dict[str, object]:
        """Plain data for evaluation.json."""
        return evaluation_record(self.result, self.baseline, self.protocols)

    def headline(self) -> dict[str, float | None]:
        """For summary.json: the numbers that runs are compared by; null where they are not finite or not measured."""
        numbers = {"perplexity": self.result.perplexity, "bits_per_byte": self.result.bits_per_byte}
        if self.baseline is not None:
            numbers["baseline_bits_per_byte"] = self.baseline.bits_per_byte
        return {name: finite_or_none(value) for name, value in numbers.items()}

    def words(self) -> str:
        """One line for a log."""
        words = f"perplexity {self.result.perplexity:.2f}"
        if self.result.bits_per_byte is None:
            return words
        words += f", {self.result.bits_per_byte:.3f} bits per byte"
        if self.baseline is None:
            return words
        return f"{words} ({self.baseline.name}: {self.baseline.bits_per_byte:.3f})"


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


def evaluate_documents(
    model: LanguageModel,
    tokenizer: Tokenizer,
    stored: StoredDocuments,
    scoring: Scoring,
    *,
    context: int,
    device: torch.device | str,
    precision: Precision,
    train: Documents | None = None,
    limit: int | None = None,
    start: int | None = None,
    receptive_field: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    protocol_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a sample of `stored` documents, each preceded by the token that begins one; prompts are read, not scored.

    context          the window where `scoring` names none
    train            training documents of the same tokenizer, to fit the baseline on; None or empty: no baseline
    limit            at most this many documents
    start            that token; None: the end-of-text token
    receptive_field  how far back a prediction can see (`DecoderConfig.receptive_field`); None: to the beginning
    progress         called with (tokens scored, tokens in all), and `protocol_progress` for the other protocols
    Raises ValueError for a request that cannot be met: no documents, a stride beyond the window, foreign tokens.
    """
    documents = documents_from(
        stored, limit=limit, max_tokens=scoring.max_tokens, decode=tokenizer.decode, seed=SAMPLE_SEED
    )
    window = scoring.window or context
    stride = scoring.stride or max(1, window // 2)
    drawn = documents
    if scoring.scored == "full_windows":
        documents = _in_full_windows(documents, tokenizer, window=window, stride=stride)
    scores = score(
        model,
        documents,
        window=window,
        stride=stride,
        bos=tokenizer.eos_id if start is None else start,
        batch=scoring.batch,
        device=device,
        precision=precision,
        progress=progress,
        documents_available=len(stored),
        reach=receptive_field if scoring.merge_windows else None,
    )
    protocol = replace(
        scores.protocol,
        max_tokens=scoring.max_tokens,
        sample_seed=SAMPLE_SEED,
        scored=scoring.scored,
        text_sha256=text_digest(documents, tokenizer.decode),
        tokenizer_sha256=tokenizer.sha256,
    )
    if scoring.scored == "full_windows":  # its cuts are the protocol's, not the documents'
        protocol = replace(
            protocol,
            truncated=sum(document.truncated for document in drawn),
            prompts=sum(document.prompt > 0 for document in drawn),
        )
    baseline = None
    texts = [document.text(tokenizer.decode) for document in documents]
    if train is not None and len(train) and any(texts):
        prompts = [document.prompt_text(tokenizer.decode) for document in documents]
        baseline = measure_baseline(spread_texts(train, tokenizer, BASELINE_BYTES), texts, after=prompts)
    others: list[ProtocolResult] = []
    if scoring.protocols:
        others = measure_protocols(
            model,
            drawn,
            scoring.protocols,
            tokenizer=tokenizer,
            window=window,
            bos=tokenizer.eos_id if start is None else start,
            batch=scoring.batch,
            device=device,
            precision=precision,
            stride=stride,
            progress=protocol_progress,
        )
    return Evaluation(
        replace(scores, protocol=protocol).summary(), baseline, documents=scores.by_document(), protocols=tuple(others)
    )


def _in_full_windows(
    documents: Sequence[EvalDocument], tokenizer: Tokenizer, *, window: int, stride: int
) -> list[EvalDocument]:
    """What is scored of each, a token before it. Raises ValueError where no document has a full window."""
    cut = (in_full_windows(each, window=window, stride=stride, first=0, decode=tokenizer.decode) for each in documents)
    kept = [document for document in cut if document is not None]
    if not kept:
        longest = max((len(document.tokens) for document in documents), default=0)
        raise ValueError(
            f"evaluation.scored=full_windows: no document fills a window of {window:,} tokens (the longest drawn has "
            f"{longest:,}); lower evaluation.window, raise evaluation.max_tokens, or score all tokens"
        )
    return kept


def spread_texts(documents: Documents, tokenizer: Tokenizer, limit: int) -> Iterator[str]:
    """Texts of documents evenly spread over a split, about `limit` bytes of them; a longer document is cut there."""
    every = max(1, -(-int(documents.byte_counts.sum()) // limit))
    left = limit
    for index in range(0, len(documents), every):
        text = tokenizer.decode(documents.tokens(index)[:left].tolist())
        yield text
        left -= len(text.encode())
        if left <= 0:
            return
