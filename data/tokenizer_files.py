"""A tokenizer.json out of the files that older checkpoints have: vocab.json with merges.txt, or vocab.txt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from .tokenizer import END_OF_TEXT, TokenizerError

DEFINITION = "tokenizer.json"
_VOCABULARY, _MERGES, _WORD_PIECES = "vocab.json", "merges.txt", "vocab.txt"
_ADDED, _SETTINGS = "added_tokens.json", "tokenizer_config.json"


def write_definition(directory: Path | str, model_type: str) -> Path | None:
    """Writes tokenizer.json into a directory that has only the older files of a `model_type` whose rules are known
    (`KINDS`), and returns it; None where there is one already, or nothing to make it of.

    What the files leave unsaid is what the original code of that family does: how text is cut into words before the
    merges, and which special tokens stand around a text. Raises TokenizerError for files that contradict that.
    """
    directory = Path(directory)
    if (directory / DEFINITION).exists() or model_type not in KINDS:
        return None
    names, build = KINDS[model_type]
    if not all((directory / name).is_file() for name in names):
        return None
    settings = _json(directory / _SETTINGS)
    try:
        tokenizer = build(directory, settings)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{directory / names[0]} is no vocabulary ({str(error).splitlines()[0]})") from error
    unknown = [word for word in _json(directory / _ADDED) if tokenizer.token_to_id(word) is None]
    if unknown:
        raise TokenizerError(
            f"{directory / _ADDED} adds '{unknown[0]}', which only the library that wrote it knows how to read; "
            f"save the tokenizer from there as {DEFINITION}"
        )
    path = directory / DEFINITION
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return path


def _gpt2(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Radford et al. 2019: no special token but the end of a text, and none is added."""
    tokenizer = _byte_pairs(directory, settings)
    _special(tokenizer, directory, END_OF_TEXT)
    return tokenizer


def _roberta(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Liu et al. 2019: `<s> text </s>`, and `<s> text </s></s> text </s>`; the mask takes the space before it, as in
    the tokenizers that were published (transformers 5 forgets that where it makes one of these files)."""
    tokenizer = _byte_pairs(directory, settings)
    _special(tokenizer, directory, "<s>", "<pad>", "</s>", "<unk>")
    _special(tokenizer, directory, AddedToken("<mask>", lstrip=True, special=True))
    start, end = (("<s>", tokenizer.get_vocab()["<s>"]), ("</s>", tokenizer.get_vocab()["</s>"]))
    space = bool(settings.get("add_prefix_space", False))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=True, add_prefix_space=space)
    return tokenizer


def _bert(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Devlin et al. 2019: WordPiece over words cut at spaces and punctuation, lower case unless the settings say that
    it stays; `[CLS] text [SEP] text [SEP]`."""
    words = (directory / _WORD_PIECES).read_text(encoding="utf-8").split("\n")
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words) if word}
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)  # noqa: S106  no password
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    _special(tokenizer, directory, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _byte_pairs(directory: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model = models.BPE.from_file(str(directory / _VOCABULARY), str(directory / _MERGES))
    tokenizer = tokenizers.Tokenizer(model)
    space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(tokenizer: tokenizers.Tokenizer, directory: Path, *words: str | AddedToken) -> None:
    """Marks tokens of the vocabulary as special. Raises TokenizerError for one that it lacks: a new one would get an id
    that the model does not know."""
    for word in words:
        content = word if isinstance(word, str) else word.content
        if tokenizer.token_to_id(content) is None:
            raise TokenizerError(f"{directory}: the vocabulary has no '{content}', which this kind of model reads")
    tokenizer.add_special_tokens(list(words))


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


_Build = Callable[[Path, Mapping[str, Any]], tokenizers.Tokenizer]
_PAIRS = (_VOCABULARY, _MERGES)
# Families whose rules the files do not say but everybody knows. Others (Llama, Qwen) have always had a tokenizer.json,
# or cut words by rules of their own.
KINDS: Mapping[str, tuple[tuple[str, ...], _Build]] = MappingProxyType(
    {
        "gpt2": (_PAIRS, _gpt2),
        "roberta": (_PAIRS, _roberta),
        "longformer": (_PAIRS, _roberta),
        "bart": (_PAIRS, _roberta),
        "led": (_PAIRS, _roberta),
        "bert": ((_WORD_PIECES,), _bert),
    }
)
