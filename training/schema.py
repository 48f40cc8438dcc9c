"""The schema of every verb: each key that a config may hold, with type, default, meaning and limits.

Hydra composes YAML groups; `validate` and its siblings turn the result into frozen dataclasses before torch is
imported, so a wrong key or value is reported in a second, all of them at once, each with the nearest valid name.
`longspan <verb> --help` prints it. Reading order: schema_sections.py, schema_requests.py (what each verb reads), and
this file, from what a user wrote to what the code reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from longspan.model.config import (
    AttentionPlan,
    DecoderConfig,
    ModelConfigError,
    Seq2SeqConfig,
    StackConfig,
    from_dict,
)
from longspan.model.config import ModelConfig as BuiltModel
from longspan.model.zoo import CONFIGS, configure

from .config_checks import check_data, check_evaluate, check_generate, check_run, longest_input
from .config_convert import check_convert
from .config_errors import COMMAND_LINE, ConfigError, Problem, lines, translate, wrong
from .config_plain import booleans, named, plain, without, written
from .config_uptrain import check_decided, check_uptrain
from .schema_convert import ConvertConfig
from .schema_evaluate import EvaluateConfig
from .schema_model import BACKENDS, AttentionConfig, AttentionPlanConfig, BackendPlan, ModelConfig, StackSection
from .schema_requests import (
    BenchConfig,
    ConformanceConfig,
    EstimateConfig,
    EstimateRequest,
    ExplainConfig,
    ExplainRequest,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
    RunConfig,
    RunRequest,
)
from .schema_sections import (
    DEFAULT_NEW_TOKENS,
    Accelerator,
    CallbacksConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationDataConfig,
    LoggerConfig,
    OptimizerConfig,
    ProtocolConfig,
    SampleConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainerConfig,
)
from .schema_stages import StageConfig, StageSeries
from .schema_uptrain import UptrainConfig, UptrainRequest
from .stage_checks import check_stages
from .stages import total_steps

__all__ = [
    "BACKENDS",
    "DEFAULT_NEW_TOKENS",
    "Accelerator",
    "AttentionConfig",
    "BackendPlan",
    "BenchConfig",
    "CallbacksConfig",
    "ConformanceConfig",
    "ConvertConfig",
    "DataConfig",
    "EstimateConfig",
    "EstimateRequest",
    "EvaluateConfig",
    "EvaluationConfig",
    "EvaluationDataConfig",
    "ExplainConfig",
    "ExplainRequest",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "ProtocolConfig",
    "RunConfig",
    "RunRequest",
    "SampleConfig",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "StageSeries",
    "TokenizerConfig",
    "TrainerConfig",
    "UptrainConfig",
    "UptrainRequest",
    "as_request",
    "validate",
    "validate_bench",
    "validate_conformance",
    "validate_convert",
    "validate_estimate",
    "validate_evaluate",
    "validate_explain",
    "validate_export",
    "validate_generate",
    "validate_import",
    "validate_prepare",
    "validate_uptrain",
]

UPTRAIN_SECTIONS = ("data", "optimizer", "trainer", "evaluation")

Raw = Mapping[str, Any]
Where = Mapping[str, str]
_HEAD = {"head", "labels", "head_dropout", "pooler"}  # keys of a model that fine-tuning may ask of a checkpoint's
T = TypeVar("T")
R = TypeVar("R", bound=RunConfig)


def validate(raw: Raw, *, where: Where | None = None) -> RunConfig:
    """The sections of a run (`model: {name, …}`, `attention: {patterns, layers, backend}`, …) checked and resolved.

    `where` maps key paths to where they were set ("on the command line", "in experiment/tiny.yaml"), for the errors.
    Raises ConfigError that lists everything wrong, one line each.
    """
    return _validate_run(RunRequest, RunConfig, raw, where)


def validate_estimate(raw: Raw, *, where: Where | None = None) -> EstimateConfig:
    """`longspan estimate`; as `validate`."""
    return _validate_run(EstimateRequest, EstimateConfig, raw, where)


def validate_explain(raw: Raw, *, where: Where | None = None) -> ExplainConfig:
    """`longspan attention`; as `validate`."""
    request, problems = _parse(ExplainRequest, raw)
    config = None
    if request is not None:
        model, refused = _model(request, raw)
        problems += _independent(refused, problems)
        config = _resolved(ExplainConfig, request, model or DecoderConfig())
    return _sound(config, problems, where)


def validate_prepare(raw: Raw, *, where: Where | None = None) -> PrepareConfig:
    """`longspan prepare`; as `validate`. An experiment's other sections are left unread, unless a user typed one."""
    of_a_run = {field.name for field in fields(RunRequest)} - {field.name for field in fields(PrepareConfig)}
    typed = {path.partition(".")[0] for path, origin in (where or {}).items() if origin == COMMAND_LINE}
    kept = {name: value for name, value in raw.items() if name not in of_a_run - typed}
    config, problems = _parse(PrepareConfig, kept)
    return _sound(config, [*problems, *(check_data(config.data) if config is not None else ())], where)


