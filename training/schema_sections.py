"""The sections of a config but for the model: each key with its type, default, meaning and limits. (`schema` says how
they are used, and schema_model.py has the model and its attention.)"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from longspan.evaluation.names import ProtocolName

DEFAULT_NEW_TOKENS = 200
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Accelerator = Literal["auto", "cpu", "gpu"]
InferencePrecision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerConfig:
    """data.tokenizer"""

    kind: Literal["bpe", "bytes", "words", "file"] = Field(
        default="bpe",
        description="train a byte-level BPE on the training documents, plain bytes, a token for each word of theirs "
        "(for languages of few words), or an existing tokenizer.json",
    )
    vocab_size: int = Field(
        default=8192, ge=257, description="bpe: size of the vocabulary, special tokens included; words: at most"
    )
    path: str | None = Field(default=None, description="file: a tokenizer.json or a directory that holds one")
    train_bytes: int = Field(
        default=20_000_000, ge=1, description="bpe, words: how much text to train on (evenly spaced documents)"
    )
    digits: Literal["merged", "single"] = Field(
        default="merged",
        description="bpe: merged into numbers like letters into words, or a token for each (as Llama's)",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaskingConfig:
    """data.masking: tokens that are hidden and asked for (Devlin et al. 2019), others in every pass"""

    probability: float = Field(default=0.15, gt=0, lt=1, description="share of tokens that are asked for")
    masked: float = Field(default=0.8, ge=0, le=1, description="share of those that become the mask token")
    random: float = Field(
        default=0.1, ge=0, le=1, description="share of those that become another token; the rest stay as they are"
    )
    whole_words: bool = Field(default=False, description="choose words instead of tokens")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DenoisingConfig:
    """data.denoising: texts that an encoder–decoder reads damaged and writes whole (BART: Lewis et al. 2019)"""

    probability: float = Field(default=0.3, ge=0, lt=1, description="share of tokens that are hidden, in spans")
    mean_span: float = Field(
        default=3.0,
        ge=1,
        description="mean length of a span (Poisson); one mask token stands for each, and a span may be empty",
    )
    permute_sentences: bool = Field(default=True, description="put the sentences of a sequence in random order")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExamplesConfig:
    """data.examples: labelled records, which replace documents: what an encoder or encoder–decoder is fine-tuned on"""

    kind: Literal["classification", "qa", "seq2seq"] = Field(
        description="classification: which class a text has; qa: where in a text the answer to a question stands; "
        "seq2seq: what is to be written for a text"
    )
    path: str | None = Field(
        default=None, description="a file, directory or glob of .jsonl(.gz) .parquet .arrow, or hub:<name>"
    )
    made: Literal["packages", "parameters", "outlines", "same_document", "listops", "main_points"] | None = Field(
        default=None,
        description="instead of path: Long Range Arena's ListOps (classification), made-up reports of up to 1,000 "
        "words and their main points (main_points: seq2seq), or, to try things out, examples made of the running "
        "Python's own library: which package a piece of source is from (classification), what "
        "parameters a function has (qa), the names that a piece of source defines (seq2seq), whether two pieces are of "
        "one module (same_document: classification)",
    )
    validation_path: str | None = Field(
        default=None, description="held-out records, like path; null: data.validation_fraction of path's"
    )
    split: str = Field(default="train", description="hub: which split path is")
    validation_split: str = Field(default="validation", description="hub: which split validation_path is")
    limit: int | None = Field(default=None, ge=1, description="read at most this many records of path, or make so many")
    validation_limit: int | None = Field(
        default=None, ge=1, description="and of validation_path, or of what is made to be held out"
    )
    text_field: str = Field(default="text", description="classification: column of the text")
    label_field: str = Field(
        default="label", description="classification: column of the class, one of model.labels: text or a whole number"
    )
    question_field: str = Field(default="question", description="qa: column of the question")
    context_field: str = Field(default="context", description="qa: column of the text that holds the answer")
    answer_field: str = Field(
        default="answers",
        description="qa: column of the answer: a text, a list of texts (the first is learned, each counts as right; "
        "none: the text has no answer), or an object with text and answer_start",
    )
    answer_start_field: str | None = Field(
        default=None, description="qa: column of the answer's first character; null: its first occurrence"
    )
    source_field: str = Field(default="source", description="seq2seq: column of the text that is read")
    target_field: str = Field(default="target", description="seq2seq: column of the text that is written for it")
    target_context: int | None = Field(
        default=None,
        ge=2,
        description="seq2seq: tokens of a target at most (a source has data.context); null: what the decoder has "
        "positions for, at most 256",
    )
    group_field: str | None = Field(
        default=None,
        description="column whose equal values are held out together; null: equal texts are (qa: equal contexts)",
    )
    tolerance: float = Field(
        default=0.01, ge=0, lt=1, description="share of records that may be unusable; they are counted and named"
    )
    overlap: int | None = Field(
        default=None,
        ge=0,
        description="qa: tokens that neighbouring windows of a long text share; null: a quarter of data.context, at "
        "most 128",
    )
    max_answer_tokens: Count = Field(default=30, description="qa: longest answer that is looked for")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """data: documents -> tokens -> packed sequences, or records -> tokens -> labelled rows"""

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
    masking: MaskingConfig | None = Field(
        default=None,
        description="null: every token is asked for the next one, as decoders are trained; otherwise hidden tokens are "
        "asked for, as encoders are; see data.masking.*",
    )
    denoising: DenoisingConfig | None = Field(
        default=None,
        description="not null: texts are read damaged and written whole, as encoder–decoders are trained; a sequence's "
        "first and last token are the text's ends; see data.denoising.*",
    )
    examples: ExamplesConfig | None = Field(
        default=None, description="not null: labelled records are read, and no documents; see data.examples.*"
    )
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """schedule: the learning rate over optimizer steps"""

    name: Literal["cosine", "linear", "wsd", "rsqrt", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup: float = Field(default=0.02, ge=0, description="below 1: share of the run; otherwise a number of steps")
    final_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate, as a share of the peak")
    decay: float = Field(
        default=0.2, gt=0, description="wsd: length of the final decay, a share of the run or a number of steps"
    )
    offset: Count | None = Field(
        default=10_000,
        description="rsqrt: steps that count as taken already: step s has sqrt(offset / (offset + s)) of the peak; "
        "null: the n-th step has sqrt(warmup / n), so that the warm-up ends at the peak (Vaswani et al. 2017)",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
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
    label_smoothing: Probability = Field(
        default=0.0,
        description="encoder–decoders: share of each target that is spread over all tokens, in training (Szegedy et "
        "al. 2016)",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="on a NaN or infinite loss or gradient: stop the run, or skip the step and count it"
    )
    deterministic: bool = Field(default=False, description="refuse operations without a deterministic implementation")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; default: torch's choice")
    log_every: Count = Field(default=10, description="steps between metric rows")
    val_every: int | None = Field(
        default=None, ge=1, description="steps between validations; null: a tenth of the run (uptrain: a quarter)"
    )
    val_batches: Count = Field(default=20, description="micro-batches a validation reads at most")
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; null: a tenth of the run (uptrain: a quarter)"
    )
    keep: Count = Field(default=2, description="how many of the newest checkpoints stay, the best one aside")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggerConfig:
    """logger: metrics.csv is always written"""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="auto: online where WANDB_API_KEY is set, else offline files in the run directory"
    )
    project: str = Field(default="longspan", description="wandb project")
    entity: str | None = Field(default=None, description="wandb entity")
    tags: tuple[str, ...] = Field(default=(), description="wandb tags")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CallbacksConfig:
    """callbacks"""

    progress: Literal["auto", "bar", "lines", "off"] = Field(
        default="auto", description="auto: a bar on a terminal, lines elsewhere"
    )
    progress_seconds: float = Field(default=5.0, gt=0, description="lines: seconds between them")
    report: bool = Field(default=True, description="write report.html at the end")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProtocolConfig:
    """How documents longer than a window are scored; every number of ours names these."""

    max_tokens: int | None = Field(
        default=200_000, ge=2, description="score at most this many tokens; null: all held-out documents"
    )
    window: int | None = Field(default=None, ge=2, description="tokens a forward pass sees; null: the training context")
    stride: int | None = Field(default=None, ge=1, description="new tokens scored per window; null: half the window")
    batch: Count = Field(default=8, description="windows per forward pass")
    scored: Literal["all", "full_windows"] = Field(
        default="all",
        description="every token once, or only the last `stride` tokens of each window that is full",
    )
    merge_windows: bool = Field(
        default=True,
        description="compute several windows in one pass where that changes no number: windowed attention that never "
        "reaches back to where a window begins, and relative positions",
    )
    protocols: tuple[ProtocolName, ...] = Field(
        default=(),
        description="other ways to count perplexity, measured beside ours on the same text (docs/evaluation.md)",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig(ProtocolConfig):
    """evaluation: perplexity on held-out documents at the end of a run"""

    enabled: bool = Field(default=True, description="evaluate when training ends")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = Field(default=0.8, ge=0, description="0: greedy")
    top_k: int | None = Field(default=50, ge=1, description="keep the k likeliest tokens")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the smallest set of tokens with this probability"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="keep tokens at least this many times as likely as the likeliest one"
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        description="above 1: tokens that stand in prompt or output become less likely; 1: no penalty",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleConfig(SamplingConfig):
    """sample: a text generated at the end of a run"""

    max_new_tokens: Count = Field(
        default=DEFAULT_NEW_TOKENS, description="tokens to generate, at most what learned positions have room for"
    )
    prompt: str = Field(
        default="def ",
        description="what the sample continues (an encoder–decoder reads a held-out source instead); empty: no sample",
    )
