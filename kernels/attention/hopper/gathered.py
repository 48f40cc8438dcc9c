"""Rows that are gathered by index, so that TMA reads them in tiles: keys that may be seen from everywhere (sinks,
global tokens) with their values, and queries that may see everything with the gradients of their output.

Legend: B batch, n rows of a sequence, A the most that any sequence gathers, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Plan
from ..spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Gathered:
    """x, y [B, A, heads, width] of two tensors [B, n, …]: rows index[b, at] for at < count[b]; beyond lie others.

    index [B, n], count [B]  int32
    more                     int32, of keys: `outside_of_windows` [B, T, 2]; of queries: `seen_from` [B, S]; and of both
                             the documents [B, n] in the index's order
    """

    x: Tensor
    y: Tensor
    index: Tensor
    count: Tensor
    more: tuple[Tensor | None, ...]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.y, self.index, self.count, *self.more


NOTHING: tuple[None, ...] = (None,) * 6  # `tensors` where nothing is gathered


def gathered(
    x: Tensor, y: Tensor, index: Tensor | None, count: Tensor | None, most: int, *more: Tensor | None
) -> Gathered | None:
    """The first `most` rows of an index [B or 1, n]; None where there is none."""
    if index is None or count is None:
        return None
    B = x.shape[0]
    index, count = index.expand(B, -1).contiguous(), count.expand(B).contiguous()
    at = index[:, :most, None, None].long()
    x, y = (z.gather(1, at.expand(-1, -1, *z.shape[2:])) for z in (x, y))
    rest = (None if z is None else z.expand(B, *z.shape[1:]).contiguous() for z in more)
    return Gathered(x, y, index, count, tuple(rest))


def outside_of_windows(plan: Plan, spec: AttentionSpec, n_queries: int, n_keys: int) -> Tensor | None:
    """[B, T, 2] int32: of the keys that may be seen from everywhere, which are in order, those before the first number
    and from the second on lie outside of a row's window (and, under causality, not after the row). None without any."""
    if plan.always is None or plan.n_always is None:
        return None
    at, window = torch.arange(n_keys, device=plan.always.device), spec.window
    places = torch.where(at < plan.n_always[:, None], plan.always, n_keys)
    q_pos = torch.arange(n_keys - n_queries, n_keys, device=at.device, dtype=torch.int32).repeat(len(places), 1)
    nobody = torch.zeros_like(q_pos)
    before = nobody if window.left is None else torch.searchsorted(places, q_pos - min(window.left, 2**30))
    after = nobody + n_keys
    if window.right is not None and not spec.causal:
        after = torch.searchsorted(places, q_pos + min(window.right, 2**30) + 1)
    return torch.stack((before, after), dim=-1).int()


def seen_from(plan: Plan, spec: AttentionSpec, n_queries: int, n_keys: int) -> Tensor | None:
    """[B, S] int32: of the queries that may see everything, which are in order, those from this number on do not stand
    before a key. None without any, and without causality."""
    if plan.rows is None or plan.n_rows is None or not spec.causal:
        return None
    at = torch.arange(n_queries, device=plan.rows.device)
    places = torch.where(at < plan.n_rows[:, None], plan.rows, n_queries)
    row = torch.arange(n_keys, device=at.device, dtype=torch.int32) - (n_keys - n_queries)
    return torch.searchsorted(places, row.repeat(len(places), 1)).int()


def statistics_of_rows(stats: Tensor, lse: Tensor, rows: Gathered, factor: float, multiple: int) -> Tensor:
    """[B, H, 2, A rounded up to a multiple] fp32: of gathered rows what `stats` [B, H, 2, …] holds of all others (the
    lse times a negative factor, and -delta), with the lse [B, H, n] that `stats` lacks. Of rows that are not there, and
    those that see nothing, -inf and whatever."""
    (B, H), most = lse.shape[:2], rows.x.shape[1]
    at = rows.index[:, None, :most].long().expand(-1, H, -1)
    there = torch.arange(most, device=lse.device) < rows.count[:, None, None]
    of_rows = lse.gather(2, at)
    found = stats.new_zeros(B, H, 2, -(-most // multiple) * multiple)
    found[:, :, 0].fill_(-torch.inf)
    found[:, :, 0, :most] = (of_rows * factor).masked_fill(~there | (of_rows == -torch.inf), -torch.inf)
    found[:, :, 1, :most] = stats[:, :, 1].gather(2, at)
    return found