def validate_evaluate(raw: Raw, *, where: Where | None = None) -> EvaluateConfig:
    """`longspan evaluate`; as `validate`."""
    config, problems = _parse(EvaluateConfig, raw)
    return _sound(config, [*problems, *(check_evaluate(config) if config is not None else ())], where)


def validate_generate(raw: Raw, *, where: Where | None = None) -> GenerateConfig:
    """`longspan generate`; as `validate`."""
    config, problems = _parse(GenerateConfig, raw)
    return _sound(config, [*problems, *(check_generate(config) if config is not None else ())], where)


def validate_import(raw: Raw, *, where: Where | None = None) -> ImportConfig:
    """`longspan import`; as `validate`."""
    config, problems = _parse(ImportConfig, raw)
    return _sound(config, problems, where)


def validate_export(raw: Raw, *, where: Where | None = None) -> ExportConfig:
    """`longspan export`; as `validate`."""
    config, problems = _parse(ExportConfig, raw)
    return _sound(config, problems, where)


def validate_convert(raw: Raw, *, where: Where | None = None) -> ConvertConfig:
    """`longspan convert`; as `validate`."""
    config, problems = _parse(ConvertConfig, raw)
    return _sound(config, [*problems, *(check_convert(config, raw) if config is not None else ())], where)


def validate_uptrain(raw: Raw, *, where: Where | None = None) -> UptrainConfig:
    """`longspan uptrain`; as `validate`. Of the sections of a run, what was written is kept, to be laid over the
    recipe's."""
    overrides = {name: dict(written(raw, name)) for name in UPTRAIN_SECTIONS if written(raw, name)}
    decided = list(check_decided(overrides))
    refused = {problem.keys[0] for problem in decided}
    request, problems = _parse(UptrainRequest, raw)
    # What is wrong inside what is refused as a whole is no second mistake.
    problems = decided + [each for each in problems if not any(f"{each.keys[0]}.".startswith(f"{k}.") for k in refused)]
    config = None
    if request is not None:
        problems += check_uptrain(request)
        own = {field.name: getattr(request, field.name) for field in fields(request)}
        config = UptrainConfig(
            **{name: value for name, value in own.items() if name not in UPTRAIN_SECTIONS}, overrides=overrides
        )
    return _sound(config, problems, where)


def validate_bench(raw: Raw, *, where: Where | None = None) -> BenchConfig:
    """`longspan bench`; as `validate`."""
    config, problems = _parse(BenchConfig, raw)
    return _sound(config, problems, where)


def validate_conformance(raw: Raw, *, where: Where | None = None) -> ConformanceConfig:
    """`longspan conformance`; as `validate`."""
    config, problems = _parse(ConformanceConfig, raw)
    return _sound(config, problems, where)


def as_request(config: RunConfig | ExplainConfig) -> dict[str, Any]:
    """The config as plain data in the form that a user writes: `validate(as_request(config))` gives it back."""
    sections = plain(config)
    model, backend = sections.pop("model"), sections.pop("attention_backend")
    plan = {}
    if isinstance(config.model, Seq2SeqConfig):
        for half in (model["encoder"], model["decoder"]):
            if half["attention"] is None:  # where nothing is said it is full
                del half["attention"]
    else:
        plan = model.pop("attention")
    if sections["model_name"] is not None:
        del model["architecture"]  # the name says it
    if sections.get("context_open"):
        del sections["data"]["context"]
    rest = {name: value for name, value in sections.items() if name not in ("model_name", "context_open")}
    return {"model": {"name": sections["model_name"], **model}, "attention": {**plan, "backend": backend}, **rest}


