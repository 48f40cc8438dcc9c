"""Which recipe an uptraining continues: the parent, its steps, and the run that each cell of the grid will be.

A parent that lies in a run brings everything; of a foreign one nobody knows how long and how it was trained, so
`parent_steps` and `recipe` have to say.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspan.model.checkpoint_files import LINEAGE, WEIGHTS, load_config, resolve_checkpoint, sha256_of
from longspan.model.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from longspan.model.surgery import GroupedQuery, SurgeryError, plan_steps
from longspan.model.surgery.gqa import Grouping

from .config_checks import check_lengths, longest_input
from .config_errors import ConfigError, lines
from .config_plain import plain
from .errors import UserError
from .schema import DataConfig, RunConfig, as_request, validate
from .schema_sections import CallbacksConfig, LoggerConfig, ScheduleConfig
from .schema_uptrain import UptrainConfig
from .uptrain_plan import Cell, Chain, chains_of, schedule_of

_OF_A_RUN = ("output", "resume", "overwrite", "dry_run", "name", "checkpoint", "hardware")


@dataclass(frozen=True, slots=True, kw_only=True)
class Uptraining:
    """Everything that an uptraining was asked for, settled.

    parent        the checkpoint directory whose heads are grouped
    parent_steps  optimizer steps that it was trained for
    base          the run that every cell is, but for its weights, steps, seed and directory
    settings      what cells are functions of beside their place in the grid, as plain data: a grid is continued only
                  where it is the same
    """

    request: UptrainConfig
    directory: Path
    parent: Path
    parent_steps: int
    model: DecoderConfig | EncoderConfig
    base: RunConfig
    chains: tuple[Chain, ...]
    settings: Mapping[str, object]

    @property
    def lr(self) -> float:
        return self.base.optimizer.lr

    @property
    def tokens_per_step(self) -> int:
        return self.base.trainer.global_batch * self.base.data.context

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for chain in self.chains for cell in chain.cells)

    def model_of(self, cell: Cell) -> DecoderConfig | EncoderConfig:
        """The model of a cell."""
        heads = cell.start.kv_heads
        return self.model if heads is None else replace(self.model, n_kv_heads=heads)

    def run_config(self, cell: Cell, directory: Path) -> RunConfig:
        """The training run that a cell is, from the weights that it starts with (`checkpoint` is left open)."""
        steps = cell.steps
        trainer = replace(self.base.trainer, steps=steps)
        # Fixed for all cells of a chain: a cell must not depend on how far its run goes on.
        quarter = max(1, -(-max(each.steps for each in self.cells) // 4))
        trainer = replace(trainer, val_every=trainer.val_every or quarter, save_every=trainer.save_every or quarter)
        return replace(
            self.base,
            model=self.model_of(cell),
            seed=cell.seed or 0,
            trainer=trainer,
            output=str(directory),
            name=cell.name,
        )


def settle_uptraining(request: UptrainConfig, recipe: Mapping[str, Any] | None) -> Uptraining:
    """`recipe` is the config of a run as a user would write it; None: the parent's own run.

    Raises UserError, CheckpointError, SurgeryError or ConfigError for what cannot be; nothing is written.
    """
    parent = resolve_checkpoint(request.checkpoint)
    own = _own_run(parent)
    steps = request.parent_steps or _steps_of(parent, own)
    recipe = recipe if recipe is not None else own
    missing = [key for key, value in (("parent_steps", steps), ("recipe", recipe)) if value is None]
    if missing or steps is None or recipe is None:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{' and '.join(missing)}: {verb} required, because {parent} lies in no run that says how it was trained; "
            "give parent_steps=N (optimizer steps behind it) and recipe=NAME (an experiment or a run directory), whose "
            "data, optimizer and batch are continued"
        )
    model = load_config(parent)
    if isinstance(model, Seq2SeqConfig):
        raise UserError(
            f"checkpoint={request.checkpoint}: holds an encoder–decoder, and uptrain takes decoders and encoders; "
            "longspan convert surgery=gqa groups its heads, longspan train checkpoint=… goes on from there"
        )
    _check_heads(request, model)
    base = _base(request, recipe, parent, model)
    chains = chains_of(_without_control(request, model), steps)
    trained = [cell.steps for chain in chains for cell in chain.cells if cell.steps]
    schedule = ScheduleConfig(name="constant", warmup=0.0)
    if trained:
        schedule = schedule_of(
            request.schedule,
            parent_steps=steps,
            warmup=request.warmup,
            final_ratio=request.final_ratio,
            shortest=min(trained),
        )
    optimizer = replace(base.optimizer, lr=request.lr_fraction * base.optimizer.lr)
    base = replace(base, schedule=schedule, optimizer=optimizer)
    return Uptraining(
        request=request,
        directory=Path(request.output),
        parent=parent,
        parent_steps=steps,
        model=model,
        base=base,
        chains=chains,
        settings=_settings(request, base, parent, steps),
    )


def run_config_of(directory: Path) -> dict[str, Any] | None:
    """The config of a run directory; None where there is none. Raises UserError for a damaged one."""
    path = directory / "config.yaml"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from error
    return content if isinstance(content, dict) else None


def _own_run(parent: Path) -> dict[str, Any] | None:
    """The config of the run that a checkpoint lies in."""
    resolved = parent.resolve()
    return run_config_of(resolved.parent.parent) if resolved.parent.name == "checkpoints" else None


def _steps_of(parent: Path, own: Mapping[str, Any] | None) -> int | None:
    """The steps of the parent's run, all of them, though its best checkpoint may be an earlier one."""
    if own is not None:
        return validate(own).trainer.steps
    lineage = parent / LINEAGE
    step = json.loads(lineage.read_text(encoding="utf-8")).get("step") if lineage.is_file() else None
    return step if isinstance(step, int) and step > 0 else None


