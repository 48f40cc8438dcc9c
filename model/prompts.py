"""Prompts of one batch: from rows padded on either side, or sequences of any length, into the cache.

Legend: B prompts, T tokens of the longest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.caching import KeyValueCache

from .completion import TextTokenizer
from .config import DecoderConfig, Seq2SeqConfig
from .sampling import Sampling

if TYPE_CHECKING:
    from .conditional import Generative

logger = logging.getLogger("longspan.model")

EMPTY = "the prompt is empty: a decoder continues at least one token (an end-of-text token will do)"


@dataclass(frozen=True, slots=True)
class Prompts:
    """tokens_BT stand from column 0 on, `lengths` of them in each row; behind them any token."""

    tokens_BT: Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def ragged(self) -> bool:
        return min(self.lengths) < self.longest

    def real(self) -> Tensor:
        """[B, T] bool: no padding."""
        device = self.tokens_BT.device
        return torch.arange(self.longest, device=device)[None] < torch.tensor(self.lengths, device=device)[:, None]


def from_rows(tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Prompts:
    """Rows of tokens, real where the mask is True; padding before and after them is cut away.

    Raises ValueError for no tokens, and for masks of another shape or with gaps between a row's tokens.
    """
    if not isinstance(tokens_BT, Tensor) or tokens_BT.is_floating_point():
        found = f"{tokens_BT.dtype}" if isinstance(tokens_BT, Tensor) else type(tokens_BT).__name__
        raise ValueError(f"prompt tokens are an integer tensor [batch, time], not {found}; `complete` takes lists")
    if tokens_BT.dim() != 2:
        raise ValueError(f"prompt tokens have shape {tuple(tokens_BT.shape)}; generation reads [batch, time]")
    if tokens_BT.numel() == 0:
        raise ValueError(EMPTY)
    B, T = tokens_BT.shape
    if mask_BT is None:
        return Prompts(tokens_BT, (T,) * B)
    if mask_BT.shape != tokens_BT.shape or mask_BT.dtype != torch.bool:
        raise ValueError(
            f"prompt_mask_BT is {mask_BT.dtype} of shape {tuple(mask_BT.shape)}; it is bool of the tokens' shape "
            f"{tuple(tokens_BT.shape)}, True where a token is no padding"
        )
    mask_BT = mask_BT.to(tokens_BT.device)
    lengths_B, first_B = mask_BT.sum(dim=1), mask_BT.int().argmax(dim=1)
    column_BT = first_B[:, None] + torch.arange(T, device=tokens_BT.device)
    lengths = tuple(int(length) for length in lengths_B.tolist())
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)}: {EMPTY}")
    within_BT = column_BT < (first_B + lengths_B)[:, None]
    whole_B = (mask_BT.gather(1, column_BT.clamp(max=T - 1)) | ~within_BT).all(dim=1)
    if not whole_B.all():
        row = int(whole_B.int().argmin())
        raise ValueError(
            f"prompt_mask_BT: row {row} has padding between its tokens; it may stand before and after them"
        )
    real_BT = torch.where(within_BT, tokens_BT.gather(1, column_BT.clamp(max=T - 1)), 0)
    return Prompts(real_BT[:, : max(lengths)], lengths)


def from_sequences(
    prompts: Sequence[str] | Sequence[Sequence[int]], tokenizer: TextTokenizer | None, device: torch.device
) -> Prompts:
    """Texts, or lists of token ids. Raises ValueError for none, empty ones, texts without a tokenizer, and a text that
    stands for a list of them."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts are a list: [{prompts[:40]!r}]; a text would be read letter by letter")
    rows: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError("prompts are texts: pass the tokenizer= that reads them, or token ids")
            rows.append(tokenizer.encode(prompt))
        else:
            rows.append([int(token) for token in prompt])
    if not rows:
        raise ValueError("no prompts")
    lengths = tuple(map(len, rows))
    if 0 in lengths:
        raise ValueError(EMPTY if len(rows) == 1 else f"prompt {lengths.index(0)}: {EMPTY}")
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    return Prompts(torch.tensor(padded, device=device), lengths)


