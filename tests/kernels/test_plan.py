"""What the fused kernels read of a context, against `AttentionContext.allowed`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.kernels.attention.plan import make_plan, narrows

CPU = torch.device("cpu")


@st.composite
def documents(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of queries and keys, large and negative ones too, in any order."""
    ids = draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4, unique=True))
    rows = [
        [draw(st.lists(st.sampled_from(ids), min_size=n, max_size=n)) for _ in range(2)]
        for n in (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    ]
    if draw(st.booleans()):
        rows = [[sorted(row) for row in side] for side in rows]
    return torch.tensor(rows[0]), torch.tensor(rows[1])


@settings(max_examples=60, deadline=None)
@given(documents())
def test_documents_and_their_spans(ids: tuple[torch.Tensor, torch.Tensor]) -> None:
    q_ids, k_ids = ids
    T, S = q_ids.shape[1], k_ids.shape[1]
    spec = AttentionSpec(causal=False, documents=True)
    context = AttentionContext(q_documents=q_ids, kv_documents=k_ids)
    seen = context.allowed(spec, slice(0, T), slice(0, S))
    plan = make_plan(context, spec, T, S, CPU)
    assert plan.q_doc is not None
    assert plan.k_doc is not None
    assert plan.q_span is not None
    assert plan.k_span is not None
    assert torch.equal(plan.q_doc[:, :, None] == plan.k_doc[:, None, :], seen)
    for picture, spans in ((seen, plan.q_span), (seen.transpose(1, 2), plan.k_span)):
        for row, (lo, full_lo, full_hi, hi) in zip(picture.flatten(0, 1), spans.flatten(0, 1).tolist(), strict=True):
            where = row.nonzero().flatten().tolist()
            if not where:
                assert lo >= hi
                assert full_lo >= full_hi
                continue
            assert (lo, hi) == (where[0], where[-1] + 1)
            if len(where) == hi - lo:
                assert (full_lo, full_hi) == (lo, hi)
            else:
                assert full_lo >= full_hi


def test_what_is_visible_from_everywhere_comes_first() -> None:
    flags = torch.zeros(2, 40, dtype=torch.bool)
    flags[0, [3, 17]] = True
    flags[1, 39] = True
    spec = AttentionSpec(causal=True, window=Window(left=4), global_tokens=True, sink_tokens=2)
    context = AttentionContext(is_global=flags, kv_lengths=torch.tensor([40, 30]))
    plan = make_plan(context, spec, 25, 40, CPU)
    assert plan.always is not None
    assert plan.n_always is not None
    assert plan.rows is not None
    assert plan.n_rows is not None
    assert plan.is_global is not None
    assert plan.n_always.tolist() == [4, 2]  # key 39 of the second does not exist
    assert plan.always[0, :4].tolist() == [0, 1, 3, 17]
    assert plan.always[1, :2].tolist() == [0, 1]
    assert plan.n_rows.tolist() == [1, 0]  # query 2 is at key 17; the other global keys have no query here
    assert plan.rows[0, 0] == 2
    assert plan.is_global.sum() == 1
    assert plan.most_always == 16
    assert plan.most_rows == 16


def test_what_plays_no_part_is_left_out() -> None:
    none = torch.zeros(1, 8, dtype=torch.bool)
    spec = AttentionSpec(causal=True, window=Window(left=1), global_tokens=True)
    plan = make_plan(AttentionContext(is_global=none), spec, 8, 8, CPU)
    assert plan.always is plan.rows is plan.is_global is None
    wide = AttentionSpec(causal=True, global_tokens=True, sink_tokens=3)
    plan = make_plan(AttentionContext(is_global=~none), wide, 8, 8, CPU)
    assert plan.always is plan.rows is None, "an unlimited window already shows everything"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (AttentionSpec(causal=True), False),
        (AttentionSpec(causal=True, window=Window(None, 3)), False),
        (AttentionSpec(causal=False, window=Window(None, 3)), True),
        (AttentionSpec(causal=True, window=Window(3)), True),
        (AttentionSpec(causal=True, window=Window(dilation=2)), True),
        (AttentionSpec(causal=True, block_sparse=BlockLayout.from_rows([[1]])), True),
    ],
)
def test_narrowing(spec: AttentionSpec, expected: bool) -> None:
    assert narrows(spec) is expected
