"""Packings: every token once, no short document cut, capacity respected, the same again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.packing import Packing, Span, pack

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
CONTEXT = st.integers(1, 32)


def rows(packing: Packing) -> list[list[Span]]:
    return [packing.spans(index) for index in range(len(packing))]


def tokens(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.document, span.start + offset) for span in spans for offset in range(span.length)]


@given(lengths=LENGTHS, context=CONTEXT)
@settings(max_examples=25, deadline=None)
def test_concat_is_the_stream_in_order_less_the_stated_tail(lengths: list[int], context: int):
    stream = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    packing = pack(np.array(lengths, dtype=np.int64), context)
    dropped = (len(stream) - 1) % context + 1 if stream else 0
    assert [token for row in rows(packing) for token in tokens(row)] == stream[: len(stream) - dropped]
    assert packing.n_tokens == len(stream) - dropped
    assert all(len(tokens(row)) == context for row in rows(packing))
    assert all(span.length > 0 for row in rows(packing) for span in row)

    kept = pack(np.array(lengths, dtype=np.int64), context, keep_tail=True)
    whole = [token for row in rows(kept) for token in tokens(row)]
    # The last token predicts nothing, so it alone opens no sequence.
    assert whole == (stream if (len(stream) - 1) % context else stream[:-1])
    assert all(len(tokens(row)) == context for row in rows(kept)[:-1])

    after = {index: stream[(index + 1) * context] for index in range(len(packing))}
    assert [packing.document_after(index) for index in after] == [
        document if place == 0 else None for document, place in after.values()
    ]


@given(lengths=LENGTHS, context=CONTEXT)
@settings(max_examples=25, deadline=None)
def test_best_fit_loses_nothing_and_cuts_no_short_document(lengths: list[int], context: int):
    packing = pack(np.array(lengths, dtype=np.int64), context, "best_fit")
    stream = [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert sorted(token for row in rows(packing) for token in tokens(row)) == stream
    for row in rows(packing):
        assert 0 < len(tokens(row)) <= context
        for span in row:
            if lengths[span.document] <= context:
                assert span == Span(span.document, 0, lengths[span.document])
            else:
                assert span.start % context == 0
                assert span.length == min(context, lengths[span.document] - span.start)
    assert rows(pack(np.array(lengths, dtype=np.int64), context, "best_fit")) == rows(packing)
    firsts = [(row[0].document, row[0].start) for row in rows(packing)]
    assert firsts == sorted(firsts)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), context=st.integers(20, 24))
@settings(max_examples=25, deadline=None)
def test_best_fit_chooses_as_the_textbook_does(lengths: list[int], context: int):
    """Against the quadratic definition: longest first, into the fullest bin with room, the youngest of equals."""
    bins: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        rooms = [(context - sum(lengths[item] for item in held), held) for held in bins]
        fitting = [room for room, _ in rooms if room >= lengths[document]]
        if fitting:
            next(held for room, held in rooms if room == min(fitting)).append(document)
        else:
            bins.append([document])
    # Which of equally full bins is taken does not change how full they are.
    want = sorted(sum(lengths[item] for item in held) for held in bins)
    packing = pack(np.array(lengths, dtype=np.int64), context, "best_fit")
    assert sorted(len(tokens(row)) for row in rows(packing)) == want


def test_rooms_beyond_one_mask_word():
    # Contexts over 1,024 use the second level of the index of free rooms.
    lengths = np.random.default_rng(0).integers(1, 9000, size=4000)
    packing = pack(lengths, 8192, "best_fit")
    filled = [len_ for row in rows(packing) for len_ in [sum(span.length for span in row)]]
    assert max(filled) <= 8192
    assert sum(filled) == lengths.sum()
    assert packing.n_tokens / (len(packing) * 8192) > 0.99


def test_best_fit_by_hand():
    packing = pack(np.array([3, 2, 7]), 5, "best_fit", documents=np.array([10, 20, 30]))
    assert rows(packing) == [[Span(10, 0, 3), Span(20, 0, 2)], [Span(30, 0, 5)], [Span(30, 5, 2)]]
    assert packing.document_after(0) is None


def test_refusals():
    with pytest.raises(ValueError, match="context=0"):
        pack(np.array([1]), 0)
    with pytest.raises(ValueError, match="'first_fit' is unknown: use concat or best_fit"):
        pack(np.array([1]), 4, "first_fit")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="sequence 1: the packing has 1"):
        pack(np.array([9]), 8).spans(1)


@given(lengths=LENGTHS, context=CONTEXT, method=st.sampled_from(["concat", "best_fit"]), keep_tail=st.booleans())
@settings(max_examples=25, deadline=None)
def test_lengths_are_those_of_the_spans_and_of_the_padding(lengths, context, method, keep_tail):
    packing = pack(np.array(lengths, dtype=np.int64), context, method, keep_tail=keep_tail)
    expected = []
    for row in rows(packing):
        expected += [span.length for span in row]
        expected += [context - sum(span.length for span in row)]
    assert sorted(packing.lengths().tolist()) == sorted(length for length in expected if length)
