"""Which numbers of two checkpoints are put beside each other, and what is said where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest

from longspan.evaluation.perplexity.result import DocumentScore, ScoringProtocol
from longspan.evaluation.results.directory import CheckpointResults
from longspan.evaluation.results.pairs import compare_checkpoints
from longspan.evaluation.tasks.registry import TASKS
from longspan.evaluation.tasks.result import QuestionScore, TaskProtocol, summarise_task


def asked(name: str, protocol: TaskProtocol, *, right: Mapping[str, float]) -> CheckpointResults:
    """A checkpoint that was asked one question about each document."""
    samples = tuple(
        QuestionScore(
            id=document,
            document=document,
            groups={},
            scores={"accuracy": value, "nll": 1.0 - value},
            answer="",
            references=("a",),
            prompt_tokens=9,
            dropped=0,
        )
        for document, value in right.items()
    )
    result = summarise_task(TASKS["lambada"], protocol, samples)
    return CheckpointResults(name=name, facts={}, tasks={"lambada": result}, samples={"lambada": samples})


def read(name: str, *, tokenizer: str, documents: Mapping[str, tuple[int, int]], **of_protocol) -> CheckpointResults:
    """A checkpoint's perplexity of documents of (tokens, bytes), one nat a token."""
    protocol = ScoringProtocol(
        **{"window": 8, "stride": 4, "bos": 0, "precision": "fp32", "documents": len(documents), **of_protocol}
    )
    return CheckpointResults(
        name=name,
        facts={"tokenizer_sha256": tokenizer},
        perplexity={"perplexity": {"protocol": {**asdict(protocol), "words": protocol.words}}},
        documents=tuple(
            DocumentScore(id=id, source="s", nll=float(tokens), tokens=tokens, bytes=size)
            for id, (tokens, size) in documents.items()
        ),
    )


def test_answers_behind_other_start_tokens_are_not_compared(answers: TaskProtocol) -> None:
    one = asked("one", answers, right={"a": 1.0, "b": 0.0})
    other = asked("other", replace(answers, start=(1,)), right={"a": 1.0, "b": 1.0})
    found, (refused,) = compare_checkpoints([one, other], seed=0, force=False)
    assert found == ()
    assert refused.startswith("lambada, accuracy: one and other were measured by different protocols: start is (256,) ")
    (forced,), refused = compare_checkpoints([one, other], seed=0, force=True)
    assert (forced.differing, forced.difference, refused) == (("start",), -0.5, ())
    (alike,), _ = compare_checkpoints([one, asked("third", answers, right={"a": 0.0, "b": 0.0})], seed=0, force=False)
    assert (alike.differing, alike.difference) == ((), 0.5)


@pytest.mark.parametrize("seen_through", ["documents", "bytes"])
def test_a_budget_that_two_tokenizers_spend_on_different_text_is_named(seen_through: str) -> None:
    """Whether the budget ends with another document or within one: the remedy is the same, and no circle."""
    texts = {"a": (4, 8), "b": (4, 8)} if seen_through == "bytes" else {"a": (4, 8)}
    one = read("one", tokenizer="x", documents={"a": (3, 8), "b": (5, 7)}, max_tokens=8)
    other = read("other", tokenizer="y", documents=texts, max_tokens=8)
    found, (refused,) = compare_checkpoints([one, other], seed=0, force=False)
    assert found == ()
    assert refused.startswith("bits per byte: ")
    assert refused.endswith("; two tokenizers make two texts of one budget: set evaluation.max_tokens=null")
    assert "compare bits per byte" not in refused  # which is what was asked for


def test_the_budget_is_blamed_for_nothing_else() -> None:
    documents = {"a": (3, 8), "b": (5, 7)}
    one = read("one", tokenizer="x", documents=documents)
    others = (
        read("other", tokenizer="y", documents=documents, window=16, max_tokens=8),
        read("other", tokenizer="y", documents={"a": (3, 8), "b": (5, 9)}),  # no budget was set
        read("other", tokenizer="x", documents={"a": (3, 8), "c": (5, 7)}, max_tokens=8),  # one tokenizer
    )
    for other in others:
        first = read("one", tokenizer="x", documents=documents, max_tokens=8) if other is not others[1] else one
        found, (refused,) = compare_checkpoints([first, other], seed=0, force=False)
        assert found == ()
        assert "budget" not in refused


def test_two_tokenizers_are_compared_by_bytes() -> None:
    one = read("one", tokenizer="x", documents={"a": (4, 8), "b": (6, 8)})
    other = read("other", tokenizer="y", documents={"a": (2, 8), "b": (3, 8)}, bos=5)
    (found,), refused = compare_checkpoints([one, other], seed=0, force=False)
    assert (found.measure, refused) == ("bits per byte", ())
    assert found.difference == pytest.approx((10 - 5) / 16 / 0.6931471805599453)
