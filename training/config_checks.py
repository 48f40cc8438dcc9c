"""What keys must agree on with each other; each disagreement is found before anything is read or built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from longspan.model.config import EncoderConfig, ModelConfig, Seq2SeqConfig

from .config_errors import Problem, assignment
from .example_checks import check_examples, check_labelled_model

if TYPE_CHECKING:
    from .schema import DataConfig, EvaluateConfig, GenerateConfig, ProtocolConfig, RunConfig, SourceConfig

_SPECIAL_TOKENS = 1  # the document separator; with data.masking and data.denoising, a mask token is added


def check_run(config: RunConfig) -> Iterator[Problem]:
    """Everything about a run that two keys can contradict each other on."""
    yield from check_data(config.data)
    if config.checkpoint is None and config.resume is None:
        yield from check_objective(config)
    if config.checkpoint is None and config.resume is None:  # otherwise model and tokenizer may be a checkpoint's
        yield from check_vocabulary(config)
        yield from check_lengths(config)
    yield from check_protocol(config.evaluation, default_window=None if config.context_open else config.data.context)
    yield from check_trainer(config)
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        yield _problem(
            ("optimizer.betas", list(config.optimizer.betas)), "expected two numbers, each at least 0 and below 1"
        )
    yield from check_schedule(config)
    yield from _check_directories(config)
    yield from check_documents(config)


def check_objective(config: RunConfig, *, fixed_by: str | None = None) -> Iterator[Problem]:
    """An encoder sees the token that follows, so it can only be asked for hidden ones; an encoder–decoder reads one
    text and writes another.

    `fixed_by` names the checkpoint that brings the model.
    """
    model, masking = config.model, config.data.masking
    smoothing = config.trainer.label_smoothing
    if smoothing and not isinstance(model, Seq2SeqConfig):
        yield _problem(("trainer.label_smoothing", smoothing), "is for encoder–decoders; leave it out", "model.name")
    if config.data.examples is not None:
        yield from check_labelled_model(config, fixed_by=fixed_by)
        return
    if isinstance(model, Seq2SeqConfig):
        yield from _check_seq2seq(config.data)
        return
    if config.data.denoising is not None:
        yield Problem(
            ("data.denoising", "model.name"),
            "data.denoising: makes a source and a target, which an encoder–decoder reads and writes; leave it out, or "
            "name one as model",
        )
    if isinstance(model, EncoderConfig):
        if masking is None:
            yield Problem(
                ("data.masking",),
                "data.masking=null: an encoder sees the next token and learns nothing from being asked for it; set "
                "data.masking={probability: 0.15}",
            )
        if model.head != "mlm":
            advice = "set model.head=mlm" if fixed_by is None else f"{fixed_by} has none"
            yield _problem(
                ("model.head", model.head), f"documents teach the masked-LM head; {advice}, or give data.examples"
            )
    elif masking is not None:
        yield Problem(
            ("data.masking", "model.name"),
            "data.masking: a decoder predicts the next token and has no use for hidden ones; leave it out, or name an "
            "encoder as model",
        )


def _check_seq2seq(data: DataConfig) -> Iterator[Problem]:
    if data.masking is not None:
        yield Problem(
            ("data.masking",),
            "data.masking: asks for tokens where they were hidden; an encoder–decoder writes whole texts, with "
            "data.denoising",
        )
    elif data.denoising is None:
        yield Problem(
            ("data.denoising",),
            "data.denoising=null: an encoder–decoder needs a source and a target; set "
            "data.denoising={probability: 0.3}, or give pairs with data.examples={kind: seq2seq, path: …}",
        )
    for name in ("document_mask", "reset_positions"):
        if getattr(data, name):
            yield _problem((f"data.{name}", True), "an encoder–decoder reads a sequence as one text; set it to false")


def longest_input(model: ModelConfig) -> int:
    """Tokens that the model is built for; of an encoder–decoder, in either stack."""
    if isinstance(model, Seq2SeqConfig):
        return min(model.encoder.max_positions, model.decoder.max_positions)
    return model.max_positions


def target_context(data: DataConfig, model: Seq2SeqConfig) -> int:
    """Tokens of a target at most."""
    examples = data.examples
    if examples is None:
        return data.context
    rows = model.decoder.max_positions
    return min(256, rows) if examples.target_context is None else examples.target_context


def check_documents(config: RunConfig) -> Iterator[Problem]:
    if isinstance(config.model, Seq2SeqConfig):
        return
    for name, specs in config.model.attention.specs().items():
        if any(spec.documents for spec in specs) and not config.data.document_mask:
            yield _problem(
                (f"attention.patterns.{name}.documents", True),
                "needs document ids in the batches: set data.document_mask=true (which sets this for every pattern)",
                "data.document_mask",
            )


def check_data(data: DataConfig) -> Iterator[Problem]:
    if (data.prompt_field is None) != (data.response_field is None):
        given, missing = (
            ("prompt_field", "response_field") if data.response_field is None else ("response_field", "prompt_field")
        )
        yield _problem(
            (f"data.{given}", getattr(data, given)),
            f"needs data.{missing} too: the prompt is read, the response carries the loss",
        )
    masking = data.masking
    if masking is not None and masking.masked + masking.random > 1:
        yield _problem(
            ("data.masking.masked", masking.masked),
            f"and data.masking.random={masking.random:g} are shares of the same tokens, more than 1 together",
            "data.masking.random",
        )
    for name in ("masking", "denoising"):
        if getattr(data, name) is not None and data.response_field is not None:
            yield _problem(
                ("data.response_field", data.response_field),
                f"says which tokens are asked for, and so does data.{name}; give one of them",
                f"data.{name}",
            )
    if masking is not None and data.denoising is not None:
        yield Problem(("data.masking", "data.denoising"), "data.masking and data.denoising: give one of them")
    if not data.sources and data.path is None:
        yield _problem(("data.sources", []), "names no source; give data.path or at least one source")
    yield from check_examples(data)
    tokenizer = data.tokenizer
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield _problem(("data.tokenizer.kind", "file"), "needs data.tokenizer.path, a tokenizer.json or its directory")
    if tokenizer.kind != "file" and tokenizer.path is not None:
        yield _problem(
            ("data.tokenizer.path", tokenizer.path),
            f"is not read with data.tokenizer.kind={tokenizer.kind}; set data.tokenizer.kind=file",
        )
    if tokenizer.kind != "bpe" and tokenizer.digits == "single":
        yield _problem(
            ("data.tokenizer.digits", tokenizer.digits),
            f"is not read with data.tokenizer.kind={tokenizer.kind}; set data.tokenizer.kind=bpe",
            "data.tokenizer.kind",
        )
    if data.path is None:
        seen: set[str] = set()
        for i, source in enumerate(data.sources):
            yield from _check_source(source, f"data.sources.{i}")
            label = source.name or source.path or source.kind
            if label in seen:
                yield _problem(
                    (f"data.sources.{i}.name", label), "is the name of an earlier source; give each its own name"
                )
            seen.add(label)


def check_protocol(protocol: ProtocolConfig, default_window: int | None = None) -> Iterator[Problem]:
    window = protocol.window if protocol.window is not None else default_window
    if protocol.stride is not None and window is not None and protocol.stride > window:
        asked = f"evaluation.window={window}" if protocol.window is not None else f"the window (data.context={window})"
        yield _problem(
            ("evaluation.stride", protocol.stride),
            f"is larger than {asked}: tokens between windows would never be scored",
            "evaluation.window" if protocol.window is not None else "data.context",
        )


def check_evaluate(config: EvaluateConfig) -> Iterator[Problem]:
    yield from check_protocol(config.evaluation)
    if config.checkpoint is None and not config.checkpoints:
        yield Problem(
            ("checkpoint",),
            "checkpoint: is required: a checkpoint directory, or a run; or checkpoints=[A,B], to compare several",
        )
    if config.checkpoint is not None and config.checkpoints:
        yield _problem(
            ("checkpoints", list(config.checkpoints)),
            f"and checkpoint={config.checkpoint} are both given; name them all in checkpoints",
            "checkpoint",
        )
    if len(set(config.checkpoints)) < len(config.checkpoints):
        yield _problem(("checkpoints", list(config.checkpoints)), "names one of them twice")
    if not config.tasks and not config.harness:
        yield _problem(("tasks", []), "measures nothing; name tasks, or harness=[…]")
    if len(set(config.tasks)) < len(config.tasks):
        yield _problem(("tasks", list(config.tasks)), "names a task twice")
    if config.lengths is not None and min(config.lengths) < 1:
        yield _problem(("lengths", list(config.lengths)), "a length is a number of tokens, at least 1")
    for key, values in (("lengths", config.lengths or ()), ("depths", config.depths)):
        if len(set(values)) < len(values):
            yield _problem((key, list(values)), "names one of them twice")
    if not all(0 <= depth <= 1 for depth in config.depths):
        yield _problem(("depths", list(config.depths)), "a depth is a share of the text, from 0 to 1")
    if config.harness_files is not None and not config.harness:
        yield _problem(("harness_files", config.harness_files), "is for harness=[task,…]; leave it out", "harness")


def check_generate(config: GenerateConfig) -> Iterator[Problem]:
    sources = {"requests": config.requests, "file": config.file, "prompt": config.prompt}
    given = {key: value for key, value in sources.items() if value is not None}
    if not given:
        yield Problem(
            ("prompt",),
            "prompt: is required (or file=PATH, file=- for standard input, requests=FILE.jsonl): the text to continue",
        )
    if len(given) > 1:
        (first, value), *others = given.items()
        names = " and ".join(key for key, _ in others)
        number = "both" if len(others) == 1 else "all"
        yield _problem((first, value), f"and {names} are {number} given; the text to continue is one of them", names)
    if config.output is not None and config.requests is None:
        yield _problem(
            ("output", config.output), "is for the answers to requests=FILE.jsonl; a prompt's text is printed"
        )
    if "" in config.stop_strings:
        yield _problem(("stop_strings", list(config.stop_strings)), "an empty text would stop before the first token")
    if config.requests is not None and config.cache == "contiguous":
        yield _problem(
            ("cache", "contiguous"),
            f"requests={config.requests} come and go, and so share pages; leave it out",
            "requests",
        )
    yield from _check_beams(config)


def _check_beams(config: GenerateConfig) -> Iterator[Problem]:
    if config.num_beams == 1:
        if config.length_penalty != 1:
            yield _problem(
                ("length_penalty", config.length_penalty),
                "compares the texts of a beam search; set num_beams",
                "num_beams",
            )
        return
    penalty = config.repetition_penalty
    contradictions = {
        "temperature": config.temperature > 0
        and f"beam search draws nothing, but temperature={config.temperature:g}; add temperature=0",
        "repetition_penalty": penalty != 1
        and f"beams compare by probability, which repetition_penalty={penalty:g} is not; leave one of them at 1",
        "stop_strings": config.stop_strings and "beams compare tokens and know no text; leave stop_strings out",
        "cache": config.cache == "contiguous" and "beams share pages; leave cache=contiguous out",
        "requests": config.requests is not None and f"requests={config.requests} are answered without beam search",
    }
    for key, sentence in contradictions.items():
        if sentence:
            yield _problem(("num_beams", config.num_beams), sentence, key)


def _check_source(source: SourceConfig, path: str) -> Iterator[Problem]:
    if source.kind == "stdlib" and source.path is not None:
        yield _problem((f"{path}.path", source.path), f"is not read with {path}.kind=stdlib; set {path}.kind=files")
    if source.kind != "stdlib" and source.path is None:
        what = (
            "a file, directory or glob (or data.path)"
            if source.kind == "files"
            else "the data set's name (or data.path)"
        )
        yield _problem((f"{path}.kind", source.kind), f"needs {path}.path, {what}")
    if source.kind != "hub":
        given = {"config": source.config, "revision": source.revision, "streaming": source.streaming or None}
        for name, value in given.items():
            if value is not None:
                yield _problem((f"{path}.{name}", value), f"belongs to kind=hub, and {path}.kind={source.kind}")


def check_vocabulary(config: RunConfig) -> Iterator[Problem]:
    tokenizer = config.data.tokenizer
    special = _SPECIAL_TOKENS + (config.data.masking is not None or config.data.denoising is not None)
    # Words and files: known when they are read, and checked then.
    needed = {"bpe": tokenizer.vocab_size, "bytes": 256 + special, "words": 0, "file": 0}[tokenizer.kind]
    if needed > config.model.vocab_size:
        key = ("data.tokenizer.vocab_size", needed) if tokenizer.kind == "bpe" else ("data.tokenizer.kind", "bytes")
        yield _problem(
            key,
            f"makes {needed} tokens, more than model.vocab_size={config.model.vocab_size}; raise it or lower this",
            "model.vocab_size",
        )


def check_lengths(config: RunConfig, *, fixed_by: str | None = None) -> Iterator[Problem]:
    """A table of learned positions ends; the other encodings reach as far as they are asked to.

    `fixed_by` names the checkpoint that brings the model, whose table cannot be made longer.
    """
    model = config.model
    if isinstance(model, Seq2SeqConfig):
        yield from _check_stack_lengths(config.data, model, fixed_by)
        return
    if model.positions != "learned":
        return
    rows = model.max_positions
    if fixed_by is None:
        advice = f"model.max_positions={rows} learned positions; raise model.max_positions or lower it"
    else:
        advice = f"the {rows} learned positions of {fixed_by}; lower it"
    if config.data.context > rows:
        yield _problem(("data.context", config.data.context), f"is longer than {advice}", "model.max_positions")
    window = config.evaluation.window
    if window is not None and window > rows:
        yield _problem(("evaluation.window", window), f"is longer than {advice}", "model.max_positions")


def _check_stack_lengths(data: DataConfig, model: Seq2SeqConfig, fixed_by: str | None) -> Iterator[Problem]:
    of_target = "data.context" if data.examples is None else "data.examples.target_context"
    asked = (("encoder", "data.context", data.context), ("decoder", of_target, target_context(data, model)))
    for name, key, length in asked:
        rows, limit = getattr(model, name).max_positions, f"model.{name}.max_positions"
        advice = f"{limit}={rows} learned positions; raise it or lower this"
        if fixed_by is not None:
            advice = f"the {rows} learned positions of the {name} of {fixed_by}; lower it"
        if length > rows:
            yield _problem((key, length), f"is longer than {advice}", limit)


def check_trainer(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    world = trainer.devices * trainer.nodes
    per_pass = trainer.micro_batch * world
    if trainer.global_batch % per_pass:
        devices = f" × {world} devices" if world > 1 else ""
        yield _problem(
            ("trainer.global_batch", trainer.global_batch),
            f"is not a multiple of trainer.micro_batch={trainer.micro_batch}{devices}; "
            f"{_multiples(trainer.global_batch, per_pass)} would be",
            "trainer.micro_batch",
            "trainer.devices",
            "trainer.nodes",
        )
    if trainer.strategy == "fsdp" and trainer.accelerator == "cpu":
        yield _problem(
            ("trainer.strategy", "fsdp"),
            "shards over GPUs; with trainer.accelerator=cpu use ddp",
            "trainer.accelerator",
        )
    examples = config.data.examples
    own_file = examples is not None and examples.validation_path is not None
    if config.evaluation.enabled and config.data.validation_fraction == 0 and not own_file:
        yield _problem(
            ("data.validation_fraction", 0), "holds nothing out to evaluate on; set evaluation.enabled=false with it"
        )


def check_schedule(config: RunConfig) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.trainer.steps
    warmup, decay = (amount * steps if amount < 1 else amount for amount in (schedule.warmup, schedule.decay))
    for name, amount in (("warmup", schedule.warmup), ("decay", schedule.decay)):
        if amount > 1 and amount != int(amount):
            yield _problem(
                (f"schedule.{name}", amount), "is neither a share of the run (below 1) nor a whole number of steps"
            )
    if warmup >= steps and schedule.warmup >= 1:
        yield _problem(
            ("schedule.warmup", schedule.warmup), f"steps of warm-up fill trainer.steps={steps}", "trainer.steps"
        )
    elif schedule.name == "wsd" and warmup + decay > steps:
        yield _problem(
            ("schedule.decay", schedule.decay),
            f"and schedule.warmup={schedule.warmup} together are longer than trainer.steps={steps}",
            "schedule.warmup",
            "trainer.steps",
        )


def _check_directories(config: RunConfig) -> Iterator[Problem]:
    if config.checkpoint is not None and config.resume is not None:
        yield _problem(
            ("checkpoint", config.checkpoint),
            f"starts anew from weights and resume={config.resume} continues a run; give one of them "
            "(resume=auto alone continues a run that started from weights)",
            "resume",
        )
    if config.resume is not None and config.overwrite:
        yield _problem(
            ("overwrite", True),
            f"would delete the run that resume={config.resume} continues; give one of them",
            "resume",
        )
    if not config.name.strip() or "/" in config.name or config.name in (".", ".."):
        yield _problem(("name", config.name), "names a directory below runs/: no slashes; use output= for a path")


def _problem(culprit: tuple[str, object], rest: str, *others: str) -> Problem:
    key, value = culprit
    return Problem((key, *others), f"{assignment(key, value)}: {rest}")


def _multiples(batch: int, of: int) -> str:
    below = batch // of * of
    return f"{below} or {below + of}" if below else str(of)
