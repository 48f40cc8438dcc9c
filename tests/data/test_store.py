"""The token store: what is written is what was read, verified on opening, the same whoever builds it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.data import store as module
from longspan.data.shards import cut_into_shards, piece_of, split_hash, token_dtype, tokenize_shard
from longspan.data.sources import Document, SourceError, SourceSpec, read
from longspan.data.store import SPLITS, StoreError, TokenStore, build_store
from longspan.data.tokenizer import byte_level, train_bpe

BYTES = byte_level()
BPE = train_bpe([f"the quick brown fox {number} jumps over it\n" * 3 for number in range(50)], 400)


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[SourceSpec, ...]:
    """Two sources, 130 documents, some of them equal, one in Japanese."""
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(f"document {number % 27} é\n" * (1 + number), "utf-8")
    rows = [{"text": f"row {number} 日本語 the quick brown fox\n" * (1 + number % 7)} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        SourceSpec(kind="files", path=str(tmp_path / "texts"), name="texts"),
        SourceSpec(kind="files", path=str(tmp_path / "rows.jsonl"), name="rows"),
    )


def build(directory: Path, corpus: tuple[SourceSpec, ...], **options) -> TokenStore:
    return build_store(directory, corpus, BPE, **({"validation_fraction": 0.2} | options))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_every_document_is_there_once_with_its_bytes_source_and_end(tmp_path: Path, corpus):
    store = build(tmp_path / "store", corpus, shard_bytes=1000)
    found = []
    for split in SPLITS:
        documents = store.documents(split)
        for index in range(len(documents)):
            tokens = documents.tokens(index)
            assert tokens.dtype == np.uint16
            assert tokens[-1] == BPE.eos_id
            assert BPE.eos_id not in tokens[:-1]
            assert documents.length(index) == len(tokens)
            assert documents.loss_mask(index) is None
            text = BPE.decode(tokens.tolist())
            assert documents.n_bytes(index) == len(text.encode())
            assert (split_hash(text) < 0.2 * 2**64) == (split == "validation")
            found.append((documents.source(index), documents.id(index), text))
    expected = [(document.source, document.id, document.text) for source in corpus for document in read(source)]
    assert sorted(found) == sorted(expected)
    train = [(source, name) for source, name, _ in found[: len(store.documents("train"))]]
    assert train == [(d.source, d.id) for s in corpus for d in read(s) if split_hash(d.text) >= 0.2 * 2**64]


def test_counts_by_source_and_split(tmp_path: Path, corpus):
    store = build(tmp_path / "store", corpus)
    assert store.sources == ("texts", "rows")
    for split in SPLITS:
        documents = store.documents(split)
        for name in store.sources:
            mine = [index for index in range(len(documents)) if documents.source(index) == name]
            count = store.counts[split][name]
            assert count.documents == len(mine) > 0
            assert count.tokens == sum(documents.length(index) for index in mine)
            assert count.bytes == sum(documents.n_bytes(index) for index in mine)
        assert store.n_tokens(split) == len(documents.all_tokens)


def test_equal_texts_are_on_one_side(tmp_path: Path, corpus):
    store = build(tmp_path / "store", corpus, validation_fraction=0.5)
    sides = [
        {store.documents(split).tokens(index).tobytes() for index in range(len(store.documents(split)))}
        for split in SPLITS
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_workers_and_shards_do_not_change_a_byte(tmp_path: Path, corpus):
    alone = build(tmp_path / "alone", corpus, shard_bytes=1 << 20)
    seen = []
    together = build(
        tmp_path / "together",
        corpus,
        shard_bytes=500,
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(alone.directory) == contents(together.directory)
    done = [amount for amount, _ in seen]
    assert done == sorted(done)
    n_bytes = sum(count.bytes for counts in alone.counts.values() for count in counts.values())
    assert seen[-1] == (n_bytes, n_bytes)
    assert len(seen) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "rows.jsonl", "texts", "together"]


def test_a_finished_shard_is_known_by_its_texts():
    def names(*texts: str) -> list[str]:
        pieces = [piece_of(Document(text, "source", str(number)), 0) for number, text in enumerate(texts)]
        return [shard.file_name for shard in cut_into_shards(pieces, shard_bytes=4)]

    before = names("ab", "cd", "ef", "gh", "i")
    assert len(before) == 3
    assert names("ab", "cd", "ef", "gx", "i") == [before[0], names("ab", "cd", "ef", "gx")[1], before[2]]
    assert names("ab", "cd", "ef", "gx")[1] != before[1]


def test_the_same_text_at_another_time_gives_the_same_store(tmp_path: Path, corpus):
    first = build(tmp_path / "first", corpus)
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, (1, 1))
    again = build(tmp_path / "again", corpus)
    assert contents(first.directory) == contents(again.directory)
    assert again.skipped_files == {}
    (tmp_path / "texts" / "picture.png").write_bytes(b"\0")
    assert build(tmp_path / "more", corpus).skipped_files == {"texts": 1}
    assert (
        again.manifest["sources"][0] | {"name": "texts", "kind": "files", "count": 30} == again.manifest["sources"][0]
    )


def test_ids_above_uint16_take_uint32():
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32


class TestSplit:
    def build(self, tmp_path: Path, texts: list[str], fraction: float) -> dict[str, list[str]]:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        spec = SourceSpec(kind="files", path=str(path))
        store = build_store(tmp_path / "store", [spec], BYTES, validation_fraction=fraction)
        return {
            split: [BYTES.decode(documents.tokens(index).tolist()) for index in range(len(documents))]
            for split in SPLITS
            for documents in [store.documents(split)]
        }

    def test_the_fraction_is_kept_on_average(self, tmp_path: Path):
        found = self.build(tmp_path, [f"text {number}" for number in range(2000)], 0.1)
        assert 150 < len(found["validation"]) < 250

    def test_few_documents_hold_out_one(self, tmp_path: Path):
        texts = [f"text {number}" for number in range(5)]
        found = self.build(tmp_path, texts, 1e-6)
        assert found["validation"] == [min(texts, key=split_hash)]
        assert sorted(found["train"] + found["validation"]) == texts

    def test_something_is_always_left_to_train_on(self, tmp_path: Path):
        texts = [f"text {number}" for number in range(5)]
        assert self.build(tmp_path, texts, 0.999999)["train"] == [max(texts, key=split_hash)]

    def test_a_single_document_is_cut_at_a_line_near_its_end(self, tmp_path: Path):
        lines = [f"line {number}\n" for number in range(100)]
        found = self.build(tmp_path, ["".join(lines)], 0.1)
        assert found == {"train": ["".join(lines[:90])], "validation": ["".join(lines[90:])]}

    def test_a_single_line_is_cut_too(self, tmp_path: Path):
        assert self.build(tmp_path, ["0123456789"], 0.2) == {"train": ["01234567"], "validation": ["89"]}

    def test_none_held_out_when_not_asked(self, tmp_path: Path):
        assert self.build(tmp_path, ["only"], 0) == {"train": ["only"], "validation": []}

    def test_equal_documents_only(self, tmp_path: Path):
        with pytest.raises(StoreError, match="all documents are the same text"):
            self.build(tmp_path, ["same", "same"], 0.5)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_prompts_get_a_loss_mask(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "ab", "a": "cde"}\n{"q": "", "a": "f"}\n')
    spec = SourceSpec(kind="files", path=str(path), prompt_field="q", response_field="a")
    documents = build_store(tmp_path / "store", [spec], BYTES, validation_fraction=0).documents("train")
    assert documents.tokens(0).tolist() == [97, 98, 99, 100, 101, 256]
    masks = [documents.loss_mask(index) for index in (0, 1)]
    assert [mask.tolist() for mask in masks if mask is not None] == [[0, 0, 1, 1, 1, 1], [1, 1]]
    assert documents.n_bytes(0) == 5


class TestOpening:
    @pytest.fixture
    def directory(self, tmp_path: Path, corpus) -> Path:
        store = build(tmp_path / "store", corpus)
        module._hashed.clear()  # as in a new process
        return store.directory

    def test_gives_what_was_built_with_its_tokenizer(self, directory: Path):
        store = TokenStore.open(directory, tokenizer_sha256=BPE.sha256)
        assert store.tokenizer().sha256 == BPE.sha256
        assert len(store.documents("train").tokens(0)) > 1

    def test_another_tokenizer(self, directory: Path):
        with pytest.raises(StoreError, match="was written with another tokenizer"):
            TokenStore.open(directory, tokenizer_sha256=BYTES.sha256)

    @pytest.mark.parametrize(
        ("damage", "match"),
        [
            (
                lambda d: (d / "train.tokens.bin").write_bytes(b"\0\0"),
                r"train\.tokens\.bin has 2 bytes instead of [\d,]+",
            ),
            (lambda d: (d / "train.offsets.bin").unlink(), r"train\.offsets\.bin is missing: delete"),
            (lambda d: flip(d / "validation.tokens.bin"), r"validation\.tokens\.bin was changed .*sha256"),
            (lambda d: flip(d / "tokenizer.json"), r"tokenizer\.json was changed"),
            (lambda d: (d / "manifest.json").unlink(), r"is not a token store: it has no manifest\.json"),
            (lambda d: (d / "manifest.json").write_text('{"format": '), r"manifest\.json is damaged"),
            (lambda d: (d / "manifest.json").write_text('{"model": 1}'), r"belongs to something else"),
            (lambda d: edit(d, version=99), r"has store version 99, this program reads 1"),
            (lambda d: edit(d, eos_id=5), r"manifest\.json was changed after it was written"),
        ],
    )
    def test_damage_is_refused_in_one_line(self, directory: Path, damage: Callable[[Path], object], match: str):
        TokenStore.open(directory)
        module._hashed.clear()
        damage(directory)
        with pytest.raises(StoreError, match=match) as caught:
            TokenStore.open(directory)
        assert "\n" not in str(caught.value)

    def test_hashes_are_compared_once_a_process_or_when_asked(self, directory: Path, monkeypatch):
        TokenStore.open(directory)
        flip(directory / "train.tokens.bin")
        TokenStore.open(directory)
        with pytest.raises(StoreError, match="sha256"):
            TokenStore.open(directory, check=True)
        module._hashed.clear()
        TokenStore.open(directory, check=False)
        monkeypatch.setattr(module, "HASHED_ON_OPEN", 10)
        TokenStore.open(directory)

    def test_pickles_as_a_path(self, directory: Path):
        store = TokenStore.open(directory)
        store.documents("train").tokens(0)
        pickled = pickle.dumps(store)
        assert len(pickled) < 4000
        again = pickle.loads(pickled)
        assert again.documents("train").tokens(3).tolist() == store.documents("train").tokens(3).tolist()

    def test_the_memory_maps_are_read_only(self, directory: Path):
        with pytest.raises(ValueError, match="read-only"):
            TokenStore.open(directory).documents("train").tokens(0)[0] = 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestRefusals:
    def test_nothing_is_left_behind(self, tmp_path: Path, corpus):
        before = sorted(path.name for path in tmp_path.iterdir())
        bad = tmp_path / "rows.jsonl"
        bad.write_text(bad.read_text() + "{broken\n")
        for workers in (1, 2):
            with pytest.raises(SourceError, match=r"rows\.jsonl line 101: not valid JSON"):
                build(tmp_path / "store", corpus, shard_bytes=500, workers=workers)
            assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_an_existing_directory_and_wrong_settings(self, tmp_path: Path, corpus):
        (tmp_path / "store").mkdir()
        with pytest.raises(StoreError, match="exists already"):
            build(tmp_path / "store", corpus)
        with pytest.raises(StoreError, match="validation_fraction=1"):
            build(tmp_path / "new", corpus, validation_fraction=1)
        with pytest.raises(StoreError, match="2 sources are called 'texts'"):
            build(tmp_path / "new", (corpus[0], corpus[0]))

    def test_leftovers_of_another_tokenizer_are_not_used(self, tmp_path: Path, corpus):
        wanted = build(tmp_path / "wanted", corpus, shard_bytes=2000)
        building = tmp_path / "store.building"
        (building / "shards").mkdir(parents=True)
        (building / "plan.json").write_text("{}")
        pieces = [piece_of(document, index) for index, source in enumerate(corpus) for document in read(source)]
        for shard in cut_into_shards(pieces, 2000):
            tokenize_shard(shard, BYTES, building / "shards")
        assert contents(build(tmp_path / "store", corpus, shard_bytes=2000).directory) == contents(wanted.directory)
