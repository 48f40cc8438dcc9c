"""The position-wise layers: normalisation and the two kinds of MLP.

Legend: B batch, T tokens, D model width, F hidden width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import config


def norm(kind: config.Norm, dim: int, *, eps: float, bias: bool) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), which never has a bias."""
    return nn.LayerNorm(dim, eps=eps, bias=bias) if kind == "layernorm" else nn.RMSNorm(dim, eps=eps)


def feed_forward(kind: config.MLP, d_model: int, d_ff: int, *, bias: bool) -> nn.Module:
    if kind == "swiglu":
        return SwiGLU(d_model, d_ff, bias=bias)
    return MLP(d_model, d_ff, bias=bias, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """down(gelu(up(x))); GPT-2 approximates the GELU by a tanh (Hendrycks & Gimpel 2016)."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool, approximate: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.approximate = approximate

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD), approximate=self.approximate))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
