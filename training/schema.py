"""The schema of every verb: each key that a config may hold, with type, default, meaning and limits.

Hydra composes YAML groups; `validate` and its siblings turn the result into these frozen dataclasses before torch is
imported, so a wrong key or value is reported in a second, all of them at once, each with the nearest valid name.
`longspan <verb> --help` prints this file. Reading order: sections, what each verb reads, validation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, make_dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from longspan.kernels.attention.spec import AttentionSpec
from longspan.model.config import AttentionPlan, DecoderConfig, HeadGroup, ModelConfigError, from_dict
from longspan.model.zoo import CONFIGS, configure

from .config_checks import check_data, check_generate, check_protocol, check_run
from .config_errors import COMMAND_LINE, ConfigError, Problem, lines, translate, wrong
from .config_keys import documented
from .config_plain import booleans, named, plain, without, written

DEFAULT_NEW_TOKENS = 200
BACKENDS = ("reference", "sdpa", "flex")  # what kernels.attention registers; to ask it would import torch
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def _branch(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<one>"


def _every_phase(value: object) -> object:
    """`backend: sdpa` and `backend: [flex, reference]` mean all phases."""
    if not isinstance(value, str | list) or not value:
        return value
    for name in [value] if isinstance(value, str) else value:
        if isinstance(name, str):  # wrong names once, not once a phase
            _known_backend(name)
    if isinstance(value, list):
        _alternatives(tuple(value))
    return dict.fromkeys(("train", "prefill", "decode"), value)


def _known_backend(name: str) -> str:
    """The names that are built in, told before torch is imported. A backend that others register is known only at run
    time: a dot in its name (`lab.sparse`) says that it is one of those, and then the registry is asked, not this list.
    """
    if name in ("auto", *BACKENDS) or "." in name:
        return name
    near = get_close_matches(name, ["auto", *BACKENDS], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(BACKENDS)
    raise ValueError(f"no backend is called {name!r}; {hint}there are auto, {known}, and registered names with a dot")


def _alternatives(names: tuple[str, ...]) -> tuple[str, ...]:
    if "auto" in names:
        raise ValueError("auto chooses by itself and stands alone, not in a list")
    return names


# The branch of a union is told by the value's shape, so that an error speaks of the branch that was meant.
BackendName = Annotated[str, AfterValidator(_known_backend)]
Backend = Annotated[
    Annotated[BackendName, Tag("<one>")]
    | Annotated[tuple[BackendName, ...], Field(min_length=1), AfterValidator(_alternatives), Tag("<list>")],
    Discriminator(_branch),
]
Pattern = Annotated[
    Annotated[AttentionSpec, Tag("<one>")] | Annotated[tuple[HeadGroup, ...], Tag("<list>"), Field(min_length=1)],
    Discriminator(_branch),
]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Accelerator = Literal["auto", "cpu", "gpu"]
InferencePrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackendPlan:
    """attention.backend: who computes attention in each phase: a name, `auto`, or a list tried in order."""

    train: Backend = Field(
        default="auto",
        description="backend of training and evaluation: auto, sdpa, flex, reference, or a list to try; a backend that "
        "others register has a dot in its name",
    )
    prefill: Backend = Field(default="auto", description="backend that reads a prompt into the cache")
    decode: Backend = Field(default="auto", description="backend that generates token by token")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceConfig:
    """One source of documents in a mixture (data.sources)."""

    kind: Literal["stdlib", "files", "hub"] = Field(
        default="stdlib", description="the running Python's library, local files, or a data set on the hub"
    )
    path: str | None = Field(
        default=None,
        description="files: a file, directory or glob of .txt .md .py .jsonl(.gz) .parquet .arrow; "
        "hub: the data set's name",
    )
    name: str | None = Field(
        default=None, description="what this source is called in counts and reports; default: kind or path"
    )
    weight: float = Field(default=1.0, gt=0, description="share of the training stream, relative to the other sources")
    split: str = Field(default="train", description="hub: which split")
    config: str | None = Field(default=None, description="hub: the data set's configuration name")
    revision: str | None = Field(default=None, description="hub: commit or tag to pin")
    streaming: bool = Field(default=False, description="hub: read without downloading everything first")
    text_field: str = Field(
        default="text", description="column that holds a document's text (jsonl, parquet, arrow, hub)"
    )
    limit: int | None = Field(default=None, ge=1, description="read at most this many documents")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TokenizerConfig:
    """data.tokenizer"""

    kind: Literal["bpe", "bytes", "file"] = Field(
        default="bpe",
        description="train a byte-level BPE on the training documents, plain bytes, or an existing tokenizer.json",
    )
    vocab_size: int = Field(default=8192, ge=257, description="bpe: size of the vocabulary, special tokens included")
    path: str | None = Field(default=None, description="file: a tokenizer.json or a directory that holds one")
    train_bytes: int = Field(
        default=20_000_000, ge=1, description="bpe: how much text to train on (evenly spaced documents)"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """data: documents -> tokens -> packed sequences"""

    name: str = Field(default="data", description="label in reports; names the token store under data.cache")
    path: str | None = Field(
        default=None,
        description="shortcut: a file, directory or glob of your text, or hub:<name>; replaces data.sources",
    )
    sources: tuple[SourceConfig, ...] = Field(
        default=(SourceConfig(),), description="the mixture; see data.sources[i].*"
    )
    tokenizer: TokenizerConfig = Field(default=TokenizerConfig(), description="see data.tokenizer.*")
    cache: str = Field(default="cache", description="where token stores and tokenizers are kept between runs")
    context: int = Field(
        default=1024,
        ge=2,
        description="tokens in a training sequence; not given: the model's max_positions, at most 1024 (what the run "
        "has that is resumed)",
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concatenate and split, or best-fit so that no document shorter than the context is cut",
    )
    document_mask: bool = Field(default=False, description="attention never crosses a document boundary")
    reset_positions: bool = Field(default=False, description="positions restart at 0 in each document")
    boundary_loss: bool = Field(default=True, description="score the first token of a document given the one before it")
    validation_fraction: Probability = Field(
        default=0.01, description="share of documents held out, chosen by a hash of their text"
    )
    shuffle: bool = Field(
        default=True, description="order sequences by a function of (seed, epoch, index); false: stream order"
    )
    workers: int = Field(default=0, ge=0, description="loader processes")
    tokenize_workers: int | None = Field(default=None, ge=1, description="tokenisation processes; default: all cores")
    prompt_field: str | None = Field(
        default=None,
        description="jsonl: with response_field, train on responses only; this column is read but carries no loss",
    )
    response_field: str | None = Field(default=None, description="jsonl: the column that carries loss")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """optimizer"""

    name: Literal["adamw"] = Field(default="adamw", description="decoupled weight decay (Loshchilov & Hutter 2019)")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="decay rates of the moments, each at least 0 and below 1"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="on weight matrices only: never norms, biases, embeddings"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleConfig:
    """schedule: the learning rate over optimizer steps"""

    name: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup: float = Field(default=0.02, ge=0, description="below 1: share of the run; otherwise a number of steps")
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate, as a share of the peak")
    decay: float = Field(
        default=0.2, gt=0, description="wsd: length of the final decay, a share of the run or a number of steps"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainerConfig:
    """trainer"""

    steps: Count = Field(default=1000, description="optimizer steps")
    global_batch: Count = Field(default=32, description="sequences per optimizer step, over all devices")
    micro_batch: Count = Field(
        default=8, description="sequences per device and forward pass; must divide the global batch exactly"
    )
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-true"] = Field(
        default="auto", description="auto: bf16-mixed where the device multiplies bf16 fast, else fp32"
    )
    accelerator: Accelerator = Field(default="auto", description="where to train")
    devices: Count = Field(default=1, description="devices per node")
    nodes: Count = Field(default=1, description="nodes")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="auto: single device, or ddp when there are several"
    )
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")
    compile: bool = Field(default=False, description="torch.compile the model's blocks")
    activation_checkpointing: bool = Field(
        default=False, description="recompute blocks in the backward pass to save memory"
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="on a NaN or infinite loss or gradient: stop the run, or skip the step and count it"
    )
    deterministic: bool = Field(default=False, description="refuse operations without a deterministic implementation")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; default: torch's choice")
    log_every: Count = Field(default=10, description="steps between metric rows")
    val_every: int | None = Field(
        default=None, ge=1, description="steps between validations; default: a tenth of the run"
    )
    val_batches: Count = Field(default=20, description="micro-batches a validation reads at most")
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; default: a tenth of the run"
    )
    keep: Count = Field(default=2, description="how many of the newest checkpoints stay, the best one aside")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoggerConfig:
    """logger: metrics.csv is always written"""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="auto: online where WANDB_API_KEY is set, else offline files in the run directory"
    )
    project: str = Field(default="longspan", description="wandb project")
    entity: str | None = Field(default=None, description="wandb entity")
    tags: tuple[str, ...] = Field(default=(), description="wandb tags")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CallbacksConfig:
    """callbacks"""

    progress: Literal["auto", "bar", "lines", "off"] = Field(
        default="auto", description="auto: a bar on a terminal, lines elsewhere"
    )
    progress_seconds: float = Field(default=5.0, gt=0, description="lines: seconds between them")
    report: bool = Field(default=True, description="write report.html at the end")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ProtocolConfig:
    """How documents longer than a window are scored; every number of ours names these."""

    max_tokens: int | None = Field(
        default=200_000, ge=2, description="score at most this many tokens; null: all held-out documents"
    )
    window: int | None = Field(default=None, ge=2, description="tokens a forward pass sees; null: the training context")
    stride: int | None = Field(default=None, ge=1, description="new tokens scored per window; null: half the window")
    batch: Count = Field(default=8, description="windows per forward pass")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationConfig(ProtocolConfig):
    """evaluation: perplexity on held-out documents at the end of a run"""

    enabled: bool = Field(default=True, description="evaluate when training ends")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = Field(default=0.8, ge=0, description="0: greedy")
    top_k: int | None = Field(default=50, ge=1, description="keep the k likeliest tokens")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the smallest set of tokens with this probability"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SampleConfig(SamplingConfig):
    """sample: a text generated at the end of a run"""

    max_new_tokens: Count = Field(
        default=DEFAULT_NEW_TOKENS, description="tokens to generate, at most what learned positions have room for"
    )
    prompt: str = Field(default="def ", description="what the sample continues; empty: no sample")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AttentionConfig:
    """attention: what each layer attends to, and who computes it"""

    patterns: Mapping[str, Pattern] | None = Field(
        default=None,
        description="kinds of attention by name: an attention spec each, or a list of {heads, spec} where the heads of "
        "a layer differ; null: those of model.name",
    )
    layers: tuple[str, ...] | None = Field(
        default=None,
        description="the pattern of each layer, repeated cyclically over the stack; null: the only pattern there is",
    )
    backend: Annotated[BackendPlan, BeforeValidator(_every_phase)] = Field(
        default=BackendPlan(), description="see attention.backend.*; a name or a list alone means every phase"
    )


def _model_section() -> type:
    """`model.*`: a named size, and every field of DecoderConfig as an override of it."""
    hints, meanings = get_type_hints(DecoderConfig), documented(DecoderConfig)
    named = (
        "name",
        Literal[tuple(CONFIGS)] | None,  # pyright: ignore[reportOperatorIssue]: the names are known at run time
        Field(default=None, description="named size to start from; null: the keys below alone"),
    )
    overrides = [
        (field.name, hints[field.name], Field(default=None, description=meanings.get(field.name, "")))
        for field in fields(DecoderConfig)
        if field.name not in ("architecture", "attention")  # the one there is; a section of its own
    ]
    plain = make_dataclass("ModelConfig", [named, *overrides], frozen=True, kw_only=True)
    return dataclass(frozen=True, kw_only=True, config=_STRICT)(plain)


ModelConfig = _model_section()


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _RunSections:
    data: DataConfig = Field(default=DataConfig(), description="see data.*")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="see optimizer.*")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="see schedule.*")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="see trainer.*")
    logger: LoggerConfig = Field(default=LoggerConfig(), description="see logger.*")
    callbacks: CallbacksConfig = Field(default=CallbacksConfig(), description="see callbacks.*")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="see evaluation.*")
    sample: SampleConfig = Field(default=SampleConfig(), description="see sample.*")
    name: str = Field(default="run", description="name of the run; its directory is runs/<name> unless output is given")
    output: str | None = Field(default=None, description="run directory")
    seed: int = Field(default=0, ge=0, description="seeds weights, data order and sampling")
    checkpoint: str | None = Field(
        default=None, description="start from these weights: a checkpoint directory or a run"
    )
    resume: str | None = Field(
        default=None, description="auto: continue the run in `output` if there is one; or a run directory"
    )
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(
        default=False,
        description="print the resolved config with parameters, tokens, FLOPs, memory and time; do nothing",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunRequest(_RunSections):
    """A run as a user writes it: `model` and `attention` are sections of their own."""

    model: ModelConfig = Field(default=ModelConfig(), description="see model.*")  # pyright: ignore[reportInvalidTypeForm]: made from DecoderConfig's fields
    attention: AttentionConfig = Field(default=AttentionConfig(), description="see attention.*")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig(_RunSections):
    """A run as the code reads it: `model` is complete, its attention included."""

    model: DecoderConfig
    model_name: str | None = Field(default=None, description="the named size that the model started from")
    attention_backend: BackendPlan = Field(default=BackendPlan())
    context_open: bool = Field(
        default=False, description="data.context was not written, and the checkpoint that a run starts from decides it"
    )

    @property
    def directory(self) -> str:
        return self.output or f"runs/{self.name}"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EstimateRequest(RunRequest):
    """`longspan estimate` as a user writes it: a run, and where it would run"""

    hardware: str | None = Field(
        default=None,
        description="a kind of GPU that is not in this machine (H100, A100, …); null: this machine, and an H100 where "
        "trainer.accelerator=gpu finds none",
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EstimateConfig(RunConfig):
    """`longspan estimate` as the code reads it"""

    hardware: str | None = Field(default=None)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PrepareConfig:
    """`longspan prepare`"""

    data: DataConfig = Field(default=DataConfig(), description="see data.*")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationDataConfig:
    """data: what `longspan evaluate` scores"""

    path: str | None = Field(
        default=None,
        description="a file, directory or glob of text, or hub:<name>; null: the documents that the run held out",
    )
    text_field: str = Field(
        default="text", description="column that holds a document's text (jsonl, parquet, arrow, hub)"
    )
    limit: int | None = Field(default=None, ge=1, description="read at most this many documents")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluateConfig:
    """`longspan evaluate`"""

    checkpoint: str = Field(description="a checkpoint directory, or a run (its best, else its last)")
    tasks: tuple[Literal["perplexity"], ...] = Field(
        default=("perplexity",), min_length=1, description="what to measure"
    )
    data: EvaluationDataConfig = Field(default=EvaluationDataConfig(), description="see data.*")
    evaluation: ProtocolConfig = Field(default=ProtocolConfig(), description="see evaluation.*")
    accelerator: Accelerator = Field(default="auto", description="where to run")
    precision: InferencePrecision = Field(
        default="auto", description="auto: as the run evaluated itself, else bf16 where the device multiplies it fast"
    )
    output: str | None = Field(
        default=None,
        description="directory of the results; null: evaluations/<checkpoint's name>/<data's name> in the working "
        "directory",
    )
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GenerateConfig(SamplingConfig):
    """`longspan generate`"""

    checkpoint: str = Field(description="a checkpoint directory, or a run (its best, else its last)")
    prompt: str | None = Field(default=None, description="text to continue")
    file: str | None = Field(default=None, description="file with the text to continue; -: standard input")
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description=f"tokens to generate; null: {DEFAULT_NEW_TOKENS}, or as many as learned positions have room for",
    )
    seed: int = Field(default=0, ge=0, description="seed of sampling")
    stop: bool = Field(default=True, description="stop at the end-of-text token")
    accelerator: Accelerator = Field(default="auto", description="where to run")
    precision: InferencePrecision = Field(default="auto", description="auto: bf16 where the device multiplies it fast")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class _ExplainKeys:
    context: int | None = Field(default=None, ge=1, description="keys that a query may see; null: model.max_positions")
    accelerator: Accelerator = Field(default="auto", description="device type that the question is about")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="type of q, k and v")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExplainRequest(_ExplainKeys):
    """`longspan attention` as a user writes it"""

    model: ModelConfig = Field(default=ModelConfig(), description="see model.*")  # pyright: ignore[reportInvalidTypeForm]: made from DecoderConfig's fields
    attention: AttentionConfig = Field(default=AttentionConfig(), description="see attention.*")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExplainConfig(_ExplainKeys):
    """`longspan attention` as the code reads it"""

    model: DecoderConfig
    model_name: str | None = Field(default=None)
    attention_backend: BackendPlan = Field(default=BackendPlan())


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BenchConfig:
    """`longspan bench`"""

    suite: Literal["attention", "window", "documents", "sparse", "dilation"] = Field(
        description="what is measured: dense attention, windows with and without global tokens, packed documents, "
        "block-sparse layouts, dilated windows"
    )
    shapes: Literal["tiny", "quick", "full"] | None = Field(
        default=None,
        description="tiny: a smoke test in seconds; quick: what decides the targets, some minutes on a GPU; full: every "
        "shape; null: quick on a GPU, tiny on a CPU",
    )
    backend: BackendName = Field(default="triton", description="ours: the attention backend that is measured")
    peers: tuple[Literal["sdpa-flash", "sdpa-cudnn", "flex", "longformer-hf", "flash-attn-4"], ...] | None = Field(
        default=None, description="who is measured beside it; null: everybody; []: nobody"
    )
    only: str | None = Field(default=None, description="measure only cases whose name contains this")
    device: Literal["auto", "cuda", "cpu"] = Field(default="auto", description="cpu: a smoke test, no speeds")
    repetitions: int = Field(default=100, ge=2, description="interleaved repetitions; the median counts")
    time_limit: float | None = Field(
        default=None, gt=0, description="seconds; a case that would not fit is left out, and said so"
    )
    output: str | None = Field(
        default=None,
        description="directory that rows, figure and table go to; null: benchmarks/results/ of a checkout, bench/ "
        "for smoke tests and where there is no checkout",
    )
    dry_run: bool = Field(default=False, description="print the resolved config and the cases; do nothing")


# -- from what a user wrote to what the code reads ---------------------------------------------------------------------

Raw = Mapping[str, Any]
Where = Mapping[str, str]
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
    return _sound(config, [*problems, *(check_protocol(config.evaluation) if config is not None else ())], where)


def validate_generate(raw: Raw, *, where: Where | None = None) -> GenerateConfig:
    """`longspan generate`; as `validate`."""
    config, problems = _parse(GenerateConfig, raw)
    return _sound(config, [*problems, *(check_generate(config) if config is not None else ())], where)


def validate_bench(raw: Raw, *, where: Where | None = None) -> BenchConfig:
    """`longspan bench`; as `validate`."""
    config, problems = _parse(BenchConfig, raw)
    return _sound(config, problems, where)


def as_request(config: RunConfig | ExplainConfig) -> dict[str, Any]:
    """The config as plain data in the form that a user writes: `validate(as_request(config))` gives it back."""
    sections = plain(config)
    model, backend = sections.pop("model"), sections.pop("attention_backend")
    plan = model.pop("attention")
    del model["architecture"]
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
                fitting = min(config.data.context, config.model.max_positions)
                config = replace(config, data=replace(config.data, context=fitting))
            config = replace(config, context_open=config.checkpoint is not None or config.resume is not None)
        problems += _independent(refused, problems)
        failed = {key for problem in problems for key in problem.keys}
        problems += [
            problem
            for problem in check_run(config)
            if failed.isdisjoint(problem.keys)
            and (model is not None or not any(key.startswith("model.") for key in problem.keys))
        ]
    return _sound(config, problems, where)


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


def _model(request: Any, raw: Raw) -> tuple[DecoderConfig | None, list[Problem]]:
    """`model` and `attention` of a request as one DecoderConfig."""
    typed = written(raw, "model")
    known = {field.name for field in fields(ModelConfig)} - {"name"}
    overrides = {name: getattr(request.model, name) for name in typed if name in known}
    # A key whose value was wrong holds its place-holder None by now; a null that was written is meant.
    overrides = {name: value for name, value in overrides.items() if value is not None or typed[name] is None}
    patterns, layers = request.attention.patterns, request.attention.layers
    try:
        start = configure(request.model.name, overrides) if request.model.name else from_dict(overrides)
        if patterns is None:
            plan = start.attention if layers is None else replace(start.attention, layers=layers)
        elif layers is None and len(patterns) != 1:
            names = ", ".join(patterns)
            raise ValueError(f"attention.layers: is required: which of {names} each layer has, repeated cyclically")
        else:
            plan = AttentionPlan(patterns=patterns, layers=layers or tuple(patterns))
        model = replace(start, attention=plan)
    except ModelConfigError as error:
        return None, [_of_model(problem) for problem in error.problems]
    except ValueError as error:
        return None, [_of_model(str(error))]
    used = ", ".join(dict.fromkeys(plan.layers))
    unused = [f"attention.patterns.{name}" for name in plan.patterns if name not in plan.layers]
    return model, [Problem((key,), f"{key}: no layer has it; attention.layers names {used}") for key in unused]


def _of_model(sentence: str) -> Problem:
    """A sentence of model/config.py as a problem of the section that a user sees."""
    head = re.match(r"[\w.]*", sentence)
    key = head[0] if head else ""
    if key.startswith("attention"):
        return Problem((key,), sentence)
    known = {field.name for field in fields(ModelConfig)}
    mentioned = [f"model.{name}" for name in re.findall(r"\b(\w+)=", sentence) if name in known]
    if key in known:
        return Problem((f"model.{key}", *mentioned), f"model.{sentence}")
    return Problem(("model.name", *mentioned), f"model: {sentence}")


def _independent(refused: list[Problem], problems: list[Problem]) -> list[Problem]:
    """What is wrong with the model apart from what follows from keys already reported."""
    failed = {key for problem in problems for key in problem.keys}
    if "model.name" in failed:
        return []
    attention = any(key.partition(".")[0] == "attention" for key in failed)
    return [problem for problem in refused if not (attention and problem.keys[0].startswith("attention"))]


def _resolved(schema: Callable[..., T], request: Any, model: DecoderConfig) -> T:
    rest = {field.name: getattr(request, field.name) for field in fields(request)}
    del rest["model"]
    backend = rest.pop("attention").backend
    return schema(model=model, model_name=request.model.name, attention_backend=backend, **rest)


def _sound(config: T | None, problems: Iterable[Problem], where: Where | None) -> T:
    found = lines(problems, where or {})
    if found or config is None:
        raise ConfigError(found)
    return config
