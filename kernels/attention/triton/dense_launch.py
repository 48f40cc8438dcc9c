"""The launches of `dense.py`, for the kernels here and for those of `hopper`: rows of global queries, and gradients of
keys that may be seen from everywhere.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..tiles import Tiles
from .dense import (
    always_keys_dkdv_kernel,
    global_rows_dq_kernel,
    global_rows_kernel,
    merge_rows_kernel,
    sum_rows_kernel,
)
from .mask import INTERPRETED


@dataclass(frozen=True, slots=True)
class Dense:
    """A call, of which some rows or keys are gathered by index [B, T or S], as many as a count [B] says and at most
    `most`. Elements of a row of q, k and v lie side by side; the rest is contiguous.

    scalars    scale, softcap (1 for none), dropout
    constants  what the kernels are compiled for
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    seed: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    q_doc: Tensor | None
    k_doc: Tensor | None
    lengths: Tensor | None
    scalars: tuple[float, float, float]
    constants: dict[str, Any]

    @property
    def _inputs(self) -> tuple[Tensor | None, ...]:
        return self.slopes, self.seed, self.q_pos, self.k_pos, self.q_doc, self.k_doc

    @property
    def _strides(self) -> list[int]:
        return [s for x in (self.q, self.k, self.v) for s in x.stride()[:3]]

    def global_rows(
        self, out: Tensor, lse: Tensor, sinks: Tensor | None, rows: Tensor, n_rows: Tensor, most: int, tiles: Tiles
    ) -> None:
        """Writes the rows of out and of lse that belong to global queries."""
        (B, T, H, _), S, E = self.q.shape, self.k.shape[1], self.v.shape[3]
        M = _tile(most, tiles.rows)
        row_tiles = triton.cdiv(most, M)
        splits, length = _splits(S, tiles.columns, row_tiles * B * H)
        part = self.q.new_empty(splits, B, most, H, E, dtype=torch.float32)
        part_lse = self.q.new_empty(splits, B, most, H, dtype=torch.float32)
        global_rows_kernel[row_tiles, splits, B * H](
            self.q, self.k, self.v, part, part_lse, *self._inputs, self.lengths, rows, n_rows, *self._strides,
            T, S, H, most, length, *self.scalars,
            M=M, N=tiles.columns, num_warps=4, num_stages=tiles.stages, **self.constants,
        )  # fmt: skip
        merge_rows_kernel[most, H, B](
            part, part_lse, out, lse, sinks, rows, n_rows, *out.stride()[:3], B, T, H, most, splits,
            E=E, BLOCK_E=self.constants["BLOCK_E"], num_warps=1,
        )  # fmt: skip

    def global_rows_dq(
        self, d_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, rows: Tensor, n_rows: Tensor, most: int,
        tiles: Tiles,
    ) -> Tensor | None:  # fmt: skip
        """Writes the rows of dq that belong to global queries. With ALiBi, what they add to the slopes' gradients [H]
        is returned. delta [B, H, T] is of all rows, lse too."""
        (B, T, H, D), S = self.q.shape, self.k.shape[1]
        M = _tile(most, tiles.rows)
        row_tiles = triton.cdiv(most, M)
        splits, length = _splits(S, tiles.columns, row_tiles * B * H)
        part = self.q.new_empty(splits, B, most, H, D, dtype=torch.float32)
        slopes = self.q.new_zeros(splits, B, most, H, dtype=torch.float32) if self.constants["ALIBI"] else None
        global_rows_dq_kernel[row_tiles, splits, B * H](
            self.q, self.k, self.v, d_out, lse, delta, part, slopes, *self._inputs, self.lengths, rows, n_rows,
            *self._strides, *d_out.stride()[:3], T, S, H, most, length, *self.scalars,
            M=M, N=tiles.columns, num_warps=4, num_stages=tiles.stages, **self.constants,
        )  # fmt: skip
        sum_rows_kernel[most, H, B](
            part, dq, rows, n_rows, *dq.stride()[:3], B, T, H, most, splits,
            WIDTH=D, BLOCK=self.constants["BLOCK_D"], num_warps=1,
        )  # fmt: skip
        return None if slopes is None else slopes.sum(dim=(0, 1, 2))

    def always_keys_dkdv(
        self, d_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, always: Tensor, n_always: Tensor,
        most: int, tiles: Tiles,
    ) -> None:  # fmt: skip
        """Writes the rows of dk and dv that belong to keys that may be seen from everywhere: from all queries."""
        (B, T, H, D), (S, G), E = self.q.shape, self.k.shape[1:3], self.v.shape[3]
        N = _tile(most, tiles.rows)
        key_tiles = triton.cdiv(most, N)
        splits, length = _splits(T, tiles.columns, key_tiles * B * G)
        part_k = self.q.new_empty(splits, B, most, G, D, dtype=torch.float32)
        part_v = self.q.new_empty(splits, B, most, G, E, dtype=torch.float32)
        always_keys_dkdv_kernel[key_tiles, splits, B * G](
            self.q, self.k, self.v, d_out, lse, delta, part_k, part_v, *self._inputs, always, n_always, *self._strides,
            *d_out.stride()[:3], T, S, H, most, length, *self.scalars,
            M=tiles.columns, N=N, num_warps=4, num_stages=tiles.stages, **self.constants,
        )  # fmt: skip
        for part, gradient, block in ((part_k, dk, "BLOCK_D"), (part_v, dv, "BLOCK_E")):
            sum_rows_kernel[most, G, B](
                part, gradient, always, n_always, *gradient.stride()[:3], B, S, G, most, splits,
                WIDTH=gradient.shape[3], BLOCK=self.constants[block], num_warps=1,
            )  # fmt: skip


def _tile(most: int, tile: int) -> int:
    return min(tile, max(16, triton.next_power_of_2(most)))


def _splits(n: int, tile: int, programs: int) -> tuple[int, int]:
    """(how many slices of n keep the device busy, how long each is); a slice is at least four tiles long."""
    n = max(n, 1)
    slices = min(max(1, _BUSY // max(programs, 1)), max(1, n // (4 * tile)))
    length = triton.cdiv(triton.cdiv(n, 2 if INTERPRETED else slices), tile) * tile
    return triton.cdiv(n, length), length


_BUSY = 528  # programs: four on each processor of an H100
