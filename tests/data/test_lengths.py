"""Lengths of padded batches: few of them, and never much longer than what they hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.lengths import padded_length, padded_lengths


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_a_padded_row_has_room_and_no_more_than_the_context(longest: int, most: int) -> None:
    padded = padded_length(longest, most)
    assert longest <= padded <= max(longest, most)
    assert padded in (longest, most) or padded % 16 == 0
    if longest > 64:
        assert padded < 1.25 * longest
    assert padded_length(padded, most) == padded


def test_lengths_are_few() -> None:
    found = padded_lengths(np.arange(1, 16_385), 16_384)
    assert found[[0, 15, 16, 63, 64, 128, 256, 512]].tolist() == [16, 16, 32, 64, 80, 160, 320, 640]
    assert (np.diff(found) >= 0).all()
    assert len(set(found.tolist())) == 36
    assert sorted(set(padded_lengths(np.arange(1, 71), 70).tolist())) == [16, 32, 48, 64, 70]
