"""What a run writes and says about itself when it starts and when it ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longspan.data.example_build import PreparedExamples
from longspan.data.writer import SPLITS
from longspan.evaluation.perplexity.evaluate import Evaluation

from . import run_directory as files
from .callbacks import RunLoop
from .checkpointing import Checkpoints, best_of
from .data_settings import skipped_files
from .fit import Session
from .labelled import Scored
from .new_head import HeadChange
from .schema import as_request
from .stages import stages_of
from .start import Origin
from .streams import AnyPrepared


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended.

    final_step       optimizer steps done
    validation_loss  of the last validation, nats per loss token; None without held-out documents
    best_step        the step with the lowest one
    bits_per_byte    of the final evaluation; None where it is switched off, or of labelled examples
    scores           of the final evaluation on labelled examples, by name; empty elsewhere
    """

    directory: Path
    final_step: int
    validation_loss: float | None
    best_step: int | None
    bits_per_byte: float | None
    scores: Mapping[str, float] = field(default_factory=dict)


def open_directory(
    session: Session, origin: Origin, prepared: AnyPrepared, new_head: HeadChange | None = None
) -> dict[str, object]:
    """Clears what a new run replaces, or what a killed one left; writes what is known at the start. The lineage.

    new_head  what replaced the head of the starting weights
    """
    config, directory, state = session.config, session.directory, session.state
    facts = _data_facts(prepared)
    lineage = files.lineage(seed=config.seed, data=facts, parent=origin.parent, device=session.device)
    if state is not None:
        if (directory / files.LINEAGE).is_file():
            lineage = files.read_json(directory / files.LINEAGE)
        Checkpoints(directory, keep=config.trainer.keep).sweep(after=session.step, best=best_of(state))
    else:
        files.clear(directory)
    if new_head is not None:
        lineage["head"] = new_head.to_dict()
    if config.stages:
        lineage["stages"] = [stage.to_dict() for stage in stages_of(config)]
    sessions = lineage.setdefault("sessions", [])
    if isinstance(sessions, list):
        sessions.append({"started": files.now(), "step": session.step, "command": files.command()})
    files.write_json(directory / files.CONFIG, as_request(config))  # JSON is YAML; no YAML writer is needed for it
    files.write_json(directory / files.LINEAGE, lineage)
    files.write_json(directory / files.ACCOUNTING, session.costs.to_dict())
    return lineage


def _data_facts(prepared: AnyPrepared) -> dict[str, object]:
    store = prepared.store
    facts: dict[str, object] = {
        "store": os.path.abspath(prepared.directory),
        "manifest_sha256": store.manifest["self_sha256"],
        "tokenizer_sha256": store.tokenizer_sha256,
        "vocab_size": store.vocab_size,
    }
    if isinstance(prepared, PreparedExamples):
        facts |= {split: f"{len(prepared.store.records(split)):,} examples" for split in SPLITS}
        return facts | ({"left out": f"{prepared.store.refused:,} records"} if prepared.store.refused else {})
    store = prepared.store
    for split, counts in store.counts.items():
        for name, count in counts.items():
            facts[f"{split}: {name}"] = f"{count.documents:,} documents, {count.tokens:,} tokens, {count.bytes:,} bytes"
    return facts | {f"left out: {name}": words for name, words in skipped_files(store).items()}


def result_of(session: Session, loop: RunLoop, evaluation: Evaluation | Scored | None) -> RunResult:
    return RunResult(
        directory=session.directory,
        final_step=session.config.trainer.steps,
        validation_loss=loop.validation_loss,
        best_step=loop.best.step if loop.best is not None else None,
        bits_per_byte=evaluation.result.bits_per_byte if isinstance(evaluation, Evaluation) else None,
        scores=evaluation.scores if isinstance(evaluation, Scored) else {},
    )


def summary_of(
    session: Session, result: RunResult, chosen: Path, loop: RunLoop, evaluation: Evaluation | Scored | None
) -> dict[str, object]:
    """summary.json; `chosen` is the checkpoint that was evaluated."""
    config, costs = session.config, session.costs
    summary: dict[str, object] = {
        "name": config.name,
        "model": config.model_name or config.model.architecture,
        "architecture": config.model.architecture,
        "parameters": costs.parameters.total,
        "steps": result.final_step,
        "tokens": costs.tokens,
        "seconds": loop.seconds,
        "validation_loss": result.validation_loss,
        "best_step": result.best_step,
        "best_validation_loss": loop.best.validation_loss if loop.best is not None else None,
        "evaluated_checkpoint": chosen.name,
        "finished": files.now(),
    }
    if evaluation is not None:
        summary |= evaluation.headline()
    return summary


def closing_words(result: RunResult, evaluation: Evaluation | Scored | None) -> str:
    """The last line of the log."""
    words = [f"step {result.final_step}"]
    if result.validation_loss is not None:
        words.append(f"validation loss {result.validation_loss:.3f}")
    if evaluation is not None:
        words.append(f"evaluated: {evaluation.words()}")
    return ", ".join(words) + f"; everything is in {result.directory}"
