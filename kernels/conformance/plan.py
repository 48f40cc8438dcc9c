"""Which cases are tried: by construction each claimed feature, each pair, the edges of every size; then random draws.

Everything here reads the capabilities, the same data that the documentation's table shows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import torch

from ..attention.backend import Capabilities, Feature, Phase
from ..attention.quantize import LARGEST
from ..attention.spec import AttentionSpec, BlockLayout, Window
from .cases import Case, Lengths, Memory, Positions, Values
from .tensors import reach

F = Feature
OF_A_CASE = frozenset(Feature) - {F.LSE, F.BACKWARD}  # what a case may have; lse and gradients are asked for wherever
MEMORIES: tuple[Memory, ...] = ("transposed", "gaps", "inner stride", "misaligned", "expanded")
EDGES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What cases may ask of a backend: its capabilities, as far as they hold here, and the budget of the run.

    features     those to exercise, lse and gradients among them
    max_queries  None: any number
    """

    features: frozenset[Feature]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    max_length: int
    max_queries: int | None

    @property
    def backward(self) -> bool:
        return F.BACKWARD in self.features

    @property
    def lse(self) -> bool:
        return F.LSE in self.features

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(n for n in EDGES if n <= self.max_length)


def head_dims(capabilities: Capabilities) -> tuple[int, ...]:
    """The dims that are tried: the usual ones, the odd ones and the extremes that the backend allows."""
    step = capabilities.head_dim_multiple
    largest = capabilities.max_head_dim or 256
    wanted = (16, 8, 32, 40, 59, 64, 80, 96, 111, 128, 192, 256, largest, step)
    allowed = [dim for dim in wanted if dim <= largest and dim % step == 0]
    return tuple(dict.fromkeys(allowed))


def limits(
    capabilities: Capabilities,
    features: frozenset[Feature],
    dtypes: tuple[torch.dtype, ...],
    max_length: int,
    dims: tuple[int, ...],
) -> Limits:
    decodes_only = not {Phase.TRAIN, Phase.PREFILL} & capabilities.phases
    return Limits(
        features=features,
        dtypes=dtypes,
        head_dims=dims,
        max_length=max_length,
        max_queries=1 if decodes_only else capabilities.max_queries,
    )


# -- one case ----------------------------------------------------------------------------------------------------------


def case_with(features: frozenset[Feature], limits: Limits, *, n_keys: int, dtype: torch.dtype, seed: int) -> Case:
    """The plainest case that needs exactly `features` (and lse and gradients where they can be had)."""
    page = 4 if F.PAGED in features else None
    n_keys = max(n_keys // 4, 1) * 4 if page else n_keys
    n_queries = n_keys // 2 + 1 if F.CROSS_LENGTH in features else n_keys
    if limits.max_queries is not None:
        n_queries = min(n_queries, limits.max_queries) if F.CROSS_LENGTH in features else 1
    position: Positions = "none"
    if F.POSITIONS in features:
        position = "chunk" if F.CROSS_LENGTH in features else "left padding"
    dim = limits.head_dims[0]
    other = next((d for d in limits.head_dims if d != dim), dim + 8)
    case = Case(
        spec=spec_with(features),
        n_queries=n_queries,
        n_keys=n_keys,
        heads=4 if F.GQA in features else 2,
        kv_heads=2,
        head_dim=dim,
        value_dim=other if F.VALUE_DIM in features else dim,
        dtype=dtype,
        lse=limits.lse,
        backward=limits.backward and F.QUANTIZED_KV not in features,
        positions=position,
        kv_lengths="ragged" if F.KV_LENGTHS in features else "none",
        page=page,
        stored=torch.int8 if F.QUANTIZED_KV in features else None,
        seed=seed,
    )
    return with_layout(case, 16, 16) if F.BLOCK_SPARSE in features else case


def spec_with(features: frozenset[Feature]) -> AttentionSpec:
    causal = F.CAUSAL in features
    window = Window()
    if F.WINDOW in features:
        window = Window(left=5) if causal else Window(4, 2)
    if F.DILATION in features:
        window = dataclasses.replace(window, dilation=3)
    return AttentionSpec(
        causal=causal,
        window=window,
        global_tokens=F.GLOBAL_TOKENS in features,
        documents=F.DOCUMENTS in features,
        alibi=F.ALIBI in features,
        softcap=0.8 if F.SOFTCAP in features else None,
        sink_tokens=2 if F.SINK_TOKENS in features else 0,
        learned_sink=F.LEARNED_SINK in features,
        scale=None,
        dropout=0.3 if F.DROPOUT in features else 0.0,
    )


def with_layout(case: Case, q_block: int, kv_block: int) -> Case:
    """`case` under a block layout: a checkered band, one query block that may look nowhere, one key block unseen."""
    n = reach(case.positions, case.n_queries, case.n_keys)
    rows, columns = -(-n // q_block), -(-n // kv_block)
    pattern = [[(i - j) % 3 != 1 and i != 2 and j != 4 for j in range(columns)] for i in range(rows)]
    layout = BlockLayout.from_rows(pattern, q_block=q_block, kv_block=kv_block)
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, block_sparse=layout))


