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
from .conditional import Conditional, Generative, Unread
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
from .sampling import Sampling, choose, demanded, log_probabilities, no_numbers, seen_tokens, sequence_seeds, unusable
from .seq2seq import Seq2Seq
from .step import DecodeStep, Steps, records


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
    steps: Steps = "auto",
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
    reader, prompts, sampling = _ready(model, from_rows(tokens_BT, prompt_mask_BT), sampling, flags_BT)
    before_BT = prompts.tokens_BT if isinstance(reader, Unread | Conditional) else tokens_BT
    if num_beams > 1:
        if on_token is not None:
            raise ValueError(f"num_beams={num_beams} with on_token: a beam search knows its tokens only at the end")
        _check_beam_steps(sampling, steps)
        best = [hypotheses[0].tokens for hypotheses in search(reader, prompts, sampling, cache=cache, storage=storage)]
        rows = [[*tokens, *[pad_token] * (max_new_tokens - len(tokens))] for tokens in best]
        return torch.cat([before_BT, torch.tensor(rows, dtype=torch.int64, device=before_BT.device)], dim=1)
    columns = [before_BT]
    for token_B, _ in _begun(reader, prompts, sampling, cache, storage, steps):
        if on_token is not None:
            on_token(token_B)
        columns.append(token_B[:, None])
    out_BT = torch.cat(columns, dim=1)
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
    steps: Steps = "auto",
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
    steps               auto, plain, recorded (a CUDA graph, replayed for each token) or compiled (the same, its kernels
                        fused by torch.compile, which takes long); auto: recorded where that can be and pays

    The model runs in evaluation mode and without gradients, and is left as it was.
    Raises ValueError, before any work is done, for an empty prompt, token ids outside the vocabulary, impossible
    settings, more tokens than a learned position table has rows, a cache that does not fit into memory, and steps that
    cannot be recorded.
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
    reader, prompts, sampling = _ready(model, from_rows(tokens_BT, prompt_mask_BT), sampling, flags_BT)
    return (token_B for token_B, _ in _begun(reader, prompts, sampling, cache, storage, steps))


def complete(
    model: Generative | Seq2Seq,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokenizer: TextTokenizer | None = None,
    stop_strings: Sequence[str] = (),
    global_positions: Sequence[int] = (),
    cache: CacheKind = "auto",
    storage: Storage | None = None,
    on_text: Callable[[int, str], None] | None = None,
    steps: Steps = "auto",
) -> list[Completion]:
    """Continues prompts of any lengths, texts or token ids, as one batch.

    tokenizer          reads texts and writes `Completion.text`
    stop_strings       a prompt whose continuation contains one of these is finished; its text is cut before it
    global_positions   which tokens of every source are global (LED reads summaries off its first one); those behind a
                       source's end are none
    on_text            called with (number of the prompt, further text) as soon as the text is certain; with beams, once
    cache, storage, steps   as in `stream`

    Raises ValueError as `stream` does, and for a tokenizer that has more tokens than the model.
    """
    if tokenizer is not None:
        check_tokenizer(model.config, tokenizer)
    rows = from_sequences(prompts, tokenizer, model.head_weight.device)
    reader, rows, sampling = _ready(model, rows, sampling, _flags_at(global_positions, rows))
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
        _check_beam_steps(sampling, steps)
        for row, hypotheses in enumerate(search(reader, rows, sampling, cache=cache, storage=storage)):
            for token, logprob in zip(hypotheses[0].tokens, hypotheses[0].logprobs):
                push(row, token, logprob)
        return [output.completion() for output in outputs]

    for token_B, logits_BV in _begun(reader, rows, sampling, cache, storage, steps):
        logprob_B = log_probabilities(logits_BV, token_B)
        for row, (token, logprob) in enumerate(zip(token_B.tolist(), logprob_B.tolist())):
            if outputs[row].finish_reason is None:
                push(row, token, logprob)
        if all(output.finish_reason is not None for output in outputs):
            break
    return [output.completion() for output in outputs]


