"""Requests answered: by a decoder in a session, as they come and go; by an encoder–decoder in batches of what is alike.

Legend: B requests of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from .answers import Origin
from .cache_plan import CacheKind, Storage
from .completion import Completion, TextTokenizer
from .generation import complete
from .prompts import check_tokenizer, fitting
from .requests import BadLine, TextRequest
from .sampling import Sampling
from .seq2seq import Seq2Seq
from .session import NoRoom, Request, Session
from .step import Steps

Answer = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How requests are answered.

    origin        with a digest of what each answer was made of
    start_token   what an empty prompt is taken for
    shorten       requests that do not say max_new_tokens end where learned positions do, and are not refused for it
    logprobs      with the new tokens and their log-probabilities
    """

    origin: Origin
    start_token: int
    shorten: bool = False
    logprobs: bool = False


def answer(session: Session, requests: Iterable[TextRequest | BadLine], manner: Manner) -> Iterator[Answer]:
    """The answer to each request, as soon as there is one: line, id, and either text, finish_reason, numbers of tokens
    and digest, or error. Lines are read as the session has room, so there may be any number of them.

    Raises ValueError for a session without a tokenizer.
    """
    if session.tokenizer is None:
        raise ValueError("requests are texts: make the session with a tokenizer")
    running: dict[int, tuple[TextRequest, int]] = {}
    remaining = iter(requests)
    more = True
    while more or running:
        while more and session.unfinished < 2 * session.max_batch:
            request = next(remaining, None)
            if request is None:
                more = False
                break
            if isinstance(request, BadLine):
                yield _failed(request, request.error)
                continue
            tokens = session.tokenizer.encode(request.prompt) or [manner.start_token]
            sampling = request.sampling
            if manner.shorten and not request.own_length:
                fits = fitting(session.model.config, len(tokens), sampling.max_new_tokens)
                sampling = replace(sampling, max_new_tokens=fits)
            try:
                number = session.submit(Request(prompt=tokens, sampling=sampling, stop_strings=request.stop_strings))
            except NoRoom as error:
                yield _failed(request, f"{error.needs}; ask for fewer tokens, or raise max_batch, which sizes the pool")
            except ValueError as error:
                yield _failed(request, str(error))
            else:
                running[number] = request, len(tokens)
        for event in session.step():
            if event.completion is not None:
                request, n_tokens = running.pop(event.request)
                yield _answered_by(request, n_tokens, event.completion, manner)


def answer_sources(
    model: Seq2Seq,
    tokenizer: TextTokenizer,
    requests: Iterable[TextRequest | BadLine],
    manner: Manner,
    *,
    max_batch: int,
    global_positions: Sequence[int] = (),
    cache: CacheKind = "auto",
    storage: Storage | None = None,
    steps: Steps = "auto",
) -> Iterator[Answer]:
    """As `answer`, of an encoder–decoder: the prompts are sources. Of `max_batch` lines at a time, those with the same
    settings are one batch; each has the text that it would have alone.

    global_positions   as in `complete`
    """
    check_tokenizer(model.config, tokenizer)

    def completions(
        sampling: Sampling, stops: tuple[str, ...], batch: Sequence[tuple[TextRequest, list[int]]]
    ) -> list[Completion]:
        return complete(
            model,
            [tokens for _, tokens in batch],
            replace(sampling, seeds=tuple(request.sampling.seed or 0 for request, _ in batch)),
            tokenizer=tokenizer,
            stop_strings=stops,
            global_positions=global_positions,
            cache=cache,
            storage=storage,
            steps=steps,
        )

    remaining = iter(requests)
    while lines := list(islice(remaining, max_batch)):
        alike: dict[tuple[Sampling, tuple[str, ...]], list[tuple[TextRequest, list[int]]]] = {}
        for request in lines:
            if isinstance(request, BadLine):
                yield _failed(request, request.error)
                continue
            tokens = tokenizer.encode(request.prompt) or [manner.start_token]
            sampling = request.sampling
            if manner.shorten and not request.own_length:
                fits = fitting(model.config.decoder_half, 1, sampling.max_new_tokens)
                sampling = replace(sampling, max_new_tokens=fits)
            shared = replace(sampling, seed=None)
            alike.setdefault((shared, request.stop_strings), []).append((request, tokens))

        for (sampling, stops), batch in alike.items():
            try:
                found = completions(sampling, stops, batch)
            except ValueError:  # of one of them, or of all together: each answers for itself
                for each in batch:
                    try:
                        (completion,) = completions(sampling, stops, [each])
                    except ValueError as error:
                        yield _failed(each[0], str(error))
                    else:
                        yield _answered_by(each[0], len(each[1]), completion, manner)
            else:
                for (request, tokens), completion in zip(batch, found, strict=True):
                    yield _answered_by(request, len(tokens), completion, manner)


def _answered_by(request: TextRequest, prompt_tokens: int, completion: Completion, manner: Manner) -> Answer:
    fields: Answer = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(completion.tokens),
    }
    if manner.logprobs:
        fields |= {"tokens": completion.tokens, "logprobs": [round(each, 6) for each in completion.logprobs]}
    return _named(request, {**fields, "digest": manner.origin.digest(request)})


def _failed(request: TextRequest | BadLine, error: str) -> Answer:
    return _named(request, {"error": error})


def _named(request: TextRequest | BadLine, fields: Mapping[str, object]) -> Answer:
    name = {} if request.id is None else {"id": request.id}
    return {"line": request.line, **name, **fields}
