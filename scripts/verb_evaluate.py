"""`longspan evaluate`: perplexity of a checkpoint on held-out documents or on a text of one's own."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from longspan.data.sources import from_path
from longspan.data.store import Documents
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.documents import StoredDocuments, text_documents
from longspan.evaluation.evaluate import evaluate_documents
from longspan.evaluation.record import markdown, write_evaluation
from longspan.model.checkpoint import load_decoder, resolve_checkpoint
from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.held_out import imported, trained_with, training_store
from longspan.training.precision import choose_device, inference_precision
from longspan.training.schema import EvaluateConfig, EvaluationDataConfig

from .output import as_yaml, progress_bars, refuse_occupied


def run(config: EvaluateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    output = Path(config.output) if config.output is not None else _default_output(config)
    refuse_occupied(output, overwrite=config.overwrite)
    device = choose_device(config.accelerator, key="accelerator")
    checkpoint = resolve_checkpoint(config.checkpoint)
    # Asked for fp32, weights that are stored narrower are widened; else they are computed with as they are.
    model = load_decoder(checkpoint, device=device, dtype=torch.float32 if config.precision == "fp32" else None)
    tokenizer = Tokenizer.load(checkpoint)
    stored, train = _documents(config.data, checkpoint, tokenizer)
    trained = trained_with(checkpoint)
    with progress_bars() as bars:
        task = bars.add_task("scoring")
        found = evaluate_documents(
            model,
            tokenizer,
            stored,
            config.evaluation,
            context=trained.context or model.config.max_positions,
            device=device,
            precision=inference_precision(config.precision, device, trained_in=trained.precision),
            train=train,
            limit=config.data.limit,
            start=next(iter(reversed(tokenizer.start_ids)), None) if imported(checkpoint) else None,
            receptive_field=model.config.receptive_field,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    title = f"Perplexity of {checkpoint}"
    write_evaluation(found.result, output, baseline=found.baseline, title=title)
    print(markdown(found.result, found.baseline, title=title))
    print(f"written to {output}/")
    return 0


def _default_output(config: EvaluateConfig) -> Path:
    """evaluations/<checkpoint's name>/<data's name>: one checkpoint is evaluated on many texts."""
    data = "held-out"
    if config.data.path is not None:
        data = re.sub(r"[^\w.-]+", "-", config.data.path.removeprefix("hub:").rstrip("/")).strip("-.") or "text"
    return Path("evaluations", Path(config.checkpoint).resolve().name, data)


def _documents(
    data: EvaluationDataConfig, checkpoint: Path, tokenizer: Tokenizer
) -> tuple[StoredDocuments, Documents | None]:
    """What to score, and the training documents for the baseline: a text of the user's own can do without."""
    if data.path is None:
        store = training_store(checkpoint, tokenizer)
        return store.documents("validation"), store.documents("train")
    source = replace(from_path(data.path), text_field=data.text_field, limit=data.limit)
    stored = text_documents(source, tokenizer)
    try:
        return stored, training_store(checkpoint, tokenizer).documents("train")
    except UserError as error:
        print(f"no n-gram baseline: {error}", file=sys.stderr)
        return stored, None
