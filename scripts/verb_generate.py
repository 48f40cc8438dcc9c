"""`longspan generate`: a prompt and its continuation, or a source and its target, written as it is generated; or a file
of requests, several of them answered at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from longspan.data.tokenizer import StreamDecoder, Tokenizer
from longspan.model.answering import Answer, Manner, answer, answer_sources
from longspan.model.answers import Answers, Origin, as_line
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.model.checkpoint_files import CheckpointError, fingerprint, load_config
from longspan.model.completion import Completion
from longspan.model.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.generation import complete
from longspan.model.prompts import check_tokenizer, fitting
from longspan.model.requests import BadLine, TextRequest, read_requests
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq
from longspan.model.session import Session
from longspan.training.config_plain import plain
from longspan.training.errors import RunFailed, UserError
from longspan.training.held_out import imported
from longspan.training.precision import choose_device, inference_precision
from longspan.training.schema import DEFAULT_NEW_TOKENS, GenerateConfig

from .output import as_yaml, progress_bars, table

_SECONDS = 5.0  # between lines about progress, where there is no terminal


def run(config: GenerateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    if config.requests is not None:
        return _answer_requests(config, config.requests)
    prompt = _prompt(config)
    checkpoint = _checkpoint(config)
    model = _loaded(config, checkpoint)
    tokenizer, reader = checkpoint.tokenizer, checkpoint.reader
    tokens = reader.encode(prompt) or [tokenizer.eos_id]  # an empty prompt: the start of a document
    writes_on = isinstance(model, Decoder)
    new_tokens = config.max_new_tokens or _fitting(model, len(tokens))
    unshown = [prompt] if writes_on else []  # until the first new text: a request that is refused prints nothing

    def show(_row: int, text: str) -> None:
        print("".join(unshown) + text, end="", flush=True)
        unshown.clear()

    (completion,) = complete(
        model,
        [tokens],
        _sampling(config, tokenizer, new_tokens),
        tokenizer=tokenizer,
        stop_strings=config.stop_strings,
        global_positions=checkpoint.global_positions,
        cache=config.cache,
        storage=config.storage,
        on_text=show,
        steps=config.steps,
    )
    print("".join(unshown))
    if config.logprobs:
        print("\n" + _logprobs(completion, tokenizer))
    return 0


# -- what is asked of which model --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Framed:
    """A tokenizer that puts tokens around every text it reads, as encoders have seen their texts."""

    tokenizer: Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        return [*self.before, *self.tokenizer.encode(text), *self.after]

    def stream(self) -> StreamDecoder:
        return self.tokenizer.stream()


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint that generates, before its weights are loaded.

    reader             the tokenizer, as it reads prompts or sources
    global_positions   tokens of a source that are global
    """

    directory: Path
    config: DecoderConfig | Seq2SeqConfig
    tokenizer: Tokenizer
    reader: Tokenizer | _Framed
    global_positions: tuple[int, ...] = ()


def _checkpoint(config: GenerateConfig) -> _Checkpoint:
    """Raises CheckpointError for an encoder, UserError for global positions without global attention."""
    directory = resolve_checkpoint(config.checkpoint)
    model = load_config(directory)
    if isinstance(model, EncoderConfig):
        raise CheckpointError(
            f"{directory} holds an encoder, which fills in masked tokens and continues no text; generate takes "
            "decoders and encoder–decoders"
        )
    tokenizer = Tokenizer.load(directory)
    check_tokenizer(model, tokenizer)
    if isinstance(model, DecoderConfig):
        if config.global_positions:
            raise UserError(
                f"global_positions={list(config.global_positions)}: {config.checkpoint} is a decoder, whose prompts "
                "have no global tokens; leave it out"
            )
        return _Checkpoint(directory, model, tokenizer, tokenizer.starting() if imported(directory) else tokenizer)
    specs = model.encoder_half.attention.specs().values()
    has_globals = any(spec.global_tokens for of_pattern in specs for spec in of_pattern)
    if config.global_positions and not has_globals:
        raise UserError(
            f"global_positions={list(config.global_positions)}: the encoder of {config.checkpoint} has no global "
            "attention; leave it out"
        )
    positions = ((0,) if has_globals else ()) if config.global_positions is None else config.global_positions
    frame = tokenizer.frame  # training puts it around every source, too
    return _Checkpoint(directory, model, tokenizer, _Framed(tokenizer, frame.before, frame.after), positions)


def _loaded(config: GenerateConfig, checkpoint: _Checkpoint) -> Decoder | Seq2Seq:
    device, dtype = _arithmetic(config)
    model = load_model(checkpoint.directory, device=device, dtype=dtype)
    if isinstance(model, Encoder):
        raise CheckpointError(f"{checkpoint.directory} holds an encoder; generate takes decoders and encoder–decoders")
    return model


def _arithmetic(config: GenerateConfig) -> tuple[torch.device, torch.dtype]:
    device = choose_device(config.accelerator, key="accelerator")
    return device, torch.bfloat16 if inference_precision(config.precision, device) == "bf16" else torch.float32


