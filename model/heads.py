"""What an encoder's hidden states become: logits of tokens, of classes, of an answer's ends.

Legend: B batch, T tokens, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLMHead(nn.Module):
    """Logits of tokens: dense, GELU, norm, then the embedding transposed (or a matrix of its own) and a bias."""

    def __init__(
        self, *, d_model: int, vocab_size: int, tied: bool, bias: bool, approximate: str, final_norm: nn.Module
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model, bias=bias)
        self.norm = final_norm
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None
        self.approximate = approximate

    def forward(self, hidden_xD: Tensor, embedding_VD: Tensor) -> Tensor:
        """[…, V] of […, D]."""
        return F.linear(self.features(hidden_xD), self.matrix(embedding_VD), self.bias)

    def features(self, hidden_xD: Tensor) -> Tensor:
        """What the matrix is multiplied by, […, D]: a loss that works in pieces starts here."""
        return self.norm(F.gelu(self.dense(hidden_xD), approximate=self.approximate))

    def matrix(self, embedding_VD: Tensor) -> Tensor:
        """[V, D]: the embedding, unless the head has one of its own."""
        return embedding_VD if self.weight is None else self.weight


class Classifier(nn.Module):
    """Logits of classes from the pooled token."""

    def __init__(self, *, d_model: int, n_labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, n_labels)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        return self.out_proj(self.dropout(pooled_BD))


class SpanHead(nn.Module):
    """Two logits a token: that an answer starts there, and that it ends there."""

    def __init__(self, *, d_model: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(d_model, 2)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.out_proj(hidden_BTD)
