"""Intervals by resampling documents, the independent draws of every evaluation here.

Legend: d documents.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
FEWEST_DOCUMENTS = 10  # with fewer, resampling them says little about the documents not seen


def ratio_interval(total_d: np.ndarray, count_d: np.ndarray, *, seed: int) -> tuple[float, float] | None:
    """95 % percentile interval of Σ total / Σ count; None with fewer than ten documents."""
    n = len(count_d)
    if n < FEWEST_DOCUMENTS:
        return None
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, n, n)
        ratios[i] = total_d[drawn].sum() / count_d[drawn].sum()
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
