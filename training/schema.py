"""The schema of a training run: every key that a config may hold, with type, default, meaning and limits.

Hydra composes YAML groups; `validate` turns the result into these frozen dataclasses before torch is imported, so a
wrong key or value is reported in a second, all of them at once, each with the nearest valid name.
`longspan <verb> --help` prints this file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from longspan.model.config import AttentionPlan, DecoderConfig

_STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BackendPlan:
    """attention.backend: who computes attention in each phase: a name, `auto`, or a list tried in order."""

    train: str | tuple[str, ...] = Field("auto", description="backend of training and evaluation forward passes")
    prefill: str | tuple[str, ...] = Field("auto", description="backend that reads a prompt into the cache")
    decode: str | tuple[str, ...] = Field("auto", description="backend that generates token by token")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceConfig:
    """One source of documents in a mixture (data.sources)."""

    kind: Literal["stdlib", "files", "hub"] = Field(
        "stdlib", description="the running Python's library, local files, or a data set on the hub"
    )
    path: str | None = Field(
        None,
        description="files: a file, directory or glob of .txt .md .py .jsonl(.gz) .parquet .arrow; "
        "hub: the data set's name",
    )
    name: str | None = Field(
        None, description="what this source is called in counts and reports; default: kind or path"
    )
    weight: float = Field(1.0, gt=0, description="share of the training stream, relative to the other sources")
    split: str = Field("train", description="hub: which split")
    config: str | None = Field(None, description="hub: the data set's configuration name")
    revision: str | None = Field(None, description="hub: commit or tag to pin")
    streaming: bool = Field(False, description="hub: read without downloading everything first")
    text_field: str = Field("text", description="column that holds a document's text (jsonl, parquet, arrow, hub)")
    limit: int | None = Field(None, ge=1, description="read at most this many documents")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TokenizerConfig:
    """data.tokenizer"""

    kind: Literal["bpe", "bytes", "file"] = Field(
        "bpe",
        description="train a byte-level BPE on the training documents, plain bytes, or an existing tokenizer.json",
    )
    vocab_size: int = Field(8192, ge=257, description="bpe: size of the vocabulary, special tokens included")
    path: str | None = Field(None, description="file: a tokenizer.json or a directory that holds one")
    train_bytes: int = Field(20_000_000, ge=1, description="bpe: how much text to train on (evenly spaced documents)")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """data: documents -> tokens -> packed sequences"""

    name: str = Field("data", description="label in reports; names the token store under data.cache")
    path: str | None = Field(
        None, description="shortcut: a file, directory or glob of your text, or hub:<name>; replaces data.sources"
    )
    sources: tuple[SourceConfig, ...] = Field((SourceConfig(),), description="the mixture; see data.sources[i].*")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="see data.tokenizer.*")
    cache: str = Field("cache", description="where token stores and tokenizers are kept between runs")
    context: int = Field(1024, ge=2, description="tokens in a training sequence")
    packing: Literal["concat", "best_fit"] = Field(
        "concat", description="concatenate and split, or best-fit so that no document shorter than the context is cut"
    )
    document_mask: bool = Field(False, description="attention never crosses a document boundary")
    reset_positions: bool = Field(False, description="positions restart at 0 in each document")
    boundary_loss: bool = Field(True, description="score the first token of a document given the one before it")
    validation_fraction: Probability = Field(
        0.01, description="share of documents held out, chosen by a hash of their text"
    )
    shuffle: bool = Field(
        True, description="order sequences by a function of (seed, epoch, index); false: stream order"
    )
    workers: int = Field(0, ge=0, description="loader processes")
    tokenize_workers: int | None = Field(None, ge=1, description="tokenisation processes; default: all cores")
    prompt_field: str | None = Field(
        None, description="jsonl: with response_field, train on responses only; this column is read but carries no loss"
    )
    response_field: str | None = Field(None, description="jsonl: the column that carries loss")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """optimizer"""

    name: Literal["adamw"] = Field("adamw", description="decoupled weight decay (Loshchilov & Hutter 2019)")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of the moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="on weight matrices only: never norms, biases, embeddings")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleConfig:
    """schedule: the learning rate over optimizer steps"""

    name: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: float = Field(0.02, ge=0, description="below 1: share of the run; otherwise a number of steps")
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate, as a share of the peak")
    decay: float = Field(
        0.2, gt=0, description="wsd: length of the final decay, a share of the run or a number of steps"
    )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainerConfig:
    """trainer"""

    steps: Count = Field(1000, description="optimizer steps")
    global_batch: Count = Field(32, description="sequences per optimizer step, over all devices")
    micro_batch: Count = Field(
        8, description="sequences per device and forward pass; must divide the global batch exactly"
    )
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16-true"] = Field(
        "auto", description="auto: bf16-mixed where the device multiplies bf16 fast, else fp32"
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="where to train")
    devices: Count = Field(1, description="devices per node")
    nodes: Count = Field(1, description="nodes")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="auto: single device, or ddp when there are several"
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    compile: bool = Field(False, description="torch.compile the model's blocks")
    activation_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="on a NaN or infinite loss or gradient: stop the run, or skip the step and count it"
    )
    deterministic: bool = Field(False, description="refuse operations without a deterministic implementation")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; default: torch's choice")
    log_every: Count = Field(10, description="steps between metric rows")
    val_every: int | None = Field(None, ge=1, description="steps between validations; default: a tenth of the run")
    val_batches: Count = Field(20, description="micro-batches a validation reads at most")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; default: a tenth of the run")
    keep: Count = Field(2, description="how many of the newest checkpoints stay, the best one aside")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoggerConfig:
    """logger: metrics.csv is always written"""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online where WANDB_API_KEY is set, else off"
    )
    project: str = Field("longspan", description="wandb project")
    entity: str | None = Field(None, description="wandb entity")
    tags: tuple[str, ...] = Field((), description="wandb tags")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CallbacksConfig:
    """callbacks"""

    progress: Literal["auto", "bar", "lines", "off"] = Field(
        "auto", description="auto: a bar on a terminal, lines elsewhere"
    )
    progress_seconds: float = Field(5.0, gt=0, description="lines: seconds between them")
    report: bool = Field(True, description="write report.html at the end")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluationConfig:
    """evaluation: perplexity on held-out documents at the end of a run"""

    enabled: bool = Field(True, description="evaluate when training ends")
    max_tokens: int | None = Field(
        200_000, ge=2, description="score at most this many tokens; null: all held-out documents"
    )
    window: int | None = Field(None, ge=2, description="tokens a forward pass sees; default: data.context")
    stride: int | None = Field(None, ge=1, description="new tokens scored per window; default: half the window")
    batch: Count = Field(8, description="windows per forward pass")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SampleConfig:
    """sample: a text generated at the end of a run"""

    prompt: str = Field("def ", description="what the sample continues; empty: no sample")
    max_new_tokens: Count = Field(200, description="tokens to generate")
    temperature: float = Field(0.8, ge=0, description="0: greedy")
    top_k: int | None = Field(50, ge=1, description="keep the k likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the smallest set of tokens with this probability")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AttentionConfig:
    """attention: what each layer attends to, and who computes it"""

    plan: AttentionPlan = Field(AttentionPlan(), description="patterns and layers")
    backend: BackendPlan = Field(BackendPlan(), description="see attention.backend.*")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """A training run."""

    model: DecoderConfig
    attention_backend: BackendPlan = Field(BackendPlan())
    data: DataConfig = Field(DataConfig())
    optimizer: OptimizerConfig = Field(OptimizerConfig())
    schedule: ScheduleConfig = Field(ScheduleConfig())
    trainer: TrainerConfig = Field(TrainerConfig())
    logger: LoggerConfig = Field(LoggerConfig())
    callbacks: CallbacksConfig = Field(CallbacksConfig())
    evaluation: EvaluationConfig = Field(EvaluationConfig())
    sample: SampleConfig = Field(SampleConfig())
    name: str = Field("run", description="name of the run; its directory is runs/<name> unless output is given")
    output: str | None = Field(None, description="run directory")
    seed: int = Field(0, ge=0, description="seeds weights, data order and sampling")
    checkpoint: str | None = Field(None, description="start from these weights: a checkpoint directory or a run")
    resume: str | None = Field(
        None, description="auto: continue the run in `output` if there is one; or a run directory"
    )
    overwrite: bool = Field(False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(
        False, description="print the resolved config with parameters, tokens, FLOPs, memory and time; do nothing"
    )

    @property
    def directory(self) -> str:
        return self.output or f"runs/{self.name}"
