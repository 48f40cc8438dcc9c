"""Where a run starts: from nothing, from given weights or from its own last checkpoint, and what that decides."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from longspan.data.tokenizer import Tokenizer
from longspan.kernels.attention import Phase
from longspan.kernels.attention.spec import AttentionSpec
from longspan.model import checkpoint as model_checkpoint
from longspan.model.build import Model, build_from
from longspan.model.config import AttentionPlan, HeadGroup, ModelConfig, Seq2SeqConfig
from longspan.model.encoder import Encoder

from . import run_directory as files
from .checkpointing import newest
from .config_checks import (
    check_documents,
    check_lengths,
    check_objective,
    check_protocol,
    check_vocabulary,
    longest_input,
)
from .config_errors import ConfigError, lines
from .errors import UserError
from .example_checks import HEADS
from .new_head import with_head
from .precision import Arithmetic
from .schema import DataConfig, RunConfig, TokenizerConfig, validate
from .stage_checks import check_stages
from .stages import Stage, stage_at, stages_of

logger = logging.getLogger("longspan.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a run starts: from nothing, from weights, or from the full state of its own last checkpoint (`resumes`).

    checkpoint  directory with the starting weights; None: fresh ones
    parent      what lineage.json names: the checkpoint that the run's first step started from
    """

    checkpoint: Path | None = None
    parent: str | None = None
    resumes: bool = False


def find_directory(config: RunConfig) -> Path:
    """The run directory: `output`, or the run that `resume` names."""
    if config.resume is None or config.resume == "auto":
        return Path(config.directory)
    named = Path(config.resume)
    if config.output is not None and Path(config.output).resolve() != named.resolve():
        raise UserError(
            f"resume={config.resume}: a run continues in its own directory; leave out output={config.output}"
        )
    if not files.is_run(named):
        raise UserError(
            f"resume={config.resume}: is not a run (it has neither {files.CONFIG} nor {files.CHECKPOINTS}/)"
        )
    return named


def find_origin(config: RunConfig, directory: Path) -> Origin:
    """Raises UserError or CheckpointError where there is nothing to start from."""
    if config.resume is not None and config.checkpoint is not None:
        raise UserError(
            f"checkpoint={config.checkpoint} starts anew from weights, resume={config.resume} continues a run; give one"
        )
    if config.checkpoint is not None:
        return _from_weights(config.checkpoint)
    if config.resume is None:
        return Origin()
    try:
        found = newest(directory)
    except model_checkpoint.CheckpointError as error:
        raise UserError(
            f"resume={config.resume}: {error}; without resume, overwrite=true starts the run anew"
        ) from error
    if found is not None:
        parent = files.read_json(found / files.LINEAGE).get("parent")
        return Origin(checkpoint=found, parent=parent, resumes=True)
    if config.resume != "auto":
        raise UserError(
            f"resume={config.resume}: the run was stopped before its first checkpoint; without resume, overwrite=true "
            "starts it anew"
        )
    recorded = directory / files.LINEAGE
    parent = files.read_json(recorded).get("parent") if recorded.is_file() else None
    # Killed before its first checkpoint, a run that started from weights starts from them again.
    return Origin() if parent is None else _from_weights(parent)


def _from_weights(path: str) -> Origin:
    chosen = model_checkpoint.resolve_checkpoint(path)
    model_checkpoint.verify(chosen)
    return Origin(checkpoint=chosen, parent=str(chosen))


def settle(config: RunConfig, origin: Origin, directory: Path, *, own_objective: bool = False) -> RunConfig:
    """The config with what its starting point decides: the model, and a context that was left open. With an objective
    of its own a run may train any model.

    Makes the checks that the schema could not make without knowing the model; raises ConfigError.
    """
    model = model_of(config, origin, directory)
    config = replace(config, model=model, model_name=None if origin.parent is not None else config.model_name)
    if config.context_open:
        data = replace(config.data, context=_open_context(origin, directory, model))
        config = replace(config, data=data, context_open=False)
    problems = [
        *check_lengths(config, fixed_by=None if origin.checkpoint is None else str(origin.checkpoint)),
        *check_stages(config, fixed_by=None if origin.checkpoint is None else str(origin.checkpoint)),
        *check_documents(config),
    ]
    if not own_objective:
        problems += check_objective(config, fixed_by=None if origin.checkpoint is None else str(origin.checkpoint))
    if origin.parent is None:  # otherwise the weights bring their tokenizer
        problems += check_vocabulary(config)
    if not problems:
        stages = stages_of(config)
        problems += check_protocol(config.evaluation, default_window=stages[-1].config.data.context)
        if origin.resumes and origin.checkpoint is not None:
            _check_stage(stages, origin.checkpoint)
    if problems:
        raise ConfigError(lines(problems, {}))
    return config


def _check_stage(stages: tuple[Stage, ...], checkpoint: Path) -> None:
    """Refuses to continue a run from a model that the stage at its step does not have."""
    stage = stage_at(stages, int(files.read_json(checkpoint / files.LINEAGE)["step"]))
    differing = _differences(stage.config.model, model_checkpoint.load_config(checkpoint))
    if differing:
        within = f" in {stage.name}" if stage.name is not None else ""
        raise UserError(f"resume: the configured model{within} is not the one that {checkpoint} holds: {differing}")


