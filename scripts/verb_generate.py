"""`longspan generate`: a prompt and its continuation, written as it is generated; or a file of requests, several of
them answered at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import load_decoder, load_decoder_config, resolve_checkpoint
from longspan.model.completion import Completion
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.prompts import check_tokenizer, fitting
from longspan.model.requests import Answers, answer, as_line, read_requests
from longspan.model.sampling import Sampling
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
    model, tokenizer = _load(config)
    tokens = tokenizer.encode(prompt) or [tokenizer.eos_id]  # an empty prompt: the start of a document
    new_tokens = config.max_new_tokens or fitting(model.config, len(tokens), DEFAULT_NEW_TOKENS)
    unshown = [prompt]  # until the first new text: a request that is refused prints nothing

    def show(_row: int, text: str) -> None:
        print("".join(unshown) + text, end="", flush=True)
        unshown.clear()

    (completion,) = complete(
        model,
        [tokens],
        _sampling(config, tokenizer, new_tokens),
        tokenizer=tokenizer,
        stop_strings=config.stop_strings,
        cache=config.cache,
        storage=config.storage,
        on_text=show,
    )
    print("".join(unshown))
    if config.logprobs:
        print("\n" + _logprobs(completion, tokenizer))
    return 0


def _load(config: GenerateConfig) -> tuple[Decoder, Tokenizer]:
    device = choose_device(config.accelerator, key="accelerator")
    checkpoint = resolve_checkpoint(config.checkpoint)
    model_config = load_decoder_config(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)
    if imported(checkpoint):
        tokenizer = tokenizer.starting()
    check_tokenizer(model_config, tokenizer)
    dtype = torch.bfloat16 if inference_precision(config.precision, device) == "bf16" else torch.float32
    return load_decoder(checkpoint, device=device, dtype=dtype), tokenizer


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
        answers = None if config.output is None else stack.enter_context(Answers(config.output))
        model, tokenizer = _load(config)
        session = Session(model, max_batch=config.max_batch, tokenizer=tokenizer, storage=config.storage)
        done = frozenset() if answers is None else answers.answered
        requests = read_requests(
            lines,
            _sampling(config, tokenizer, config.max_new_tokens or DEFAULT_NEW_TOKENS),
            stop_strings=config.stop_strings,
        )
        advance = stack.enter_context(_progress(None if source == "-" else _count(lines), len(done)))
        for each in answer(
            session,
            (request for request in requests if request.key not in done),
            start_token=tokenizer.eos_id,
            shorten=config.max_new_tokens is None,
            logprobs=config.logprobs,
        ):
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
