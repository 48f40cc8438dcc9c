"""Text from a decoder: one prefill (whole or in chunks), then a token at a time through the same modules and a cache.
Of an encoder–decoder the prompts are sources, read once, and the text is a target from its start token on.

    generate   tokens in, tokens out
    stream     the new tokens of each step
    complete   prompts in, `Completion`s out: with log-probabilities, reasons, and text up to a stop string

Legend: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .beam import search
from .cache import ContiguousCache, create_cache
from .cache_plan import CacheKind, Storage
from .completion import Completion, Output, TextTokenizer
from .conditional import Conditional, Generative, condition
from .config import DecoderConfig
from .decoder import Decoder
from .paging import PagedCache
from .prompts import (
    Prompts,
    check_room,
    check_special,
    check_tokenizer,
    check_tokens,
    from_rows,
    from_sequences,
    prefill,
)
from .sampling import Sampling, choose, demanded, log_probabilities, seen_tokens, sequence_seeds
from .seq2seq import Seq2Seq
from .step import DecodeStep, recordable

_WORTH_RECORDING = 8  # tokens: recording takes about as long as a few steps


def generate(
    model: Generative | Seq2Seq,
    tokens_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Collection[int] | None = None,
    pad_token: int = 0,
    prompt_mask_BT: Tensor | None = None,
    is_global_BT: Tensor | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    cache: CacheKind = "auto",
    storage: Storage | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Prompt and continuation, [B, T + max_new_tokens] int64; of an encoder–decoder, start token and target,
    [B, 1 + max_new_tokens]. Arguments as in `stream`; rows that stop early (or all at once) are padded with
    `pad_token`.

    on_token                    called with each step's tokens [B]
    num_beams, length_penalty   above 1: the best of a beam search (`beam.search`), which draws nothing: temperature=0
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        seeds=None if seeds is None else tuple(seeds),
        stop_tokens=frozenset(stop_tokens or ()),
        pad_token=pad_token,
        prefill_chunk=prefill_chunk,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    flags_BT = _flags(is_global_BT, tokens_BT, prompt_mask_BT)
    model, prompts, sampling = _ready(model, from_rows(tokens_BT, prompt_mask_BT), sampling, flags_BT)
    before_BT = prompts.tokens_BT if isinstance(model, Conditional) else tokens_BT
    if num_beams > 1:
        if on_token is not None:
            raise ValueError(f"num_beams={num_beams} with on_token: a beam search knows its tokens only at the end")
        best = [hypotheses[0].tokens for hypotheses in search(model, prompts, sampling, cache=cache, storage=storage)]
        rows = [[*tokens, *[pad_token] * (max_new_tokens - len(tokens))] for tokens in best]
        return torch.cat([before_BT, torch.tensor(rows, dtype=torch.int64, device=before_BT.device)], dim=1)
    steps = [before_BT]
    for token_B, _ in _steps(model, prompts, sampling, cache, storage):
        if on_token is not None:
            on_token(token_B)
        steps.append(token_B[:, None])
    out_BT = torch.cat(steps, dim=1)
    missing = before_BT.shape[1] + max_new_tokens - out_BT.shape[1]
    return torch.nn.functional.pad(out_BT, (0, missing), value=pad_token)


def stream(
    model: Generative | Seq2Seq,
    tokens_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Collection[int] | None = None,
    pad_token: int = 0,
    prompt_mask_BT: Tensor | None = None,
    is_global_BT: Tensor | None = None,
    cache: CacheKind = "auto",
    storage: Storage | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yields the new tokens of each step, [B] int64; ends early once every row has stopped.

    tokens_BT           prompts, each read as one document; of an encoder–decoder, sources
    prompt_mask_BT      bool [B, T], True for tokens; prompts of different lengths are padded on either side, and each
                        is continued as if it were alone
    is_global_BT        bool [B, T], which tokens of sources are global; None: none is
    temperature, top_k, top_p, min_p, repetition_penalty, prefill_chunk   see `Sampling`
    seed, seeds         a number for the batch, of which row 0 has itself and the others numbers made of it, or one for
                        each row; what a row draws is a function of its seed and the step, on every device, in every
                        batch. None: drawn from torch's generator
    stop_tokens         a row that emits one of these is finished and yields `pad_token` from then on
    cache, storage      where and how keys and values are kept: `create_cache`

    The model runs in evaluation mode and without gradients, and is left as it was.
    Raises ValueError, before any work is done, for an empty prompt, token ids outside the vocabulary, impossible
    settings, more tokens than a learned position table has rows, and a cache that does not fit into memory.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        seeds=None if seeds is None else tuple(seeds),
        stop_tokens=frozenset(stop_tokens or ()),
        pad_token=pad_token,
        prefill_chunk=prefill_chunk,
    )
    flags_BT = _flags(is_global_BT, tokens_BT, prompt_mask_BT)
    model, prompts, sampling = _ready(model, from_rows(tokens_BT, prompt_mask_BT), sampling, flags_BT)
    return (token_B for token_B, _ in _steps(model, prompts, sampling, cache, storage))


def complete(
    model: Generative | Seq2Seq,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokenizer: TextTokenizer | None = None,
    stop_strings: Sequence[str] = (),
    cache: CacheKind = "auto",
    storage: Storage | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Continues prompts of any lengths, texts or token ids, as one batch.

    tokenizer      reads texts and writes `Completion.text`
    stop_strings   a prompt whose continuation contains one of these is finished; its text is cut before it
    on_text        called with (number of the prompt, further text) as soon as the text is certain; with beams, once

    Raises ValueError as `stream` does, and for a tokenizer that has more tokens than the model.
    """
    if tokenizer is not None:
        check_tokenizer(model.config, tokenizer)
    rows = from_sequences(prompts, tokenizer, model.head_weight.device)
    model, rows, sampling = _ready(model, rows, sampling)
    outputs = [
        Output(
            max_new_tokens=sampling.max_new_tokens,
            stop_tokens=sampling.stop_tokens,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
        )
        for _ in rows.lengths
    ]

    def push(row: int, token: int, logprob: float) -> None:
        text = outputs[row].push(token, logprob)
        if text and on_text is not None:
            on_text(row, text)

    if sampling.num_beams > 1:
        if stop_strings:
            raise ValueError(
                f"num_beams={sampling.num_beams} with stop_strings: beams compare tokens and know no text; "
                "use stop_tokens, or num_beams=1"
            )
        for row, hypotheses in enumerate(search(model, rows, sampling, cache=cache, storage=storage)):
            for token, logprob in zip(hypotheses[0].tokens, hypotheses[0].logprobs):
                push(row, token, logprob)
        return [output.completion() for output in outputs]

    for token_B, logits_BV in _steps(model, rows, sampling, cache, storage):
        logprob_B = log_probabilities(logits_BV, token_B)
        for row, (token, logprob) in enumerate(zip(token_B.tolist(), logprob_B.tolist())):
            if outputs[row].finish_reason is None:
                push(row, token, logprob)
        if all(output.finish_reason is not None for output in outputs):
            break
    return [output.completion() for output in outputs]


