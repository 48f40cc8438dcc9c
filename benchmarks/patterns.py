"""Lengths of documents and block-sparse layouts, drawn from seeds."""

from __future__ import annotations

import math
import random

Pattern = tuple[tuple[bool, ...], ...]  # rows are query blocks, columns key blocks


def document_lengths(total: int, mean: int, *, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths (σ = 1) with this mean, cut so that they sum to `total`."""
    draw = random.Random(seed)
    lengths: list[int] = []
    left = total
    while left > 0:
        lengths.append(min(left, max(1, round(draw.lognormvariate(math.log(mean) - 0.5, 1.0)))))
        left -= lengths[-1]
    return tuple(lengths)


def butterfly(n_blocks: int) -> Pattern:
    """Block i sees itself and every i xor 2^k (Dao et al. 2022, arXiv 2112.00029: flat block butterfly)."""
    steps = {0, *(1 << power for power in range((n_blocks - 1).bit_length()))}
    return tuple(tuple(i ^ j in steps for j in range(n_blocks)) for i in range(n_blocks))


def bigbird(n_blocks: int, *, seed: int = 0) -> Pattern:
    """Three blocks around the diagonal, two rows and columns, three random blocks a row (arXiv 2007.14062)."""
    draw = random.Random(seed)
    rows = []
    for i in range(n_blocks):
        chosen = {j for j in range(n_blocks) if i < 2 or j < 2 or abs(i - j) <= 1}
        others = [j for j in range(n_blocks) if j not in chosen]
        chosen.update(draw.sample(others, min(3, len(others))))
        rows.append(tuple(j in chosen for j in range(n_blocks)))
    return tuple(rows)


def random_blocks(n_blocks: int, per_row: int, *, seed: int = 0) -> Pattern:
    """The diagonal and random others, `per_row` blocks in each row."""
    draw = random.Random(seed)
    rows = []
    for i in range(n_blocks):
        chosen = {i, *draw.sample([j for j in range(n_blocks) if j != i], per_row - 1)}
        rows.append(tuple(j in chosen for j in range(n_blocks)))
    return tuple(rows)
