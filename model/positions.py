"""Where tokens stand: rotary embedding and its scaling, sinusoids, ALiBi slopes. (Learned positions are a plain table.)

Legend: B batch, T tokens, N heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config_rope import RopeScaling


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

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self.rows = max_positions
        self.table = FixedTable(self._rows)

    def _rows(self) -> Tensor:
        """[rows, 2, D/2]: cosines and sines. `device` is explicit: a model under construction may be on meta."""
        return self._angles(torch.arange(self.rows, device="cpu"), length=0)

    def _angles(self, positions: Tensor, length: int) -> Tensor:
        """Cosines and sines [..., 2, D/2] of positions [...] in a sequence of that length."""
        rates, temperature = rope_rates(self.head_dim, self.theta, self.scaling, length, device=positions.device)
        angles = positions[..., None].double() * rates
        return (torch.stack([angles.cos(), angles.sin()], dim=-2) * temperature).float()

    def forward(self, positions_BT: Tensor, reach: int, length: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, 1, D/2] of positions that are all below `reach`, in sequences that have, or will
        come to have, `length` tokens (only dynamic scaling asks). The table grows when asked for more than it holds:
        rotation has no longest position."""
        if self.scaling is not None and stretches(self.scaling, length):
            # No table, for every length has its own; and all on the device, so that a graph can be captured.
            cos, sin = self._angles(positions_BT, length).unbind(dim=-2)
            return cos[:, :, None], sin[:, :, None]
        if reach > self.rows:
            self.rows = max(reach, 2 * self.rows)
            self.table.to(self.table.values.device)  # computes the longer table
        cos, sin = self.table.values[positions_BT].unbind(dim=-2)
        return cos[:, :, None], sin[:, :, None]


def stretches(scaling: RopeScaling, length: int) -> bool:
    """Whether the frequencies of a sequence depend on its length: dynamic scaling, past the original length."""
    return scaling.kind == "dynamic" and length > (scaling.original_positions or 0)


def rope_rates(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, fp64 [D/2], and what cosines and sines are multiplied by.

    `length` is that of the sequence, for dynamic scaling. `RopeScaling` names the sources.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    if scaling is None:
        return theta ** (-pairs / head_dim), 1.0
    factor, original = scaling.factor, scaling.original_positions or 0
    if scaling.kind == "dynamic":
        factor = factor * length / original - (factor - 1) if length > original else 1.0
    if scaling.kind in ("ntk", "dynamic"):
        # With a single pair there is no lower frequency to spare: it is the highest, and kept.
        stretched = theta * factor ** (head_dim / (head_dim - 2)) if head_dim > 2 else theta
        return stretched ** (-pairs / head_dim), 1.0
    rates = theta ** (-pairs / head_dim)
    if scaling.kind == "linear":
        return rates / factor, 1.0
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
        kept = ((rates * original / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        return rates * (kept + (1 - kept) / factor), 1.0
    kept = _yarn_kept(head_dim, theta, scaling).to(device)
    temperature = scaling.attention_factor
    if temperature is None:
        temperature = 0.1 * math.log(factor) + 1.0
    return rates * (kept + (1 - kept) / factor), temperature


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each frequency is kept, fp64 [D/2]: 1 for those that turn fast, 0 for those that turn slowly, and a
    ramp over the dimensions between."""

    def dimension(turns: float) -> float:
        """The pair, as a number with a fraction, that makes so many turns within the original length."""
        original = scaling.original_positions or 0
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    return 1 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0.0, 1.0)


class Sinusoids(nn.Module):
    """Sinusoidal positions (Vaswani et al. 2017, arXiv 1706.03762, §3.5): dimension 2i of position p is
    sin(p / 10000^(2i/D)), dimension 2i + 1 its cosine. No parameters, and no longest position."""

    def __init__(self, d_model: int, max_positions: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.rows = max_positions
        self.table = FixedTable(self._rows)

    def _rows(self) -> Tensor:
        rates, _ = rope_rates(self.d_model, 10_000.0)
        angles = torch.arange(self.rows, dtype=torch.float64, device="cpu")[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : self.d_model].float()

    def forward(self, positions_BT: Tensor, reach: int) -> Tensor:
        """[B, T, D] of positions that are all below `reach`."""
        if reach > self.rows:
            self.rows = max(reach, 2 * self.rows)
            self.table.to(self.table.values.device)  # computes the longer table
        return self.table.values[positions_BT]


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