def check_tokens(config: DecoderConfig | Seq2SeqConfig, tokens: Tensor, *, what: str = "prompt") -> None:
    """Raises ValueError for token ids that the model does not have."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"the {what} has token {low if low < 0 else high}, but the model's vocabulary is 0 … "
            f"{config.vocab_size - 1}: it was made by another tokenizer"
        )


def check_special(config: DecoderConfig, sampling: Sampling) -> None:
    """Raises ValueError for tokens of the settings that the model does not have."""
    named = {"pad_token": sampling.pad_token, "first_token": sampling.first_token, "last_token": sampling.last_token}
    for name, token in named.items():
        if token is not None and not 0 <= token < config.vocab_size:
            raise ValueError(f"{name}={token}: a token of the model, 0 … {config.vocab_size - 1}")


def check_room(config: DecoderConfig, prompt: int, max_new_tokens: int) -> None:
    """Raises ValueError where learned positions end before the text does; its last token is never read back. Rotary
    positions do not end: a text beyond those that the model was made for costs a warning, once."""
    needed = prompt + max_new_tokens - 1
    scaling = config.rope_scaling
    if config.positions == "rope" and needed > config.max_positions and (scaling is None or scaling.kind != "dynamic"):
        _warn_beyond(config.max_positions)
    if config.positions == "learned" and needed > config.max_positions:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones need {needed} positions, "
            f"but the model has learned {config.max_positions}; shorten the prompt or max_new_tokens"
        )


@lru_cache
def _warn_beyond(max_positions: int) -> None:
    logger.warning(
        "the text may grow beyond the %d positions of this model: what it writes there is likely to be worthless; "
        "shorten the prompt or max_new_tokens, or convert the model's positions",
        max_positions,
    )


def fitting(config: DecoderConfig, prompt: int, wanted: int) -> int:
    """As many new tokens as learned positions have room for, at most `wanted` and at least one."""
    if config.positions != "learned":
        return wanted
    return max(1, min(wanted, config.max_positions - prompt + 1))  # the last token is never read back


def check_tokenizer(config: DecoderConfig | Seq2SeqConfig, tokenizer: TextTokenizer) -> None:
    """Raises ValueError for a tokenizer that has tokens which the model does not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: they do not belong "
            "together; use the tokenizer that the model was trained with"
        )


@torch.no_grad()
def prefill(
    model: Generative,
    tokens_BT: Tensor,
    cache: KeyValueCache,
    *,
    chunk: int | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Reads tokens into the cache, all at once or `chunk` at a time; logits [B, V] after the last one of each row.

    lengths   how many of the T are real in each row, at least one; None: all
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        last_BD: Tensor | None = None
        start = 0
        for piece_BT in tokens_BT.split(chunk or tokens_BT.shape[1], dim=1):
            width = piece_BT.shape[1]
            if lengths is None:
                last_BD = model.hidden(piece_BT, cache=cache)[:, -1]
            else:
                counts = [min(max(length - start, 0), width) for length in lengths]
                hidden_BTD = model.hidden(piece_BT, AttentionContext(kv_lengths=torch.tensor(counts)), cache=cache)
                # A row that has no token in this piece keeps what it had.
                ends_B = torch.tensor(counts, device=piece_BT.device)
                rows_B = torch.arange(len(counts), device=piece_BT.device)
                own_BD = hidden_BTD[rows_B, (ends_B - 1).clamp(min=0)]
                last_BD = own_BD if last_BD is None else torch.where(ends_B[:, None] > 0, own_BD, last_BD)
            start += width
        if last_BD is None:
            raise ValueError("no tokens to read")
        return model.logits(last_BD)
    finally:
        if was_training:
            model.train()
