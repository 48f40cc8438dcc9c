"""Testing attention kernels, ours and anybody's: `conformance(backend)` and the measure that it uses.

    from longspan.kernels.testing import conformance

    conformance(MyBackend()).raise_if_failed()

docs/conformance.md tells what is checked and how to read a failure.
"""

from __future__ import annotations

from .conformance.caches import CacheCase, CacheReport, cache_conformance
from .conformance.cases import Case
from .conformance.judge import assert_within_budget, judge, plain_attention, twin
from .conformance.report import ConformanceError, Report
from .conformance.suite import NEEDS_HYPOTHESIS, conformance, replay

__all__ = [
    "NEEDS_HYPOTHESIS",
    "CacheCase",
    "CacheReport",
    "Case",
    "ConformanceError",
    "Report",
    "assert_within_budget",
    "cache_conformance",
    "conformance",
    "judge",
    "plain_attention",
    "replay",
    "twin",
]
