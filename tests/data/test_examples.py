"""The example store: what is stored is what was written, answers stand where they are, bad records are counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.example_build import BuiltIn, ExampleSettings, prepare_examples, sorted_labels
from longspan.data.example_records import Answer, ExampleColumns, ExampleRecord, token_span
from longspan.data.examples import ExampleStore
from longspan.data.prepare import TokenizerSettings
from longspan.data.shards import StoreError
from longspan.data.sources import SourceError, SourceSpec
from longspan.data.tokenizer import Frame, Tokenizer, byte_level, train_bpe

CLASSES = ExampleColumns(texts=(("text", "text"),), label="label")
ANSWERS = ExampleColumns(texts=(("question", "question"), ("context", "context")), answer="answers")
BYTES = TokenizerSettings(kind="bytes")


def write(path: Path, *rows: object) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceSpec(kind="files", path=str(path))


def store_of(tmp_path: Path, source: SourceSpec, columns: ExampleColumns, **changes) -> ExampleStore:
    changes = {"tokenizer": BYTES, "validation_fraction": 0.0, **changes}
    return prepare_examples(ExampleSettings(source=source, columns=columns, cache=tmp_path / "cache", **changes))


class TestClasses:
    def test_texts_and_classes_come_back(self, tmp_path: Path):
        source = write(tmp_path / "a.jsonl", {"text": "héllo", "label": 10}, {"text": "you", "label": 9})
        store = store_of(tmp_path, source, CLASSES)
        assert store.labels == ("9", "10")  # whole numbers by value
        assert [store.label(record) for record in store.records("train")] == [1, 0]
        assert bytes(store.tokens("text", 0).tolist()).decode() == "héllo"
        assert store.lengths("text").tolist() == [6, 3]
        assert store.place(1) == f"{tmp_path / 'a.jsonl'} line 2"
        again = pickle.loads(pickle.dumps(store))
        assert again.tokens("text", 1).tolist() == list(b"you")

    def test_parquet_and_truth_values(self, tmp_path: Path):
        pq.write_table(pa.table({"t": ["a", "b"], "l": [True, False], "other": [1, 2]}), tmp_path / "a.parquet")
        columns = ExampleColumns(texts=(("text", "t"),), label="l")
        store = store_of(tmp_path, SourceSpec(kind="files", path=str(tmp_path / "a.parquet")), columns)
        assert store.labels == ("false", "true")
        assert [store.label(0), store.label(1)] == [1, 0]
        with pytest.raises(SourceError, match="has no column 'text': it has t, l, other"):
            store_of(tmp_path, SourceSpec(kind="files", path=str(tmp_path / "a.parquet")), CLASSES)

    def test_several_texts(self, tmp_path: Path):
        source = write(tmp_path / "a.jsonl", {"long": "a b c", "short": "b"})
        store = store_of(tmp_path, source, ExampleColumns(texts=(("source", "long"), ("target", "short"))))
        assert bytes(store.tokens("source", 0).tolist()) == b"a b c"
        assert bytes(store.tokens("target", 0).tolist()) == b"b"
        with pytest.raises(ValueError, match="have no class"):
            store.label(0)

    def test_labels_in_order(self):
        assert sorted_labels(["b", "10", "9", None, "a", "b"]) == ["9", "10", "a", "b"]


class TestSplit:
    def test_equal_texts_and_equal_groups_are_on_one_side(self, tmp_path: Path):
        rows = [{"text": f"text {i % 20}", "label": 0, "from": f"file {i % 5}"} for i in range(60)]
        source = write(tmp_path / "a.jsonl", *rows)
        by_text = store_of(tmp_path, source, CLASSES, validation_fraction=0.4)
        held, kept = by_text.records("validation"), by_text.records("train")
        assert sorted([*held, *kept]) == list(range(60))
        assert len(held) > 0
        assert not {i % 20 for i in held} & {i % 20 for i in kept}
        grouped = ExampleColumns(texts=(("text", "text"),), label="label", group="from")
        by_file = store_of(tmp_path, source, grouped, validation_fraction=0.4)
        held, kept = by_file.records("validation"), by_file.records("train")
        assert {i % 5 for i in held}
        assert not {i % 5 for i in held} & {i % 5 for i in kept}

    def test_questions_on_one_text_are_on_one_side(self, tmp_path: Path):
        rows = [{"question": f"q{i}", "context": f"text {i % 6}", "answers": "text"} for i in range(30)]
        store = store_of(tmp_path, write(tmp_path / "a.jsonl", *rows), ANSWERS, validation_fraction=0.3)
        held, kept = store.records("validation"), store.records("train")
        assert {i % 6 for i in held}
        assert not {i % 6 for i in held} & {i % 6 for i in kept}

    def test_a_share_too_small_for_chance_still_holds_one_out(self, tmp_path: Path):
        source = write(tmp_path / "a.jsonl", *({"text": str(i), "label": 0} for i in range(5)))
        store = store_of(tmp_path, source, CLASSES, validation_fraction=1e-9)
        assert len(store.records("validation")) == 1
        same = write(tmp_path / "b.jsonl", *({"text": "x", "label": 0} for i in range(5)))
        with pytest.raises(StoreError, match="all examples are the same text"):
            store_of(tmp_path, same, CLASSES, validation_fraction=0.1)

    def test_a_file_of_its_own(self, tmp_path: Path):
        train = write(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": 0} for i in range(3)))
        validation = write(tmp_path / "b.jsonl", *({"text": f"v{i}", "label": 1} for i in range(2)))
        store = store_of(tmp_path, train, CLASSES, validation=validation, validation_fraction=0.5)
        assert store.records("train").tolist() == [0, 1, 2]
        assert store.records("validation").tolist() == [3, 4]
        assert bytes(store.tokens("text", 3).tolist()) == b"v0"


class TestCache:
    def test_what_is_there_is_used_and_what_changed_is_made_again(self, tmp_path: Path):
        source = write(tmp_path / "a.jsonl", {"text": "one", "label": 0})
        first = store_of(tmp_path, source, CLASSES)
        stamp = (first.directory / "manifest.json").stat().st_mtime_ns
        again = store_of(tmp_path, source, CLASSES)
        assert again.directory == first.directory
        assert (again.directory / "manifest.json").stat().st_mtime_ns == stamp
        other = store_of(tmp_path, source, CLASSES, tokenizer=TokenizerSettings(vocab_size=300))
        assert other.directory != first.directory
        longer = write(tmp_path / "a.jsonl", {"text": "one", "label": 0}, {"text": "two", "label": 0})
        assert store_of(tmp_path, longer, CLASSES).n_records == 2
        assert sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.is_dir()) == []

    def test_a_changed_file_is_refused(self, tmp_path: Path):
        store = store_of(tmp_path, write(tmp_path / "a.jsonl", {"text": "one", "label": 0}), CLASSES)
        (store.directory / "text.tokens.bin").write_bytes(b"\0\0\0\0\0\0")
        with pytest.raises(StoreError, match=r"text.tokens.bin was changed .*sha256"):
            ExampleStore.open(store.directory, check=True)

    def test_records_that_a_function_makes(self, tmp_path: Path):
        made = BuiltIn(
            name="numbers",
            version=1,
            make=lambda: (ExampleRecord(place=f"number {i}", texts={"text": str(i)}, label="n") for i in range(4)),
        )
        store = prepare_examples(
            ExampleSettings(source=made, columns=CLASSES, tokenizer=BYTES, cache=tmp_path, validation_fraction=0.3)
        )
        assert store.n_records == 4
        assert store.place(2) == "number 2"


class TestBadRecords:
    def test_they_are_counted_and_named_up_to_a_share(self, tmp_path: Path):
        good = [{"text": f"t{i}", "label": 0} for i in range(18)]
        path = tmp_path / "a.jsonl"
        write(path, *good, {"text": "x", "label": None})
        with path.open("a") as file:
            file.write("{not json\n")
        source = SourceSpec(kind="files", path=str(path))
        store = store_of(tmp_path, source, CLASSES, tolerance=0.1)
        assert (store.n_records, store.refused) == (18, 2)
        first, second = store.manifest["refused"]["first"]
        assert first.endswith(
            "a.jsonl line 19: column 'label' holds None, which names no class (text or a whole number does)"
        )
        assert "a.jsonl line 20: not valid JSON" in second
        with pytest.raises(
            StoreError, match=r"2 of 20 examples cannot be used, more than .*tolerance=0.09 allows: .*19"
        ):
            store_of(tmp_path, source, CLASSES, tolerance=0.09)
        assert not list((tmp_path / "cache").glob("*.building"))

    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            (
                {"question": "q", "context": "some text", "answers": "nowhere"},
                "the answer 'nowhere' is not in 'context'",
            ),
            (
                {"question": "q", "context": "a b a", "answers": {"text": ["a"], "answer_start": [2]}},
                "the answer 'a' is not in 'context' at character 2",
            ),
            (
                {"question": "q", "context": "a", "answers": {"text": ["a", "a"], "answer_start": [0]}},
                "expected 2 first",
            ),
            ({"question": "q", "context": "a", "answers": 3}, "expected a text or a list of texts"),
            ({"question": " ", "context": "a", "answers": "a"}, "column 'question' is empty"),
            ({"context": "a", "answers": "a"}, "has no column 'question': it has context, answers"),
            ([1], "expected an object with the columns question, context, answers"),
        ],
    )
    def test_each_says_what_is_wrong(self, row: object, sentence: str):
        with pytest.raises(SourceError) as refusal:
            ANSWERS.of_row(row, "f.jsonl", "line 7")
        assert str(refusal.value).startswith("f.jsonl line 7")
        assert sentence in str(refusal.value)

    def test_plain_text_has_no_columns(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("hello")
        with pytest.raises(SourceError, match=r"has no columns \(text, label\): use .jsonl, .parquet or .arrow"):
            store_of(tmp_path, SourceSpec(kind="files", path=str(tmp_path / "a.txt")), CLASSES)


class TestAnswers:
    def test_forms_of_answers(self):
        def answers(value: object, **more: object) -> tuple[Answer, ...]:
            columns = ExampleColumns(texts=ANSWERS.texts, answer="answers", answer_start="at" if more else None)
            return columns.of_row({"question": "q", "context": "b a b", "answers": value, **more}, "f", "row 0").answers

        assert answers("b") == (Answer("b", 0),)
        assert answers("b", at=4) == (Answer("b", 4),)
        assert answers(["b", "elsewhere"]) == (Answer("b", 0), Answer("elsewhere"))
        assert answers({"text": ["b", "a"], "answer_start": [4, 2]}) == (Answer("b", 4), Answer("a", 2))
        assert answers(None) == answers([]) == answers({"text": [], "answer_start": []}) == ()

    def test_spans_are_of_the_answer(self, tmp_path: Path):
        rows = [
            {"question": "q", "context": "x yz x", "answers": {"text": ["x"], "answer_start": [5]}},
            {"question": "q", "context": "x yz x", "answers": []},
        ]
        store = store_of(tmp_path, write(tmp_path / "a.jsonl", *rows), ANSWERS)
        assert store.span(0) == (5, 5)
        assert store.span(1) is None
        assert store.answers(0) == ("x",)
        assert store.answered_text(0) == "x yz x"

    @settings(max_examples=25, deadline=None)
    @given(
        text=st.text(st.sampled_from("ab c\n.,é€𝄞漢'0"), min_size=1, max_size=60),
        cut=st.tuples(st.integers(0, 59), st.integers(1, 20)),
        kind=st.sampled_from(["bytes", "bpe"]),
    )
    def test_the_tokens_of_a_span_cover_its_characters_and_no_token_too_many(
        self, text: str, cut: tuple[int, int], kind: str
    ):
        start = min(cut[0], len(text) - 1)
        end = min(len(text), start + cut[1])
        tokenizer = byte_level() if kind == "bytes" else train_bpe(["ab c ab c. a,b é €"] * 3, 270)
        ids, chars = tokenizer.encode_offsets([text])[0]
        assert ids.tolist() == tokenizer.encode(text)
        span = token_span(chars, start, end)
        assert span is not None
        first, last = span
        assert chars[first][0] <= start < chars[first][1]
        assert chars[last][0] < end <= chars[last][1]
        # Tokens back to back reproduce the text that their characters name, so the map is the tokenizer's own.
        covered = text[int(chars[first][0]) : int(chars[last][1])]
        assert text[start:end] in covered
        before = [token for token in range(first) if chars[token][1] > start]
        after = [token for token in range(last + 1, len(ids)) if chars[token][0] < end]
        assert before == after == []

    def test_long_texts_are_tokenised_in_pieces_with_the_same_places(self, monkeypatch: pytest.MonkeyPatch):
        text = "".join(f"line {i} é\nnext{i}\n" for i in range(300))
        tokenizer = train_bpe([text], 300)
        whole = tokenizer.encode_offsets([text, "x"])
        monkeypatch.setattr("longspan.data.tokenizer._GROUP", 100)
        pieces = tokenizer.encode_offsets([text, "x"])
        for (ids, chars), (other_ids, other_chars) in zip(whole, pieces, strict=True):
            assert np.array_equal(ids, other_ids)
            assert np.array_equal(chars, other_chars)


class TestFrame:
    def test_ours_have_the_end_token_in_each_place(self):
        assert byte_level().frame == Frame((256,), (256,), (256,))

    def test_others_have_their_template(self):
        definition = json.loads(byte_level()._definition)
        words = ["<s>", "</s>"]
        definition["added_tokens"] += [
            {"id": 257 + i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False}
            for i, word in enumerate(words)
        ]
        special = {word: {"id": word, "ids": [257 + i], "tokens": [word]} for i, word in enumerate(words)}
        token = [{"SpecialToken": {"id": word, "type_id": 0}} for word in words]
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token[0], a, token[1]],
            "pair": [token[0], a, token[1], token[1], b, token[1]],
            "special_tokens": special,
        }
        tokenizer = Tokenizer(json.dumps(definition), "</s>")
        assert tokenizer.frame == Frame((257,), (258, 258), (258,))
