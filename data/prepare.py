"""Sources → tokenizer → token store, kept in a cache and rebuilt only when something it depends on has changed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from .shards import StoreError, split_hash
from .sources import SourceSpec, fingerprint, read, size_hint
from .store import SHARD_BYTES, TokenStore, build_store
from .tokenizer import Digits, Tokenizer, byte_level, train_bpe, train_words
from .writer import VERSION

Stage = Literal["waiting", "tokenizer", "tokens"]
Progress = Callable[[Stage, int, int | None], None]  # (what is going on, bytes done, bytes in all where known)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """kind          bpe: train a byte-level BPE; bytes: no training; words: the words of the training texts; file: an
                  existing tokenizer.json
    vocab_size    bpe, words: tokens in all
    path          file: a tokenizer.json or a directory that holds one
    train_bytes   bpe, words: bytes of training documents to train on, shared among the sources by weight
    digits        bpe: merged into numbers like letters into words, or each a token
    mask          bpe, bytes, words: with a mask token, for masked language modelling
    """

    kind: Literal["bpe", "bytes", "words", "file"] = "bpe"
    vocab_size: int = 8192
    path: str | None = None
    train_bytes: int = 20_000_000
    digits: Digits = "merged"
    mask: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "bytes", "words", "file"):
            raise ValueError(f"tokenizer kind '{self.kind}' is unknown: use bpe, bytes, words or file")
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("data.tokenizer.path goes with data.tokenizer.kind=file: give both or neither")

    @property
    def is_trained(self) -> bool:
        """Whether it depends on texts."""
        return self.kind in ("bpe", "words")

    def described(self) -> dict[str, object]:
        """What decides what a trained one is: of later settings only those that are not the default, so that stores
        made before keep their names."""
        settings: dict[str, object] = asdict(self)
        if self.digits == "merged":
            del settings["digits"]
        return settings

    def train(self, texts: Iterator[str]) -> Tokenizer:
        """The tokenizer of a kind that is trained."""
        if self.kind == "words":
            return train_words(texts, self.vocab_size, self.mask)
        return train_bpe(texts, self.vocab_size, self.mask, self.digits)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What a store is made of.

    name                 first part of its directory's name
    cache                where stores are kept
    validation_fraction  share of documents held out, by a hash of their text
    workers              tokenisation processes; None: all cores
    shard_bytes          text between two points from which a killed run goes on
    """

    name: str = "data"
    sources: tuple[SourceSpec, ...] = (SourceSpec(),)
    tokenizer: TokenizerSettings = TokenizerSettings()
    cache: str | Path = "cache"
    validation_fraction: float = 0.01
    workers: int | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True)
class Prepared:
    store: TokenStore
    tokenizer: Tokenizer
    directory: Path


def prepare(settings: PrepareSettings, *, progress: Progress | None = None) -> Prepared:
    """The store and tokenizer of some settings, from the cache where they are there.

    The directory is `<cache>/<name>-<hash>`; the hash covers the sources (see `sources.fingerprint`), the tokenizer
    and the held-out share. Of several processes that ask for the same store one builds it and the others wait.
    Raises SourceError, StoreError, TokenizerError or FileNotFoundError for wrong requests, OSError (ENOSPC) where the
    disk is full; nothing half-written is left but what a killed process can go on from.
    """
    if not settings.sources:
        raise StoreError("data.sources is empty: name at least one source, or give data.path=…")
    loaded = Tokenizer.load(settings.tokenizer.path) if settings.tokenizer.path is not None else None
    directory = Path(settings.cache) / f"{file_name(settings.name)}-{_key(settings, loaded)}"
    built_once(directory, lambda building: _build(directory, building, settings, loaded, progress), progress)
    store = TokenStore.open(directory)
    return Prepared(store, store.tokenizer(), directory)


