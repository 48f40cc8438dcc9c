"""Intervals by resampling documents, the independent draws of every evaluation here.

Legend: d documents, R resamples, K sums of each document.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

FEWEST_DOCUMENTS = 10  # with fewer, resampling them says little about the documents not seen
_CHUNK = 1 << 22  # numbers drawn at once


def ratio_interval(
    total_d: np.ndarray, count_d: np.ndarray, *, seed: int, resamples: int = 1000
) -> tuple[float, float] | None:
    """95 % percentile interval of Σ total / Σ count; None with fewer than ten documents."""
    return figure_interval(total_d[:, None], count_d, lambda ratio_K: ratio_K[0], seed=seed, resamples=resamples)


def figure_interval(
    total_dK: np.ndarray,
    count_d: np.ndarray,
    figure: Callable[[np.ndarray], float],
    *,
    seed: int,
    resamples: int = 1000,
) -> tuple[float, float] | None:
    """95 % percentile interval of a number made of several ratios, figure(Σ total / Σ count): documents are drawn, and
    the number is made again. None with fewer than ten documents."""
    n = len(count_d)
    if n < FEWEST_DOCUMENTS:
        return None
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for size in chunks(resamples, n):
        drawn_Rd = rng.integers(0, n, (size, n))
        count_R = count_d[drawn_Rd].sum(axis=1)
        ratio_RK = np.stack([total_d[drawn_Rd].sum(axis=1) / count_R for total_d in total_dK.T], axis=1)
        found += [figure(ratio_K) for ratio_K in ratio_RK]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def chunks(total: int, width: int) -> list[int]:
    """Numbers that add up to `total`, each small enough that so many rows of `width` fit into memory."""
    most = max(1, _CHUNK // width)
    return [most] * (total // most) + ([total % most] if total % most else [])
