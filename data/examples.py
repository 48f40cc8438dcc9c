"""The example store: labelled records, tokenised into memory-mapped files that say what they are.

    manifest.json        format, dtype, tokenizer, texts, classes, counts, what was refused; sizes and hashes
    tokenizer.json       the tokenizer that wrote the tokens
    {text}.tokens.bin    uint16 (uint32 above 65,536 tokens): that text of every record, back to back, without specials
    {text}.offsets.bin   uint64 [records + 1]: of record i it is tokens[offsets[i] : offsets[i + 1]]
    labels.bin           int32 [records], where records have a class: its number in the manifest's list
    spans.bin            int64 [records, 2], where they have answers: first and last token of the answer; -1, -1: none
    chars.bin            uint32 [tokens, 2], likewise: characters [start, end) that each token of the answered text is
    records.jsonl        a line each: where the record came from; with answers, also them and the text they are in
    lines.bin            uint64 [records + 1]: byte offsets of those lines
    {split}.bin          uint64: the numbers of the split's records, in stored order

All numbers are little-endian. Like a token store it is built beside its place and renamed when whole, kept in the cache
and built again only when its sources, columns or tokenizer have changed. Special tokens, truncation and padding are not
stored: they are the batches' business (`labelled.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from .shards import token_dtype
from .store import read_manifest, verify_files
from .tokenizer import Tokenizer
from .writer import Split

FORMAT = "longspan example store"
VERSION = 1


class ExampleStore:
    """An opened example store. Pickles as its path, so that loader processes map the same pages."""

    def __init__(self, directory: Path, manifest: dict) -> None:
        self.directory, self.manifest = directory, manifest
        self.eos_id: int = manifest["eos_id"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.texts: tuple[str, ...] = tuple(manifest["texts"])
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self.refused: int = manifest["refused"]["count"]
        n_records = self.n_records = int(manifest["records"])
        tokens = manifest["tokens"]
        dtype = token_dtype(self.vocab_size)
        self._tokens = {name: self._map(f"{name}.tokens", dtype, (tokens[name],)) for name in self.texts}
        self._offsets = {name: self._map(f"{name}.offsets", "<u8", (n_records + 1,)) for name in self.texts}
        self._labels = self._map("labels", "<i4", (n_records,)) if manifest["has_labels"] else None
        answered: str | None = manifest["answered"]
        self.answered = answered
        self._spans = self._map("spans", "<i8", (n_records, 2)) if answered is not None else None
        self._chars = self._map("chars", "<u4", (tokens[answered], 2)) if answered is not None else None
        self._lines = self._map("lines", "<u8", (n_records + 1,))

    def __reduce__(self) -> tuple[Callable[..., ExampleStore], tuple[Path, dict]]:
        return ExampleStore, (self.directory, self.manifest)

    @classmethod
    def open(cls, directory: Path | str, *, check: bool | None = None) -> ExampleStore:
        """Open a store after verifying it against its manifest; `check` as for `TokenStore.open`. Raises StoreError."""
        directory = Path(directory)
        manifest = read_manifest(directory, what="example store", format=FORMAT, version=VERSION)
        verify_files(directory, manifest, check)
        return cls(directory, manifest)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote this store."""
        return Tokenizer.load(self.directory)

    def records(self, split: Split) -> np.ndarray:
        """The numbers of a split's records, int64."""
        return self._map(split, "<u8", (self.manifest["counts"][split],)).astype(np.int64)

    def tokens(self, text: str, record: int) -> np.ndarray:
        """Token ids of one of a record's texts: a read-only view of the store."""
        offsets = self._offsets[text]
        return self._tokens[text][int(offsets[record]) : int(offsets[record + 1])]

    def lengths(self, text: str) -> np.ndarray:
        """Tokens of that text in every record, int64."""
        return np.diff(self._offsets[text].astype(np.int64))

    def label(self, record: int) -> int:
        """The number of the record's class in `labels`."""
        if self._labels is None:
            raise ValueError(f"the records of {self.directory} have no class")
        return int(self._labels[record])

    def span(self, record: int) -> tuple[int, int] | None:
        """First and last token of the record's (first) answer in the text it is in; None: it has no answer."""
        if self._spans is None:
            raise ValueError(f"the records of {self.directory} have no answers")
        first, last = self._spans[record].tolist()
        return None if first < 0 else (first, last)

    @property
    def has_unanswered(self) -> bool:
        """Whether some record has no answer."""
        return self._spans is not None and bool((self._spans[:, 0] < 0).any())

    def chars(self, record: int) -> np.ndarray:
        """Characters [start, end) that each token of the answered text stands for, uint32 [tokens, 2]."""
        if self._chars is None or self.answered is None:
            raise ValueError(f"the records of {self.directory} have no answers")
        offsets = self._offsets[self.answered]
        return self._chars[int(offsets[record]) : int(offsets[record + 1])]

    def place(self, record: int) -> str:
        """Where the record came from."""
        return self._line(record)["place"]

    def answered_text(self, record: int) -> str:
        return self._line(record)["text"]

    def answers(self, record: int) -> tuple[str, ...]:
        """The texts that count as right; (): the record has no answer."""
        return tuple(self._line(record)["answers"])

    def _line(self, record: int) -> dict:
        start, stop = int(self._lines[record]), int(self._lines[record + 1])
        return json.loads(self._bytes[start:stop].tobytes())

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.directory / "records.jsonl", np.uint8, mode="r")

    def _map(self, name: str, dtype: str | np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:  # an empty file cannot be mapped
            return np.empty(shape, dtype)
        return np.memmap(self.directory / f"{name}.bin", dtype, mode="r", shape=shape)
