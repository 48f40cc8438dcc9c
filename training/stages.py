"""A run in stages: which part of its steps has which context, windows, batch and learning rate (no torch here).

A plain run is a run of one stage, so what trains asks for stages and never whether there are any. The config of a stage
is that of a plain run which does what the stage does; only where it begins and what it carries on is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.model.config import (
    AttentionPlan,
    DecoderConfig,
    EncoderConfig,
    HeadGroup,
    ModelConfig,
    ModelConfigError,
    Seq2SeqConfig,
)
from longspan.model.config_attention import Pattern, specs_of

from .config_errors import Problem
from .schema_stages import Carry, StageConfig, StageSeries

if TYPE_CHECKING:
    from .schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run.

    name           None: the run has no stages, and this is all of it
    number, of     which of how many, from 1
    start, end     optimizer steps of the run when the stage begins and when it is done
    tokens_before  tokens that the stages before it read
    lr_factor      its peak learning rate, as a share of optimizer.lr
    optimizer      what becomes of the optimizer's moments when it begins
    config         of a plain run that does what this stage does: its own model, context, batch and steps
    """

    name: str | None
    number: int
    of: int
    start: int
    end: int
    tokens_before: int
    lr_factor: float
    optimizer: Carry
    config: RunConfig

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def tokens_per_step(self) -> int:
        return self.config.trainer.global_batch * self.config.data.context

    @property
    def place(self) -> int:
        """The sequence of its stream that it begins with: as many tokens in as the stages before it have read."""
        return -(-self.tokens_before // self.config.data.context)

    @property
    def words(self) -> str:
        """`stage 2/3 long: context 1,024, windows 64–1,024, lr 0.0005, 200 steps of 8,192 tokens`"""
        config = self.config
        return (
            f"stage {self.number}/{self.of} {self.name}: context {config.data.context:,}, windows "
            f"{windows_in_words(config.model)}, lr {config.optimizer.lr * self.lr_factor:.3g}, {self.steps:,} steps of "
            f"{self.tokens_per_step:,} tokens"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data, for lineage.json and accounting.json."""
        config = self.config
        return {
            "name": self.name,
            "first_step": self.start + 1,
            "last_step": self.end,
            "context": config.data.context,
            "windows": windows_in_words(config.model),
            "lr": config.optimizer.lr * self.lr_factor,
            "global_batch": config.trainer.global_batch,
            "micro_batch": config.trainer.micro_batch,
            "tokens": self.steps * self.tokens_per_step,
            "optimizer": self.optimizer,
        }


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a sound config, in order. Raises ValueError where `stage_problems` has something to say."""
    stages, problems = _resolve(config)
    if problems:
        raise ValueError("; ".join(problem.text for problem in problems))
    return stages


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """What keeps the stages from being put together; whether each is a sound run is for others to check."""
    yield from _resolve(config)[1]


def total_steps(stages: tuple[StageConfig, ...] | StageSeries) -> int:
    return sum(stages.steps) if isinstance(stages, StageSeries) else sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that took a step (counted from 1); the first one at step 0, the last one past the end."""
    return next((stage for stage in stages if step <= stage.end), stages[-1])


# -- from what is written to stages ------------------------------------------------------------------------------------


def _resolve(config: RunConfig) -> tuple[tuple[Stage, ...], list[Problem]]:
    if not config.stages:
        alone = Stage(
            name=None,
            number=1,
            of=1,
            start=0,
            end=config.trainer.steps,
            tokens_before=0,
            lr_factor=1.0,
            optimizer="kept",
            config=config,
        )
        return (alone,), []
    listed, problems = _listed(config)
    stages: list[Stage] = []
    start, tokens = 0, 0
    for i, each in enumerate(listed):
        where = f"stages.{i}" if isinstance(config.stages, tuple) else "stages"
        model, refused = _model(config.model, each, where)
        problems += refused
        stage = Stage(
            name=each.name or f"stage{i + 1}",
            number=i + 1,
            of=len(listed),
            start=start,
            end=start + each.steps,
            tokens_before=tokens,
            lr_factor=each.lr_factor,
            optimizer=each.optimizer,
            config=_config(config, each, model),
        )
        start, tokens = stage.end, tokens + stage.steps * stage.tokens_per_step
        stages.append(stage)
    problems += _repeated_names(stages)
    return tuple(stages), problems


def _config(config: RunConfig, stage: StageConfig, model: ModelConfig) -> RunConfig:
    trainer = config.trainer
    return replace(
        config,
        stages=(),
        model=model,
        data=replace(config.data, context=stage.context or config.data.context),
        trainer=replace(
            trainer,
            steps=stage.steps,
            global_batch=stage.global_batch or trainer.global_batch,
            micro_batch=stage.micro_batch or trainer.micro_batch,
        ),
        schedule=config.schedule if stage.warmup is None else replace(config.schedule, warmup=stage.warmup),
    )


def _listed(config: RunConfig) -> tuple[tuple[StageConfig, ...], list[Problem]]:
    """The stages one by one, however they were written."""
    series = config.stages
    if not isinstance(series, StageSeries):
        return series, []
    problems: list[Problem] = []
    n = len(series.steps)
    batches: dict[str, tuple[int | None, ...]] = {}
    for name in ("global_batch", "micro_batch"):
        given: tuple[int, ...] | None = getattr(series, name)
        if given is not None and len(given) != n:
            problems.append(
                Problem(
                    (f"stages.{name}", "stages.steps"),
                    f"stages.{name}={list(given)}: has {len(given)} numbers and stages.steps has {n}; give one a stage",
                )
            )
            given = None
        batches[name] = given or (None,) * n
    listed: list[StageConfig] = []
    for i, steps in enumerate(series.steps):
        context = config.data.context * series.context_ratio**i
        if series.max_context is not None:
            context = min(context, series.max_context)
        if context != int(context) or context < 2:
            problems.append(
                Problem(
                    ("stages.context_ratio", "data.context"),
                    f"stages.context_ratio={series.context_ratio:g}: stage {i + 1} would have sequences of {context:g} "
                    f"tokens (data.context={config.data.context}); choose a ratio that gives whole numbers from 2 on",
                )
            )
            context = config.data.context
        listed.append(
            StageConfig(
                steps=steps,
                context=int(context),
                window_factor=series.window_ratio**i,
                lr_factor=series.lr_ratio**i,
                warmup=series.warmup,
                global_batch=batches["global_batch"][i],
                micro_batch=batches["micro_batch"][i],
                optimizer=series.optimizer,
            )
        )
    return tuple(listed), problems


def _repeated_names(stages: list[Stage]) -> Iterator[Problem]:
    seen: set[str | None] = set()
    for i, stage in enumerate(stages):
        if stage.name in seen:
            key = f"stages.{i}.name"
            yield Problem((key,), f"{key}={stage.name}: is the name of an earlier stage; give each its own")
        seen.add(stage.name)


# -- windows -----------------------------------------------------------------------------------------------------------


def _model(model: ModelConfig, stage: StageConfig, where: str) -> tuple[ModelConfig, list[Problem]]:
    """The model with a stage's attention; unchanged where that cannot be."""
    if stage.patterns is not None:
        if stage.window_factor != 1:
            rest = "and patterns both say the windows; give one of them"
            return model, [
                Problem(
                    (f"{where}.window_factor", f"{where}.patterns"),
                    f"{where}.window_factor={stage.window_factor:g}: {rest}",
                )
            ]
        return _with_patterns(model, stage.patterns, where)
    factor = stage.window_factor
    key = f"{where}.window_factor" if where != "stages" else "stages.window_ratio"
    try:
        return _over_stacks(model, lambda plan: widened(plan, factor)), []
    except ValueError as error:
        return model, [Problem((key,), f"{key}: {error}")]


def _with_patterns(
    model: ModelConfig, patterns: Mapping[str, Pattern], where: str
) -> tuple[ModelConfig, list[Problem]]:
    known = {name: pattern for stack in _stacks(model) for name, pattern in stack.attention.patterns.items()}
    problems: list[Problem] = []
    for name, pattern in patterns.items():
        key = f"{where}.patterns.{name}"
        if name not in known:
            problems.append(Problem((key,), f"{key}: the model has no such pattern; it has {', '.join(known)}"))
        elif _has_weights(pattern) != _has_weights(known[name]):
            rest = "learned_sink and global_tokens come with weights, so every stage has them or none"
            problems.append(Problem((key,), f"{key}: {rest}"))
    if problems:
        return model, problems

    def replaced(plan: AttentionPlan) -> AttentionPlan:
        return replace(
            plan, patterns={name: _in_place_of(old, patterns.get(name)) for name, old in plan.patterns.items()}
        )

    try:
        return _over_stacks(model, replaced), []
    except ModelConfigError as error:
        key = f"{where}.patterns"
        return model, [Problem((key,), f"{where}: {problem}") for problem in error.problems]


def _in_place_of(old: Pattern, new: Pattern | None) -> Pattern:
    """The new pattern, if there is one, which keeps to documents where the old one did (data.document_mask)."""
    if new is None or not any(spec.documents for spec in specs_of(old)):
        return new or old
    if isinstance(new, AttentionSpec):
        return replace(new, documents=True)
    return tuple(replace(group, spec=replace(group.spec, documents=True)) for group in new)


def _has_weights(pattern: Pattern) -> tuple[bool, bool]:
    specs = specs_of(pattern)
    return any(spec.learned_sink for spec in specs), any(spec.global_tokens for spec in specs)


def _stacks(model: ModelConfig) -> tuple[DecoderConfig | EncoderConfig, ...]:
    return (model.encoder_half, model.decoder_half) if isinstance(model, Seq2SeqConfig) else (model,)


def _over_stacks(model: ModelConfig, change: Callable[[AttentionPlan], AttentionPlan]) -> ModelConfig:
    if isinstance(model, Seq2SeqConfig):
        return replace(
            model,
            encoder=replace(model.encoder, attention=change(model.encoder_half.attention)),
            decoder=replace(model.decoder, attention=change(model.decoder_half.attention)),
        )
    return replace(model, attention=change(model.attention))


def widened(plan: AttentionPlan, factor: float) -> AttentionPlan:
    """The plan with every limited window times `factor`, dilation as it is.

    A window to one side counts keys, the query's own among them: 32 keys (left=31) become 64 (left=63). A window to
    both sides counts neighbours on each: 64 either side become 128.
    Raises ValueError where that gives no whole number.
    """

    def of(spec: AttentionSpec) -> AttentionSpec:
        window = spec.window
        one_sided = int(spec.causal or 0 in (window.left, window.right))
        sides = [_times(side, factor, one_sided) for side in (window.left, window.right)]
        return replace(spec, window=Window(left=sides[0], right=sides[1], dilation=window.dilation))

    def over(pattern: Pattern) -> Pattern:
        if isinstance(pattern, AttentionSpec):
            return of(pattern)
        return tuple(HeadGroup(heads=group.heads, spec=of(group.spec)) for group in pattern)

    return replace(plan, patterns={name: over(pattern) for name, pattern in plan.patterns.items()})


def _times(side: int | None, factor: float, with_itself: int) -> int | None:
    if not side:  # unlimited, or nothing on this side
        return side
    keys = side + with_itself
    wanted = keys * factor
    if wanted != int(wanted) or wanted < 1:
        raise ValueError(f"a window of {keys} keys would have {wanted:g}; choose a factor that gives whole numbers")
    return int(wanted) - with_itself


def windows_in_words(model: ModelConfig) -> str:
    """How many keys the windows of the layers hold: `32–512`, `129`, `all`, `64, all`."""
    keys: set[int] = set()
    unlimited = False
    for stack in _stacks(model):
        for layer in range(stack.n_layers):
            for spec in specs_of(stack.attention.of_layer(layer)[1]):
                left, right = spec.window.left, 0 if spec.causal else spec.window.right
                if left is None or right is None:
                    unlimited = True
                else:
                    keys.add(left + 1 + right)
    words = [f"{min(keys):,}–{max(keys):,}" if len(keys) > 1 else f"{keys.pop():,}"] if keys else []
    return ", ".join(words + ["all"] * unlimited)