def _validate_run(request_type: type[RunRequest], config_type: type[R], raw: Raw, where: Where | None) -> R:
    request, problems = _parse(request_type, raw)
    config = None
    if request is not None:
        model, refused = _model(request, raw)
        config = _resolved(config_type, request, model or DecoderConfig())
        if "context" not in written(raw, "data"):
            if config.checkpoint is None:
                fitting = min(config.data.context, longest_input(config.model))
                config = replace(config, data=replace(config.data, context=fitting))
            config = replace(config, context_open=config.checkpoint is not None or config.resume is not None)
        if config.stages:
            total = total_steps(config.stages)
            if "steps" in written(raw, "trainer") and config.trainer.steps != total:
                text = f"trainer.steps={config.trainer.steps}: the stages take {total} together; give that or nothing"
                problems.append(Problem(("trainer.steps", "stages"), text))
            config = replace(config, trainer=replace(config.trainer, steps=total))
        problems += _independent(refused, problems)
        failed = {key for problem in problems for key in problem.keys}
        problems += [
            problem
            for problem in (*check_run(config), *(_of_stages(config) if model is not None else ()))
            if failed.isdisjoint(problem.keys)
            and (model is not None or not any(key.startswith("model.") for key in problem.keys))
        ]
    return _sound(config, problems, where)


def _of_stages(config: RunConfig) -> Iterable[Problem]:
    return check_stages(config, lengths=config.checkpoint is None and config.resume is None)


def _parse(schema: type[T], raw: Raw) -> tuple[T | None, list[Problem]]:
    """The schema's instance and the problems. Where single keys are wrong the instance has their defaults, so that
    the checks between keys can still run; it is None when that is impossible (a required key is missing)."""
    raw = named(raw)
    adapter = TypeAdapter(schema)
    problems = [wrong(schema, path, value) for path, value in booleans(schema, raw, "")]
    try:
        return adapter.validate_python(raw), problems
    except ValidationError as error:
        errors = error.errors(include_url=False)
    problems += translate(schema, raw, errors)
    for each in errors:
        raw = without(raw, [str(part) for part in each["loc"] if not str(part).startswith("<")])
    try:
        return adapter.validate_python(raw), problems
    except ValidationError:
        return None, problems  # it says nothing that the first one did not


def _model(request: Any, raw: Raw) -> tuple[BuiltModel | None, list[Problem]]:
    """`model` and `attention` of a request as one config."""
    typed = written(raw, "model")
    try:
        overrides = _overrides(request.model, typed)
        if isinstance(request, RunRequest) and _asks_for_head(request, overrides):
            return from_dict(_head_alone(overrides)), []
        start = configure(request.model.name, overrides) if request.model.name else from_dict(overrides)
        if isinstance(start, Seq2SeqConfig):
            return _of_two_stacks(start, request, typed)
        plan, unused = _plan(start.attention, request.attention, "attention")
        return replace(start, attention=plan), unused
    except ModelConfigError as error:
        return None, [_of_model(problem) for problem in error.problems]
    except ValueError as error:
        return None, [_of_model(str(error))]


def _asks_for_head(request: RunRequest, overrides: Raw) -> bool:
    """Whether the model is a checkpoint's encoder and a user names its new head beside a decoder's sizes, which
    `train` has where no model is chosen."""
    starts = request.checkpoint is not None or request.resume is not None
    named = CONFIGS.get(request.model.name or "")
    kind = request.model.architecture if named is None else named.architecture
    return starts and request.data.examples is not None and kind != "encoder" and bool(_HEAD & overrides.keys())


def _head_alone(overrides: Raw) -> dict[str, Any]:
    asked = {name: value for name, value in overrides.items() if name in _HEAD}
    head = asked.setdefault("head", "classification" if asked.get("labels") else "qa")
    return {"architecture": "encoder", **asked, "pooler": head == "classification"}


