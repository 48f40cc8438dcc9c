"""Random cases for caches: Hypothesis draws layers and programs, and shrinks what fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from ..attention.backend import Feature
from ..attention.spec import AttentionSpec
from .cache_cases import FULL, LAYOUT, CacheCase, Program, window
from .draws import explore_cases

_REACH = min(len(LAYOUT.pattern) * LAYOUT.q_block, len(LAYOUT.pattern[0]) * LAYOUT.kv_block)


@st.composite
def specs(draw: st.DrawFn, without: frozenset[Feature], max_length: int) -> AttentionSpec:
    """A causal spec, shrinking to full attention."""

    def wants(feature: Feature) -> bool:
        return feature not in without and draw(st.booleans())

    left = draw(st.none() | st.integers(0, 7))
    features: dict[str, Any] = {}
    for feature, value in ((Feature.ALIBI, True), (Feature.SOFTCAP, 0.8), (Feature.LEARNED_SINK, True)):
        if draw(st.integers(0, 3)) == 3:  # they change nothing about where keys are: seldom is enough
            features[str(feature)] = value
    for feature in (Feature.DOCUMENTS, Feature.GLOBAL_TOKENS):
        if wants(feature):
            features[str(feature)] = True
    if wants(Feature.SINK_TOKENS):
        features["sink_tokens"] = draw(st.integers(1, 3))
    if max_length <= _REACH and draw(st.integers(0, 7)) == 7:
        features["block_sparse"] = LAYOUT
    spec = FULL if left is None else window(left, draw(st.integers(1, 3)))
    return replace(spec, **features)


@st.composite
def programs(draw: st.DrawFn, without: frozenset[Feature], max_length: int) -> Program:
    """Calls of any size, single tokens often, and steps back now and then."""
    batch, left = draw(st.integers(1, 3)), max_length
    ragged = Feature.KV_LENGTHS not in without and draw(st.booleans())
    program: list[tuple[int, ...] | int] = []
    for n_tokens in draw(st.lists(st.just(1) | st.integers(1, 24), min_size=1, max_size=20)):
        if n_tokens > left:
            break
        left -= n_tokens
        others = [draw(st.integers(0, n_tokens)) if ragged else n_tokens for _ in range(batch - 1)]
        program.append((n_tokens, *others))
        if draw(st.integers(0, 9)) == 9:
            program.append(draw(st.integers(0, max_length - left)))
    return tuple(program) or ((1,) * batch,)


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype], without: frozenset[Feature], max_length: int) -> CacheCase:
    spec = specs(without, max_length)
    layers = tuple(
        (draw(spec), draw(spec)) if draw(st.integers(0, 3)) == 3 else (draw(spec),)
        for _ in range(draw(st.integers(2, 3)))
    )
    return CacheCase(
        layers=layers,
        program=draw(programs(without, max_length)),
        padding=0 if Feature.KV_LENGTHS in without else draw(st.sampled_from((0, 0, 0, 2))),
        shared=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from((8, 16))),
        dtype=draw(st.sampled_from(list(dtypes))),
        marked=draw(st.sampled_from((True, True, True, False))),
        seed=draw(st.integers(0, 2**16)),
    )


def explore(
    fails: Callable[[CacheCase], bool],
    dtypes: Sequence[torch.dtype],
    without: frozenset[Feature],
    *,
    examples: int,
    random_seed: int,
    max_length: int,
) -> None:
    explore_cases(cases(dtypes, without, max_length), fails, examples=examples, random_seed=random_seed)
