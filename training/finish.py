"""What follows the last step: evaluation on held-out documents, the n-gram baseline, a sample, summary and report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from longspan.data.prepare import Prepared
from longspan.data.store import Documents
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.documents import EvalDocument, documents_from
from longspan.evaluation.ngram import NgramBaseline
from longspan.evaluation.perplexity import score
from longspan.model.decoder import Decoder
from longspan.model.generation import generate

from .precision import Arithmetic
from .run_directory import SAMPLE
from .schema import EvaluationConfig, SampleConfig

BASELINE_ORDER = 2
BASELINE_BYTES = 50_000_000  # of training text: beyond that three bytes have nothing more to learn

logger = logging.getLogger("longspan.training")


def evaluate(
    model: Decoder,
    prepared: Prepared,
    config: EvaluationConfig,
    *,
    context: int,
    arithmetic: Arithmetic,
    device: torch.device,
    seed: int,
) -> dict[str, object]:
    """evaluation.json: perplexity of held-out documents by its protocol, and the baseline on the same bytes."""
    held_out = prepared.store.documents("validation")
    documents = documents_from(held_out, max_tokens=config.max_tokens, decode=prepared.tokenizer.decode, seed=seed)
    window = config.window or context
    logger.info("evaluating %d held-out documents", len(documents))
    scores = score(
        model,
        documents,
        window=window,
        stride=config.stride or max(1, window // 2),
        bos=prepared.tokenizer.eos_id,
        batch=config.batch,
        device=device,
        precision="bf16" if arithmetic.autocast is not None else "fp32",
        documents_available=len(held_out),
    )
    return {"perplexity": scores.summary().to_dict(), "baseline": baseline(prepared, documents)}


def baseline(prepared: Prepared, documents: list[EvalDocument]) -> dict[str, object]:
    """A byte n-gram fitted on the training documents, on the text of `documents`."""
    ngram = NgramBaseline(BASELINE_ORDER)
    ngram.fit(_texts(prepared.store.documents("train"), prepared.tokenizer, BASELINE_BYTES))
    texts = [prepared.tokenizer.decode(document.tokens.tolist()) for document in documents]
    return {
        "name": f"order-{BASELINE_ORDER} byte n-gram",
        "order": BASELINE_ORDER,
        "bits_per_byte": ngram.bits_per_byte(texts),
        "trained_bytes": ngram.trained_bytes,
    }


def _texts(documents: Documents, tokenizer: Tokenizer, limit: int) -> Iterator[str]:
    """Texts of documents evenly spread over the split, about `limit` bytes of them."""
    every = max(1, -(-int(documents.byte_counts.sum()) // limit))
    for index in range(0, len(documents), every):
        yield tokenizer.decode(documents.tokens(index).tolist())


def sample(model: Decoder, tokenizer: Tokenizer, config: SampleConfig, *, seed: int, directory: Path) -> None:
    """sample.txt: the prompt and what the model makes of it; nothing for an empty prompt."""
    prompt = tokenizer.encode(config.prompt)
    if not prompt:
        return
    new_tokens = config.max_new_tokens
    if model.config.positions == "learned":
        new_tokens = min(new_tokens, model.config.max_positions - len(prompt))
    if new_tokens < 1:
        logger.warning("no sample: sample.prompt fills the model's %d positions", model.config.max_positions)
        return
    device = model.head_weight.device
    tokens_BT = generate(
        model,
        torch.tensor([prompt], device=device),
        max_new_tokens=new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=seed,
        stop_tokens={tokenizer.eos_id},
        pad_token=tokenizer.eos_id,
    )
    (directory / SAMPLE).write_text(tokenizer.decode(tokens_BT[0].tolist()), encoding="utf-8")
