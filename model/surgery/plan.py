"""What a surgery is, and how several of them, in the order given, make one checkpoint into another.

A surgery says three things: which config it makes of a config, which tensors it makes of tensors, and what it changed.
The first needs no weights, so everything that can be refused is refused before a tensor is read. The second wraps
readers (`lazy`), so that tensors stream from file to file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longspan.model.accounting import parameters
from longspan.model.build import build_from
from longspan.model.cache_plan import cache_bytes, cross_cache_bytes
from longspan.model.checkpoint import (
    CONFIG,
    LINEAGE,
    WEIGHTS,
    CheckpointError,
    resolve_checkpoint,
    sha256_of,
    verify,
    write_directory,
)
from longspan.model.checkpoint_files import load_config
from longspan.model.config import EncoderConfig, ModelConfig, ModelConfigError, Seq2SeqConfig, to_dict
from longspan.model.conversion.hf import carry, read_json
from longspan.model.lazy import LazyTensor, Weights, stored_weights, write_weights

from .errors import SurgeryError
from .tokenizer_files import tell_length

Report = MutableMapping[str, object]


class Surgery(Protocol):
    """One change to a model. An implementation is a frozen dataclass whose fields are the keys that a user writes
    (`registry.SURGERIES` lists it under its name)."""

    @property
    def name(self) -> str: ...

    def config(self, before: ModelConfig) -> ModelConfig:
        """The config afterwards. Raises SurgeryError, a line for each reason, where this model cannot have it."""
        ...

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        """All tensors of the config afterwards, by name, made of those of `before`. Nothing is read yet: readers are
        wrapped, and the writer calls each once, in the order of the model's layers. Numbers that only the tensors tell
        go into `report` while they are read; they join `changes` in lineage.json."""
        ...

    def changes(self, before: ModelConfig) -> dict[str, object]:
        """What it changes, with its numbers, as plain data for lineage.json. Known without weights."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One surgery, the config that it is given and the config that it makes."""

    surgery: Surgery
    before: ModelConfig
    after: ModelConfig


def plan_steps(config: ModelConfig, surgeries: Sequence[Surgery]) -> tuple[Step, ...]:
    """The surgeries one after the other. Raises SurgeryError for the first that cannot be, and for none at all."""
    if not surgeries:
        raise SurgeryError("surgery=[]: names at least one surgery")
    steps: list[Step] = []
    for surgery in surgeries:
        try:
            after = surgery.config(config)
        except ModelConfigError as error:  # a model that could not be built
            raise SurgeryError(*(f"surgery={surgery.name}: {problem}" for problem in error.problems)) from error
        steps.append(Step(surgery, config, after))
        config = after
    return tuple(steps)


def operate(steps: Sequence[Step], weights: Weights) -> tuple[dict[str, LazyTensor], tuple[Report, ...]]:
    """The tensors of the last config, not read yet, in the order of the model's; and each step's report, which fills
    while they are read.

    Raises ValueError where a surgery does not make the tensors of the config that it announced.
    """
    reports: list[Report] = []
    for step in steps:
        reports.append({})
        weights = step.surgery.weights(step.before, weights, reports[-1])
        shapes = {name: tuple(tensor.shape) for name, tensor in _bare(step.after).items()}
        made = {name: lazy.shape for name, lazy in weights.items()}
        if made != shapes:
            wrong = sorted(name for name in made.keys() | shapes.keys() if made.get(name) != shapes.get(name))
            raise ValueError(f"surgery={step.surgery.name} does not make {wrong[0]} of the model that it plans")
    return {name: weights[name] for name in _bare(steps[-1].after)}, tuple(reports)


def _bare(config: ModelConfig) -> Mapping[str, Any]:
    return build_from(config, device="meta").state_dict()


