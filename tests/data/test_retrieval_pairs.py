"""Pairs of pieces of documents: the right label, no overlap, no document on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.data.synthetic import Document, pair_records, write_pairs
from longspan.data.synthetic.retrieval import SEPARATOR

# Every place of every document is told by its text.
DOCUMENTS = [Document(f"d{i}", "".join(f"<{i}:{k:04}>" for k in range(60 + i))) for i in range(12)]


def pieces(text: str) -> tuple[str, str]:
    first, second = text.split(SEPARATOR)
    return first, second


def test_labels_say_whether_the_documents_are_the_same():
    records = list(pair_records(DOCUMENTS, n=60, piece_bytes=100))
    assert [record.label for record in records] == ["same", "different"] * 30
    orders = set()
    for record in records:
        first, second = pieces(record.texts["text"])
        assert len(first) == len(second) == 100
        whole = [each for each in DOCUMENTS if first in each.text]
        other = [each for each in DOCUMENTS if second in each.text]
        assert len(whole) == len(other) == 1
        assert (whole == other) == (record.label == "same")
        if whole == other:
            text = whole[0].text
            assert abs(text.index(first) - text.index(second)) >= 100
            orders.add(text.index(first) < text.index(second))
    assert orders == {True, False}
    assert list(pair_records(DOCUMENTS, n=3, piece_bytes=100)) == records[:3]


def test_characters_are_not_cut_in_half():
    accents = [Document(str(i), "é" * 300 + str(i)) for i in range(3)]
    for record in pair_records(accents, n=8, piece_bytes=101):
        assert "\ufffd" not in record.texts["text"]
        assert all(len(piece.encode()) <= 101 for piece in pieces(record.texts["text"]))


def test_no_document_is_on_both_sides(tmp_path: Path):
    paths = write_pairs(DOCUMENTS, tmp_path, n_train=40, n_validation=20, held_out=0.3, piece_bytes=100)
    sides = []
    for path, n in zip(paths, (40, 20), strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == n
        shown = [piece for row in rows for piece in pieces(row["text"])]
        sides.append({each.name for each in DOCUMENTS for piece in shown if piece in each.text})
    assert len(sides[1]) == 4
    assert not sides[0] & sides[1]
    with pytest.raises(FileExistsError):
        write_pairs(DOCUMENTS, tmp_path, n_train=1, n_validation=1, piece_bytes=100)


def test_too_few_documents():
    with pytest.raises(ValueError, match=r"0 documents have 8,000 bytes or more"):
        list(pair_records(DOCUMENTS, n=1))
