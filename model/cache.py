"""Keys and values of past tokens.

Legend: B batch, T new tokens, S all tokens so far, L capacity, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .accounting import kv_bytes_per_token
from .config import DecoderConfig


class KeyValueCache(Protocol):
    """What the decoder asks of a cache. Keys are stored as attention reads them: rotated, one per key/value head."""

    @property
    def length(self) -> int:
        """Tokens held, which is the position of the next one."""
        ...

    def append(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens of one layer; returns all keys and values [B, S, G, K], oldest first."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Called once all layers have written `n_tokens`."""
        ...


class ContiguousCache:
    """One preallocated tensor of keys and one of values, written in place: [n_layers, B, L, G, K] each."""

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layers, batch, length, config.kv_heads, config.dim_per_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError when the new tokens do not fit."""
        end = self._length + k_BTGK.shape[1]
        if end > self.capacity or k_BTGK.shape[0] != self.keys.shape[1]:
            raise ValueError(
                f"cache for {self.keys.shape[1]} sequences of {self.capacity} tokens: "
                f"{k_BTGK.shape[0]} sequences of {end} tokens do not fit"
            )
        self.keys[layer, :, self._length : end] = k_BTGK
        self.values[layer, :, self._length : end] = v_BTGK
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, n_tokens: int) -> None:
        self._length += n_tokens

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens (a shared prefix, a rejected draft)."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot keep {length} tokens of a cache that holds {self._length}")
        self._length = length


def cache_bytes(config: DecoderConfig, batch: int, length: int, dtype: torch.dtype | str = "float32") -> int:
    """Bytes of a `ContiguousCache`, before it exists."""
    return batch * length * kv_bytes_per_token(config, dtype)
