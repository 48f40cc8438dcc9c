"""The contract between data and everything that trains or evaluates on it.

Legend: B sequences, T tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # target value that carries no loss (the default of torch's cross entropy)


class Batch(Protocol):
    """What a training step asks of a batch, whatever it holds."""

    @property
    def indices_B(self) -> Tensor:  # noqa: N802 (shapes are in names)
        """int64: which sequences of the stream these are (named when a step fails)."""
        ...

    @property
    def n_loss_tokens(self) -> Tensor:
        """What the step's loss is divided by: int64 scalar, at least 0."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self: ...

    def pin_memory(self) -> Self: ...


BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)


class BatchSource(Protocol[BatchT_co]):
    """A stream of sequences, of which the k-th is a pure function of k (and of settings that never change): whoever
    builds it, in whatever batch, builds the same."""

    @property
    def n_sequences(self) -> int:
        """Sequences in one pass."""
        ...

    def batch(self, indices: Sequence[int]) -> BatchT_co:
        """Sequences `indices` of the stream as one batch."""
        ...


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
