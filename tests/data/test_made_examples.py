"""Examples that are made with held-out ones of their own: ListOps, and pairs of pieces of the library's modules."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from longspan.data.example_build import ExampleSettings, prepare_examples
from longspan.data.example_records import ExampleColumns
from longspan.data.prepare import TokenizerSettings
from longspan.data.stdlib_examples import BUILT_IN, HELD_OUT
from longspan.data.synthetic import listops_expression
from longspan.data.synthetic.listops import SYMBOLS, ListOpsSplit
from longspan.data.synthetic.retrieval import SEPARATOR

CLASSES = ExampleColumns(texts=(("text", "text"),), label="label")


def test_listops_goes_into_a_store_of_one_token_a_symbol(tmp_path: Path):
    def build(limit: int):
        return prepare_examples(
            ExampleSettings(
                name="listops",
                source=replace(BUILT_IN["listops"], limit=limit),
                validation=replace(HELD_OUT["listops"], limit=10),
                columns=CLASSES,
                tokenizer=TokenizerSettings(kind="words"),
                cache=tmp_path,
            )
        )

    store = build(40)
    assert len(store.records("train")) == 40
    assert len(store.records("validation")) == 10
    assert store.vocab_size == len(SYMBOLS) + 2 == 17
    tokenizer = store.tokenizer()
    begins: dict[ListOpsSplit, int] = {"train": 0, "validation": 40}
    for split, first in begins.items():
        made = listops_expression(split, 3)
        assert tokenizer.decode(store.tokens("text", first + 3).tolist()) == made.text
        assert store.lengths("text")[first + 3] == made.n_symbols
        assert store.labels[store.label(first + 3)] == str(made.value)
    stamp = (store.directory / "manifest.json").stat().st_mtime_ns
    assert (build(40).directory / "manifest.json").stat().st_mtime_ns == stamp
    assert build(30).directory != store.directory


def test_pairs_of_the_library_hold_out_modules():
    sides = {}
    for name, made in (("train", BUILT_IN), ("validation", HELD_OUT)):
        records = list(islice(made["same_document"].records(), 60))
        assert {record.label for record in records} == {"same", "different"}
        assert all(record.texts["text"].count(SEPARATOR) >= 1 for record in records)
        assert max(len(record.texts["text"].encode()) for record in records) <= 8000 + len(SEPARATOR)
        sides[name] = {part for record in records for part in record.place.split(" of ")[1].split(" and ")}
    assert sides["train"]
    assert not sides["train"] & sides["validation"]
