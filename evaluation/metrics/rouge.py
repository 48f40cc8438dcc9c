"""ROUGE (Lin 2004, aclanthology.org/W04-1013) as the `rouge-score` package counts it.

Words are runs of ASCII letters and digits in lower case. ROUGE-1 and -2 count words and pairs of neighbours that two
texts share, ROUGE-L the longest common subsequence of the whole texts (not sentence by sentence: that is rougeLsum).
Each is the F1 of precision and recall. Of several references the best counts, for each of the three by itself.

Stemming (Porter's, of words longer than three letters) moves all three by a point or so and must be stated with them.
SCROLLS (Shaham et al. 2022, arXiv 2201.03533) does without, and so do we unless asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_TYPES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class RougeScores:
    """F1 of each, 0 … 1."""

    rouge1: float
    rouge2: float
    rougeL: float  # its name everywhere

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def rouge(guess: str, references: Sequence[str], *, stem: bool = False) -> RougeScores:
    """The scores of one text. Raises ImportError where rouge-score is not installed, ValueError for no reference."""
    if not references:
        raise ValueError("ROUGE compares with references, and there is none")
    found = _scorer(stem)(references, guess)
    return RougeScores(*(float(found[name].fmeasure) for name in _TYPES))


def geometric_mean(scores: Mapping[str, float]) -> float:
    """(ROUGE-1 · ROUGE-2 · ROUGE-L)^(1/3), of means over texts: SCROLLS's one number for a summarisation task."""
    return (scores["rouge1"] * scores["rouge2"] * scores["rougeL"]) ** (1 / 3)


@functools.cache
def _scorer(stem: bool) -> Callable[[Sequence[str], str], Mapping[str, Any]]:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # brings nltk; only summaries need it
    except ImportError as error:
        raise ImportError(f"ROUGE needs the package rouge-score ({error}): pip install longspan[eval]") from error
    return RougeScorer(list(_TYPES), use_stemmer=stem).score_multi
