"""The hashes that say what text a perplexity and an effective context are of."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from longspan.data.sources import from_path
from longspan.data.tokenizer import Tokenizer, byte_level, train_bpe
from longspan.evaluation.perplexity.documents import (
    EvalDocument,
    StoredDocuments,
    TextDocuments,
    documents_from,
    text_digest,
    text_documents,
    tokens_digest,
)
from longspan.evaluation.perplexity.evaluate import evaluate_documents
from longspan.evaluation.perplexity.result import ScoringProtocol
from longspan.model.zoo import build

TEXTS = ("Grün, über naïve.", "The sky is blue, the sky is blue.", "naïve")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stored(tokenizer: Tokenizer, *texts: str) -> TextDocuments:
    ids = [np.array([*tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    return TextDocuments(
        ids, [len(text.encode()) for text in texts], ["made"] * len(texts), [sha(each) for each in texts]
    )


def protocol_of(tokenizer: Tokenizer, documents: StoredDocuments, **scoring) -> ScoringProtocol:
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 16}, seed=0)
    asked = {"max_tokens": None, "window": 8, "stride": 4, "batch": 4, "scored": "all", "merge_windows": True}
    choices = SimpleNamespace(**{**asked, "protocols": (), **scoring})
    found = evaluate_documents(model, tokenizer, documents, choices, context=16, device="cpu", precision="fp32")  # pyright: ignore[reportArgumentType]: the zoo gives any kind of model
    return found.result.protocol


def test_by_hand() -> None:
    one = EvalDocument(tokens=np.array([7, 300], dtype=np.uint16), n_bytes=2, id="x", source="y")
    two = EvalDocument(tokens=np.array([5]), n_bytes=1, prompt=1)
    assert tokens_digest([one, two]) == hashlib.sha256(struct.pack("<7q", 2, 0, 7, 300, 1, 1, 5)).hexdigest()
    texts = {(): "", (7, 300): "né", (5,): "?"}
    found = text_digest([one, two], lambda ids: texts[tuple(ids)])
    assert found == sha(f"{sha('')} {sha('né')}\n{sha('?')} {sha('')}\n")
    known = replace(one, text_sha256=sha("Né"))  # as it was before a tokenizer lowered it
    assert text_digest([known], lambda ids: texts[tuple(ids)]) == sha(f"{sha('')} {sha('Né')}\n")
    for cut in (replace(known, truncated=True), replace(known, tokens=known.tokens, prompt=0, text_sha256=None)):
        assert text_digest([cut], lambda ids: texts[tuple(ids)]) == sha(f"{sha('')} {sha('né')}\n")


def test_a_perplexity_says_what_was_scored() -> None:
    """In tokens, which tokenizers cut differently, and in words, which they have in common."""
    of_bytes, of_pieces = byte_level(), train_bpe(["the sky is blue, the grass is green"] * 3, 270)
    bytes_, pieces = (protocol_of(each, stored(each, *TEXTS)) for each in (of_bytes, of_pieces))
    assert bytes_.tokens_sha256 == tokens_digest(documents_from(stored(of_bytes, *TEXTS)))
    assert (bytes_.tokenizer_sha256, pieces.tokenizer_sha256) == (of_bytes.sha256, of_pieces.sha256)
    assert bytes_.tokens_sha256 != pieces.tokens_sha256
    assert bytes_.text_sha256 == pieces.text_sha256 == sha("".join(f"{sha('')} {sha(text)}\n" for text in TEXTS))


def test_text_from_a_file_is_known_as_it_was(tmp_path: Path) -> None:
    """Whatever becomes of it in a tokenizer; what is cut is known by its tokens alone."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    documents = documents_from(
        text_documents(from_path(str(path)), byte_level()), max_tokens=45, decode=byte_level().decode
    )
    whole = [each for each in documents if not each.truncated]
    assert [each.text_sha256 for each in whole] == [sha(TEXTS[int(each.id)]) for each in whole]
    assert 0 < len(whole) < len(documents)
    assert text_digest(whole, lambda ids: "" if not ids else "LOSSY") == sha(
        "".join(f"{sha('')} {each.text_sha256}\n" for each in whole)
    )


@pytest.mark.parametrize(
    ("texts", "scoring"),
    [
        ((*TEXTS[:2], "naive"), {}),
        (TEXTS[:2], {}),
        ((TEXTS[1], TEXTS[0], TEXTS[2]), {}),
        (TEXTS, {"max_tokens": 30}),
        (TEXTS, {"scored": "full_windows"}),
    ],
)
def test_other_text_has_another_hash(texts: tuple[str, ...], scoring: dict[str, object]) -> None:
    tokenizer = byte_level()
    ours, other = (
        protocol_of(tokenizer, stored(tokenizer, *TEXTS)),
        protocol_of(tokenizer, stored(tokenizer, *texts), **scoring),
    )
    assert ours.tokens_sha256 != other.tokens_sha256
    assert ours.text_sha256 != other.text_sha256


def test_what_is_only_read_is_told_from_what_is_scored() -> None:
    document = EvalDocument(tokens=np.arange(6), n_bytes=6)
    assert tokens_digest([document]) != tokens_digest([replace(document, prompt=2)])
    assert tokens_digest([document]) == tokens_digest([replace(document, id="7", source="elsewhere")])
