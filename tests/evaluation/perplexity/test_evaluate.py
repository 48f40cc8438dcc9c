"""The one way to evaluate: protocol, sample and baseline come from one place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.data.sources import SourceSpec
from longspan.data.store import TokenStore, build_store
from longspan.data.tokenizer import byte_level
from longspan.evaluation.names import ProtocolName
from longspan.evaluation.perplexity.baseline import NgramBaseline
from longspan.evaluation.perplexity.documents import documents_from, text_documents
from longspan.evaluation.perplexity.evaluate import Evaluation, evaluate_documents, spread_texts
from longspan.evaluation.perplexity.result import Scored
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.config import AttentionPlan, DecoderConfig
from longspan.model.decoder import Decoder, from_config


@dataclass(frozen=True)
class Scoring:
    max_tokens: int | None = None
    window: int | None = None
    stride: int | None = None
    batch: int = 4
    scored: Scored = "all"
    merge_windows: bool = True
    protocols: tuple[ProtocolName, ...] = ()


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


@pytest.mark.parametrize("merge", [True, False])
def test_bits_per_byte_of_full_windows_by_hand(tmp_path: Path, merge: bool) -> None:
    """The last 8 of every full window of 40, each from a forward pass of its own over that window alone."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("".join(rng.choice(list("abcd e\n"), 205)))
    (tmp_path / "b.txt").write_text("too short for a window")
    tokenizer = byte_level()
    attention = AttentionPlan(
        patterns={"near": AttentionSpec(causal=True, window=Window.causal_keys(9))}, layers=("near",)
    )
    config = DecoderConfig(
        vocab_size=257, n_layers=2, d_model=16, n_heads=2, positions="rope", init_std=0.5, attention=attention
    )
    model = from_config(config, seed=0)
    stored = text_documents(SourceSpec(kind="files", path=str(tmp_path)), tokenizer)
    scoring = Scoring(window=40, stride=8, scored="full_windows", merge_windows=merge)
    field = model.config.receptive_field
    assert field == 16
    found = evaluate_documents(
        model, tokenizer, stored, scoring, context=8, device="cpu", precision="fp32", receptive_field=field
    )

    (long,) = (stored.tokens(i).tolist() for i in range(2) if len(stored.tokens(i)) > 40)
    inputs, nats, n_bytes = [tokenizer.eos_id, *long[:-1]], 0.0, 0  # 205 bytes and the separator
    for start in range(0, len(long) - 40 + 1, 8):
        with torch.no_grad():
            log_probs_TV = model(torch.tensor([inputs[start : start + 40]]))[0].double().log_softmax(-1)
        for i in range(32, 40):
            nats -= float(log_probs_TV[i, long[start + i]])
            n_bytes += 1
    assert n_bytes == (1 + (206 - 40) // 8) * 8 == 168
    result = found.result
    assert (result.tokens, result.bytes, result.documents) == (168, 168, 1)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert result.protocol.merged == merge
    assert "the last 8 tokens of every full window" in result.protocol.words
    assert "windows of exactly 40 tokens that advance by 8" in result.protocol.words
    assert "1 of 2 documents, none truncated" in result.protocol.words


def test_full_windows_that_no_document_fills(evaluate: Evaluate) -> None:
    with pytest.raises(ValueError, match=r"no document fills a window of 5,000 tokens \(the longest drawn has \d+\)"):
        evaluate(Scoring(window=5000, stride=8, scored="full_windows"))


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
