"""Where tokens stand: rotary embedding and ALiBi slopes. (Learned positions are a plain embedding table.)

Legend: B batch, T tokens, N heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class FixedTable(nn.Module):
    """A constant fp32 tensor that follows its module between devices but keeps its exact values.

    A plain buffer would be rounded by `model.to(torch.bfloat16)` and be garbage after `to_empty`; this one is
    computed again instead. It is no part of the state dict.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self._compute = compute
        self.values: Tensor
        self.register_buffer("values", compute(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        self.values = self._compute().to(self.values.device)
        return self


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34) in the rotate-half layout of Llama
    checkpoints on the Hugging Face hub: dimension i is paired with i + D/2.

    Angles are computed in fp64 and stored as fp32 cosines and sines, so that positions of any size keep their accuracy.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.rows = max_positions
        self.table = FixedTable(self._angles)

    def _angles(self) -> Tensor:
        """[rows, 2, D/2]: cosines and sines. `device` is explicit: a model under construction may be on meta."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        rates = self.theta ** (-pairs / self.head_dim)
        angles = torch.arange(self.rows, dtype=torch.float64, device="cpu")[:, None] * rates
        return torch.stack([angles.cos(), angles.sin()], dim=1).float()

    def forward(self, positions_BT: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, 1, D/2] of positions that are all below `reach`. The table grows when asked for
        more than it holds: rotation has no longest position."""
        if reach > self.rows:
            self.rows = max(reach, 2 * self.rows)
            self.table.to(self.table.values.device)  # computes the longer table
        cos, sin = self.table.values[positions_BT].unbind(dim=-2)
        return cos[:, :, None], sin[:, :, None]


def rotate(x_BTND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates heads by `Rotary`'s angles, in fp32 whatever the heads' dtype."""
    cos, sin = rotation
    first, second = x_BTND.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTND.dtype)


def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """One slope a head (Press et al. 2022, arXiv 2108.12409, §3 and its reference code): 2^(-8h/n) for h = 1 … n when
    n is a power of two; otherwise the slopes of the next lower power of two, then every other one of the next higher.
    """
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8.0 * head / lower) for head in range(1, lower + 1)]
    between = [2.0 ** (-4.0 * head / lower) for head in range(1, 2 * lower + 1, 2)]
    return tuple(slopes + between[: n_heads - lower])


def slope_table(n_heads: int) -> Tensor:
    """`alibi_slopes` as fp32 [H], for a `FixedTable`."""
    return torch.tensor(alibi_slopes(n_heads), dtype=torch.float32, device="cpu")
