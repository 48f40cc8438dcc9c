"""Text from a decoder: one prefill (whole or in chunks), then a token at a time through the same modules and a cache.

Legend: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.attention.caching import KeyValueCache

from .cache import create_cache
from .decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a prompt is continued; `stream` explains the settings. Raises ValueError for impossible ones."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    pad_token: int = 0
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: a count is 0 or more")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: 0 is greedy, above it sampling")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least one token is kept; null keeps all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability in (0, 1]; null keeps all")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk}: a count of tokens is at least 1")


def generate(
    model: Decoder,
    tokens_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Collection[int] | None = None,
    pad_token: int = 0,
    on_token: Callable[[Tensor], None] | None = None,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Prompt and continuation, [B, T + max_new_tokens] int64. Arguments as in `stream`; rows that stop early (or all
    at once) are padded with `pad_token`. `on_token` is called with each step's tokens [B]."""
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=frozenset(stop_tokens or ()),
        pad_token=pad_token,
        prefill_chunk=prefill_chunk,
    )
    _check(model, tokens_BT, sampling)
    steps = [tokens_BT]
    for token_B in _stream(model, tokens_BT, sampling):
        if on_token is not None:
            on_token(token_B)
        steps.append(token_B[:, None])
    out_BT = torch.cat(steps, dim=1)
    missing = tokens_BT.shape[1] + max_new_tokens - out_BT.shape[1]
    return torch.nn.functional.pad(out_BT, (0, missing), value=pad_token)


def stream(
    model: Decoder,
    tokens_BT: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Collection[int] | None = None,
    pad_token: int = 0,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yields the new tokens of each step, [B] int64; ends early once every row has stopped.

    tokens_BT       prompts of one length, each read as one document. Padding inside a prompt would be read as text, so
                    prompts of different lengths are generated one by one
    temperature     divides the logits; 0 takes the likeliest token
    top_k, top_p    keep the k likeliest tokens; of those, the fewest whose probabilities reach p
    seed            makes sampling a function of (seed, row, step), on every device and for every batch size; None:
                    drawn from torch's generator
    stop_tokens     a row that emits one of these is finished and yields `pad_token` from then on
    prefill_chunk   read the prompt in pieces of this many tokens (less memory, same result)

    The model runs in evaluation mode and without gradients, and is left as it was.
    Raises ValueError, before any work is done, for an empty prompt, token ids outside the vocabulary, impossible
    settings, and more tokens than a learned position table has rows.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=frozenset(stop_tokens or ()),
        pad_token=pad_token,
        prefill_chunk=prefill_chunk,
    )
    _check(model, tokens_BT, sampling)
    return _stream(model, tokens_BT, sampling)


def _stream(model: Decoder, tokens_BT: Tensor, sampling: Sampling) -> Iterator[Tensor]:
    B, T = tokens_BT.shape
    n_steps = sampling.max_new_tokens
    if n_steps == 0:
        return
    weight = model.head_weight
    # The last token is never read back, so it needs no slot.
    cache = create_cache(model, B, T + n_steps - 1)
    noise_BN = _noise(sampling.seed, B, n_steps).to(weight.device) if sampling.temperature > 0 else None
    stops = torch.tensor(sorted(sampling.stop_tokens), device=weight.device) if sampling.stop_tokens else None
    finished_B = torch.zeros(B, dtype=torch.bool, device=weight.device)

    logits_BV = prefill(model, tokens_BT, cache, chunk=sampling.prefill_chunk)
    for step in range(n_steps):
        if noise_BN is None:
            token_B = logits_BV.argmax(dim=-1)
        else:
            probabilities_BV = distribution(
                logits_BV, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
            )
            token_B = draw(probabilities_BV, noise_BN[:, step])
        if stops is not None:
            token_B = token_B.masked_fill(finished_B, sampling.pad_token)
            finished_B = finished_B | torch.isin(token_B, stops)
        yield token_B
        if step + 1 == n_steps or (stops is not None and bool(finished_B.all())):
            return
        logits_BV = prefill(model, token_B[:, None], cache)


@torch.no_grad()
def prefill(model: Decoder, tokens_BT: Tensor, cache: KeyValueCache, *, chunk: int | None = None) -> Tensor:
    """Reads tokens into the cache, all at once or `chunk` at a time; logits [B, V] after the last one."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        *pieces, last_BT = tokens_BT.split(chunk or tokens_BT.shape[1], dim=1)
        for piece_BT in pieces:
            model.hidden(piece_BT, cache=cache)
        hidden_BTD = model.hidden(last_BT, cache=cache)
        return torch.nn.functional.linear(hidden_BTD[:, -1], model.head_weight)
    finally:
        if was_training:
            model.train()


def distribution(
    logits_BV: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities [B, V] in fp64 after temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751:
    the smallest set of likeliest tokens whose probability reaches p; at least one)."""
    logits_BV = logits_BV.double() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kept = logits_BV.topk(top_k, dim=-1)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of everything likelier
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities_BV = torch.zeros_like(ordered).scatter(-1, order, ordered)
        probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    return probabilities_BV


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row, [B]: the first whose cumulative probability exceeds the row's number in [0, 1)."""
    cumulative_BV = probabilities_BV.cumsum(dim=-1)
    # Scaled by the sum, so that rounding cannot ask for more than there is; tokens of probability 0 are never first.
    wanted_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, wanted_B1, right=True).squeeze(-1)


def _noise(seed: int | None, batch: int, steps: int) -> Tensor:
    """Uniform numbers [B, steps] in [0, 1): 24 bits each, so that times the sum of probabilities they stay below it.
    Every row has a generator of its own, on the CPU: what a row draws depends on neither batch size nor device."""
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(batch)]
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators]).double()


def _check(model: Decoder, tokens_BT: Tensor, sampling: Sampling) -> None:
    """What the model and the prompt decide; the rest is Sampling's own."""
    config = model.config
    if tokens_BT.dim() != 2:
        raise ValueError(f"prompt tokens have shape {tuple(tokens_BT.shape)}; generation reads [batch, time]")
    if tokens_BT.numel() == 0:
        raise ValueError("the prompt is empty: a decoder continues at least one token (an end-of-text token will do)")
    low, high = int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"the prompt has token {low if low < 0 else high}, but the model's vocabulary is 0 … "
            f"{config.vocab_size - 1}: it was made by another tokenizer"
        )
    if not 0 <= sampling.pad_token < config.vocab_size:
        raise ValueError(f"pad_token={sampling.pad_token}: a token of the model, 0 … {config.vocab_size - 1}")
    needed = tokens_BT.shape[1] + sampling.max_new_tokens - 1
    if config.positions == "learned" and needed > config.max_positions:
        raise ValueError(
            f"a prompt of {tokens_BT.shape[1]} tokens and {sampling.max_new_tokens} new ones need {needed} positions, "
            f"but the model has learned {config.max_positions}; shorten the prompt or max_new_tokens"
        )
