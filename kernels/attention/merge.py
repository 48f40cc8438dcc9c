"""Joining attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .backend import AttentionOutput


def merge_partials(parts: Iterable[AttentionOutput]) -> AttentionOutput:
    """Attention over the union of disjoint sets of keys, from the attention over each.

        lse = logsumexp_i(lse_i),   out = Σ_i exp(lse_i - lse) · out_i

    Each part has out [B, T, H, E] and lse [B, H, T]. Safe where parts are empty: a row that saw no key anywhere stays
    zero with lse -inf, and gradients are finite. A learned sink belongs to at most one part, one whose rows all see a
    key. Accumulates in the lse's dtype (fp32); out keeps the first part's dtype.

    Raises ValueError for no parts, or a part without lse.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge_partials: no parts")
    lses = [part.lse for part in parts if part.lse is not None]
    if len(lses) != len(parts):
        raise ValueError("merge_partials: every part needs its lse; ask for it with return_lse=True")
    lse_PBHT = torch.stack(lses)
    # The shift only guards the exponential; 0 where every part is empty keeps -inf - (-inf) from making NaN.
    shift_BHT = lse_PBHT.detach().amax(dim=0)
    shift_BHT = torch.where(shift_BHT == -torch.inf, 0.0, shift_BHT)
    weight_PBHT = torch.exp(lse_PBHT - shift_BHT)
    total_BHT = weight_PBHT.sum(dim=0)
    empty_BHT = total_BHT == 0
    total_BHT = torch.where(empty_BHT, 1.0, total_BHT)
    share_PBTH1 = (weight_PBHT / total_BHT).transpose(2, 3)[..., None]
    out_BTHE = torch.zeros_like(parts[0].out, dtype=lse_PBHT.dtype)
    for part, share_BTH1 in zip(parts, share_PBTH1, strict=True):
        out_BTHE = out_BTHE + share_BTH1 * part.out
    lse_BHT = torch.where(empty_BHT, -torch.inf, shift_BHT + torch.log(total_BHT))
    return AttentionOutput(out_BTHE.to(parts[0].out.dtype), lse_BHT)
