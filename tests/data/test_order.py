"""The order of the stream: bijections, exact shares, and nothing that depends on how one got there."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.order import BucketedStream, MixedStream, SinglePass, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=25, deadline=None)
def test_permute_is_a_bijection(size: int, key: int):
    assert sorted(permute(index, size, key=key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 8, 17])
def test_every_place_is_equally_likely(size: int):
    """Over keys, each index goes everywhere: chi-squared of its images stays below what chance gives in 1 of 10^5."""
    n_keys = 2000
    limit = {2: 20, 3: 24, 8: 38, 17: 58}[size]
    for index in range(size):
        counts = Counter(permute(index, size, key=key * 7919) for key in range(n_keys))
        chi_squared = sum((counts[place] - n_keys / size) ** 2 for place in range(size)) / (n_keys / size)
        assert chi_squared < limit


def test_permute_moves_neighbours_apart():
    images = [permute(index, 10_000, key=5) for index in range(10_000)]
    distances = [abs(a - b) for a, b in pairwise(images)]
    assert 3200 < sum(distances) / len(distances) < 3466  # n/3 for a random order


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    start=st.integers(0, 10**12),
)
@settings(max_examples=10, deadline=None)
def test_sources_are_taken_by_weight_within_one_at_every_moment(weights: list[float], start: int):
    stream = MixedStream([7] * len(weights), weights, seed=1)
    for share, weight in zip(stream.shares, weights):
        assert abs(float(share) - weight / sum(weights)) < 1e-3
    taken = [0] * len(weights)
    bound = 1 - Fraction(1, max(1, 2 * len(weights) - 2))  # the best possible (Tijdeman 1980)
    for k in range(600):
        taken[stream.address(k).source] += 1
        for count, share in zip(taken, stream.shares):
            assert abs(count - share * (k + 1)) <= bound
    # Anywhere far along, the n-th take of a source is what the shares say, to one.
    address = stream.address(start)
    nth = address.epoch * 7
    assert -8 < nth - float(stream.shares[address.source] * start) < 8


def test_simple_weights_are_exact():
    stream = MixedStream([5, 5, 5], [0.7, 0.2, 0.1], seed=None)
    assert [float(share) for share in stream.shares] == [0.7, 0.2, 0.1]
    sources = [stream.address(k).source for k in range(20)]
    assert Counter(sources) == {0: 14, 1: 4, 2: 2}
    assert sources[:10] == sources[10:]


def test_each_pass_holds_every_sequence_once_in_a_new_order():
    stream = MixedStream([10, 3], [2, 1], seed=3)
    addresses = [stream.address(k) for k in range(90)]
    for source, size in ((0, 10), (1, 3)):
        mine = [address for address in addresses if address.source == source]
        passes = [mine[start : start + size] for start in range(0, len(mine), size)]
        for epoch, one in enumerate(passes):
            assert {address.epoch for address in one} == {epoch}
            assert sorted(address.index for address in one) == list(range(size))
        assert len({tuple(address.index for address in one) for one in passes}) > 1


def test_seed_changes_the_order_and_none_keeps_it():
    def indices(seed: int | None) -> list[int]:
        stream = MixedStream([50], [1], seed)
        return [stream.address(k).index for k in range(100)]

    assert indices(None) == [*range(50), *range(50)]
    assert indices(0) != indices(1)
    assert indices(1) == indices(1)
    # These lines pin the stream: a change here changes the data of every resumed run.
    assert indices(0)[:8] == [18, 17, 33, 19, 39, 25, 32, 2]
    assert MixedStream([1000], [1], 7).address(123_456_789).index == 155


def test_single_pass_spreads_sources_evenly():
    order = SinglePass([4, 2])
    found = [(order.address(k).source, order.address(k).index) for k in range(len(order))]
    assert found == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    with pytest.raises(IndexError, match="sequence 6: the pass has 6"):
        order.address(6)


def test_refusals():
    with pytest.raises(IndexError):
        MixedStream([3], [1], 0).address(-1)
    with pytest.raises(ValueError, match="at least one sequence"):
        MixedStream([3, 0], [1, 1], 0)
    with pytest.raises(ValueError, match="weight greater than 0"):
        MixedStream([3, 1], [1, 0], 0)


class TestBuckets:
    @given(
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
        bucket=st.integers(1, 9),
        pools=st.integers(1, 4),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=25, deadline=None)
    def test_every_pass_is_a_permutation(self, lengths: list[int], bucket: int, pools: int, seed: int):
        stream = BucketedStream(np.array(lengths), bucket=bucket, pools=pools, seed=seed)
        for epoch in range(2):
            addresses = [stream.address(epoch * len(lengths) + k) for k in range(len(lengths))]
            assert sorted(address.index for address in addresses) == list(range(len(lengths)))
            assert {address.epoch for address in addresses} == {epoch}

    def test_a_place_does_not_depend_on_how_one_got_there(self):
        lengths = np.random.default_rng(0).integers(1, 500, 1000)
        forward = BucketedStream(lengths, bucket=8, pools=5, seed=3)
        indices = [forward.address(k).index for k in range(2500)]
        for k in (2499, 3, 1000, 999, 41, 40):
            assert BucketedStream(lengths, bucket=8, pools=5, seed=3).address(k).index == indices[k]
            assert forward.address(k).index == indices[k]
        assert indices[:1000] != indices[1000:2000]
        assert [BucketedStream(lengths, bucket=8, pools=5, seed=4).address(k).index for k in range(9)] != indices[:9]

    def test_neighbours_are_of_like_length(self):
        lengths = np.random.default_rng(0).integers(1, 500, 2000)
        stream = BucketedStream(lengths, bucket=8, pools=50, seed=0)
        groups = lengths[[stream.address(k).index for k in range(2000)]].reshape(-1, 8)
        padded, shuffled = 8 * groups.max(1).sum(), 8 * lengths.reshape(-1, 8).max(1).sum()
        assert padded < 1.03 * lengths.sum() < 1.5 * lengths.sum() < shuffled
        means = groups.mean(1)  # short and long groups come in no order
        assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2

    def test_items_of_one_length_meet_by_chance(self):
        """Not by their place in the store, where neighbours are often of one class."""
        stream = BucketedStream(np.full(800, 7), bucket=16, pools=50, seed=0)
        groups = np.array([stream.address(k).index for k in range(800)]).reshape(-1, 16)
        assert (groups.max(1) - groups.min(1)).min() > 400

    def test_stored_order(self):
        stream = BucketedStream(np.array([3, 1, 2]), bucket=2, seed=None)
        assert [stream.address(k).index for k in range(5)] == [0, 1, 2, 0, 1]

    def test_bad_requests(self):
        with pytest.raises(ValueError, match="each is at least 1"):
            BucketedStream(np.array([], dtype=int), bucket=2, seed=0)
        with pytest.raises(IndexError, match="starts at 0"):
            BucketedStream(np.array([1]), bucket=2, seed=0).address(-1)