def _begun(
    model: Generative | Unread,
    prompts: Prompts,
    sampling: Sampling,
    cache: CacheKind,
    storage: Storage | None,
    steps: Steps,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`_taken`, once everything that can be refused has been: the cache is there, and steps can be taken as asked."""
    if sampling.max_new_tokens == 0:
        return iter(())
    # The last token is never read back, so it needs no slot.
    length = prompts.longest + sampling.max_new_tokens - 1
    memory = create_cache(model, len(prompts.lengths), length, kind=cache, storage=storage)
    recorded = records(model, steps, paged=isinstance(memory, PagedCache), n_steps=sampling.max_new_tokens)
    reader = model.read() if isinstance(model, Unread) else model
    return _taken(reader, prompts, sampling, memory, recorded=recorded, compiled=steps == "compiled")


def _taken(
    model: Generative,
    prompts: Prompts,
    sampling: Sampling,
    memory: ContiguousCache | PagedCache,
    *,
    recorded: bool,
    compiled: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens [B], the logits [B, V] they were chosen from) of each step, until every row has met a stop token."""
    n_steps, batch = sampling.max_new_tokens, len(prompts.lengths)
    device = model.head_weight.device
    seeds_B = torch.tensor(sequence_seeds(sampling, batch), device=device)
    stops = torch.tensor(sorted(sampling.stop_tokens), device=device) if sampling.stop_tokens else None
    finished_B, broken_B = torch.zeros(2, batch, dtype=torch.bool, device=device)
    penalised = sampling.repetition_penalty != 1.0
    seen_BV = seen_tokens(prompts.tokens_BT, model.config.vocab_size, prompts.real()) if penalised else None

    lengths = prompts.lengths if prompts.ragged else None
    logits_BV = prefill(model, prompts.tokens_BT, memory, chunk=sampling.prefill_chunk, lengths=lengths)
    advance: Callable[[Tensor], Tensor] | None = None
    for step in range(n_steps):
        broken_B = broken_B | unusable(logits_BV)
        # To look is to wait for the device, so that is done where one waits anyway, and now and then.
        if (not logits_BV.is_cuda or stops is not None or step % 16 == 0 or step + 1 == n_steps) and broken_B.any():
            raise no_numbers(int(broken_B.int().argmax()))
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
            advance = _advance(model, memory, recorded=recorded, compiled=compiled)
        logits_BV = advance(token_B)


def _advance(
    model: Generative, cache: ContiguousCache | PagedCache, *, recorded: bool, compiled: bool
) -> Callable[[Tensor], Tensor]:
    """One token of every row -> the next logits."""
    if recorded and isinstance(model, Decoder):
        return DecodeStep(model, cache, compiled=compiled)
    return lambda token_B: prefill(model, token_B[:, None], cache)


def _check_beam_steps(sampling: Sampling, steps: Steps) -> None:
    if steps in ("recorded", "compiled"):
        raise ValueError(
            f"num_beams={sampling.num_beams} with steps={steps!r}: the rows of a beam search change between steps; "
            "steps is auto or plain"
        )


def _ready(
    model: Generative | Seq2Seq, prompts: Prompts, sampling: Sampling, is_global_BT: Tensor | None = None
) -> tuple[Generative | Unread, Prompts, Sampling]:
    """What decoding takes. The prompts of an encoder–decoder are its sources, and it is prompted with start tokens."""
    if is_global_BT is not None and not isinstance(model, Seq2Seq):
        raise ValueError("only sources have global tokens here; leave them out, or generate with an encoder–decoder")
    if not isinstance(model, Seq2Seq):
        sampling = _as_configured(model, prompts, sampling)
        _check(model.config, prompts, sampling)
        return model, prompts, sampling
    sources, batch = prompts, len(prompts.lengths)
    prompts = Prompts(model.start(batch), (1,) * batch)
    _check(model.config.decoder_half, prompts, sampling)
    lengths_B = torch.tensor(sources.lengths, device=sources.tokens_BT.device) if sources.ragged else None
    unread = Unread(model, sources.tokens_BT, lengths_B, is_global_BT)
    return unread, prompts, _as_configured(unread, prompts, sampling)


def _as_configured(model: Generative | Unread, prompts: Prompts, sampling: Sampling) -> Sampling:
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


def _flags_at(positions: Sequence[int], prompts: Prompts) -> Tensor | None:
    """Raises ValueError for a position that no source has."""
    if not positions:
        return None
    wrong = next((position for position in positions if not 0 <= position < prompts.longest), None)
    if wrong is not None:
        raise ValueError(f"global_positions has {wrong}: the longest source has tokens 0 … {prompts.longest - 1}")
    flags_BT = torch.zeros_like(prompts.tokens_BT, dtype=torch.bool)
    flags_BT[:, list(positions)] = True
    return flags_BT & prompts.real()


def _check(config: DecoderConfig, prompts: Prompts, sampling: Sampling) -> None:
    """What the model and the prompt decide; the rest is Sampling's own."""
    check_tokens(config, prompts.tokens_BT)
    check_special(config, sampling)
    check_room(config, prompts.longest, sampling.max_new_tokens)
    if sampling.seeds is not None:
        sequence_seeds(sampling, len(prompts.lengths))
