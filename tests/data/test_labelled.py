"""Rows of labelled examples: what is read, where the answer stands, what is padded, and which row comes when."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.example_build import ExampleSettings, prepare_examples
from longspan.data.example_records import ExampleColumns
from longspan.data.examples import ExampleStore
from longspan.data.labelled import ItemPass, ItemStream, TextItems, WindowItems, default_overlap, windows_of
from longspan.data.prepare import TokenizerSettings
from longspan.data.shards import StoreError
from longspan.data.sources import SourceSpec

END = 256  # the end token of byte tokenizers, which stands in each special place


def store_of(tmp_path: Path, rows: Sequence[dict], columns: ExampleColumns, held_out: float = 0.0) -> ExampleStore:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare_examples(
        ExampleSettings(
            source=SourceSpec(kind="files", path=str(path)),
            columns=columns,
            tokenizer=TokenizerSettings(kind="bytes"),
            validation_fraction=held_out,
            cache=tmp_path / "cache",
        )
    )


def classes(tmp_path: Path, *rows: tuple[str, str]) -> ExampleStore:
    columns = ExampleColumns(texts=(("text", "text"),), label="label")
    return store_of(tmp_path, [{"text": text, "label": label} for text, label in rows], columns)


def answers(tmp_path: Path, *rows: tuple[str, str, str]) -> ExampleStore:
    columns = ExampleColumns(texts=(("question", "q"), ("context", "c")), answer="a")
    return store_of(tmp_path, [{"q": q, "c": c, "a": a or None} for q, c, a in rows], columns)


class TestTexts:
    def test_a_row_is_a_framed_text_with_its_class(self, tmp_path: Path):
        store = classes(tmp_path, ("abc", "no"), ("x" * 30, "yes"))
        items = TextItems(store, "train", classes=("yes", "no"), context=20)
        assert items.lengths.tolist() == [5, 20]
        assert items.n_cut == 1
        batch = items.batch([0, 1], [7, 8])
        assert batch.tokens_BT.shape == (2, 20)  # the multiple of 16 above is beyond the context
        assert batch.tokens_BT[0, :6].tolist() == [END, *b"abc", END, END]
        assert batch.tokens_BT[1].tolist() == [END, *b"x" * 18, END]
        assert batch.lengths_B.tolist() == [5, 20]
        assert batch.targets_BN.tolist() == [[1], [0]]
        assert batch.indices_B.tolist() == [7, 8]
        assert batch.is_global_BT.nonzero().tolist() == [[0, 0], [1, 0]]
        assert batch.types_BT is None
        assert int(batch.n_loss_tokens) == 2
        assert items.batch([0], [0]).tokens_BT.shape == (1, 16)

    def test_an_unknown_class_is_named(self, tmp_path: Path):
        store = classes(tmp_path, ("a", "no"), ("b", "maybe"))
        with pytest.raises(StoreError, match=r"model.labels=\['no', 'yes'\]: the examples also have maybe"):
            TextItems(store, "train", classes=("no", "yes"), context=20)
        with pytest.raises(StoreError, match=r"data.context=2: special tokens fill it"):
            TextItems(store, "train", classes=("no", "maybe"), context=2)


class TestWindows:
    @settings(max_examples=25, deadline=None)
    @given(n_tokens=st.integers(0, 200), room=st.integers(1, 40), overlap=st.integers(0, 39))
    def test_they_cover_every_token_and_share_the_overlap(self, n_tokens: int, room: int, overlap: int):
        overlap = min(overlap, room - 1)
        windows = windows_of(n_tokens, room, overlap)
        assert {token for first, size in windows for token in range(first, first + size)} == set(range(n_tokens))
        assert all(size == room for _, size in windows[:-1])
        for (first, size), (after, _) in pairwise(windows):
            assert first + size - after == overlap
        assert windows[-1][0] + windows[-1][1] == n_tokens
        assert all(size > 0 for _, size in windows) or n_tokens == 0

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_the_answer_stands_where_the_targets_say(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ):
        text = data.draw(st.text("abcdé ", min_size=40, max_size=120).filter(lambda text: text.strip()))
        start = data.draw(st.integers(0, len(text) - 1))
        answer = text[start : start + data.draw(st.integers(1, 12))]
        if not answer.strip():
            return
        store = answers(tmp_path_factory.mktemp("q"), ("what?", text, answer))
        items = WindowItems(store, "train", context=40, overlap=14)
        batch = items.batch(range(len(items.lengths)), range(len(items.lengths)))
        assert batch.types_BT is not None
        found = 0
        for row in range(len(items.lengths)):
            first, last = batch.targets_BN[row].tolist()
            tokens = batch.tokens_BT[row, : int(batch.lengths_B[row])].tolist()
            assert tokens[:7] == [END, *b"what?", END]
            assert batch.types_BT[row].nonzero().flatten().tolist() == list(range(7, len(tokens)))
            assert batch.is_global_BT[row].nonzero().flatten().tolist() == list(range(6))
            if (first, last) == (0, 0):
                continue
            found += 1
            assert bytes(tokens[first : last + 1]).decode() == answer
        # Windows share 14 bytes; an answer of 12 characters may be 24 bytes and lie across them.
        assert found >= 1 or len(answer.encode()) > 14

    def test_no_answer_is_the_first_token(self, tmp_path: Path):
        store = answers(tmp_path, ("q", "text", ""))
        assert WindowItems(store, "train", context=40, overlap=4).batch([0], [0]).targets_BN.tolist() == [[0, 0]]

    def test_long_questions_are_cut(self, tmp_path: Path):
        store = answers(tmp_path, ("q" * 50, "text " * 20, "text"))
        items = WindowItems(store, "train", context=60, overlap=10)
        assert items.n_cut == 1
        assert items.batch([0], [0]).begins_B.tolist() == [1 + 20 + 1]
        assert int(items.lengths.max()) == 60
        with pytest.raises(StoreError, match=r"overlap=40: the longest question leaves 37 of data.context=60"):
            WindowItems(store, "train", context=60, overlap=40)

    def test_windows_of_a_record_stay_together_in_validation(self, tmp_path: Path):
        store = answers(tmp_path, *((f"q{i}", f"{i} " * 60, str(i)) for i in range(9)))
        items = WindowItems(store, "train", context=40, overlap=8)
        order = items.by_record()
        assert sorted(order.tolist()) == list(range(len(items.lengths)))
        stream = ItemPass(items, bucket=4, order=order)
        batch = stream.batch(range(stream.n_sequences))
        records = batch.records_B.tolist()
        changes = sum(one != other for one, other in pairwise(records))
        assert changes == 8
        assert records != sorted(records)
        assert {record: records.count(record) for record in records} == items.n_windows
        assert default_overlap(64) == 16
        assert default_overlap(4096) == 128


class TestStreams:
    @pytest.fixture
    def items(self, tmp_path: Path) -> TextItems:
        lengths = np.random.default_rng(0).integers(1, 90, 50)
        store = classes(tmp_path, *((f"{i:02}" + "x" * int(n), "ab"[i % 2]) for i, n in enumerate(lengths)))
        return TextItems(store, "train", classes=("a", "b"), context=64)

    def test_a_pass_holds_every_record_once(self, items: TextItems):
        stream = ItemStream(items, bucket=4, seed=1)
        assert stream.n_sequences == 50
        for epoch in range(2):
            batch = stream.batch(range(50 * epoch, 50 * epoch + 50))
            assert sorted(batch.records_B.tolist()) == list(range(50))
        validation = ItemPass(items, bucket=4)
        assert sorted(validation.batch(range(50)).records_B.tolist()) == list(range(50))

    def test_a_row_does_not_depend_on_its_batch(self, items: TextItems):
        stream = ItemStream(items, bucket=4, seed=1)
        whole = stream.batch(range(60))
        again = pickle.loads(pickle.dumps(ItemStream(items, bucket=4, seed=1)))
        for k in (59, 0, 31):
            alone = again.batch([k])
            n_tokens = int(alone.lengths_B)
            assert int(whole.lengths_B[k]) == n_tokens
            assert torch.equal(whole.tokens_BT[k, :n_tokens], alone.tokens_BT[0, :n_tokens])
            assert torch.equal(whole.targets_BN[k], alone.targets_BN[0])

    def test_batches_go_to_a_device_whole(self, items: TextItems):
        batch = items.batch([1, 2], [0, 1])
        moved = batch.to("meta")
        assert all(
            getattr(moved, name).device.type == "meta"
            for name in batch.__slots__
            if isinstance(getattr(batch, name), torch.Tensor)
        )