def _overrides(section: Any, typed: Raw) -> dict[str, Any]:
    """What a user wrote of a section and its stacks, without their attention."""
    overrides: dict[str, Any] = {}
    for name in typed:
        value = getattr(section, name, None)
        if isinstance(value, StackSection):
            overrides[name] = _overrides(value, written(typed, name))
        # A key whose value was wrong holds its place-holder None by now; a null that was written is meant.
        elif (
            name not in ("name", "attention") and hasattr(section, name) and (value is not None or typed[name] is None)
        ):
            overrides[name] = value
    return overrides


def _of_two_stacks(start: Seq2SeqConfig, request: Any, typed: Raw) -> tuple[BuiltModel, list[Problem]]:
    problems = [
        Problem(
            (f"attention.{key}",),
            f"attention.{key}: an encoder–decoder has two stacks; give model.encoder.attention.{key} or "
            f"model.decoder.attention.{key}",
        )
        for key in ("patterns", "layers")
        if getattr(request.attention, key) is not None
    ]
    built = start
    halves = {"encoder": start.encoder_half.attention, "decoder": start.decoder_half.attention}
    for name, attention in halves.items():
        asked = getattr(request.model, name).attention
        if written(typed, name).get("attention") is not None:
            plan, unused = _plan(attention, asked, f"model.{name}.attention")
            built = replace(built, **{name: replace(getattr(built, name), attention=plan)})
            problems += unused
    return built, problems


def _plan(start: AttentionPlan, asked: AttentionPlanConfig, where: str) -> tuple[AttentionPlan, list[Problem]]:
    """A stack's attention, and the patterns that none of its layers has. Raises ValueError, as AttentionPlan does."""
    patterns, layers = asked.patterns, asked.layers
    if patterns is None:
        plan = start if layers is None else replace(start, layers=layers)
    elif layers is None and len(patterns) != 1:
        names = ", ".join(patterns)
        raise ValueError(f"{where}.layers: is required: which of {names} each layer has, repeated cyclically")
    else:
        plan = AttentionPlan(patterns=patterns, layers=layers or tuple(patterns))
    used = ", ".join(dict.fromkeys(plan.layers))
    unused = [f"{where}.patterns.{name}" for name in plan.patterns if name not in plan.layers]
    return plan, [Problem((key,), f"{key}: no layer has it; {where}.layers names {used}") for key in unused]


def _of_model(sentence: str) -> Problem:
    """A sentence of model/config.py as a problem of the section that a user sees."""
    half, colon, inner = sentence.partition(": ")
    if colon and half in ("encoder", "decoder"):
        leaf = re.match(r"\w*", inner)
        if leaf and leaf[0] in StackConfig.__dataclass_fields__:
            sentence = f"{half}.{inner}"
    head = re.match(r"[\w.]*", sentence)
    key = head[0] if head else ""
    if key in StackConfig.__dataclass_fields__ and sentence.startswith(f"{key}: unknown key"):
        sentence = f"{key}: unknown key; an encoder–decoder has model.encoder.{key} and model.decoder.{key}"
    if key.startswith(("attention", "model.")):
        return Problem((key,), sentence)
    known = {field.name for field in fields(ModelConfig)}
    mentioned = [f"model.{name}" for name in re.findall(r"\b(\w+)=", sentence) if name in known]
    if key.partition(".")[0] in known:
        return Problem((f"model.{key}", *mentioned), f"model.{sentence}")
    return Problem(("model.name", *mentioned), f"model: {sentence}")


def _independent(refused: list[Problem], problems: list[Problem]) -> list[Problem]:
    """What is wrong with the model apart from what follows from keys already reported."""
    failed = {key for problem in problems for key in problem.keys}
    if "model.name" in failed:
        return []
    attention = any(key.partition(".")[0] == "attention" for key in failed)
    return [problem for problem in refused if not (attention and problem.keys[0].startswith("attention"))]


def _resolved(schema: Callable[..., T], request: Any, model: BuiltModel) -> T:
    rest = {field.name: getattr(request, field.name) for field in fields(request)}
    del rest["model"]
    backend = rest.pop("attention").backend
    return schema(model=model, model_name=request.model.name, attention_backend=backend, **rest)


def _sound(config: T | None, problems: Iterable[Problem], where: Where | None) -> T:
    found = lines(problems, where or {})
    if found or config is None:
        raise ConfigError(found)
    return config
