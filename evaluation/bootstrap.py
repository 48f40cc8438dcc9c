"""Intervals by resampling documents, the independent draws of every evaluation here.

Legend: d documents, R resamples.
"""

from __future__ import annotations

import numpy as np

FEWEST_DOCUMENTS = 10  # with fewer, resampling them says little about the documents not seen
_CHUNK = 1 << 22  # numbers drawn at once


def ratio_interval(
    total_d: np.ndarray, count_d: np.ndarray, *, seed: int, resamples: int = 1000
) -> tuple[float, float] | None:
    """95 % percentile interval of Σ total / Σ count; None with fewer than ten documents."""
    n = len(count_d)
    if n < FEWEST_DOCUMENTS:
        return None
    rng = np.random.default_rng(seed)
    ratio_R = [
        total_d[drawn_Rd].sum(axis=1) / count_d[drawn_Rd].sum(axis=1)
        for size in chunks(resamples, n)
        for drawn_Rd in [rng.integers(0, n, (size, n))]
    ]
    low, high = np.quantile(np.concatenate(ratio_R), [0.025, 0.975])
    return float(low), float(high)


def chunks(total: int, width: int) -> list[int]:
    """Numbers that add up to `total`, each small enough that so many rows of `width` fit into memory."""
    most = max(1, _CHUNK // width)
    return [most] * (total // most) + ([total % most] if total % most else [])