def _open_context(origin: Origin, directory: Path, model: ModelConfig) -> int:
    """What the resumed run has; for a new one, as much of the default as the model is built for."""
    saved = directory / files.CONFIG
    if origin.resumes and saved.is_file():
        try:
            return int(files.read_json(saved)["data"]["context"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{saved}: does not say data.context, which the resumed run has; give data.context"
            ) from error
    return min(DataConfig().context, longest_input(model))


def model_of(config: RunConfig, origin: Origin, directory: Path) -> ModelConfig:
    """The configured model; the checkpoint's where the run starts (or once started) from given weights. Of a run in
    stages it is the one that they are made of, and `settle` checks that it is the checkpoint's."""
    wanted = resolved_model(config)
    if origin.checkpoint is None or (origin.resumes and origin.parent is None):
        return wanted
    if origin.resumes and config.stages:  # the checkpoint's has the windows of its stage by now
        return validate(files.read_json(directory / files.CONFIG)).model
    found = model_checkpoint.load_config(origin.checkpoint)
    if config.data.examples is not None and config.data.examples.kind in HEADS and not origin.resumes:
        found = with_head(found, wanted, HEADS[config.data.examples.kind], whose=str(origin.checkpoint))
    differing = _differences(wanted, found)
    if differing:
        logger.info("the model is the checkpoint's: %s", differing)
    return resolved_model(replace(config, model=found))


def _differences(wanted: ModelConfig, found: ModelConfig) -> str:
    if type(wanted) is not type(found):
        return f"architecture={found.architecture}, not {wanted.architecture}"
    names = [field.name for field in fields(wanted) if getattr(wanted, field.name) != getattr(found, field.name)]
    return ", ".join(
        f"{name} differs"
        if name in ("attention", "encoder", "decoder")
        else f"{name}={getattr(found, name)}, not {getattr(wanted, name)}"
        for name in names
    )


def tokenizer_of(config: RunConfig, origin: Origin) -> Path | None:
    """The tokenizer that starting weights were trained with. Raises UserError when another one is asked for."""
    if origin.parent is None or origin.checkpoint is None:
        return None
    theirs = origin.checkpoint / model_checkpoint.TOKENIZER
    if not theirs.is_file():
        logger.warning(
            "%s has no tokenizer; data.tokenizer must be the one that its weights were trained with", origin.checkpoint
        )
        return None
    asked = config.data.tokenizer
    if asked.kind == "file" and asked.path is not None:
        if Tokenizer.load(asked.path).sha256 != Tokenizer.load(origin.checkpoint).sha256:
            raise UserError(
                f"data.tokenizer.path={asked.path}: not the tokenizer of {origin.checkpoint}, whose weights know only "
                "their own; leave data.tokenizer out"
            )
        return None
    return origin.checkpoint


def with_tokenizer(config: RunConfig, origin: Origin, directory: Path) -> RunConfig:
    """The config with the tokenizer that the run's starting weights brought, for its config.yaml to name."""
    if origin.parent is None:
        return config
    saved = directory / files.CONFIG
    if origin.resumes and saved.is_file():
        try:
            used = TokenizerConfig(**files.read_json(saved)["data"]["tokenizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{saved}: does not say data.tokenizer, which the resumed run has: {error}") from error
    elif config.data.tokenizer.kind != "file" and (Path(origin.parent) / model_checkpoint.TOKENIZER).is_file():
        used = TokenizerConfig(kind="file", path=origin.parent)
    else:
        return config
    return replace(config, data=replace(config.data, tokenizer=used))


def set_backends(model: Model, config: RunConfig) -> None:
    backend = config.attention_backend
    if isinstance(model, Encoder):
        model.set_backend(backend.train)
    else:
        model.set_backends(train=backend.train, prefill=backend.prefill, decode=backend.decode)


def check_attention(config: RunConfig, device: torch.device, arithmetic: Arithmetic) -> None:
    """Raises UnsupportedAttention before any data is read, for every phase that the run goes through.

    `device` need not be here: a cluster's jobs are planned on laptops.
    """
    model = build_from(config.model, device="meta")
    set_backends(model, config)
    dtype, context = arithmetic.compute, config.data.context
    if isinstance(model, Encoder):
        model.check_attention(device=device, dtype=dtype, needs_grad=True, n_tokens=context)
        return
    model.check_attention(
        device=device, dtype=dtype, phase=Phase.TRAIN, needs_grad=True, n_queries=context, n_keys=context
    )
    if config.sample.prompt:
        for phase in (Phase.PREFILL, Phase.DECODE):
            model.check_attention(device=device, dtype=arithmetic.parameters, phase=phase, needs_grad=False)


def check_every_stage(config: RunConfig, device: torch.device, arithmetic: Arithmetic) -> None:
    """`check_attention` for each stage of a settled run."""
    for stage in stages_of(config):
        check_attention(stage.config, device, arithmetic)


def resolved_model(config: RunConfig) -> ModelConfig:
    """The model with `data.document_mask` in every attention pattern, so that checkpoints say what was used."""
    if not config.data.document_mask or isinstance(config.model, Seq2SeqConfig):
        return config.model

    def masked(pattern: AttentionSpec | tuple[HeadGroup, ...]) -> AttentionSpec | tuple[HeadGroup, ...]:
        if isinstance(pattern, AttentionSpec):
            return replace(pattern, documents=True)
        return tuple(replace(group, spec=replace(group.spec, documents=True)) for group in pattern)

    attention = config.model.attention
    patterns = {name: masked(pattern) for name, pattern in attention.patterns.items()}
    return replace(config.model, attention=AttentionPlan(patterns=patterns, layers=attention.layers))
