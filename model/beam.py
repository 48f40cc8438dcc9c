"""Beam search: the search itself, which asks for nothing but logits, and its run on a decoder over forked pages.

Legend: B prompts, N running hypotheses of all prompts together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache_plan import CacheKind, Storage, pages_for
from .conditional import Conditional, Generative, Unread
from .paging import PagedCache, PagePool
from .prompts import Prompts, prefill
from .sampling import Sampling, demanded, no_numbers

# (hypothesis that each new one continues, its next token) -> logits after those tokens, [N, V].
Advance = Callable[[Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A continuation. `score` is the sum of `logprobs` / length ** length_penalty, the stop token counted in both."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    stopped: bool


@dataclass(slots=True)
class _Beam:
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


@dataclass(slots=True)
class _Prompt:
    """The search of one prompt. `running` stand side by side in the rows `advance` was last called with."""

    running: list[_Beam] = field(default_factory=lambda: [_Beam()])
    finished: list[Hypothesis] = field(default_factory=list)


def beam_search(
    logits_BV: Tensor,
    advance: Advance,
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    length_penalty: float = 1.0,
) -> list[list[Hypothesis]]:
    """For each prompt its `num_beams` best hypotheses found, best first.

    logits_BV   after each prompt
    advance     called with all running hypotheses, those of one prompt adjacent; a prompt whose search is over has none

    Each step ranks every continuation of every running hypothesis by its log-probability. Those of the first
    `num_beams` that end in a stop token are finished; the first `num_beams` that do not run on. Finished hypotheses
    compare by log-probability / length ** length_penalty, as Hugging Face's do (Wu et al. 2016, arXiv 1609.08144,
    eq. 14 divides by ((5 + length) / 6) ** alpha instead). A prompt's search ends when `num_beams` are finished and
    nothing that runs could still beat the worst of them at any length, so no later step would change the result.
    """
    if max_new_tokens == 0:
        return [[Hypothesis((), (), 0.0, False)] for _ in logits_BV]
    prompts = [_Prompt() for _ in range(logits_BV.shape[0])]
    for length in range(1, max_new_tokens + 1):
        parents: list[int] = []
        row = 0
        for prompt, candidates in zip(prompts, _candidates(logits_BV, prompts, num_beams, len(stop_tokens))):
            first, before = row, prompt.running
            row += len(before)
            prompt.running = []
            for rank, (beam, token, logprob) in enumerate(candidates):
                parent = before[beam]
                grown = _Beam((*parent.tokens, token), (*parent.logprobs, logprob), parent.total + logprob)
                stopped = token in stop_tokens
                if rank < num_beams and (stopped or length == max_new_tokens):
                    score = grown.total / length**length_penalty
                    prompt.finished.append(Hypothesis(grown.tokens, grown.logprobs, score, stopped))
                if not stopped and length < max_new_tokens and len(prompt.running) < num_beams:
                    prompt.running.append(grown)
                    parents.append(first + beam)
            prompt.finished = sorted(prompt.finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]
            if len(prompt.finished) == num_beams and prompt.running:
                best = max(beam.total for beam in prompt.running)
                reached = max_new_tokens if length_penalty > 0 else length
                if best / reached**length_penalty <= prompt.finished[-1].score:
                    del parents[len(parents) - len(prompt.running) :]
                    prompt.running = []
        if not parents:
            break
        logits_BV = advance(parents, [beam.tokens[-1] for prompt in prompts for beam in prompt.running])
    return [prompt.finished for prompt in prompts]


def _candidates(
    logits_NV: Tensor, prompts: Sequence[_Prompt], num_beams: int, n_stops: int
) -> list[list[tuple[int, int, float]]]:
    """For each prompt (hypothesis within it, token, log-probability), best first: so many that `num_beams` go on even
    if every hypothesis could stop."""
    vocab_size = logits_NV.shape[-1]
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    picked: list[Tensor] = []
    row = 0
    for prompt in prompts:
        beams = len(prompt.running)
        own_nV = logprobs_NV[row : row + beams]
        row += beams
        totals_n = torch.tensor([beam.total for beam in prompt.running], dtype=torch.float64, device=own_nV.device)
        ranked_nV = (own_nV.double() + totals_n[:, None]).flatten()
        places = ranked_nV.topk(min(num_beams * (1 + max(1, n_stops)), ranked_nV.numel())).indices
        picked.append(torch.stack([places.double(), own_nV.flatten()[places].double()]))
    lists = torch.cat(picked, dim=1).tolist()  # the one wait for the device in a step
    if any(map(math.isnan, lists[1])):
        raise no_numbers()
    found: list[list[tuple[int, int, float]]] = []
    start = 0
    for own in picked:
        end = start + own.shape[1]
        pairs = zip(lists[0][start:end], lists[1][start:end])
        found.append([(*divmod(int(place), vocab_size), logprob) for place, logprob in pairs])
        start = end
    return found


# -- on a decoder ------------------------------------------------------------------------------------------------------


def search(
    model: Generative | Unread,
    prompts: Prompts,
    sampling: Sampling,
    *,
    cache: CacheKind = "auto",
    storage: Storage | None = None,
) -> list[list[Hypothesis]]:
    """`beam_search` of each prompt. Hypotheses are forks of their prompt's pages: to follow another one is to share its
    pages, and keys and values are copied only where two of them write to one page.

    Raises ValueError for cache="contiguous", whose rows cannot share, and for a cache that does not fit into memory.
    """
    if cache == "contiguous":
        raise ValueError(
            f"num_beams={sampling.num_beams} with cache='contiguous': hypotheses share pages; cache is auto or paged"
        )
    weight = model.head_weight
    length = prompts.longest + max(sampling.max_new_tokens - 1, 0)
    pool = PagePool(
        model.config,
        sum(_pages(prompt, length, sampling.num_beams) for prompt in prompts.lengths),
        _PAGE_SIZE,
        dtype=weight.dtype,
        device=weight.device,
        storage=storage,
    )
    if isinstance(model, Unread):
        model = model.read()
    sequences = [pool.open() for _ in prompts.lengths]
    held: PagedCache = pool.cache(sequences, length=length)
    lengths = prompts.lengths if prompts.ragged else None
    logits_BV = prefill(model, prompts.tokens_BT, held, chunk=sampling.prefill_chunk, lengths=lengths)
    prompt_of, step = list(range(len(prompts.lengths))), 0

    def advance(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        nonlocal held, prompt_of, step
        prompt_of, step = [prompt_of[parent] for parent in parents], step + 1
        reader = model.for_rows(prompt_of) if isinstance(model, Conditional) else model
        before = held.sequences
        forks = [before[parent].fork() for parent in parents]
        if len(forks) == len(before):
            held.hold(forks)
        else:
            held = pool.cache(forks, length=length)
        for sequence in before:
            sequence.free()
        logits_NV = prefill(reader, torch.tensor(tokens, device=weight.device)[:, None], held)
        return demanded(logits_NV, sampling, step)

    return beam_search(
        demanded(logits_BV, sampling, 0),
        advance,
        num_beams=sampling.num_beams,
        max_new_tokens=sampling.max_new_tokens,
        stop_tokens=sampling.stop_tokens,
        length_penalty=sampling.length_penalty,
    )


_PAGE_SIZE = 16


def _pages(prompt: int, length: int, num_beams: int) -> int:
    """Full pages of the prompt are everybody's; in the worst case nothing behind them is shared."""
    shared = prompt // _PAGE_SIZE
    return shared + num_beams * (pages_for(length, _PAGE_SIZE) - shared)