def _steps(
    model: Generative, prompts: Prompts, sampling: Sampling, cache: CacheKind, storage: Storage | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [B], the logits [B, V] they were chosen from) of each step, until every row has met a stop token."""
    n_steps, batch = sampling.max_new_tokens, len(prompts.lengths)
    if n_steps == 0:
        return
    device = model.head_weight.device
    # The last token is never read back, so it needs no slot.
    memory = create_cache(model, batch, prompts.longest + n_steps - 1, kind=cache, storage=storage)
    seeds_B = torch.tensor(sequence_seeds(sampling, batch), device=device)
    stops = torch.tensor(sorted(sampling.stop_tokens), device=device) if sampling.stop_tokens else None
    finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
    penalised = sampling.repetition_penalty != 1.0
    seen_BV = seen_tokens(prompts.tokens_BT, model.config.vocab_size, prompts.real()) if penalised else None

    lengths = prompts.lengths if prompts.ragged else None
    logits_BV = prefill(model, prompts.tokens_BT, memory, chunk=sampling.prefill_chunk, lengths=lengths)
    advance: Callable[[Tensor], Tensor] | None = None
    for step in range(n_steps):
        logits_BV = demanded(logits_BV, sampling, step)
        token_B = choose(logits_BV, sampling, seeds_B=seeds_B, step=step, seen_BV=seen_BV)
        if stops is not None:
            token_B = token_B.masked_fill(finished_B, sampling.pad_token)
            finished_B = finished_B | torch.isin(token_B, stops)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)
        yield token_B, logits_BV
        if step + 1 == n_steps or (stops is not None and bool(finished_B.all())):
            return
        if advance is None:
            advance = _advance(model, memory, n_steps)
        logits_BV = advance(token_B)


def _advance(model: Generative, cache: ContiguousCache | PagedCache, n_steps: int) -> Callable[[Tensor], Tensor]:
    """One token of every row -> the next logits; recorded as a CUDA graph where that can be and pays."""
    if n_steps > _WORTH_RECORDING and isinstance(model, Decoder) and recordable(model, cache):
        return DecodeStep(model, cache)
    return lambda token_B: prefill(model, token_B[:, None], cache)


def _ready(
    model: Generative | Seq2Seq, prompts: Prompts, sampling: Sampling, is_global_BT: Tensor | None = None
) -> tuple[Generative, Prompts, Sampling]:
    """What decoding takes. The prompts of an encoder–decoder are its sources: it reads them, and is prompted with start
    tokens."""
    if is_global_BT is not None and not isinstance(model, Seq2Seq):
        raise ValueError("is_global_BT: only sources have global tokens here; generate with an encoder–decoder")
    if not isinstance(model, Seq2Seq):
        sampling = _as_configured(model, prompts, sampling)
        _check(model.config, prompts, sampling)
        return model, prompts, sampling
    sources, batch = prompts, len(prompts.lengths)
    prompts = Prompts(model.start(batch), (1,) * batch)
    _check(model.config.decoder_half, prompts, sampling)
    lengths_B = torch.tensor(sources.lengths, device=sources.tokens_BT.device) if sources.ragged else None
    bound = condition(model, sources.tokens_BT, lengths_B=lengths_B, is_global_BS=is_global_BT)
    return bound, prompts, _as_configured(bound, prompts, sampling)


def _as_configured(model: Generative, prompts: Prompts, sampling: Sampling) -> Sampling:
    """The settings, with the tokens that an encoder–decoder begins and ends its targets with."""
    if isinstance(model, Decoder):
        return sampling
    config = model.model.config
    first = config.forced_bos_token if prompts.longest == 1 else None
    return replace(
        sampling,
        first_token=first if sampling.first_token is None else sampling.first_token,
        last_token=config.forced_eos_token if sampling.last_token is None else sampling.last_token,
    )


def _flags(is_global_BT: Tensor | None, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor | None:
    """Flags moved as `from_rows` moves the tokens."""
    if is_global_BT is None:
        return None
    if is_global_BT.shape != tokens_BT.shape or is_global_BT.dtype != torch.bool:
        raise ValueError(
            f"is_global_BT is {is_global_BT.dtype} of shape {tuple(is_global_BT.shape)}; it is bool of the tokens' "
            f"shape {tuple(tokens_BT.shape)}"
        )
    return from_rows(is_global_BT.long(), mask_BT).tokens_BT.bool()


def _check(config: DecoderConfig, prompts: Prompts, sampling: Sampling) -> None:
    """What the model and the prompt decide; the rest is Sampling's own."""
    check_tokens(config, prompts.tokens_BT)
    check_special(config, sampling)
    check_room(config, prompts.longest, sampling.max_new_tokens)
    if sampling.seeds is not None:
        sequence_seeds(sampling, len(prompts.lengths))
