"""Pairs against the definition's own mask, the suites against what they promise."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from longspan.benchmarks import generation
from longspan.benchmarks.contenders import contenders, mask_mod
from longspan.benchmarks.patterns import bigbird, butterfly, document_lengths, random_blocks
from longspan.benchmarks.shapes import (
    PEERS,
    Case,
    Shapes,
    SuiteName,
    Target,
    allowed_pairs,
    suite,
)
from longspan.benchmarks.tensors import make_context
from longspan.kernels.attention import AttentionSpec, BlockLayout, Window
from longspan.training.config_keys import keys
from longspan.training.schema import BenchConfig

CPU = torch.device("cpu")
SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
TINY = [case for name in SUITES for case in suite(name, "tiny")]


def visible(case: Case) -> torch.Tensor:
    """[S, S] the mask of one sequence, from the definition."""
    everything = slice(0, case.length)
    return make_context(case, CPU).allowed(case.spec, everything, everything, device=CPU)[0]


def odd(spec: AttentionSpec, **more: tuple[int, ...]) -> Case:
    return Case(name="odd", spec=spec, heads=1, kv_heads=1, length=37, head_dim=16, **more)


ODD = [
    odd(AttentionSpec(causal=True, window=Window.causal_keys(5), documents=True), documents=(4, 1, 20, 12)),
    odd(AttentionSpec(causal=True, window=Window(left=3), global_tokens=True), global_at=(0, 9, 36)),
    odd(AttentionSpec(causal=False, window=Window(2, 7), global_tokens=True), global_at=(5, 6, 7)),
    odd(AttentionSpec(causal=False, window=Window(left=None, right=2))),
    odd(AttentionSpec(causal=False, window=Window(4, 3, dilation=3))),
    odd(AttentionSpec(causal=True, window=Window(None, None, dilation=4))),
    odd(
        AttentionSpec(causal=False, window=Window(3, 3), global_tokens=True, documents=True),
        documents=(10, 27),
        global_at=(2, 30),
    ),
]


@pytest.mark.parametrize("case", [*TINY, *ODD], ids=lambda case: case.name)
def test_pairs_are_those_of_the_definition(case: Case) -> None:
    assert allowed_pairs(case) == int(visible(case).expand(case.length, case.length).sum())


def test_flops_follow_the_convention() -> None:
    causal, full = suite("attention", "tiny")
    assert causal.flops("forward") == 4 * 2 * 4 * 128 * 128 / 2 * 16
    assert full.flops("backward") == 2.5 * 4 * 2 * 96 * 96 * 16
    assert full.flops("both") == full.flops("forward") + full.flops("backward")


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_mask_mod_that_flex_compiles_is_the_same_mask(case: Case) -> None:
    mod = mask_mod(case, CPU)
    q_idx, kv_idx = torch.arange(case.length)[:, None], torch.arange(case.length)[None, :]
    zero = torch.zeros((), dtype=torch.long)
    seen = torch.ones(case.length, case.length, dtype=torch.bool) if mod is None else mod(zero, zero, q_idx, kv_idx)
    assert torch.equal(seen, visible(case).expand(case.length, case.length))


@pytest.mark.parametrize("shapes", get_args(Shapes))
@pytest.mark.parametrize("name", SUITES)
def test_suites_are_sound(name: SuiteName, shapes: Shapes) -> None:
    cases = suite(name, shapes)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert cases
    for at, case in enumerate(cases):
        assert case.pairs > 0
        assert not case.documents or sum(case.documents) == case.length
        assert set(case.peers) <= set(PEERS)
        answered = [(target.quantity, target.peer) for target in case.targets]
        assert len(set(answered)) == len(answered), "a row answers one target"
        for target in case.targets:
            assert target.peer is None or target.peer in case.peers
            assert target.baseline is None or target.baseline in names[:at], "a baseline is measured before"
    if shapes == "tiny":
        assert not any(case.targets for case in cases)
    if shapes == "quick":
        assert set(names) <= {case.name for case in suite(name, "full")}


def test_targets_bound_on_both_sides() -> None:
    target = Target(text="", quantity="both", at_least=1.9, at_most=2.1)
    assert [target.met(ratio) for ratio in (1.8, 1.9, 2.0, 2.1, 2.2)] == [False, True, True, True, False]
    linear = next(case for case in suite("window", "full") if case.series and case.length == 32768).targets[0]
    assert (linear.expected, linear.at_least, linear.at_most) == (2.0, 0.95, 1.05)


def test_documents_have_the_mean_that_is_asked_for() -> None:
    lengths = document_lengths(2**22, 2048)
    assert sum(lengths) == 2**22
    assert 0.9 * 2048 < sum(lengths) / len(lengths) < 1.1 * 2048
    assert document_lengths(1000, 100, seed=1) != document_lengths(1000, 100, seed=2)


def test_layouts() -> None:
    assert [[int(cell) for cell in row] for row in butterfly(4)] == [
        [1, 1, 1, 0],
        [1, 1, 0, 1],
        [1, 0, 1, 1],
        [0, 1, 1, 1],
    ]
    assert all(sum(row) == 3 and row[i] for i, row in enumerate(random_blocks(8, 3)))
    big = bigbird(16)
    assert all(big[0])
    assert all(row[0] and row[1] for row in big)
    assert all(big[i][j] for i in range(16) for j in range(16) if abs(i - j) <= 1)
    assert sum(big[8]) == 3 + 2 + 3


def test_pairs_of_a_layout_that_does_not_fit_are_refused() -> None:
    case = odd(AttentionSpec(causal=False, block_sparse=BlockLayout.from_rows([[1]], q_block=32, kv_block=32)))
    with pytest.raises(ValueError, match="fits exactly"):
        allowed_pairs(case)


def test_the_schema_knows_suites_shapes_and_peers() -> None:
    choices = {key.path: key.choices for key in keys(BenchConfig)}
    assert choices["suite"] == (*SUITES, "decode", "generation")  # the last two have cases of their own
    assert choices["shapes"] == get_args(Shapes)
    words = next(key.allowed for key in keys(BenchConfig) if key.path == "peers")
    assert all(name in words for name in (*PEERS, *generation.PEERS))
    assert tuple(contenders("sdpa"))[1:] == PEERS