# -- by construction ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes cases of the features given; dtypes take turns. What is drawn depends on the features alone, so that a
    run over some features sees the same cases as a run over all."""

    limits: Limits
    seed: int

    def __call__(self, *features: Feature, dtype: torch.dtype | None = None, n_keys: int | None = None) -> Case:
        n_keys = min(self.limits.max_length, 37) if n_keys is None else n_keys
        number = crc32(" ".join([*sorted(features), str(n_keys)]).encode()) % 2**16
        turn = self.limits.dtypes[number % len(self.limits.dtypes)]
        return case_with(
            frozenset(features), self.limits, n_keys=n_keys, dtype=dtype or turn, seed=number + self.seed * 2**17
        )


def basics(limits: Limits, seed: int) -> Iterator[Case]:
    """Plain attention and each feature alone, in each dtype."""
    make = Maker(limits, seed)
    for dtype in limits.dtypes:
        yield make(dtype=dtype)
        for feature in sorted(limits.features & OF_A_CASE):
            yield make(feature, dtype=dtype)


def by_construction(limits: Limits, seed: int) -> Iterator[Case]:
    """What every run contains beside the basics: variants, pairs, and the edges of every size."""
    features = sorted(limits.features & OF_A_CASE)
    make = Maker(limits, seed)
    for feature in features:
        for variant in _variants(feature, make(feature)):
            yield variant
            if F.CAUSAL in features and not variant.spec.causal:
                yield dataclasses.replace(variant, spec=dataclasses.replace(variant.spec, causal=True))
    for pair in itertools.combinations(features, 2):
        yield make(*pair)
        if F.KV_LENGTHS in pair:
            yield dataclasses.replace(make(*pair), kv_lengths="a row without keys")
        if F.CROSS_LENGTH in pair and F.BLOCK_SPARSE not in pair:
            yield from _more_queries_than_keys(make, *pair)
    yield from _triples(features, make)
    yield from _sizes(limits, make)
    yield from _values(limits, make)


def all_at_once(limits: Limits, seed: int) -> Iterator[Case]:
    """Every feature in one call, causal and not."""
    make = Maker(limits, seed)
    stored_otherwise = limits.features & {F.PAGED, F.QUANTIZED_KV}
    every = (limits.features & OF_A_CASE) - stored_otherwise
    yield make(*every)
    yield make(*(every - {F.CAUSAL}))
    if stored_otherwise:
        yield make(*every, *stored_otherwise)


def _more_queries_than_keys(make: Maker, *features: Feature) -> Iterator[Case]:
    most = make.limits.max_queries
    case = make(*features, n_keys=None if most is None else max(most - 5, 1))
    if most is None or most > case.n_keys:
        yield dataclasses.replace(case, n_queries=case.n_keys + 5 if most is None else most)


def _triples(features: list[Feature], make: Maker) -> Iterator[Case]:
    """Three that traps are made of: what a pair leaves undecided."""
    for three in (
        (F.CAUSAL, F.WINDOW, F.GLOBAL_TOKENS),
        (F.CAUSAL, F.WINDOW, F.SINK_TOKENS),
        (F.CAUSAL, F.WINDOW, F.CROSS_LENGTH),
        (F.CAUSAL, F.WINDOW, F.DILATION),
        (F.WINDOW, F.SINK_TOKENS, F.DOCUMENTS),
        (F.WINDOW, F.GLOBAL_TOKENS, F.DOCUMENTS),
        (F.WINDOW, F.GLOBAL_TOKENS, F.CROSS_LENGTH),
        (F.CROSS_LENGTH, F.POSITIONS, F.CAUSAL),
        (F.CROSS_LENGTH, F.POSITIONS, F.WINDOW),
        (F.ALIBI, F.SOFTCAP, F.CAUSAL),
        (F.LEARNED_SINK, F.CAUSAL, F.CROSS_LENGTH),
        (F.GQA, F.DROPOUT, F.CAUSAL),
        (F.PAGED, F.QUANTIZED_KV, F.KV_LENGTHS),
        (F.PAGED, F.WINDOW, F.KV_LENGTHS),
        (F.PAGED, F.GQA, F.CROSS_LENGTH),
    ):
        if set(three) <= set(features):
            yield make(*three)


def _variants(feature: Feature, case: Case) -> Iterator[Case]:
    """Other ways of asking for the same feature."""

    def window(left: int | None, right: int | None, dilation: int = 1) -> Case:
        return dataclasses.replace(case, spec=dataclasses.replace(case.spec, window=Window(left, right, dilation)))

    if feature is F.WINDOW:
        yield from (window(0, 0), window(1, None), window(None, 3), window(500, 500), window(16, 15))
    elif feature is F.DILATION:
        yield window(None, None, 40)
    elif feature is F.DOCUMENTS:
        yield dataclasses.replace(case, scattered=True)
        yield dataclasses.replace(case, shared=True)
    elif feature is F.POSITIONS:
        for kind in ("offset", "ring", "chunk"):
            yield dataclasses.replace(case, positions=kind)
        yield dataclasses.replace(case, positions="ring", shared=True)
    elif feature is F.KV_LENGTHS:
        yield dataclasses.replace(case, kv_lengths="a row without keys")
    elif feature is F.PAGED:  # one key, one whole row, and what is no power of two
        for page in (1, case.n_keys, *(page for page in (6, 9, 16) if case.n_keys % page == 0)):
            yield dataclasses.replace(case, page=page)
    elif feature is F.QUANTIZED_KV:
        yield dataclasses.replace(case, stored=torch.float8_e4m3fn)
    elif feature is F.BLOCK_SPARSE:
        yield with_layout(case, 16, 5)
        yield with_layout(case, 7, 16)


def _sizes(limits: Limits, make: Maker) -> Iterator[Case]:
    """Lengths around multiples of tiles, the shortest, more queries than keys, and head dims."""
    causal = [F.CAUSAL] if F.CAUSAL in limits.features else []
    window = [F.WINDOW] if F.WINDOW in limits.features else []
    for n_keys in limits.lengths:
        yield make(*causal, *window, n_keys=n_keys)
    if F.CROSS_LENGTH in limits.features:
        longest = limits.lengths[-1]
        for n_queries, n_keys in ((1, 1), (1, longest), (longest, 1), (17, 33), (33, 17), (16, longest), (longest, 16)):
            if max(n_queries, n_keys) <= limits.max_length and n_queries <= (limits.max_queries or n_queries):
                for chosen in (causal, window, [*causal, *window]):
                    yield dataclasses.replace(make(*chosen, n_keys=n_keys), n_queries=n_queries)
    for dim in limits.head_dims[1:]:
        yield dataclasses.replace(make(*causal, n_keys=19), head_dim=dim, value_dim=dim)


def _values(limits: Limits, make: Maker) -> Iterator[Case]:
    """Memory layouts, outliers and huge scores, one sequence, one head."""
    some = [feature for feature in (F.CAUSAL, F.GQA) if feature in limits.features]
    for memory in MEMORIES:
        yield dataclasses.replace(make(*some), memory=memory)
    for dtype in limits.dtypes:
        yield dataclasses.replace(make(*some, dtype=dtype), values="outliers")
        huge = make(*some, dtype=dtype)
        yield dataclasses.replace(huge, values="huge scores", spec=dataclasses.replace(huge.spec, scale=1.0))
    yield dataclasses.replace(make(*some), spec=dataclasses.replace(make(*some).spec, scale=0.6))
    yield dataclasses.replace(make(), batch=1, heads=1, kv_heads=1)
    if F.GQA in limits.features:
        yield dataclasses.replace(make(F.GQA), heads=6, kv_heads=1)
        yield dataclasses.replace(make(F.GQA), heads=6, kv_heads=2, batch=3)


# -- what random draws choose from -------------------------------------------------------------------------------------

POSITIONS: tuple[Positions, ...] = ("offset", "chunk", "left padding", "ring")
LENGTHS: tuple[Lengths, ...] = ("ragged", "a row without keys")
STORED = tuple(LARGEST)
PAGES = (1, 2, 3, 4, 8, 16, 32, 64)
VALUES: tuple[Values, ...] = ("normal", "normal", "outliers")
