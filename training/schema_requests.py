"""What each verb reads: the sections that it has, and keys of its own. (`schema` says how they are used.)

Where a config is resolved, a `…Request` is what a user writes and a `…Config` what the code reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from longspan.model.config import ModelConfig as BuiltModel

from .schema_model import AttentionConfig, BackendName, BackendPlan, ModelConfig
from .schema_sections import (
    DEFAULT_NEW_TOKENS,
    STRICT,
    Accelerator,
    CallbacksConfig,
    Count,
    DataConfig,
    EvaluationConfig,
    InferencePrecision,
    LoggerConfig,
    OptimizerConfig,
    SampleConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainerConfig,
)
from .schema_stages import Stages


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _RunSections:
    data: DataConfig = Field(default=DataConfig(), description="see data.*")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="see optimizer.*")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="see schedule.*")
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="see trainer.*")
    stages: Stages = Field(
        default=(),
        description="parts of the run, each with its own context, windows, learning rate and batch: a list of them "
        "(stages[i].*), or a series where each follows from the one before; []: one part",
    )
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunRequest(_RunSections):
    """A run as a user writes it: `model` and `attention` are sections of their own."""

    model: ModelConfig = Field(default=ModelConfig(), description="see model.*")  # pyright: ignore[reportInvalidTypeForm]: made from DecoderConfig's fields
    attention: AttentionConfig = Field(default=AttentionConfig(), description="see attention.*")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig(_RunSections):
    """A run as the code reads it: `model` is complete, its attention included."""

    model: BuiltModel
    model_name: str | None = Field(default=None, description="the named size that the model started from")
    attention_backend: BackendPlan = Field(default=BackendPlan())
    context_open: bool = Field(
        default=False, description="data.context was not written, and the checkpoint that a run starts from decides it"
    )

    @property
    def directory(self) -> str:
        return self.output or f"runs/{self.name}"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EstimateRequest(RunRequest):
    """`longspan estimate` as a user writes it: a run, and where it would run"""

    hardware: str | None = Field(
        default=None,
        description="a kind of GPU that is not in this machine (H100, A100, …); null: this machine, and an H100 where "
        "trainer.accelerator=gpu finds none",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EstimateConfig(RunConfig):
    """`longspan estimate` as the code reads it"""

    hardware: str | None = Field(default=None)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig:
    """`longspan prepare`"""

    data: DataConfig = Field(default=DataConfig(), description="see data.*")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


def _alone_or_listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateConfig(SamplingConfig):
    """`longspan generate`"""

    checkpoint: str = Field(description="a checkpoint directory, or a run (its best, else its last)")
    prompt: str | None = Field(
        default=None, description="text to continue; of an encoder–decoder, the source. As typed: quotes are part of it"
    )
    file: str | None = Field(default=None, description="file with that text; -: standard input")
    requests: str | None = Field(
        default=None,
        description='file of requests, a JSON object a line: {"prompt": "…"} and, as it likes, id, max_new_tokens, '
        "temperature, top_k, top_p, min_p, repetition_penalty, seed and stop (a text or a list); -: standard input",
    )
    output: str | None = Field(
        default=None,
        description="requests: file of the answers, a line each as they are ready; answers that are there already are "
        "kept, and only the others are made; null: standard output",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description=f"tokens to generate; null: {DEFAULT_NEW_TOKENS}, or as many as learned positions have room for",
    )
    seed: int = Field(default=0, ge=0, description="seed of sampling")
    stop: bool = Field(default=True, description="stop at the end-of-text token")
    stop_strings: Annotated[tuple[str, ...], BeforeValidator(_alone_or_listed)] = Field(
        default=(), description="stop where the new text contains one of these, and cut it before"
    )
    num_beams: Count = Field(
        default=1, description="above 1: beam search for the likeliest text, with temperature=0; not for requests"
    )
    length_penalty: float = Field(
        default=1.0, description="beam search compares texts by log-probability / length ** length_penalty"
    )
    logprobs: bool = Field(
        default=False,
        description="show the log-probability of each new token (of the model itself, before temperature and the rest)",
    )
    cache: Literal["auto", "contiguous", "paged"] = Field(
        default="auto",
        description="how keys and values are kept; auto: windowed layers keep only what they see (requests: paged)",
    )
    storage: Literal["int8", "float8_e4m3fn"] | None = Field(
        default=None, description="keep keys and values in 8 bits; null: as precise as the model"
    )
    steps: Literal["auto", "plain", "recorded", "compiled"] = Field(
        default="auto",
        description="how tokens are made: plain: the model is called for each; recorded: one step is recorded as a "
        "CUDA graph and replayed; compiled: the same with fused kernels, minutes before the first token; auto: "
        "recorded where that can be and pays",
    )
    global_positions: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        description="encoder–decoders: which tokens of a source are global; null: the first one, where the encoder has "
        "global attention",
    )
    max_batch: Count = Field(
        default=16, description="requests that are continued at once; it sizes the pool of pages that they share"
    )
    accelerator: Accelerator = Field(default="auto", description="where to run")
    precision: InferencePrecision = Field(default="auto", description="auto: bf16 where the device multiplies it fast")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


StoredType = Literal["stored", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImportConfig:
    """`longspan import`"""

    source: str = Field(description="a Hugging Face directory: config.json, weights, tokenizer")
    output: str = Field(description="the checkpoint directory to make")
    dtype: StoredType = Field(default="stored", description="type of the weights; stored: as they are in the source")
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(default=False, description="print the model that the source's config means; do nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """`longspan export`"""

    checkpoint: str = Field(description="a checkpoint directory, or a run (its best, else its last)")
    output: str = Field(description="the Hugging Face directory to make")
    model_type: str | None = Field(
        default=None, description="gpt2, llama, … as Hugging Face spells it; null: the first that can say the model"
    )
    dtype: StoredType = Field(default="stored", description="type of the weights; stored: as they are")
    shard_bytes: int = Field(default=5_000_000_000, ge=1, description="largest file of weights; beyond, they are split")
    repeat_kv: bool = Field(
        default=False,
        description="write shared key/value heads as often as they are read, for model types that know none (gpt2, "
        "bert, longformer, bart, led): the same outputs, but without what sharing saves",
    )
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(default=False, description="print the config.json that would be written; do nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _ExplainKeys:
    context: int | None = Field(default=None, ge=1, description="keys that a query may see; null: model.max_positions")
    accelerator: Accelerator = Field(default="auto", description="device type that the question is about")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="type of q, k and v")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExplainRequest(_ExplainKeys):
    """`longspan attention` as a user writes it"""

    model: ModelConfig = Field(default=ModelConfig(), description="see model.*")  # pyright: ignore[reportInvalidTypeForm]: made from DecoderConfig's fields
    attention: AttentionConfig = Field(default=AttentionConfig(), description="see attention.*")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExplainConfig(_ExplainKeys):
    """`longspan attention` as the code reads it"""

    model: BuiltModel
    model_name: str | None = Field(default=None)
    attention_backend: BackendPlan = Field(default=BackendPlan())


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BenchConfig:
    """`longspan bench`"""

    suite: Literal["attention", "window", "documents", "sparse", "dilation", "decode", "generation"] = Field(
        description="what is measured: dense attention, windows with and without global tokens, packed documents, "
        "block-sparse layouts, dilated windows, single tokens over a cache, whole decoding steps of models"
    )
    shapes: Literal["tiny", "quick", "full"] | None = Field(
        default=None,
        description="tiny: a smoke test in seconds; quick: what decides the targets, some minutes on a GPU; full: "
        "every shape; null: quick on a GPU, tiny on a CPU",
    )
    backend: BackendName = Field(default="triton", description="ours: the attention backend that is measured")
    peers: (
        tuple[
            Literal[
                "sdpa-flash",
                "sdpa-cudnn",
                "flex",
                "longformer-hf",
                "flash-attn-4",
                "longspan-triton",
                "transformers-dynamic",
                "transformers-static",
            ],
            ...,
        ]
        | None
    ) = Field(
        default=None,
        description="who is measured beside it; null: everybody; []: nobody. suite=generation knows the last two, "
        "suite=decode none (it measures all that are there), the other suites the rest",
    )
    only: str | None = Field(default=None, description="measure only cases whose name contains this")
    device: Literal["auto", "cuda", "cpu"] = Field(default="auto", description="cpu: a smoke test, no speeds")
    repetitions: int | None = Field(
        default=None,
        ge=2,
        description="interleaved repetitions; the median counts; null: 100, suite=generation 5 (each generates texts)",
    )
    time_limit: float | None = Field(
        default=None, gt=0, description="seconds; a case that would not fit is left out, and said so"
    )
    output: str | None = Field(
        default=None,
        description="directory that rows, figure and table go to; null: benchmarks/results/ of a checkout, bench/ "
        "for smoke tests and where there is no checkout",
    )
    dry_run: bool = Field(default=False, description="print the resolved config and the cases; do nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConformanceConfig:
    """`longspan conformance`"""

    backend: str = Field(description="a registered backend's name, or your own as package.module:Class")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where it runs")
    dtypes: tuple[Literal["fp32", "bf16", "fp16", "fp64"], ...] | None = Field(
        default=None,
        description="types of q, k and v; null: all that it claims on the device (fp64 if it has no other)",
    )
    features: tuple[str, ...] | None = Field(
        default=None, description="exercise these alone, beside lse and gradients; null: all that it claims"
    )
    examples: int = Field(default=25, ge=0, description="random cases, beside those by construction")
    max_length: int = Field(default=128, ge=1, description="of queries and keys")
    thorough: bool = Field(
        default=True, description="false: each feature alone and the random cases, for a first look at a slow kernel"
    )
    seed: int = Field(default=0, ge=0, description="of the cases")
    dry_run: bool = Field(default=False, description="print the resolved config; do nothing")
