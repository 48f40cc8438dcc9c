"""Tokenizers: exact round trips, text that stays text, determinism, streaming."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from longspan.data import tokenizer as module
from longspan.data.tokenizer import (
    END_OF_TEXT,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    byte_level,
    train_bpe,
    train_words,
)

CORPUS = [
    f"def function_{number}(value):\n    return value + {number}  # naïve café 日本語 🙂\n\n\n" for number in range(80)
]
BPE = train_bpe(CORPUS, 500)
DIGITS = train_bpe(CORPUS, 500, digits="single")
BYTES = byte_level()
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
NASTY = f"\0\r\n\ufeff \u2028{END_OF_TEXT} \U0001f468\u200d\U0001f469 e\u0301  \n\n\n\tx"


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=TEXT)
@example(text=NASTY)
@settings(max_examples=25, deadline=None)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_single_digits_are_never_merged(tmp_path: Path):
    numbers = [f"The number is: {number}.\n" for number in range(1000, 1300)]
    merged, single = (train_bpe(numbers, 400, digits=digits) for digits in ("merged", "single"))
    text = "number is: 1234,  56\n7"
    pieces = [single.decode([token]) for token in single.encode(text)]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if any(character.isdigit() for character in piece)] == list("1234567")
    assert "12" in "".join(merged.decode([token]) + "|" for token in merged.encode(text))
    assert not any(sum(byte in b"0123456789" for byte in piece) > 1 for piece in single.pieces())
    assert single.word_mark is None
    single.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(text) == single.encode(text)


def test_bytes_are_their_own_ids():
    assert BYTES.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert (BYTES.vocab_size, BYTES.eos_id) == (257, 256)


def test_text_cannot_inject_the_control_token():
    for tokenizer in (BPE, BYTES):
        ids = tokenizer.encode(f"a{END_OF_TEXT}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == f"a{END_OF_TEXT}b"
        assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == END_OF_TEXT


def test_training_is_deterministic_across_processes(tmp_path: Path):
    code = (
        "import sys, json; from longspan.data.tokenizer import train_bpe\n"
        "print(train_bpe(json.load(sys.stdin), 500).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(CORPUS), capture_output=True, text=True)
    assert done.stdout.strip() == BPE.sha256, done.stderr
    assert 257 < BPE.vocab_size <= 500
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size=256 is too small"):
        train_bpe(CORPUS, 256)


def test_save_load_and_pickle_keep_it_the_same(tmp_path: Path):
    BPE.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for again in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(BPE)),
    ):
        assert (again.sha256, again.eos_id, again.vocab_size) == (BPE.sha256, BPE.eos_id, BPE.vocab_size)
        assert again.encode(NASTY) == BPE.encode(NASTY)


@given(text=TEXT)
@settings(max_examples=25, deadline=None)
def test_long_texts_are_cut_without_changing_their_tokens(text: str):
    text = "\n".join([text, "word", f" {text}é1\n\n  indented", "x\n"] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GROUP", 7)
        for tokenizer in (BPE, BYTES, DIGITS):
            assert tokenizer._cuts_at_lines
            assert tokenizer.encode_batch([text, "", text]) == [tokenizer.encode(text), [], tokenizer.encode(text)]
        assert sum(len(group) for group in module._grouped([text], True)) > 2


class TestForeign:
    """Other people's tokenizer.json, with everything on that must be off here."""

    def save(self, directory: Path, tokens: list[str]) -> Path:
        library = Library(
            models.WordLevel({"<unk>": 0, "a": 1, "b": 2, **{t: 3 + i for i, t in enumerate(tokens)}}, "<unk>")
        )
        library.pre_tokenizer = pre_tokenizers.Whitespace()
        library.add_special_tokens(tokens)
        if tokens:
            library.post_processor = processors.TemplateProcessing(
                single=f"{tokens[0]} $A {tokens[0]}", special_tokens=[(tokens[0], 3)]
            )
        library.enable_truncation(2)
        library.enable_padding(length=8)
        library.save(str(directory / "tokenizer.json"))
        return directory

    def test_nothing_is_added_cut_or_padded(self, tmp_path: Path):
        tokenizer = Tokenizer.load(self.save(tmp_path, ["</s>"]))
        assert tokenizer.encode("a b a b") == [1, 2, 1, 2]
        assert tokenizer.encode_batch(["a b a b", "b"]) == [[1, 2, 1, 2], [2]]
        assert tokenizer.eos_id == 3

    def test_the_configured_end_token_wins_and_survives_saving(self, tmp_path: Path):
        self.save(tmp_path, ["</s>", "<end>"])
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.eos_id == 4
        tokenizer.save(tmp_path / "copy")
        assert Tokenizer.load(tmp_path / "copy").eos_id == 4

    def test_refusals(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
            Tokenizer.load(tmp_path)
        with pytest.raises(TokenizerError, match=r"no token that ends a document: looked for <\|endoftext\|>"):
            Tokenizer.load(self.save(tmp_path, []))
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json \("):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_streamed_text_joins_to_the_decoded_whole(tokenizer: Tokenizer, data: st.DataObject):
    # Any ids, as a model may write them: broken characters and end tokens included.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_character_is_shown_when_its_last_byte_has_come():
    stream = StreamDecoder(BYTES)
    assert [stream.push(byte) for byte in "é🙂!".encode()] == ["", "é", "", "", "", "🙂", "!"]
    assert stream.finish() == ""
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"


# -- templates --------------------------------------------------------------------------------------------------------


def _framed(single: str, *special: str) -> Tokenizer:
    """Plain bytes with a template of somebody else's."""
    raw = Library.from_str(byte_level()._definition)
    raw.add_special_tokens(list(special))
    ids = [(token, raw.token_to_id(token)) for token in special]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return Tokenizer(raw.to_str(), END_OF_TEXT)


def test_what_a_template_puts_before_a_text_is_added_when_asked() -> None:
    assert byte_level().start_ids == ()
    llama = _framed("<s> $A", "<s>")
    assert llama.start_ids == (257,)
    assert llama.encode("ab") == [97, 98]
    starting = llama.starting()
    assert starting.encode("ab") == [257, 97, 98]
    assert starting.encode("<s>") == [257, 60, 115, 62], "text is only ever text"
    assert pickle.loads(pickle.dumps(starting)).encode("") == [257]
    assert llama.encode("") == []
    assert _framed("<s> $A </s>", "<s>", "</s>").start_ids == (257,)
    assert _framed("$A </s>", "</s>").start_ids == ()


class TestWords:
    WORDS = train_words(["b a [MAX a", "a c <|endoftext|> <|unknown|>"], 300)

    def test_the_commonest_come_first_and_others_are_unknown(self):
        assert self.WORDS.encode("a [MAX b c") == [0, 1, 2, 3]
        assert self.WORDS.encode(" a\n\tz  a") == [0, 4, 0]
        assert self.WORDS.decode([1, 0, 3]) == "[MAX a c"
        assert (self.WORDS.eos_id, self.WORDS.vocab_size) == (5, 6)
        assert self.WORDS.frame.before == (5,)

    def test_text_cannot_inject_the_control_token(self):
        assert self.WORDS.encode(END_OF_TEXT) == [4]

    def test_only_so_many_are_kept(self):
        small = train_words(["a a a b b c"], 4)
        assert small.encode("a b c") == [0, 1, 2]
        assert (small.eos_id, small.vocab_size) == (3, 4)
        masked = train_words(["a"], 300, mask=True)
        assert masked.mask_id == 3

    def test_saving_keeps_it(self, tmp_path: Path):
        self.WORDS.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.encode("c z") == [3, 4]
        assert again.word_mark == ""
