"""tokenizer.json from the files of older checkpoints, against the library that reads them otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.data.tokenizer import Tokenizer, TokenizerError, train_bpe
from longspan.data.tokenizer_files import KINDS, write_definition

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello, world! It's 3 o'clock — naïve café déjà-vu 北京 \U0001f600",
    "  two spaces,\n\na line\tand a tab  ",
    "unbelievably LONG words: antidisestablishmentarianism, x=y+1; def f(a): return a**2",
    "<s> </s><mask> [SEP] [MASK] <|endoftext|>",
    "",
]
CORPUS = [*TEXTS, "the cat sat on the mat and the dog sat on the log " * 20, "Hello hello HELLO world worlds" * 9]


def byte_pairs(directory: Path, special: list[str]) -> None:
    """vocab.json and merges.txt as GPT-2 and RoBERTa have them."""
    trained = train_bpe(CORPUS, 400)
    trained.save(directory)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    vocabulary = {word: index for word, index in model["vocab"].items() if word != "<|endoftext|>"}
    words = [*special, *sorted(vocabulary, key=lambda word: vocabulary[word])]
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    merges = [" ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def word_pieces(directory: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words += ["hello", "world", "##s", "cat", "the", "na", "##ive", "cafe"]
    (directory / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.mark.parametrize("prefix_space", [False, True])
@pytest.mark.parametrize(
    ("model_type", "special", "reader"),
    [
        ("gpt2", ["<|endoftext|>"], "GPT2Tokenizer"),
        ("roberta", ROBERTA, "RobertaTokenizer"),
        ("longformer", ROBERTA, "RobertaTokenizer"),
        ("bart", ROBERTA, "RobertaTokenizer"),
        ("led", ROBERTA, "RobertaTokenizer"),
    ],
)
def test_byte_pairs_are_read_as_their_library_reads_them(
    tmp_path: Path, model_type: str, special: list[str], reader: str, prefix_space: bool
) -> None:
    byte_pairs(tmp_path, special)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix_space}))
    oracle: Any = getattr(transformers, reader).from_pretrained(tmp_path)
    assert write_definition(tmp_path, model_type) == tmp_path / "tokenizer.json"
    compare(tmp_path, oracle)


@pytest.mark.parametrize("lower", [False, True])
def test_word_pieces_are_read_as_their_library_reads_them(tmp_path: Path, lower: bool) -> None:
    word_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    oracle: Any = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert write_definition(tmp_path, "bert") is not None
    compare(tmp_path, oracle)


def compare(directory: Path, oracle: Any) -> None:
    import tokenizers

    definition = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in TEXTS:
        assert definition.encode(text).ids == oracle(text)["input_ids"], text
        assert definition.encode(text, "b c").ids == oracle(text, "b c")["input_ids"], text
    ours = Tokenizer.load(directory)
    plain = oracle(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXTS[0]) == plain
    assert ours.decode(plain, skip_special=False) == oracle.decode(plain, clean_up_tokenization_spaces=False)


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    byte_pairs(tmp_path, ["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text("{}")
    assert write_definition(tmp_path, "gpt2") is None
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_families_with_rules_of_their_own_are_left_alone(tmp_path: Path) -> None:
    byte_pairs(tmp_path, ["<|endoftext|>"])
    assert "qwen2" not in KINDS
    assert write_definition(tmp_path, "qwen2") is None
    assert write_definition(tmp_path, "bert") is None  # it has no vocab.txt
    assert not (tmp_path / "tokenizer.json").exists()


def test_files_that_contradict_the_family_are_refused(tmp_path: Path) -> None:
    byte_pairs(tmp_path, ["<|endoftext|>"])
    with pytest.raises(TokenizerError, match="the vocabulary has no '<s>', which this kind of model reads"):
        write_definition(tmp_path, "roberta")
    (tmp_path / "added_tokens.json").write_text('{"<new>": 400}')
    with pytest.raises(TokenizerError, match=r"added_tokens.json adds '<new>'"):
        write_definition(tmp_path, "gpt2")
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "vocab.json").write_text("not JSON")
    with pytest.raises(TokenizerError, match=r"vocab.json is no vocabulary"):
        write_definition(tmp_path, "gpt2")
    assert not (tmp_path / "tokenizer.json").exists()
