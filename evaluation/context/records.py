"""Effective context as results carry it: by loss, of documents; by retrieval, of tasks that were made to length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ..tasks.result import QuestionScore, TaskResult
from .effective import EffectiveContext, RetrievalContext, retrieval_context

RETRIEVES = ("passkey", "needle", "key_value")  # and RULER's tasks that hide needles


def context_record(found: EffectiveContext) -> dict[str, object]:
    """Plain data, with the definition in words beside it."""
    return {**asdict(found), "longest": found.longest, "words": found.words}


def by_retrieval(
    tasks: Mapping[str, TaskResult], samples: Mapping[str, Sequence[QuestionScore]], *, seed: int
) -> dict[str, RetrievalContext]:
    """The figure by each retrieval task that was asked at several lengths."""
    return {
        name: retrieval_context(
            [int(each.groups["length"]) for each in samples[name]],
            [each.scores[result.headline] for each in samples[name]],
            [each.document for each in samples[name]],
            seed=seed,
        )
        for name, result in tasks.items()
        if (name in RETRIEVES or name.startswith("niah_")) and len(result.protocol.lengths) > 1
    }


def retrieval_record(found: RetrievalContext) -> dict[str, object]:
    return {**asdict(found), "longest": found.longest, "words": found.words}
