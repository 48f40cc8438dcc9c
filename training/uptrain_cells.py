"""Making the cells of a grid: conversion, training as an ordinary run, and what is measured of each.

cells/<cell>/result.json   written last and at once: a cell without it is not done
cells/<cell>/model/        its weights, as long as they are needed
runs/<chain>/              the training run of a chain, with its metrics; its checkpoints go when the chain is done
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from longspan.data.prepare import Prepared, prepare
from longspan.data.sources import SourceError
from longspan.data.store import Documents
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.ablation.summary import RESULT
from longspan.evaluation.context.recall import fitting_lengths, measure_recall
from longspan.evaluation.perplexity.evaluate import evaluate_documents
from longspan.evaluation.surgery.calibration import input_moments
from longspan.evaluation.surgery.similarity import embedding_distance
from longspan.model.accounting import kv_bytes_per_token, parameters
from longspan.model.build import Model
from longspan.model.checkpoint import (
    CONFIG,
    LINEAGE,
    TOKENIZER,
    WEIGHTS,
    load_model,
    remove_unfinished,
    step_directory,
    write_directory,
)
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.surgery import GroupedQuery, convert_model, save_moments

from . import run_directory as files
from .checkpointing import Checkpoints
from .data_settings import prepare_settings
from .distillation import DistilledHiddenLoss, DistilledTokenLoss
from .errors import Terminated, UserError
from .held_out import start_token, training_store
from .objectives import Objective, objective_for
from .precision import Arithmetic, choose_arithmetic, choose_device
from .run import Given, train
from .signals import SignalFlag
from .uptrain_plan import Cell, Chain, Start
from .uptrain_recipe import Uptraining

Event = Literal["begun", "done"]
Tell = Callable[[Event, Cell, Mapping[str, object]], object]

logger = logging.getLogger("longspan.training")

STATISTICS = "statistics"
_MODEL = "model"
_POOL = 200_000  # held-out tokens that retrieval takes its texts from
_STORE_CHANGED = ("path", "sources", "tokenizer", "name", "validation_fraction", "prompt_field", "response_field")


class Workshop:
    """Makes cells, one chain at a time, on one device.

    Whatever was interrupted goes on where it was: a finished cell is kept, a run continues from its last checkpoint,
    and gives what it would have given.
    """

    def __init__(self, grid: Uptraining, signals: SignalFlag) -> None:
        self.grid = grid
        self._signals = signals
        self.device = choose_device(grid.base.trainer.accelerator)
        self.arithmetic: Arithmetic = choose_arithmetic(grid.base.trainer.precision, self.device)

    # -- chains --------------------------------------------------------------------------------------------------------

    def make(self, chain: Chain, tell: Tell) -> None:
        """The cells of a chain that are not done yet. Raises what a run raises; Terminated after a signal."""
        missing = [cell for cell in chain.cells if not self.is_done(cell)]
        for cell in missing:
            self.stop_if_asked()
            tell("begun", cell, {})
            record = self._converted(cell) if cell.steps == 0 else self._trained(chain, cell)
            files.write_json(self._directory(cell) / RESULT, record)
            tell("done", cell, record)
        if chain.steps:
            shutil.rmtree(self._run(chain) / files.CHECKPOINTS, ignore_errors=True)

    def is_done(self, cell: Cell) -> bool:
        return (self._directory(cell) / RESULT).is_file()

    def convert(self, start: Start) -> Path:
        """The checkpoint that training starts from: the parent, or the parent with fewer heads."""
        if start.kv_heads is None or start.init is None:
            return self.grid.parent
        cell = Cell(start=start, alpha=0.0, steps=0, seed=start.seed)
        target = self._directory(cell) / _MODEL
        remove_unfinished(target.parent)
        if not (target / CONFIG).is_file():
            grouping = self.grid.request.grouping
            compares = start.init in ("aligned", "svd") or grouping == "similar"
            surgery = GroupedQuery(
                kv_heads=start.kv_heads,
                init=start.init,
                grouping=grouping,
                seed=start.seed or 0,
                statistics=self._statistics() if compares else None,
            )
            convert_model(self.grid.parent, target, [surgery], overwrite=True)
        return target

    def _statistics(self) -> str | None:
        """A file of what the parent's attentions read on the texts asked for, made once for the grid."""
        asked = self.grid.request.statistics
        if asked is None or asked.endswith(".safetensors"):
            return asked
        path = self.grid.directory / STATISTICS / f"{Path(asked).name}.safetensors"  # lineage.json names the file
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            moments = input_moments(load_model(self.grid.parent), Tokenizer.load(self.grid.parent), asked)
            save_moments(moments, partial := path.with_name(f".{path.name}.tmp-{os.getpid()}"))
            partial.replace(path)
        return str(path)

    def _converted(self, cell: Cell) -> dict[str, object]:
        return self._measured(cell, self.convert(cell.start), seconds=0.0)

    def _trained(self, chain: Chain, cell: Cell) -> dict[str, object]:
        """Trains up to the cell's step, from wherever the chain's run is, and measures."""
        directory = self._run(chain)
        config = self.grid.run_config(cell, directory)
        steps = Checkpoints(directory, keep=1).steps()
        if steps and steps[-1] > cell.steps:  # its file was taken away
            shutil.rmtree(directory)
        # Before its lineage is there, a run does not know yet which weights it began with.
        if (directory / files.LINEAGE).is_file():
            config = replace(config, resume="auto")
        else:
            config = replace(config, checkpoint=str(self.convert(cell.start)), overwrite=True)
        train(config, given=Given(prepared=self.prepared, objective=self._objective))
        checkpoint = step_directory(directory, cell.steps)
        seconds = float(files.read_json(directory / files.SUMMARY)["seconds"])
        record = self._measured(cell, checkpoint, seconds=seconds)
        if self.grid.request.keep == "all" or cell.alpha == max(each.alpha for each in self.grid.cells):
            write_directory(self._directory(cell) / _MODEL, lambda staging: _copy(checkpoint, staging), overwrite=True)
        return record

    def _objective(self, model: Model) -> Objective[Any]:
        """A decoder's next tokens, and the parent's word on them where that is asked for; an encoder's likeness."""
        distill = self.grid.request.distill
        if isinstance(model, Decoder) and not (
            distill.enabled and model.config.kv_heads != self.grid.model.kv_heads
        ):  # the control learns from text alone: its parent would hold it where it is
            return objective_for(model)
        teacher = load_model(self.grid.parent, dtype=self.arithmetic.parameters)
        if isinstance(model, Decoder) and isinstance(teacher, Decoder):
            return DistilledTokenLoss(model, teacher, weight=distill.weight, temperature=distill.temperature)
        if isinstance(model, Encoder) and isinstance(teacher, Encoder):
            return DistilledHiddenLoss(model, teacher)
        raise TypeError(f"a {type(teacher).__name__} teaches no {type(model).__name__}")

    # -- measurements --------------------------------------------------------------------------------------------------

    @cached_property
    def prepared(self) -> Prepared:
        """The parent's own store where it is still there and nothing else is asked for; else what the recipe's data and
        `data.*` say, tokenised as the parent's was."""
        parent, data = self.grid.parent, self.grid.base.data
        asked = self.grid.request.overrides.get("data", {})
        tokenizer = parent if (parent / TOKENIZER).is_file() else None
        if tokenizer is not None and self.grid.request.recipe is None and not set(asked) & set(_STORE_CHANGED):
            loaded = Tokenizer.load(parent)
            try:
                store = training_store(parent, loaded)
                return Prepared(store, loaded, store.directory)
            except UserError as error:
                logger.warning("%s; preparing the recipe's data anew", error)
        try:
            return prepare(prepare_settings(data, tokenizer=tokenizer))
        except (SourceError, FileNotFoundError) as error:
            raise UserError(f"data.path: is needed, because the recipe's data cannot be read: {error}") from error

    @cached_property
    def held_out(self) -> Documents:
        """Raises UserError where nothing is held out."""
        documents = self.prepared.store.documents("validation")
        if not len(documents):
            raise UserError(
                "data.validation_fraction: no document is held out, and cells are compared on those; raise it (whole "
                "documents are held out, so few long ones need a large share)"
            )
        return documents

    def _measured(self, cell: Cell, checkpoint: Path, *, seconds: float) -> dict[str, object]:
        # All cells in the same arithmetic, whatever the weights are stored in.
        model = load_model(checkpoint, device=self.device, dtype=torch.float32)
        record: dict[str, object] = {
            "cell": cell.key(),
            "parameters": parameters(model.config).total,
            "model_kv_heads": getattr(model.config, "kv_heads", None),
            "training_seconds": seconds,
            "tokens": cell.steps * self.grid.tokens_per_step,
        }
        if isinstance(model, Decoder):
            return record | self._of_decoder(model, model.config)
        if isinstance(model, Encoder):
            return record | self._of_encoder(model)
        raise TypeError(f"cells are decoders and encoders, not {type(model).__name__}")

    def _of_decoder(self, model: Decoder, config: DecoderConfig) -> dict[str, object]:
        tokenizer, retrieval = self.prepared.tokenizer, self.grid.request.retrieval
        found = evaluate_documents(
            model,
            tokenizer,
            self.held_out,
            self.grid.base.evaluation,
            context=self.grid.base.data.context,
            device=self.device,
            precision=self.arithmetic.scoring,
            # Every cell as `longspan evaluate` scores the parent.
            start=start_token(self.grid.parent, tokenizer),
            receptive_field=config.receptive_field,
        )
        self.stop_if_asked()
        recall: list[dict[str, object]] = []
        if retrieval.enabled and (lengths := fitting_lengths(self.grid.base.data.context)):
            results = measure_recall(
                model,
                _some_text(self.held_out),
                lengths=lengths,
                trials=retrieval.trials,
                device=self.device,
                precision=self.arithmetic.scoring,
            )
            recall = [asdict(each) for each in results]
        return {
            "loss": found.result.loss,
            "perplexity_per_token": found.result.perplexity,
            "bits_per_byte": found.result.bits_per_byte,
            "kv_bytes_per_token": kv_bytes_per_token(config),
            **found.record(),
            "retrieval": recall,
        }

    def _of_encoder(self, model: Encoder) -> dict[str, object]:
        parent = load_model(self.grid.parent, device=self.device, dtype=torch.float32)
        if not isinstance(parent, Encoder):
            raise TypeError("the parent of an encoder is an encoder")
        context, limit = self.grid.base.data.context, self.grid.base.evaluation.max_tokens
        found = embedding_distance(
            model,
            parent,
            self.held_out,
            length=context,
            max_tokens=limit,
            batch=self.grid.base.evaluation.batch,
            device=self.device,
            precision=self.arithmetic.scoring,
        )
        return {"loss": found.distance, "protocol": found.words, "similarity": asdict(found)}

    # -- places and signals --------------------------------------------------------------------------------------------

    def _directory(self, cell: Cell) -> Path:
        directory = self.grid.directory / "cells" / cell.name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _run(self, chain: Chain) -> Path:
        return self.grid.directory / "runs" / chain.name

    def stop_if_asked(self) -> None:
        """Raises Terminated once a signal has come."""
        if self._signals.received:
            raise Terminated(self._signals.received, f"stopped; what is done of {self.grid.directory} is kept")


def forget_models(directory: Path, *, but: str | None) -> None:
    """Removes the weights of all cells but one."""
    for model in (directory / "cells").glob(f"*/{_MODEL}"):
        if model.parent.name != but:
            shutil.rmtree(model)


def _copy(checkpoint: Path, staging: Path) -> None:
    """A checkpoint without its training state."""
    for name in (CONFIG, WEIGHTS, TOKENIZER, LINEAGE):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, staging / name)


def _some_text(documents: Documents) -> np.ndarray:
    pieces: list[np.ndarray] = []
    left = _POOL
    for i in range(len(documents)):
        pieces.append(np.asarray(documents.tokens(i))[:left])
        left -= len(pieces[-1])
        if left <= 0:
            break
    return np.concatenate(pieces)
