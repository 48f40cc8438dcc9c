"""Answers and classes out of logits: against a search of all spans, and on models that answer as they are told to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.example_build import ExampleSettings, prepare_examples
from longspan.data.example_records import ExampleColumns
from longspan.data.labelled import Row, TextItems, WindowItems, batch_of
from longspan.data.prepare import TokenizerSettings
from longspan.data.sources import SourceSpec
from longspan.data.tokenizer import byte_level
from longspan.evaluation.metrics.accuracy import score_answers
from longspan.evaluation.readers.predictions import (
    AnswerTally,
    ClassTally,
    SpanGuess,
    best_of_windows,
    best_spans,
    logits_of,
    predict_answers,
    predict_classes,
    score_examples,
)
from longspan.model.encoder import Encoder
from longspan.model.zoo import build

QA = {"head": "qa", "vocab_size": 257}
CLASSES = {"head": "classification", "labels": ("no", "yes"), "pooler": True, "vocab_size": 257}


def encoder(name: str, overrides: dict[str, object]) -> Encoder:
    model = build(name, overrides, seed=0)
    assert isinstance(model, Encoder)
    with torch.no_grad():  # with the usual small weights every row gives nearly the same logits
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def pair(text: str, question: str = "q?", first: int = 0) -> Row:
    tokens = [256, *question.encode(), 256, *text.encode(), 256]
    begin = 2 + len(question)
    return Row(tokens=tokens, n_task=begin - 1, begin=begin, first=first, size=len(text), is_pair=True)


class TestSpans:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 999), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), most=st.integers(1, 6))
    def test_the_best_span_is_the_one_that_a_search_of_all_finds(self, seed: int, sizes: list[int], most: int):
        rows = [pair("x" * size, first=3 * i) for i, size in enumerate(sizes)]
        batch = batch_of(rows, pad=256, limit=64, records=range(len(rows)), indices=range(len(rows)))
        generator = torch.Generator().manual_seed(seed)
        logits_BT2 = torch.randn(*batch.tokens_BT.shape, 2, generator=generator)
        logits_BT2[:, :4] += 9  # the question's tokens and padding are no answers, however likely
        logits_BT2[:, -1] += 9
        for row, guess in enumerate(best_spans(batch, logits_BT2, most)):
            start_T, end_T = logits_BT2[row].unbind(-1)
            begin, size = rows[row].begin, rows[row].size
            score, start, last = max(
                (float(start_T[i] + end_T[j]), i, j)
                for i in range(begin, begin + size)
                for j in range(i, min(begin + size, i + most))
            )
            assert guess.score == pytest.approx(score - float(start_T[0] + end_T[0]), abs=1e-5)
            assert (guess.start, guess.last) == (start - begin + rows[row].first, last - begin + rows[row].first)

    def test_the_best_window_wins_and_the_earliest_of_equals(self):
        guesses = [SpanGuess(0, 0, 1, 2, 0.5), SpanGuess(0, 8, 9, 9, 0.7), SpanGuess(1, 4, 5, 5, 1.0)]
        guesses += [SpanGuess(1, 0, 2, 2, 1.0)]
        assert best_of_windows(guesses) == {0: guesses[1], 1: guesses[3]}

    def test_a_row_without_text_has_no_answer(self):
        batch = batch_of([pair("")], pad=256, limit=64, records=[0], indices=[0])
        assert best_spans(batch, torch.zeros(1, 16, 2), 3)[0].score == -math.inf


class TestPredictions:
    def test_answers_are_characters_of_the_text(self):
        model, tokenizer = encoder("bert-tiny", QA), byte_level()
        pairs = [("what?", "Zürich is a täwn. " * 20), ("who?", "x"), ("where?", "nowhere at all")]
        found = predict_answers(model, tokenizer, pairs, context=64, max_answer_tokens=9)
        for answer, (_, text) in zip(found, pairs, strict=True):
            assert text[answer.start : answer.end] == answer.text
            assert answer.text == answer.text.strip()
        assert [bool(answer.text) for answer in found] == [True, True, True]
        unsure = predict_answers(model, tokenizer, pairs, context=64, max_answer_tokens=9, may_be_missing=True)
        assert [answer.text != "" for answer in unsure] == [answer.score >= 0 for answer in found]

    @pytest.mark.parametrize("name", ["bert-tiny", "longformer-tiny"])
    def test_batches_do_not_change_what_is_said(self, name: str):
        model, tokenizer = encoder(name, CLASSES), byte_level()
        texts = ["a", "some more text " * 3, "x" * 200]
        alone = [predict_classes(model, tokenizer, [text])[0] for text in texts]
        together = predict_classes(model, tokenizer, texts, batch=3)
        for one, other in zip(alone, together, strict=True):
            assert other.label == one.label
            assert other.probabilities == pytest.approx(one.probabilities, abs=1e-5)
        assert sum(alone[1].probabilities.values()) == pytest.approx(1)
        assert len({round(one.probabilities["yes"], 4) for one in alone}) == 3

    @pytest.mark.parametrize(
        ("name", "overrides"), [("bert-tiny", QA), ("longformer-tiny", QA), ("bert-tiny", CLASSES)]
    )
    def test_padding_does_not_change_logits(self, name: str, overrides: dict[str, object]):
        model = encoder(name, overrides)
        short, long = pair("some text"), pair("much longer text, " * 4)
        alone = logits_of(model, batch_of([short], pad=256, limit=128, records=[0], indices=[0]))
        both = logits_of(model, batch_of([short, long], pad=7, limit=128, records=[0, 1], indices=[0, 1]))
        n_tokens = len(short.tokens) if overrides is QA else 2
        torch.testing.assert_close(both[:1, :n_tokens], alone[:, :n_tokens], atol=1e-5, rtol=1e-4)

    def test_global_tokens_and_types_are_given(self):
        longformer, bert = encoder("longformer-tiny", QA), encoder("bert-tiny", QA)
        row = pair("x" * 60)
        batch = batch_of([row], pad=256, limit=128, records=[0], indices=[0])
        without = longformer(batch.tokens_BT, lengths_B=batch.lengths_B)
        assert (logits_of(longformer, batch) - without)[0, 40:60].abs().max() > 1e-2  # far beyond the window of 8
        untyped = bert(batch.tokens_BT, lengths_B=batch.lengths_B)
        typed = bert(batch.tokens_BT, lengths_B=batch.lengths_B, token_types_BT=batch.types_BT)
        assert torch.equal(logits_of(bert, batch), typed)
        assert (typed - untyped).abs().max() > 1e-2

    def test_another_head_is_refused(self):
        with pytest.raises(ValueError, match="needs an encoder with head=qa; this one has head=classification"):
            predict_answers(encoder("bert-tiny", CLASSES), byte_level(), [("q", "t")])


def write(tmp_path: Path, rows: list[dict], columns: ExampleColumns) -> ExampleSettings:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExampleSettings(
        source=SourceSpec(kind="files", path=str(path)),
        columns=columns,
        tokenizer=TokenizerSettings(kind="bytes"),
        validation_fraction=0.0,
        cache=tmp_path / "cache",
    )


class TestTallies:
    def test_answers_as_predicted_one_by_one(self, tmp_path: Path):
        rows = [{"q": f"q{i}", "c": f"word{i} text {i} end " * (1 + 3 * i), "a": f"text {i}"} for i in range(5)]
        columns = ExampleColumns(texts=(("question", "q"), ("context", "c")), answer="a")
        store = prepare_examples(write(tmp_path, rows, columns))
        model = encoder("bert-tiny", QA)
        items = WindowItems(store, "train", context=48, overlap=12)
        tally = AnswerTally(items, max_answer_tokens=8)
        scores = score_examples(model, items, tally, batch=3)
        found = predict_answers(
            model,
            store.tokenizer(),
            [(row["q"], row["c"]) for row in rows],
            context=48,
            overlap=12,
            max_answer_tokens=8,
        )
        expected = score_answers([answer.text for answer in found], [[row["a"]] for row in rows])
        assert scores == pytest.approx({"exact_match": expected.exact_match, "f1": expected.f1, "n": 5})
        # Seen twice (a rank of its own reads all) it counts once; records that were not read whole are left out.
        parts = tally.parts()
        assert tally.scores([*parts, *parts]) == scores
        assert tally.scores(part for part in parts if part[:2] != (4, 0))["n"] == 4
        assert tally.scores([]) == {}

    def test_classes(self, tmp_path: Path):
        rows = [{"text": "ab" * (i + 1), "label": ["no", "yes", "no"][i % 3]} for i in range(9)]
        store = prepare_examples(write(tmp_path, rows, ExampleColumns(texts=(("text", "text"),), label="label")))
        model = encoder("bert-tiny", CLASSES)
        items = TextItems(store, "train", classes=("no", "yes"), context=48)
        scores = score_examples(model, items, ClassTally(items), batch=4)
        guesses = predict_classes(model, store.tokenizer(), [row["text"] for row in rows], context=48)
        right = np.mean([guess.label == row["label"] for guess, row in zip(guesses, rows, strict=True)])
        assert scores["accuracy"] == pytest.approx(right)
        assert scores["majority"] == pytest.approx(6 / 9)
        assert scores["n"] == 9
