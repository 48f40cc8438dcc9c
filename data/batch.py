"""The contract between data and everything that trains or evaluates on it.

Legend: B sequences, T tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100  # target value that carries no loss (the default of torch's cross entropy)


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """Packed token sequences with their next-token targets.

    tokens_BT      int64 token ids
    targets_BT     int64: the token that follows `tokens_BT[b, t]`, or IGNORE where no loss is taken (padding, a prompt, a
                   document boundary when boundary loss is off)
    positions_BT   int64 positions for the position encoding; None: 0 … T-1 (they restart at each document when
                   position reset is on)
    documents_BT   int64 document ids; None: no document mask. Padding has the id -1
    indices_B      int64: which sequences of the stream these are (named when a step fails)
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    indices_B: Tensor
    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None

    @property
    def n_loss_tokens(self) -> Tensor:
        """How many targets carry loss: int64 scalar."""
        return (self.targets_BT != IGNORE).sum()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        return TokenBatch(
            **{
                name: None if value is None else value.to(device, non_blocking=non_blocking)
                for name, value in self._tensors()
            }
        )

    def pin_memory(self) -> TokenBatch:
        return TokenBatch(**{name: None if value is None else value.pin_memory() for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor | None]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