def _check_heads(request: UptrainConfig, model: DecoderConfig | EncoderConfig) -> None:
    if model.kv_heads in request.kv_heads:
        raise UserError(
            f"kv_heads={list(request.kv_heads)}: {model.kv_heads} is what the parent has; with all its heads it is the "
            "control, which is trained anyway"
        )
    for heads in request.kv_heads:
        if model.kv_heads % heads:
            raise UserError(f"kv_heads={heads}: {_fewer_heads(request, model, heads)}")
        plan_steps(model, [GroupedQuery(kv_heads=heads, grouping=request.grouping)])


def _fewer_heads(request: UptrainConfig, model: DecoderConfig | EncoderConfig, asked: int) -> str:
    """Why that many heads cannot be, and which numbers would be taken."""
    if model.kv_heads == 1:
        return "the parent has one key/value head, and heads can only be made fewer"
    more = ", and heads can only be made fewer" if asked > model.kv_heads else ""
    taken = [str(heads) for heads in range(model.kv_heads - 1, 0, -1) if _can_have(model, heads, request.grouping)]
    choice = f"choose one of {', '.join(taken)}" if taken else "no smaller number suits its patterns"
    return f"the parent's {model.kv_heads} key/value heads are shared out evenly{more}; {choice}"


def _can_have(model: DecoderConfig | EncoderConfig, heads: int, grouping: Grouping) -> bool:
    try:
        plan_steps(model, [GroupedQuery(kv_heads=heads, grouping=grouping)])
    except SurgeryError:
        return False
    return True


def _without_control(request: UptrainConfig, model: DecoderConfig | EncoderConfig) -> UptrainConfig:
    """An encoder learns to be like its parent, which the parent is already."""
    return replace(request, control=False) if isinstance(model, EncoderConfig) else request


def _base(
    request: UptrainConfig, recipe: Mapping[str, Any], parent: Path, model: DecoderConfig | EncoderConfig
) -> RunConfig:
    raw = copy.deepcopy({key: value for key, value in recipe.items() if key not in _OF_A_RUN})
    data = raw.get("data", {})
    if data.get("examples") is not None:
        raise UserError("recipe: trains on labelled examples; uptrain continues language modelling: name another one")
    if raw.get("stages"):
        raise UserError("recipe: has stages; name one without, with the data, batch and context of the last stage")
    if (parent / "tokenizer.json").is_file():
        data.pop("tokenizer", None)  # the parent brings its own
    if "sources" in request.overrides.get("data", {}):
        data.pop("path", None)
    if isinstance(model, EncoderConfig):
        data.pop("masking", None)
    raw["data"] = data
    for name, values in request.overrides.items():
        raw[name] = _merged(raw.get(name, {}), values)
    raw["evaluation"] = {**raw.get("evaluation", {}), "enabled": False}  # cells are measured apart from their runs
    config = validate({**raw, "checkpoint": str(parent)})
    data_config = config.data
    if config.context_open:
        data_config = replace(data_config, context=min(DataConfig().context, longest_input(model)))
    config = replace(
        config,
        model=model,
        model_name=None,
        context_open=False,
        data=data_config,
        checkpoint=None,
        trainer=replace(config.trainer, devices=1, nodes=1, strategy="auto", keep=1),
        logger=LoggerConfig(wandb="off"),
        callbacks=CallbacksConfig(progress="off", report=False),
        sample=replace(config.sample, prompt=""),
    )
    if problems := list(check_lengths(config, fixed_by=str(parent))):
        raise ConfigError(lines(problems, {}))
    return config


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged


# What may change when a grid is continued: how much of it there is, and how it is shown.
_OPEN = (
    *("checkpoint", "output", "kv_heads", "init", "alpha", "seeds", "control", "recipe", "overrides", "parent_steps"),
    *("tolerance", "keep", "speed", "workers", "progress", "resume", "overwrite", "dry_run"),
)


def _settings(request: UptrainConfig, base: RunConfig, parent: Path, parent_steps: int) -> dict[str, object]:
    asked = {name: value for name, value in plain(request).items() if name not in _OPEN}
    recipe = {name: value for name, value in as_request(base).items() if name not in (*_OF_A_RUN, "seed", "model")}
    settled: dict[str, object] = json.loads(json.dumps({**asked, "recipe": recipe}))
    return {**settled, "parent_steps": parent_steps, "parent_weights": sha256_of(parent / WEIGHTS)}