def _fitting(model: Decoder | Seq2Seq, prompt: int) -> int:
    if isinstance(model, Decoder):
        return fitting(model.config, prompt, DEFAULT_NEW_TOKENS)
    return fitting(model.config.decoder_half, 1, DEFAULT_NEW_TOKENS)  # a target begins with one token


def _sampling(config: GenerateConfig, tokenizer: Tokenizer, new_tokens: int) -> Sampling:
    return Sampling(
        max_new_tokens=new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        stop_tokens=frozenset({tokenizer.eos_id} if config.stop else ()),
        pad_token=tokenizer.eos_id,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
    )


def _prompt(config: GenerateConfig) -> str:
    if config.file is None:
        return config.prompt or ""
    content = sys.stdin.buffer.read() if config.file == "-" else Path(config.file).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"file={config.file}: is not UTF-8 text (byte {error.start})") from None


def _logprobs(completion: Completion, tokenizer: Tokenizer) -> str:
    shown = [
        json.dumps(tokenizer.decode([token], skip_special=False), ensure_ascii=False) for token in completion.tokens
    ]
    numbers = [f"{logprob:.4f}" for logprob in completion.logprobs]
    return table(("token", "log-probability"), list(zip(shown, numbers)))


# -- requests ----------------------------------------------------------------------------------------------------------


def _answer_requests(config: GenerateConfig, source: str) -> int:
    """Raises RunFailed, once all are answered, when some answers are errors."""
    failed: list[str] = []
    with ExitStack() as stack:
        lines = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))
        checkpoint = _checkpoint(config)
        manner = _manner(config, checkpoint)

        def requests() -> Iterator[TextRequest | BadLine]:
            defaults = _sampling(config, checkpoint.tokenizer, config.max_new_tokens or DEFAULT_NEW_TOKENS)
            return read_requests(lines, defaults, stop_strings=config.stop_strings)

        total = None if source == "-" else _count(lines)
        answers = None
        if config.output is not None:
            answers = Answers(config.output, manner.origin, None if source == "-" else requests())
        if source != "-":
            lines.seek(0)
        unanswered = (request for request in requests() if answers is None or not answers.has(request))
        found = _answers(config, checkpoint, unanswered, manner)
        if answers is not None:
            stack.enter_context(answers)
        advance = stack.enter_context(_progress(total, 0 if answers is None else len(answers)))
        for each in found:
            if answers is None:
                sys.stdout.buffer.write(as_line(each))
                sys.stdout.buffer.flush()
            else:
                answers.write(each)
            if "error" in each:
                failed.append(f"line {each['line']}: {each['error']}")
            advance(len(failed))
    if failed:
        raise RunFailed(f"requests={source}: {len(failed)} answered by an error; the first is {failed[0]}")
    return 0


def _manner(config: GenerateConfig, checkpoint: _Checkpoint) -> Manner:
    _, dtype = _arithmetic(config)
    settings = {
        "dtype": str(dtype),
        "storage": config.storage,
        "shorten": config.max_new_tokens is None,
        "logprobs": config.logprobs,
        "global_positions": checkpoint.global_positions,
    }
    return Manner(
        origin=Origin(checkpoint=fingerprint(checkpoint.directory), settings=settings),
        start_token=checkpoint.tokenizer.eos_id,
        shorten=config.max_new_tokens is None,
        logprobs=config.logprobs,
    )


def _answers(
    config: GenerateConfig, checkpoint: _Checkpoint, requests: Iterable[TextRequest | BadLine], manner: Manner
) -> Iterator[Answer]:
    model = _loaded(config, checkpoint)
    if isinstance(model, Decoder):
        session = Session(
            model,
            max_batch=config.max_batch,
            tokenizer=checkpoint.reader,
            storage=config.storage,
            steps=config.steps,
        )
        return answer(session, requests, manner)
    return answer_sources(
        model,
        checkpoint.reader,
        requests,
        manner,
        max_batch=config.max_batch,
        global_positions=checkpoint.global_positions,
        cache=config.cache,
        storage=config.storage,
        steps=config.steps,
    )


def _count(lines: BinaryIO) -> int:
    n = sum(1 for line in lines if line.strip())
    lines.seek(0)
    return n


@contextmanager
def _progress(total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of errors so far, after each answer: it moves a bar on a terminal, and writes
    a line now and then elsewhere."""
    answered, errors, said = done, 0, time.monotonic()
    of = "" if total is None else f" of {total}"

    def say() -> None:
        wrong = f", {errors} by an error" if errors else ""
        print(f"longspan generate: {answered}{of} requests answered{wrong}", file=sys.stderr, flush=True)

    with progress_bars() as bars:
        bar = bars.add_task("requests", total=total, completed=done)

        def advance(n_errors: int) -> None:
            nonlocal answered, errors, said
            answered, errors = answered + 1, n_errors
            bars.update(bar, completed=answered)
            if bars.disable and time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                say()

        yield advance
    if done:
        print(f"longspan generate: {done} had been answered before", file=sys.stderr)
    say()