# -- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a checkpoint would become: for a look before anything is written.

    checkpoint  directory that is read
    steps       one a surgery
    """

    checkpoint: Path
    steps: tuple[Step, ...]

    @property
    def before(self) -> ModelConfig:
        return self.steps[0].before

    @property
    def after(self) -> ModelConfig:
        return self.steps[-1].after


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """parameters  all of them
    length         the longest input; of an encoder–decoder, its source
    kv_bytes       bf16 cache of one sequence of the greatest length, windowed layers keeping what they see; of an
                   encoder–decoder, of the longest target and of the longest source that it looks back at; None: it has
                   no cache
    """

    parameters: int
    length: int
    kv_bytes: int | None


def cost(config: ModelConfig) -> Cost:
    """Of a model, at the longest input that it takes."""
    n_parameters = parameters(config).total
    if isinstance(config, EncoderConfig):
        return Cost(parameters=n_parameters, length=config.max_positions, kv_bytes=None)
    if isinstance(config, Seq2SeqConfig):
        source, target = config.encoder.max_positions, config.decoder.max_positions
        cache = cache_bytes(config.decoder_half, 1, target, "bfloat16") + cross_cache_bytes(
            config, 1, source, "bfloat16"
        )
        return Cost(parameters=n_parameters, length=source, kv_bytes=cache.keys_values)
    cache = cache_bytes(config, 1, config.max_positions, "bfloat16")
    return Cost(parameters=n_parameters, length=config.max_positions, kv_bytes=cache.keys_values)


def plan_conversion(checkpoint: Path | str, surgeries: Sequence[Surgery]) -> Conversion:
    """What `convert_model` would make of a checkpoint directory or a run; weights are not read. Raises like it."""
    chosen = resolve_checkpoint(checkpoint)
    return Conversion(chosen, plan_steps(load_config(chosen), surgeries))


def convert_model(
    checkpoint: Path | str,
    output: Path | str,
    surgeries: Sequence[Surgery],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Makes a checkpoint directory from another, or from a run, by surgeries in the order given, and returns it.

    progress  is told after each tensor how many bytes are written, and of how many

    Tensors pass one at a time, each in the type that it is stored in. The tokenizer goes along, told of the new length;
    lineage.json is the source's with an entry for each surgery: what it changed, its numbers, and the weights that it
    was given. All of the directory is written or nothing.
    Raises SurgeryError for a surgery that this model cannot have, CheckpointError for a damaged checkpoint and for an
    `output` that is not empty, unless `overwrite`, or that holds or lies in the checkpoint.
    """
    conversion = plan_conversion(checkpoint, surgeries)
    source, target = conversion.checkpoint, Path(output)
    _check_apart(source.resolve(), target.resolve())
    verify(source)

    def fill(staging: Path) -> None:
        weights, reports = operate(conversion.steps, stored_weights(source / WEIGHTS))
        (staging / CONFIG).write_text(json.dumps(to_dict(conversion.after), indent=2) + "\n")
        write_weights(staging / WEIGHTS, weights, progress)
        lineage = _lineage(source, conversion.steps, reports)
        (staging / LINEAGE).write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")
        carry(source, staging)
        tell_length(staging, conversion.before, conversion.after)

    return write_directory(target, fill, overwrite=overwrite)


def _check_apart(source: Path, target: Path) -> None:
    """Replacing a run by what is made of one of its checkpoints would take the run with it."""
    if source.is_relative_to(target) and source != target:
        raise CheckpointError(f"output={target} holds the checkpoint that is converted; choose another directory")
    if target.is_relative_to(source) and source != target:
        raise CheckpointError(f"output={target} lies in the checkpoint that is converted; choose another directory")


def _lineage(source: Path, steps: Sequence[Step], reports: Sequence[Report]) -> dict[str, Any]:
    """The source's, and the surgeries after those that it had: how the weights were trained remains true of them."""
    path, place = source / LINEAGE, source.resolve()
    lineage: dict[str, Any] = read_json(path) if path.is_file() else {}
    of_a_run = place.parent.name == "checkpoints"  # a step's name alone would not tell which run
    named = "/".join(place.parts[-3:]) if of_a_run else place.name
    of = {"checkpoint": named, "weights_sha256": sha256_of(source / WEIGHTS)}
    entries: list[dict[str, object]] = []
    for step, report in zip(steps, reports, strict=True):
        counts = {"before": parameters(step.before).total, "after": parameters(step.after).total}
        changes = {**step.surgery.changes(step.before), **report}
        entries.append({"surgery": step.surgery.name, "of": of, "parameters": counts, "changes": changes})
    return {**lineage, "surgery": [*lineage.get("surgery", []), *entries]}
