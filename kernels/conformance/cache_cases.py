"""Cases for caches: layers that keep their keys differently, under programs of calls that go round every ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import cycle, islice

import torch

from ..attention.backend import AttentionCall, Feature, needed
from ..attention.spec import AttentionSpec, BlockLayout, Window
from .cases import short_repr

Program = tuple[tuple[int, ...] | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCase:
    """A stack of layers and what is done to a cache for it. Its repr is Python.

    layers    one tuple a layer: the specs of its head groups, which share its heads equally, in order
    program   (3, 1): a call with 3 new tokens in row 0 and 1 in row 1, padded to 3; 5: forget all but the first 5
    padding   columns that each call has beyond its longest row
    shared    query heads that read one key/value head
    marked    document ids and global flags are given where a spec asks for them
    """

    layers: tuple[tuple[AttentionSpec, ...], ...]
    program: Program
    padding: int = 0
    kv_heads: int = 2
    shared: int = 1
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    marked: bool = True
    seed: int = 0

    @property
    def batch(self) -> int:
        return next(len(step) for step in self.program if not isinstance(step, int))

    @property
    def length(self) -> int:
        """Tokens of the longest row, if the cache cannot step back."""
        rows = zip(*(step for step in self.program if not isinstance(step, int)), strict=True)
        return max(sum(row) for row in rows)

    @property
    def size(self) -> int:
        """What makes an example small for a reader: few features, layers, calls and tokens."""
        return len(self.features) + sum(map(len, self.layers)) + len(self.program) + self.batch * self.length

    @property
    def features(self) -> frozenset[Feature]:
        specs = [spec for specs in self.layers for spec in specs]
        ragged = self.padding or any(len(set(step)) > 1 for step in self.program if not isinstance(step, int))
        found = {feature for spec in specs for feature in needed(spec, AttentionCall())}
        return frozenset(found | ({Feature.KV_LENGTHS} if ragged else set()))

    def gives(self, feature: Feature) -> bool:
        return self.marked and feature in self.features

    def effective(self, spec: AttentionSpec) -> AttentionSpec:
        """What a spec means in a call that gives no ids or no flags."""
        return replace(
            spec,
            documents=spec.documents and self.gives(Feature.DOCUMENTS),
            global_tokens=spec.global_tokens and self.gives(Feature.GLOBAL_TOKENS),
        )

    def __repr__(self) -> str:
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.default is MISSING or value != entry.default:
                parts.append(f"{entry.name}={_written(value)}")
        return f"CacheCase({', '.join(parts)})"


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return short_repr(value)


# -- by construction ---------------------------------------------------------------------------------------------------

N = 45  # more than any ring below holds several times over, and more than one call reads as stored


LAYOUT = BlockLayout.from_rows([[(i - j) % 3 != 1 for j in range(16)] for i in range(16)], q_block=4, kv_block=5)

FULL = AttentionSpec(causal=True)


def window(left: int, dilation: int = 1) -> AttentionSpec:
    return replace(FULL, window=Window(left=left, dilation=dilation))


STACKS = (
    ((FULL,), (window(3),)),
    ((window(0),), (window(5),), (window(5),)),
    ((window(3, 2),), (window(1, 3),)),
    ((replace(window(2), sink_tokens=3),), (FULL,), (window(4),)),
    ((window(4), window(1)), (window(2), FULL)),  # head groups of different reach
    ((replace(window(3), alibi=True),), (replace(FULL, softcap=0.8),)),
    ((replace(window(3), learned_sink=True, scale=0.5),), (replace(FULL, learned_sink=True, sink_tokens=1),)),
    ((replace(window(3), documents=True),), (replace(FULL, documents=True, sink_tokens=2),)),
    ((replace(window(2), documents=True, sink_tokens=1),), (window(2),)),
    ((replace(window(2), global_tokens=True),), (window(3),)),
    ((replace(window(2), global_tokens=True, documents=True),), (replace(FULL, global_tokens=True),)),
    ((replace(FULL, block_sparse=LAYOUT),), (replace(window(3), alibi=True, softcap=0.8, sink_tokens=1),)),
)


def _programs() -> tuple[Program, ...]:
    """Of two rows, N tokens in the longer."""

    def rows_alike(*counts: int) -> Program:
        return tuple((count, count) for count in counts)

    return (
        rows_alike(N),
        rows_alike(*[1] * N),
        rows_alike(7, 1, 1, 3, 20, 1, 5, 1, 6),
        rows_alike(18, 17, 1, 9),
        rows_alike(*[4] * 11, 1),
        ((N, 9), *[(0, 1)] * 9),
        ((5, 2), (3, 0), (1, 1), (2, 6), (19, 18), (1, 1), (1, 0), (13, 17)),
        ((1, 30), *[(1, 1)] * 15, (17, 0), (12, 0)),
        (*rows_alike(12, 1, 1), 13, *rows_alike(6, 1), 3, *rows_alike(1, 2, 5, 20), 11, *rows_alike(1, 1)),
        ((6, 3), 4, (1, 1), (2, 2), 0, (3, 8), (1, 1)),
    )


def by_construction(
    dtypes: Sequence[torch.dtype], without: frozenset[Feature], seed: int, *, thorough: bool
) -> Iterator[CacheCase]:
    """Every stack under every program (under two in turn, if not `thorough`) but for features that the cache does not
    take; dtypes and what else varies little take turns."""
    dtype, shared, padding = cycle(dtypes), cycle((1, 2, 3)), cycle((0, 0, 1, 0))
    programs, turns = _programs(), cycle(_programs())
    for number, layers in enumerate(STACKS):
        for program in programs if thorough else islice(turns, 2):
            case = CacheCase(layers=layers, program=program, shared=next(shared), dtype=next(dtype))
            case = replace(case, padding=next(padding), seed=seed * 2**16 + number)
            if Feature.KV_LENGTHS in without:
                case = replace(case, padding=0)
            if not case.features & without:
                yield case
    bare = CacheCase(layers=STACKS[7], program=_programs()[2], marked=False, dtype=next(dtype), seed=seed)
    if not bare.features & without:
        yield bare
