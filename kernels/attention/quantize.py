"""Keys and values in eight bits: one scale for each token and key/value head; stored value × scale = value.

Legend: B batch, S keys (of a pool of pages: n_pages and page), G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the dtypes, each with its largest finite value


def quantize(x_BSGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(stored [B, S, G, D] in `dtype`, scale [B, S, G] fp32), symmetric by the largest magnitude of a token and head.

    The error is at most half a step of int8 (1/254 of that magnitude), or 1/16 of each value in float8_e4m3fn. A row of
    zeros (or of numbers too small for an fp32 scale) gets scale 1 and zeros.

    Raises ValueError for a dtype that nothing is stored in.
    """
    if dtype not in LARGEST:
        known = ", ".join(str(known).removeprefix("torch.") for known in LARGEST)
        raise ValueError(f"quantize(…, {dtype}): keys and values are stored in {known}")
    wide = x_BSGD.to(torch.float64 if x_BSGD.dtype == torch.float64 else torch.float32)
    largest = LARGEST[dtype]
    scale_BSG = (wide.abs().amax(dim=-1) / largest).float()
    scale_BSG = torch.where(scale_BSG < torch.finfo(torch.float32).tiny, 1.0, scale_BSG)
    stored = (wide / scale_BSG[..., None]).clamp(-largest, largest)
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale_BSG


def dequantize(stored_BSGD: Tensor, scale_BSG: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [B, S, G, D] in `dtype`, multiplied in fp32 (fp64 for fp64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (stored_BSGD.to(wide) * scale_BSG[..., None].to(wide)).to(dtype)
