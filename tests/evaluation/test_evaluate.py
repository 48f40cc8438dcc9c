"""The one way to evaluate: protocol, sample and baseline come from one place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from longspan.data.sources import SourceSpec
from longspan.data.store import TokenStore, build_store
from longspan.data.tokenizer import byte_level
from longspan.evaluation.documents import documents_from
from longspan.evaluation.evaluate import Evaluation, evaluate_documents, spread_texts
from longspan.evaluation.ngram import NgramBaseline
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config


@dataclass(frozen=True)
class Scoring:
    max_tokens: int | None = None
    window: int | None = None
    stride: int | None = None
    batch: int = 4


@pytest.fixture(scope="module")
def model() -> Decoder:
    tokenizer = byte_level()
    return from_config(DecoderConfig(vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=2), seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    root = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (root / f"{i}.txt").write_text(f"naïve {'été ' * (i + 1)}{i}")
    source = SourceSpec(kind="files", path=str(root))
    return build_store(root.parent / "store", [source], byte_level(), validation_fraction=0.3)


Evaluate = Callable[..., Evaluation]


@pytest.fixture
def evaluate(model: Decoder, store: TokenStore) -> Evaluate:
    def run(scoring: Scoring, *, baseline: bool = True) -> Evaluation:
        train = store.documents("train") if baseline else None
        stored = store.documents("validation")
        return evaluate_documents(
            model, byte_level(), stored, scoring, context=8, device="cpu", precision="fp32", train=train
        )

    return run


def test_the_protocol_names_what_was_left_open(evaluate: Evaluate) -> None:
    protocol = evaluate(Scoring(max_tokens=50)).result.protocol
    assert (protocol.window, protocol.stride, protocol.max_tokens, protocol.sample_seed) == (8, 4, 50, 0)
    assert "(at most 50 tokens, drawn with seed 0)" in protocol.words
    protocol = evaluate(Scoring(window=6, stride=5)).result.protocol
    assert (protocol.window, protocol.stride, protocol.max_tokens) == (6, 5, None)
    assert "at most" not in protocol.words.partition("fp32;")[2]


@pytest.mark.parametrize("budget", range(9, 80, 7))
def test_model_and_baseline_are_charged_for_the_same_bytes(evaluate: Evaluate, store: TokenStore, budget: int) -> None:
    """Budgets on both sides of a character of two bytes, which a cut may split."""
    tokenizer = byte_level()
    found = evaluate(Scoring(max_tokens=budget))
    assert found.baseline is not None
    assert found.baseline.bytes == found.result.bytes
    documents = documents_from(store.documents("validation"), max_tokens=budget, decode=tokenizer.decode)
    texts = [bytes(int(i) for i in each.tokens if i < 256).decode(errors="ignore") for each in documents]
    train = store.documents("train")
    fitted = NgramBaseline(2).fit([tokenizer.decode(train.tokens(i).tolist()) for i in range(len(train))])
    assert found.result.bytes == sum(len(text.encode()) for text in texts)
    assert found.baseline.bits_per_byte == pytest.approx(fitted.bits_per_byte(texts))


def test_without_training_documents_there_is_no_baseline(evaluate: Evaluate) -> None:
    found = evaluate(Scoring(), baseline=False)
    assert found.baseline is None
    assert "baseline" not in found.record()
    assert "n-gram" not in found.words()
    assert set(found.headline()) == {"perplexity", "bits_per_byte"}


def test_numbers_that_are_not_finite_are_null_in_files_and_words_in_logs(evaluate: Evaluate) -> None:
    found = evaluate(Scoring(max_tokens=50))
    broken = Evaluation(replace(found.result, perplexity=math.inf, loss=math.nan), found.baseline)
    record = json.loads(json.dumps(broken.record(), allow_nan=False))
    assert record["perplexity"]["perplexity"] is None
    assert json.dumps(broken.headline(), allow_nan=False).startswith('{"perplexity": null')
    assert broken.words().startswith("perplexity inf, ")


@pytest.mark.parametrize("limit", [1, 100, 10_000])
def test_training_text_is_spread_and_bounded(store: TokenStore, limit: int) -> None:
    train = store.documents("train")
    sizes = [len(text.encode()) for text in spread_texts(train, byte_level(), limit)]
    assert sum(sizes) <= limit + 2  # a cut may leave a replacement character for half a character
    if limit == 10_000:
        assert sizes == np.asarray(train.byte_counts).tolist()


def test_a_single_long_document_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line of text\n" * 1000)
    source = SourceSpec(kind="files", path=str(tmp_path / "a.txt"))
    long = build_store(tmp_path / "store", [source], byte_level(), validation_fraction=0.1)
    assert [len(text) for text in spread_texts(long.documents("train"), byte_level(), 500)] == [500]
