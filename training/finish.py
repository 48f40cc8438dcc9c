"""What follows the last step: evaluation on held-out documents, the n-gram baseline, a sample, summary and report."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from longspan.data.batch import IGNORE, Batch, BatchSource
from longspan.data.prepare import Prepared
from longspan.data.seq2seq import Seq2SeqBatch
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.perplexity.evaluate import Evaluation, evaluate_documents
from longspan.model.decoder import Decoder
from longspan.model.generation import generate
from longspan.model.prompts import fitting
from longspan.model.seq2seq import Seq2Seq

from .precision import Arithmetic
from .run_directory import SAMPLE
from .schema import EvaluationConfig, SampleConfig

logger = logging.getLogger("longspan.training")


def evaluate(
    model: Decoder,
    prepared: Prepared,
    config: EvaluationConfig,
    *,
    context: int,
    arithmetic: Arithmetic,
    device: torch.device,
) -> Evaluation:
    """Perplexity of held-out documents by the configured protocol, and the baseline on the same bytes."""
    held_out = prepared.store.documents("validation")
    logger.info("evaluating on %d held-out documents", len(held_out))
    return evaluate_documents(
        model,
        prepared.tokenizer,
        held_out,
        config,
        context=context,
        device=device,
        precision=arithmetic.scoring,
        train=prepared.store.documents("train"),
        receptive_field=model.config.receptive_field,
    )


def answer(
    model: Seq2Seq,
    source: BatchSource[Batch],
    tokenizer: Tokenizer,
    config: SampleConfig,
    *,
    seed: int,
    directory: Path,
) -> None:
    """sample.txt: the first source of a stream, what the model writes for it, and its target; nothing for an empty
    `config.prompt`."""
    batch = source.batch([0])
    if not config.prompt or not isinstance(batch, Seq2SeqBatch):
        return
    batch = batch.to(model.head_weight.device)
    source_BS = batch.source_BS[:, : int(batch.source_lengths_B[0])]
    written_BT = generate(
        model,
        source_BS,
        is_global_BT=None if batch.is_global_BS is None else batch.is_global_BS[:, : source_BS.shape[1]],
        max_new_tokens=min(config.max_new_tokens, model.config.decoder.max_positions),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=seed,
        stop_tokens={tokenizer.eos_id},
        pad_token=tokenizer.eos_id,
    )
    target_T = batch.targets_BT[0][batch.targets_BT[0] != IGNORE]
    texts = {
        "read": tokenizer.decode(source_BS[0].tolist(), skip_special=False),  # mask tokens are to be seen
        "written": tokenizer.decode(written_BT[0].tolist()),
        "to be written": tokenizer.decode(target_T.tolist()),
    }
    shown = "\n\n".join(f"== {name} ==\n{text}" for name, text in texts.items())
    (directory / SAMPLE).write_text(f"{shown}\n", encoding="utf-8")


def sample(model: Decoder, tokenizer: Tokenizer, config: SampleConfig, *, seed: int, directory: Path) -> None:
    """sample.txt: the prompt and what the model makes of it; nothing for an empty prompt."""
    prompt = tokenizer.encode(config.prompt)
    if not prompt:
        return
    if model.config.positions == "learned" and len(prompt) > model.config.max_positions:
        logger.warning("no sample: sample.prompt is longer than the model's %d positions", model.config.max_positions)
        return
    device = model.head_weight.device
    tokens_BT = generate(
        model,
        torch.tensor([prompt], device=device),
        max_new_tokens=fitting(model.config, len(prompt), config.max_new_tokens),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=seed,
        stop_tokens={tokenizer.eos_id},
        pad_token=tokenizer.eos_id,
    )
    (directory / SAMPLE).write_text(tokenizer.decode(tokens_BT[0].tolist()), encoding="utf-8")
