"""One attention problem as data that can be printed, pasted and run again."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Literal, get_args

import torch

from ..attention.backend import AttentionCall, Feature, Phase, needed
from ..attention.spec import AttentionSpec, BlockLayout, Window

Memory = Literal["contiguous", "transposed", "gaps", "inner stride", "misaligned", "expanded"]
Values = Literal["normal", "outliers", "huge scores"]
Positions = Literal["none", "offset", "chunk", "left padding", "ring"]
Lengths = Literal["none", "ragged", "a row without keys"]

OFFSET = 37  # where "offset" positions start: no multiple of any tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An attention problem. Its repr names what differs from the defaults, and is Python.

    memory      how q, k and v lie in memory. contiguous [B, N, heads, dim]; transposed [B, heads, N, dim]; gaps: rows
                and heads apart, NaN between; inner stride: head dims two apart; misaligned: at an odd address;
                expanded: one batch row seen B times
    values      normal: N(0, 1); outliers: N(0, 1) + N(0, 100) · Bernoulli(.01); huge scores: ±10,000
    positions   none: keys 0 … S-1, queries at the end; offset: the same, all shifted; chunk: the queries stand
                amid the keys; left padding: row b has b empty slots first; ring: the keys' order is rotated, as in a
                ring buffer, and some slots are empty
    scattered   document ids vary from key to key (and differ by multiples of 2**32); else they come in runs
    kv_lengths  how many keys a row of the batch has
    page        keys in a page (a divisor of n_keys): k and v are pools with a page table; None: they are contiguous
    stored      k and v in eight bits of this dtype, with scales; None: in `dtype`
    shared      the context's tensors have one row for the whole batch
    """

    spec: AttentionSpec
    n_queries: int
    n_keys: int
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    lse: bool = True
    backward: bool = True
    memory: Memory = "contiguous"
    values: Values = "normal"
    positions: Positions = "none"
    scattered: bool = False
    kv_lengths: Lengths = "none"
    page: int | None = None
    stored: torch.dtype | None = None
    shared: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("memory", Memory), ("values", Values), ("positions", Positions), ("kv_lengths", Lengths)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"Case.{name}={getattr(self, name)!r}: one of {', '.join(get_args(kind))}")
        if self.page is not None and self.n_keys % self.page:
            raise ValueError(f"Case.page={self.page}: {self.n_keys} keys are no whole number of pages")

    def __repr__(self) -> str:
        return short_repr(self)

    def call(self, device: str) -> AttentionCall:
        if self.backward:
            phase = Phase.TRAIN
        else:
            phase = Phase.DECODE if self.n_queries == 1 and self.n_keys > 1 else Phase.PREFILL
        return AttentionCall(
            phase=phase,
            device=device,
            dtype=self.dtype,
            kv_dtype=self.stored,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            n_heads=self.heads,
            n_kv_heads=self.kv_heads,
            n_queries=self.n_queries,
            n_keys=self.n_keys,
            needs_grad=self.backward,
            needs_lse=self.lse,
            positions=self.positions != "none",
            kv_lengths=self.kv_lengths != "none",
            paged=self.page is not None,
        )

    @property
    def features(self) -> frozenset[Feature]:
        return frozenset(needed(self.spec, self.call("cpu")))

    @property
    def size(self) -> tuple[int, int]:
        """What makes an example small for a reader: few features, then few numbers."""
        return len(self.features), self.batch * self.heads * self.n_queries * self.n_keys * self.head_dim


def short_repr(value: object) -> str:
    """A dataclass without the fields that have their default; torch dtypes and tuples as Python writes them."""
    if not isinstance(value, (Case, AttentionSpec, Window, BlockLayout)):
        return repr(value)
    if isinstance(value, BlockLayout):
        rows = [[int(cell) for cell in row] for row in value.pattern]
        return f"BlockLayout.from_rows({rows}, q_block={value.q_block}, kv_block={value.kv_block})"
    parts = []
    for entry in fields(value):
        given = getattr(value, entry.name)
        if entry.default is MISSING or given != entry.default:
            parts.append(f"{entry.name}={short_repr(given)}")
    return f"{type(value).__name__}({', '.join(parts)})"
