"""The contract between data and everything that trains or evaluates on it.

Legend: B sequences, T tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # target value that carries no loss (the default of torch's cross entropy)


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """Packed token sequences with their next-token targets.

    tokens_BT      int64 token ids
    targets_BT     int64: the token that follows `tokens_BT[b, t]`, or IGNORE where no loss is taken (padding, a prompt,
                   a document boundary when boundary loss is off)
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
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        return TokenBatch(
            tokens_BT=change(self.tokens_BT),
            targets_BT=change(self.targets_BT),
            indices_B=change(self.indices_B),
            positions_BT=None if self.positions_BT is None else change(self.positions_BT),
            documents_BT=None if self.documents_BT is None else change(self.documents_BT),
        )
