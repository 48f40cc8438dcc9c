"""Random cases: Hypothesis draws any combination of what is allowed, and shrinks what fails."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from ..attention.backend import Feature
from ..attention.spec import Window
from .cases import Case
from .plan import LENGTHS, MEMORIES, OF_A_CASE, PAGES, POSITIONS, STORED, VALUES, Limits, case_with, with_layout

F = Feature
Drawn = TypeVar("Drawn", bound=Hashable)


class _Failing(Exception):  # noqa: N818  # control flow between Hypothesis and `explore`, never seen by anybody else
    pass


@st.composite
def cases(draw: st.DrawFn, limits: Limits) -> Case:
    """A case of any allowed features, shrinking to few of them, short lengths and plain values."""
    features = frozenset(f for f in sorted(limits.features & OF_A_CASE) if draw(st.booleans()))
    dtype = draw(st.sampled_from(limits.dtypes))
    length = st.sampled_from(limits.lengths) | st.integers(1, limits.max_length)
    case = case_with(features, limits, n_keys=draw(length), dtype=dtype, seed=draw(st.integers(0, 2**16)))
    dim = draw(st.sampled_from(limits.head_dims))
    queries = length if limits.max_queries is None else st.integers(1, limits.max_queries)
    case = dataclasses.replace(
        case,
        n_queries=draw(queries) if F.CROSS_LENGTH in features else case.n_queries,
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        head_dim=dim,
        value_dim=draw(st.sampled_from(limits.head_dims)) if F.VALUE_DIM in features else dim,
        backward=case.backward and draw(st.booleans()),
        memory=draw(st.sampled_from(("contiguous", *MEMORIES))),
        values=draw(st.sampled_from(VALUES)),
        positions=draw(st.sampled_from(POSITIONS)) if F.POSITIONS in features else "none",
        scattered=draw(st.booleans()),
        kv_lengths=draw(st.sampled_from(LENGTHS)) if F.KV_LENGTHS in features else "none",
        shared=draw(st.booleans()),
        page=draw(st.sampled_from([p for p in PAGES if case.n_keys % p == 0])) if F.PAGED in features else None,
        stored=draw(st.sampled_from(STORED)) if F.QUANTIZED_KV in features else None,
    )
    group = draw(st.integers(2, 4)) if F.GQA in features else 1
    case = dataclasses.replace(case, heads=case.kv_heads * group)
    if F.WINDOW in features:
        side = st.none() | st.integers(0, 40)
        left, right = draw(side), draw(side)
        window = Window(2 if left is None and right is None else left, right, case.spec.window.dilation)
        case = dataclasses.replace(case, spec=dataclasses.replace(case.spec, window=window))
    if F.BLOCK_SPARSE in features:
        case = with_layout(case, draw(st.sampled_from((16, 32, 64, 5))), draw(st.sampled_from((16, 32, 64, 7))))
    return case


def explore(limits: Limits, fails: Callable[[Case], bool], *, examples: int, random_seed: int) -> None:
    explore_cases(cases(limits), fails, examples=examples, random_seed=random_seed)


def explore_cases(
    drawn: st.SearchStrategy[Drawn], fails: Callable[[Drawn], bool], *, examples: int, random_seed: int
) -> None:
    """Calls `fails` on `examples` drawn cases; once it says yes, on ever smaller ones, at most `examples + 50`."""
    failed: set[Drawn] = set()
    shrinks = itertools.count()

    @seed(random_seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(drawn)
    def one(case: Drawn) -> None:
        # A slow kernel is not to be shrunk for minutes: beyond the limit only what failed before fails again.
        if case not in failed and failed and next(shrinks) >= examples + 50:
            return
        if case in failed or fails(case):
            failed.add(case)
            raise _Failing

    try:
        one()
    except _Failing:
        return
