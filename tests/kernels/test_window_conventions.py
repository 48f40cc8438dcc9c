"""Other systems' window numbers, translated: one literal predicate each, as that system writes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longspan.kernels.attention import AttentionContext, AttentionSpec, Window

N = 11


def foreign(sees: Callable[[int, int], bool]) -> list[list[bool]]:
    return [[sees(i, j) for j in range(N)] for i in range(N)]


def ours(spec: AttentionSpec) -> list[list[bool]]:
    return AttentionContext().allowed(spec, slice(0, N), slice(0, N))[0].tolist()


@pytest.mark.parametrize("W", [1, 4, 5])
def test_hugging_face_and_mistral_causal_sliding_window_counts_the_query(W: int) -> None:
    theirs = foreign(lambda q, kv: kv > q - W and kv <= q)
    assert ours(AttentionSpec(causal=True, window=Window.causal_keys(W))) == theirs


@pytest.mark.parametrize("attention_window", [2, 4, 8])
def test_hugging_face_longformer_window_is_the_total_of_both_sides(attention_window: int) -> None:
    one_side = attention_window // 2
    theirs = foreign(lambda q, kv: abs(q - kv) <= one_side)
    assert ours(AttentionSpec(causal=False, window=Window.symmetric(attention_window // 2))) == theirs


@pytest.mark.parametrize(("attention_window", "dilation"), [(2, 1), (2, 2), (1, 3)])
def test_allenai_longformer_window_is_per_side_and_dilation_counts_keys(attention_window: int, dilation: int) -> None:
    theirs = foreign(
        lambda q, kv: (q - kv) in {step * dilation for step in range(-attention_window, attention_window + 1)}
    )
    assert ours(AttentionSpec(causal=False, window=Window.symmetric(attention_window, dilation))) == theirs


@pytest.mark.parametrize(("left", "right"), [(3, 0), (2, 5), (0, 0), (-1, 2), (2, -1), (-1, -1)])
def test_flash_attention_sides_are_inclusive_and_minus_one_is_unlimited(left: int, right: int) -> None:
    theirs = foreign(lambda q, kv: (left < 0 or kv >= q - left) and (right < 0 or kv <= q + right))
    window = Window(None if left < 0 else left, None if right < 0 else right)
    assert ours(AttentionSpec(causal=False, window=window)) == theirs


@pytest.mark.parametrize("W", [1, 4])
def test_megatron_nanochat_and_nanotron_flex_see_one_key_more(W: int) -> None:
    theirs = foreign(lambda q, kv: q - kv <= W and kv <= q)
    assert ours(AttentionSpec(causal=True, window=Window(left=W))) == theirs
    assert ours(AttentionSpec(causal=True, window=Window.causal_keys(W))) != theirs


@pytest.mark.parametrize("W", [1, 3])
def test_hugging_face_bidirectional_sliding_window_is_per_side(W: int) -> None:
    theirs = foreign(lambda q, kv: abs(q - kv) <= W)
    assert ours(AttentionSpec(causal=False, window=Window.symmetric(W))) == theirs


def test_flash_attention_alignment_is_ours() -> None:
    # FlashAttention >= 2.1, README: "If seqlen_q = 2 and seqlen_k = 5 … 1 1 1 1 0 / 1 1 1 1 1", bottom-right
    allowed = AttentionContext().allowed(AttentionSpec(causal=True), slice(0, 2), slice(0, 5))
    assert allowed[0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    sdpa = torch.ones(2, 5, dtype=torch.bool).tril()  # torch's is_causal: top-left
    assert not torch.equal(allowed[0], sdpa)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Window(left=-1), "window.left=-1"),
        (lambda: Window(right=-2), "window.right=-2"),
        (lambda: Window(dilation=0), "window.dilation=0"),
        (lambda: Window.causal_keys(0), "at least the query's own key"),
        (lambda: AttentionSpec(causal=True, dropout=1.0), "dropout=1.0"),
        (lambda: AttentionSpec(causal=True, softcap=0.0), "softcap=0.0"),
        (lambda: AttentionSpec(causal=True, scale=-1.0), "scale=-1.0"),
        (lambda: AttentionSpec(causal=True, sink_tokens=-1), "sink_tokens=-1"),
    ],
)
def test_impossible_specs_are_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
