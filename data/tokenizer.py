"""Text to token ids and back: byte-level BPE (trained here or loaded), plain bytes, or whole words.

Text is only ever text: the characters `<|endoftext|>` inside a document become ordinary tokens, never the control
token, so a corpus cannot end a document or forge a role.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # separates documents
MASK = "<|mask|>"  # stands for a token to be guessed
UNKNOWN = "<|unknown|>"  # stands for the words that a vocabulary of words lacks
# What other people's tokenizers call the same thing, tried in this order when their configuration does not say.
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "<|eos|>")
_MASK_TOKENS = (MASK, "[MASK]", "<mask>")

Digits = Literal["merged", "single"]

_GROUP = 1 << 19  # characters encoded at once

# Stated explicitly so that the library does not warn about loader processes that are forked later: those never
# tokenise. An existing setting is kept.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class TokenizerError(ValueError):
    """A tokenizer cannot be trained or loaded; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Special tokens around a text: `before` it and `after` it, and `between` two texts that go together."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]


class Tokenizer:
    """A `tokenizers.Tokenizer` that never adds, truncates or pads, and never reads control tokens out of text."""

    def __init__(self, definition: str, end_token: str, *, starts: bool = False) -> None:
        """`definition`: the content of a tokenizer.json; `end_token`: which of its tokens ends a document; `starts`:
        as `starting` has it."""
        self._definition = definition
        self._end_token = end_token
        self._starts = starts
        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos_id = self._tokenizer.token_to_id(end_token)
        if eos_id is None:
            raise TokenizerError(f"the tokenizer has no token '{end_token}' to end documents with")
        self.eos_id: int = eos_id
        # What its own template puts before a text (a Llama's start token); ours have none.
        self.start_ids: tuple[int, ...] = _before_text(self._tokenizer)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(token for token, word in added.items() if word.special)
        masks = (self._tokenizer.token_to_id(word) for word in _MASK_TOKENS)
        self.mask_id: int | None = next((token for token in masks if token is not None), None)
        self.sha256: str = hashlib.sha256(definition.encode()).hexdigest()
        parsed = json.loads(definition)
        self._cuts_at_lines = _splits_words_like_gpt2(parsed)
        self.word_mark: str | None = _word_mark(parsed)

    def __reduce__(self) -> tuple[object, ...]:
        return partial(Tokenizer, starts=self._starts), (self._definition, self._end_token)

    def starting(self) -> Tokenizer:
        """The same, but `encode` begins with `start_ids`: for models of others, which have seen texts begin so."""
        return Tokenizer(self._definition, self._end_token, starts=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no start or end token (but see `starting`)."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self.start_ids, *ids] if self._starts else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as uint32 arrays. The library needs some 500 bytes a token while it works, so it gets little
        at a time: long texts too go in pieces, where that cannot change their tokens."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _grouped(texts, self._cuts_at_lines):
            encodings = self._tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (text, _), encoding in zip(group, encodings):
                parts[text].append(np.array(encoding.ids, dtype=np.uint32))
        return [np.concatenate(part) if part else np.empty(0, dtype=np.uint32) for part in parts]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_arrays`, and for each token the characters [start, end) of the text that it stands for: uint32
        [T, 2]. The tokens of a character that takes several stand for all of it."""
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        places: list[list[np.ndarray]] = [[] for _ in texts]
        begun = [0] * len(texts)  # characters of each text in the pieces before
        for group in _grouped(texts, self._cuts_at_lines):
            encodings = self._tokenizer.encode_batch([piece for _, piece in group], add_special_tokens=False)
            for (text, piece), encoding in zip(group, encodings):
                ids[text].append(np.array(encoding.ids, dtype=np.uint32))
                offsets = np.array(encoding.offsets, dtype=np.uint32).reshape(-1, 2)
                places[text].append(offsets + np.uint32(begun[text]))
                begun[text] += len(piece)
        return [
            (np.concatenate(mine), np.concatenate(where))
            if mine
            else (np.empty(0, np.uint32), np.empty((0, 2), np.uint32))
            for mine, where in zip(ids, places)
        ]

    @property
    def frame(self) -> Frame:
        """What encoders expect around their texts: this tokenizer's own template for pairs ([CLS] … [SEP] … [SEP],
        <s> … </s></s> … </s>); where it has none, the token that ends documents stands in each place."""
        pair = self._tokenizer.encode("a", "b", add_special_tokens=True)
        texts = [place for place, text in enumerate(pair.sequence_ids) if text is not None]
        first = [place for place in texts if pair.sequence_ids[place] == 0]
        second = [place for place in texts if pair.sequence_ids[place] == 1]
        found = (pair.ids[: first[0]], pair.ids[first[-1] + 1 : second[0]], pair.ids[second[-1] + 1 :])
        return Frame(*(tuple(ids) or (self.eos_id,) for ids in found))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 (a character cut in half) show as U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self) -> list[bytes]:
        """What each id stands for, as bytes: of byte-level vocabularies the bytes themselves, of others the piece as it
        is spelled (`##ing`, `▁the`)."""
        words = [self._tokenizer.id_to_token(token) or "" for token in range(self.vocab_size)]
        if self.word_mark is not None:
            return [word.encode() for word in words]
        bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
        return [
            bytes(bytes_of[character] for character in word)
            if all(character in bytes_of for character in word)
            else word.encode()
            for word in words
        ]

    def stream(self) -> StreamDecoder:
        """Text of ids that come one by one."""
        return StreamDecoder(self)

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json (and tokenizer_config.json, where only that tells which token ends a document)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._definition, encoding="utf-8")
        if _guess_end(self._tokenizer) != self._end_token:
            config = json.dumps({"eos_token": self._end_token})
            (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer.json, or the one in a directory; `eos_token` of a tokenizer_config.json beside it is obeyed.

        Raises FileNotFoundError or TokenizerError, in one line.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: give a tokenizer.json or a directory that holds one")
        try:
            definition = file.read_text(encoding="utf-8")
            tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:
            raise TokenizerError(f"{file} is not a tokenizer.json ({str(error).splitlines()[0]})") from error
        end_token = _configured_end(file.with_name("tokenizer_config.json")) or _guess_end(tokenizer)
        if end_token is None:
            raise TokenizerError(f"{file} has no token that ends a document: looked for {', '.join(_END_TOKENS)}")
        return cls(definition, end_token)


def train_bpe(texts: Iterable[str], vocab_size: int, mask: bool = False, digits: Digits = "merged") -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2) of at most `vocab_size` tokens,
    the end token, the mask token if there is one and the 256 bytes included. With `digits` single every digit is a
    token (as in Llama: Touvron et al. 2023, arXiv 2302.13971, §2.1). The same texts give the same tokenizer."""
    special = [END_OF_TEXT, MASK] if mask else [END_OF_TEXT]
    if vocab_size < 256 + len(special):
        total = 256 + len(special)
        raise TokenizerError(f"vocab_size={vocab_size} is too small: 256 bytes and {', '.join(special)} make {total}")
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    if digits == "single":
        each = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([each, tokenizer.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str(pretty=True), END_OF_TEXT)


def train_words(texts: Iterable[str], vocab_size: int, mask: bool = False) -> Tokenizer:
    """A token for each word (what has white space around it), of the commonest ones `vocab_size` tokens in all; all
    others are one unknown token. For texts of few different words, like formal languages: text comes back with single
    spaces, and unknown words do not. The same texts give the same tokenizer."""
    special = [END_OF_TEXT, MASK] if mask else [END_OF_TEXT]
    counts = Counter(word for text in texts for word in text.split())
    known = sorted(counts.keys() - {*special, UNKNOWN}, key=lambda word: (-counts[word], word))
    words = [*known[: vocab_size - len(special) - 1], UNKNOWN]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return Tokenizer(tokenizer.to_str(pretty=True), END_OF_TEXT)


def byte_level(*, mask: bool = False) -> Tokenizer:
    """No training: token id = byte value, 256 ends a document, and 257 is the mask token if there is one."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([END_OF_TEXT, MASK] if mask else [END_OF_TEXT])
    return Tokenizer(tokenizer.to_str(pretty=True), END_OF_TEXT)


