"""Losses on different text are not compared, whatever the names of the documents; nor are context curves."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from longspan.evaluation.context.effective import ContextCurve
from longspan.evaluation.perplexity.result import DocumentScore, ScoringProtocol
from longspan.evaluation.results.directory import CheckpointResults
from longspan.evaluation.results.pairs import compare_checkpoints

SAME = {"tokens_sha256": "a" * 64, "text_sha256": "b" * 64, "tokenizer_sha256": "c" * 64}


def read(name: str, **of_protocol) -> CheckpointResults:
    """A checkpoint's perplexity of two documents, always of the same names and sizes."""
    protocol = ScoringProtocol(window=8, stride=4, bos=0, precision="fp32", documents=2, **{**SAME, **of_protocol})
    documents = tuple(
        DocumentScore(id=id, source="s", nll=nll, tokens=10, bytes=30) for id, nll in (("0", 9.0), ("1", 7.0))
    )
    return CheckpointResults(
        name=name,
        facts={"tokenizer_sha256": protocol.tokenizer_sha256},
        perplexity={"perplexity": {"protocol": {**asdict(protocol), "words": protocol.words}}},
        documents=documents,
    )


def with_curve(name: str, **of_curve) -> CheckpointResults:
    curve = {"lengths": (4, 8), "targets": 2, "blocks": 1, "left_out": 0, "precision": "fp32", **SAME, **of_curve}
    del curve["text_sha256"]
    nll_dL = np.array([[5.0, 4.0], [7.0, 3.0], [6.0, 6.0]])
    units = ("s/0", "s/1", "s/2")
    return CheckpointResults(
        name=name, facts={}, curve=ContextCurve(nll_dL=nll_dL + len(name), count_d=np.full(3, 2), units=units, **curve)
    )


def test_other_text_under_the_same_names() -> None:
    """As two runs have it that held out documents of their own."""
    ours, other = read("ours"), read("other", tokens_sha256="d" * 64, text_sha256="e" * 64)
    found, (refused,) = compare_checkpoints([ours, other], seed=0, force=False)
    assert found == ()
    assert refused == (
        "loss (nats per token): ours and other were measured by different protocols: tokens_sha256 is aaaaaaaaaaaa… "
        "and dddddddddddd… (and text_sha256); measure both alike, or force=true"
    )
    (forced,), refused = compare_checkpoints([ours, other], seed=0, force=True)
    assert (forced.differing, refused) == (("tokens_sha256", "text_sha256"), ())


def test_two_tokenizers_are_compared_on_the_same_text_alone() -> None:
    ours, cut = read("ours"), read("cut", tokens_sha256="d" * 64, tokenizer_sha256="f" * 64)
    (found,), refused = compare_checkpoints([ours, cut], seed=0, force=False)
    assert (found.measure, found.differing, refused) == ("bits per byte", (), ())
    other = read("other", tokens_sha256="d" * 64, tokenizer_sha256="f" * 64, text_sha256="e" * 64)
    found, (refused,) = compare_checkpoints([ours, other], seed=0, force=False)
    assert found == ()
    assert "text_sha256 is bbbbbbbbbbbb… and eeeeeeeeeeee…; measure both alike" in refused
    before = read("before", text_sha256=None, tokens_sha256=None)  # as measured before there were hashes
    _, (refused,) = compare_checkpoints([ours, before], seed=0, force=False)
    assert "tokens_sha256 is aaaaaaaaaaaa… and not stated" in refused


def test_contexts_are_compared_by_the_loss_with_all_of_it() -> None:
    (found,), refused = compare_checkpoints([with_curve("a"), with_curve("bcd")], seed=0, force=False)
    assert (found.measure, refused) == ("loss with all of the context (nats per token)", ())
    assert (found.first_value, found.second_value) == pytest.approx(((13 + 3) / 6, (13 + 9) / 6))
    assert found.documents == 3


@pytest.mark.parametrize(
    ("of_curve", "said"),
    [
        ({"tokens_sha256": "d" * 64}, "tokens_sha256 is aaaaaaaaaaaa… and dddddddddddd…;"),
        ({"tokenizer_sha256": "d" * 64}, "tokenizer_sha256 is cccccccccccc… and dddddddddddd…;"),
        ({"lengths": (4, 16)}, "lengths is [4, 8] and [4, 16];"),
    ],
)
def test_contexts_of_other_text_or_lengths_are_not(of_curve: dict, said: str) -> None:
    pair = [with_curve("a"), with_curve("b", **of_curve)]
    found, (refused,) = compare_checkpoints(pair, seed=0, force=False)
    assert found == ()
    assert said in refused
    (forced,), refused = compare_checkpoints(pair, seed=0, force=True)
    assert (set(forced.differing), refused) == (set(of_curve), ())