def built_once(directory: Path, build: Callable[[Path], None], progress: Progress | None) -> None:
    """Has `build` make `directory`, unless it is there; work goes on in the directory that `build` is called with.

    Of several processes that want the same directory one builds it and the others wait.
    """
    building = directory.with_name(directory.name + ".building")
    try:
        if not directory.exists():  # a cache that may only be read serves what it has
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _lock(directory.with_name(directory.name + ".lock"), progress):
                if not directory.exists():
                    build(building)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = (
            f"no space left on device while writing {directory}: free some, or choose another place with data.cache"
        )
        raise OSError(errno.ENOSPC, message) from error
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed right at its end


def _build(
    directory: Path,
    building: Path,
    settings: PrepareSettings,
    loaded: Tokenizer | None,
    progress: Progress | None,
) -> None:
    try:
        tokenizer = loaded or _tokenizer(building, settings, progress)
    except (ValueError, OSError):
        shutil.rmtree(building, ignore_errors=True)
        raise
    build_store(
        directory,
        settings.sources,
        tokenizer,
        validation_fraction=settings.validation_fraction,
        workers=settings.workers or _cores(),
        shard_bytes=settings.shard_bytes,
        progress=None if progress is None else lambda done, total: progress("tokens", done, total),
        building=building,
    )


def _tokenizer(building: Path, settings: PrepareSettings, progress: Progress | None) -> Tokenizer:
    """The tokenizer of a new store: what a killed run trained is used."""
    if settings.tokenizer.kind == "bytes":
        return byte_level(mask=settings.tokenizer.mask)
    if (building / "tokenizer.json").is_file():
        return Tokenizer.load(building)
    tokenizer = settings.tokenizer.train(_training_texts(settings, progress))
    partial = building / "tokenizer.partial"
    tokenizer.save(partial)
    (partial / "tokenizer.json").replace(building / "tokenizer.json")
    partial.rmdir()
    return tokenizer


def _training_texts(settings: PrepareSettings, progress: Progress | None) -> Iterator[str]:
    """Evenly spaced training documents, each source with its share of `train_bytes`."""
    weights = sum(source.weight for source in settings.sources)
    budgets = [int(settings.tokenizer.train_bytes * source.weight / weights) for source in settings.sources]
    sizes = [size_hint(source) for source in settings.sources]
    expected = sum(budget if size is None else min(budget, size) for budget, size in zip(budgets, sizes))
    threshold = int(settings.validation_fraction * 2**64)
    done = 0
    for source, budget, total in zip(settings.sources, budgets, sizes):
        rate = 1.0 if total is None else min(1.0, budget / max(1, total))  # unknown size: the first documents
        seen = taken = 0
        for document in read(source):
            if split_hash(document.text, document.prompt) < threshold:
                continue
            text = (document.prompt or "") + document.text
            size = len(text.encode())
            seen += size
            if taken + size / 2 <= seen * rate:
                room = budget - taken
                text = text if size <= room else text.encode()[:room].decode(errors="ignore")
                taken, done = taken + min(size, room), done + min(size, room)
                yield text
                if progress is not None:
                    progress("tokenizer", done, max(expected, done))
            if taken >= budget:
                break


def _key(settings: PrepareSettings, loaded: Tokenizer | None) -> str:
    tokenizer: dict[str, object] = settings.tokenizer.described()
    del tokenizer["mask"]  # named where there is one, so that stores without it keep their names
    if not settings.tokenizer.is_trained:
        tokenizer = {"kind": settings.tokenizer.kind}
    if settings.tokenizer.mask:
        tokenizer["mask"] = True
    if loaded is not None:
        tokenizer = {"sha256": loaded.sha256, "eos": loaded.eos_id}
    weights = [source.weight for source in settings.sources] if settings.tokenizer.is_trained else None
    described = {
        "version": VERSION,
        "sources": [fingerprint(source) for source in settings.sources],
        "tokenizer": tokenizer,
        "weights": weights,  # they decide what the tokenizer is trained on
        "validation_fraction": settings.validation_fraction,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _lock(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold a file lock; the kernel drops it when the process dies, however it dies."""
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress is not None:
                    progress("waiting", 0, None)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # the holder before us removed it, so a third may hold a new one
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