class StreamDecoder:
    """Text of a growing sequence of ids, character by complete character.

    The pieces that `push` returns, with `finish` at the end, join to `tokenizer.decode(all ids)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids[:shown] are context: their text is out already

    def push(self, token: int) -> str:
        """What can be shown once this token is known; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What was held back."""
        return self._emit(self._tokenizer.decode(self._ids))

    def _emit(self, text: str) -> str:
        # Some decoders treat the first token of a text specially, so what was just shown stays as context.
        piece = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        if piece:
            del self._ids[: self._shown]
            self._shown = len(self._ids)
        return piece


def _before_text(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    # Where the text is not to be found, its tokens depend on the frame, and nothing is known.
    start = next((i for i in range(len(framed)) if plain and framed[i : i + len(plain)] == plain), 0)
    return tuple(framed[:start])


def _splits_words_like_gpt2(definition: dict[str, Any]) -> bool:
    """Then no token can span a letter or digit and the line break after it."""
    split = definition.get("pre_tokenizer") or {}
    if split.get("type") == "Sequence" and [part["type"] for part in split["pretokenizers"]] == ["Digits", "ByteLevel"]:
        split = split["pretokenizers"][1]
    return (
        definition.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space")
        and (bool(split.get("use_regex")) or definition["model"].get("merges") == [])
    )


def _word_mark(definition: dict[str, Any]) -> str | None:
    """How a vocabulary marks where words begin or go on: `##` (WordPiece), `▁` (SentencePiece), by nothing where each
    token is a word; None: byte-level."""
    if definition["model"].get("type") == "WordPiece":
        return "##"
    if (definition.get("pre_tokenizer") or {}).get("type") == "WhitespaceSplit":
        return ""
    parts = [definition.get("pre_tokenizer") or {}, definition.get("decoder") or {}]
    kinds = {
        inner.get("type")
        for part in parts
        for inner in (part, *part.get("pretokenizers", ()), *part.get("decoders", ()))
    }
    return None if "ByteLevel" in kinds else "▁"


def _grouped(texts: Iterable[str], may_cut: bool) -> Iterator[list[tuple[int, str]]]:
    """(number of the text, piece of it) in groups of about _GROUP characters."""
    group: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in _pieces(text) if may_cut else (text,):
            group.append((number, piece))
            size += len(piece)
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """The text cut after about every _GROUP characters, between a letter or digit and a line break."""
    start = 0
    while len(text) - start > 2 * _GROUP:
        cut = text.find("\n", start + _GROUP)
        while cut >= 0 and not text[cut - 1].isalnum():
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _byte_level(model: models.BPE, use_regex: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _guess_end(tokenizer: tokenizers.Tokenizer) -> str | None:
    return next((token for token in _END_TOKENS if tokenizer.token_to_id(token) is not None), None)


def _configured_end(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (json.JSONDecodeError, AttributeError) as error:
        raise TokenizerError(f"{config} is not a JSON object ({error})") from error
    return token.get("content") if isinstance(token, dict) else token
