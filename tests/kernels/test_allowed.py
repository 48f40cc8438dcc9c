"""`AttentionContext.allowed` is the definition: literal matrices, and a plain-Python oracle for everything at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window


def rows(allowed: torch.Tensor) -> list[str]:
    """The matrix of the first sequence as strings of 0 and 1."""
    return ["".join("1" if cell else "0" for cell in row) for row in allowed[0].tolist()]


def matrix(spec: AttentionSpec, T: int, S: int, **context: torch.Tensor) -> list[str]:
    return rows(AttentionContext(**context).allowed(spec, slice(0, T), slice(0, S), lengths=(T, S)))


def ids(*values: int) -> torch.Tensor:
    return torch.tensor([values])


CAUSAL = AttentionSpec(causal=True)
FULL = AttentionSpec(causal=False)


@pytest.mark.parametrize(
    ("spec", "T", "S", "expected"),
    [
        (FULL, 2, 3, ["111", "111"]),
        (CAUSAL, 3, 3, ["100", "110", "111"]),
        (CAUSAL, 2, 5, ["11110", "11111"]),  # bottom-right: the last query stands at the last key
        (CAUSAL, 1, 4, ["1111"]),
        (CAUSAL, 5, 2, ["00", "00", "00", "10", "11"]),  # queries before the first key see nothing
        (AttentionSpec(causal=True, window=Window(left=0)), 3, 3, ["100", "010", "001"]),
        (AttentionSpec(causal=True, window=Window(left=1)), 4, 4, ["1000", "1100", "0110", "0011"]),
        (AttentionSpec(causal=True, window=Window.causal_keys(3)), 5, 5, ["10000", "11000", "11100", "01110", "00111"]),
        (AttentionSpec(causal=True, window=Window(left=1)), 2, 4, ["0110", "0011"]),
        (AttentionSpec(causal=True, window=Window(left=1, right=7)), 3, 3, ["100", "110", "011"]),
        (
            AttentionSpec(causal=False, window=Window(left=1, right=2)),
            5,
            5,
            ["11100", "11110", "01111", "00111", "00011"],
        ),
        (AttentionSpec(causal=False, window=Window(left=None, right=0)), 3, 3, ["100", "110", "111"]),
        (AttentionSpec(causal=False, window=Window(left=0, right=None)), 3, 3, ["111", "011", "001"]),
        (
            AttentionSpec(causal=False, window=Window.symmetric(1, dilation=2)),
            6,
            6,
            ["101000", "010100", "101010", "010101", "001010", "000101"],
        ),
        (
            AttentionSpec(causal=True, window=Window(left=2, dilation=2)),
            6,
            6,
            ["100000", "010000", "101000", "010100", "101010", "010101"],
        ),
        (
            AttentionSpec(causal=True, window=Window(left=1, dilation=3)),
            5,
            5,
            ["10000", "01000", "00100", "10010", "01001"],
        ),
        (AttentionSpec(causal=True, window=Window(dilation=2)), 4, 4, ["1000", "0100", "1010", "0101"]),
        (AttentionSpec(causal=False, window=Window(left=0, right=1)), 3, 2, ["10", "11", "01"]),
        (AttentionSpec(causal=True, window=Window(left=0), sink_tokens=2), 4, 4, ["1000", "1100", "1110", "1101"]),
    ],
)
def test_positions_only(spec: AttentionSpec, T: int, S: int, expected: list[str]) -> None:
    assert matrix(spec, T, S) == expected


def test_documents_need_not_be_sorted() -> None:
    spec = AttentionSpec(causal=True, documents=True)
    expected = ["10000", "01000", "10100", "00010", "01001"]
    assert matrix(spec, 5, 5, q_documents=ids(7, -1, 7, 3, -1)) == expected
    assert matrix(spec, 5, 5, kv_documents=ids(7, -1, 7, 3, -1)) == expected
    assert matrix(spec, 2, 5, q_documents=ids(3, -1), kv_documents=ids(7, -1, 7, 3, -1)) == expected[3:]


def test_sinks_are_the_first_keys_of_each_document() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=0), documents=True, sink_tokens=1)
    assert matrix(spec, 6, 6, q_documents=ids(5, 5, 5, 2, 2, 2)) == [
        "100000",
        "110000",
        "101000",
        "000100",
        "000110",
        "000101",
    ]


def test_sinks_follow_positions_not_slots() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=0), sink_tokens=1)
    positions = ids(-1, -1, 0, 1)  # left padding: the sequence starts in slot 2
    assert matrix(spec, 4, 4, kv_positions=positions) == ["0000", "0000", "0010", "0011"]
    spec = AttentionSpec(causal=True, window=Window(left=0), sink_tokens=1, documents=True)
    ring = ids(4, 1, 2, 3)
    assert matrix(
        spec, 1, 4, q_positions=ids(4), kv_positions=ring, q_documents=ids(0), kv_documents=ids(0, 0, 0, 0)
    ) == ["1100"]


def test_sinks_far_from_the_start() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=0), documents=True, sink_tokens=1)
    far = ids(9_000_000_000, 9_000_000_001, 9_000_000_002)
    given = {"q_positions": far, "kv_positions": far, "q_documents": ids(0, 0, 1)}
    assert matrix(spec, 3, 3, **given) == ["100", "110", "001"]


def test_a_padded_slot_does_not_start_a_document() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=0), documents=True, sink_tokens=1)
    context = AttentionContext(q_documents=ids(0, 0), kv_documents=ids(0, 0, 0), kv_positions=ids(-1, 0, 1))
    assert rows(context.allowed(spec, slice(0, 2), slice(0, 3))) == ["010", "011"]


def test_global_tokens_bidirectional() -> None:
    spec = AttentionSpec(causal=False, window=Window.symmetric(1), global_tokens=True)
    assert matrix(spec, 5, 5, is_global=torch.tensor([[False, False, False, True, False]])) == [
        "11010",
        "11110",
        "01110",
        "11111",
        "00011",
    ]
    assert matrix(spec, 3, 3) == ["110", "111", "011"]  # no flags: no globals


def test_global_tokens_stay_causal() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=0), global_tokens=True)
    assert matrix(spec, 4, 4, is_global=torch.tensor([[False, True, False, False]])) == ["1000", "1100", "0110", "0101"]


def test_global_queries_of_a_chunk_and_with_positions() -> None:
    spec = AttentionSpec(causal=False, window=Window.symmetric(0), global_tokens=True)
    flags = torch.tensor([[False, False, True, False]])
    assert matrix(spec, 2, 4, is_global=flags) == ["1111", "0011"]
    assert matrix(spec, 5, 4, is_global=flags) == ["0010", "1010", "0110", "1111", "0011"]
    assert matrix(spec, 2, 4, is_global=flags, q_positions=ids(9, 5), kv_positions=ids(2, 4, 9, 5)) == ["1111", "0011"]


def test_global_tokens_stay_in_their_document() -> None:
    spec = AttentionSpec(causal=False, window=Window.symmetric(0), global_tokens=True, documents=True)
    flags = torch.tensor([[True, False, False, False]])
    assert matrix(spec, 4, 4, is_global=flags, q_documents=ids(0, 0, 1, 1)) == ["1100", "1100", "0010", "0001"]


def test_a_global_flag_on_an_empty_slot_is_nobody() -> None:
    spec = AttentionSpec(causal=False, window=Window.symmetric(0), global_tokens=True)
    flags = torch.tensor([[False, True, True]])
    assert matrix(spec, 3, 3, is_global=flags, kv_lengths=torch.tensor([2])) == ["110", "110", "010"]


LAYOUT = BlockLayout.from_rows([[1, 0], [1, 0], [0, 1]], q_block=2, kv_block=3)


def test_block_layout() -> None:
    spec = AttentionSpec(causal=False, block_sparse=LAYOUT)
    assert matrix(spec, 6, 6) == ["111000"] * 4 + ["000111"] * 2
    assert matrix(spec, 2, 6) == ["000111"] * 2  # blocks count positions, so a chunk sees what the whole would
    widened = AttentionSpec(causal=True, block_sparse=LAYOUT, sink_tokens=1)
    assert matrix(widened, 6, 6) == ["100000", "110000", "111000", "111000", "100110", "100111"]


def test_a_position_past_the_layout_is_an_error() -> None:
    spec = AttentionSpec(causal=False, block_sparse=LAYOUT)
    with pytest.raises(ValueError, match="covers 6 query and 6 key positions, but the call reaches 7 and 7"):
        matrix(spec, 7, 7)


def test_kv_lengths_and_empty_slots() -> None:
    assert matrix(CAUSAL, 4, 4, kv_lengths=torch.tensor([2])) == ["1000", "1100", "1100", "1100"]
    assert matrix(FULL, 2, 3, kv_lengths=torch.tensor([0])) == ["000", "000"]
    assert matrix(CAUSAL, 3, 4, q_positions=ids(0, 1, 2), kv_positions=ids(-1, 0, -1, 1)) == ["0100", "0101", "0101"]


def test_positions_rule_alignment() -> None:
    # a ring cache of four slots after six tokens, window of three keys
    spec = AttentionSpec(causal=True, window=Window.causal_keys(3))
    assert matrix(spec, 1, 4, q_positions=ids(5), kv_positions=ids(4, 5, 2, 3)) == ["1101"]
    # queries given, keys at 0 … S-1
    assert matrix(CAUSAL, 2, 4, q_positions=ids(0, 2)) == ["1000", "1110"]


def test_documents_are_required_by_the_spec() -> None:
    with pytest.raises(ValueError, match="neither q_documents nor kv_documents"):
        matrix(AttentionSpec(causal=True, documents=True), 2, 2)
    with pytest.raises(ValueError, match="pass both q_documents and kv_documents"):
        matrix(AttentionSpec(causal=True, documents=True), 2, 3, q_documents=ids(0, 0))


def test_kv_positions_alone_cannot_place_earlier_queries() -> None:
    with pytest.raises(ValueError, match="pass q_positions"):
        matrix(CAUSAL, 3, 2, kv_positions=ids(0, 1))


# -- the same in plain Python, for any combination ---------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionSpec, AttentionContext, int, int]:
    T, S = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    documents = draw(st.booleans())
    count = st.none() | st.integers(0, 4)
    spec = AttentionSpec(
        causal=draw(st.booleans()),
        window=Window(draw(count), draw(count), draw(st.integers(1, 3))),
        global_tokens=draw(st.booleans()),
        documents=documents,
        sink_tokens=draw(st.integers(0, 2)),
        block_sparse=draw(
            st.none()
            | st.builds(
                lambda bits: BlockLayout.from_rows([bits[i : i + 5] for i in range(0, 25, 5)], q_block=2, kv_block=3),
                st.lists(st.booleans(), min_size=25, max_size=25),
            )
        ),
    )

    def tensor(low: int, high: int, n: int) -> torch.Tensor:
        return torch.tensor([draw(st.lists(st.integers(low, high), min_size=n, max_size=n)) for _ in range(2)])

    explicit = draw(st.booleans())
    context = AttentionContext(
        q_positions=tensor(0, 8, T) if explicit else None,
        kv_positions=tensor(-1, 8, S) if explicit else None,
        q_documents=tensor(0, 2, T) if documents else None,
        kv_documents=tensor(0, 2, S) if documents else None,
        is_global=tensor(0, 1, S).bool() if draw(st.booleans()) else None,
        kv_lengths=tensor(0, S, 1)[:, 0] if draw(st.booleans()) else None,
    )
    return spec, context, T, S


def oracle(spec: AttentionSpec, context: AttentionContext, T: int, S: int, b: int) -> list[list[bool]]:
    def at(tensor: torch.Tensor | None, i: int, default: int) -> int:
        return default if tensor is None else int(tensor[b, i])

    q_pos = [at(context.q_positions, i, S - T + i) for i in range(T)]
    k_pos = [at(context.kv_positions, j, j) for j in range(S)]
    q_doc = [at(context.q_documents, i, 0) for i in range(T)]
    k_doc = [at(context.kv_documents, j, 0) for j in range(S)]
    exists = [k_pos[j] >= 0 and (context.kv_lengths is None or j < context.kv_lengths[b]) for j in range(S)]
    flagged = [spec.global_tokens and exists[j] and bool(at(context.is_global, j, 0)) for j in range(S)]

    def sees(i: int, j: int) -> bool:
        if not exists[j] or q_doc[i] != k_doc[j] or (spec.causal and k_pos[j] > q_pos[i]):
            return False
        start = min(k_pos[n] for n in range(S) if exists[n] and k_doc[n] == k_doc[j]) if spec.documents else 0
        sink = k_pos[j] < start + spec.sink_tokens
        query_is_global = any(flagged[n] and k_pos[n] == q_pos[i] and k_doc[n] == q_doc[i] for n in range(S))
        if sink or flagged[j] or query_is_global:
            return True
        window, back = spec.window, q_pos[i] - k_pos[j]
        if back % window.dilation:
            return False
        steps = back // window.dilation
        if (window.left is not None and steps > window.left) or (window.right is not None and -steps > window.right):
            return False
        layout = spec.block_sparse
        if layout is None:
            return True
        return q_pos[i] >= 0 and layout.pattern[q_pos[i] // layout.q_block][k_pos[j] // layout.kv_block]

    return [[sees(i, j) for j in range(S)] for i in range(T)]


@settings(max_examples=25, deadline=None)
@given(cases())
def test_allowed_is_what_plain_python_says(case: tuple[AttentionSpec, AttentionContext, int, int]) -> None:
    spec, context, T, S = case
    allowed = context.allowed(spec, slice(0, T), slice(0, S), lengths=(T, S)).expand(2, T, S)
    assert allowed.tolist() == [oracle(spec, context, T, S, b) for b in range(2)]


@settings(max_examples=25, deadline=None)
@given(cases(), st.data())
def test_a_slice_is_a_slice_of_the_whole(
    case: tuple[AttentionSpec, AttentionContext, int, int], data: st.DataObject
) -> None:
    spec, context, T, S = case
    whole = context.allowed(spec, slice(0, T), slice(0, S), lengths=(T, S)).expand(2, T, S)
    q_start, kv_start = data.draw(st.integers(0, T - 1)), data.draw(st.integers(0, S - 1))
    q = slice(q_start, data.draw(st.integers(q_start + 1, T)))
    kv = slice(kv_start, data.draw(st.integers(kv_start + 1, S)))
    part = context.allowed(spec, q, kv, lengths=(T, S))
    assert torch.equal(part.expand(whole[:, q, kv].shape), whole[:, q, kv])


def test_lengths_come_from_the_tensors_where_they_tell() -> None:
    spec = AttentionSpec(causal=True, documents=True)
    context = AttentionContext(q_documents=ids(0, 0, 1, 1))
    assert rows(context.allowed(spec, slice(2, 4), slice(1, 4))) == ["010", "011"]
