"""How RULER scores answers: by the references that occur in them (Hsieh et al. 2024, arXiv 2404.06654, §3).

RULER's retrieval, tracing and counting tasks take the share of references that occur (`string_match_all`), its two
question-answering tasks whether any does (`string_match_part`). lm-evaluation-harness takes the mean over references in
both, which for questions with several accepted answers gives less: `string_match_mean`, to be named with its numbers.
All ignore case, and control characters in an answer count as line breaks, as in the published scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer. Raises ValueError for none."""
    return sum(_found(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 where any of the references occurs in the answer, else 0: NVIDIA's score of qa_1 and qa_2. Raises ValueError
    for no references."""
    return float(any(_found(answer, references)))


def string_match_mean(answer: str, references: Sequence[str]) -> float:
    """The stricter score of questions with several accepted answers: the mean over them, so that one of three accepted
    spellings counts a third. As a number it is `string_match_all`; the name says what it is used for."""
    return string_match_all(answer, references)


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    if not references:
        raise ValueError("no references to look for in an answer")
    said = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return [reference.lower() in said for reference in references]
