"""Tokenising a stream of documents in shards: parallel, and resumable after a kill.

A shard is a run of consecutive documents with about `shard_bytes` of text, so the same documents always fall into the
same shards. Each finished shard is one file whose name carries a fingerprint of its documents; a run that was killed
keeps the shards whose fingerprints still hold and redoes the others. Reading is repeated, tokenising is not.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .sources import Document
from .tokenizer import Tokenizer


class StoreError(ValueError):
    """A token store cannot be built or must not be used; the message says which and why, in one line."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document on its way into the store: `source` is an index, `split_hash` decides train or validation."""

    text: str
    prompt: str | None
    source: int
    id: str
    split_hash: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    index: int
    fingerprint: str
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self.pieces)

    @property
    def file_name(self) -> str:
        return f"shard-{self.index:06d}-{self.fingerprint}.npz"


def split_hash(text: str, prompt: str | None = None) -> int:
    """A 64-bit hash of a document's text: it goes to validation when this is below fraction × 2^64."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"longspan-split")
    if prompt is not None:
        digest.update(b"\0" + prompt.encode())
    return int.from_bytes(digest.digest(), "big")


def piece_of(document: Document, source: int) -> Piece:
    n_bytes = len(document.text.encode()) + len((document.prompt or "").encode())
    identity = split_hash(document.text, document.prompt)
    return Piece(document.text, document.prompt, source, document.id, identity, n_bytes)


def cut_into_shards(pieces: Iterable[Piece], shard_bytes: int) -> Iterator[Shard]:
    index, held, size = 0, [], 0
    for piece in pieces:
        held.append(piece)
        size += piece.n_bytes
        if size >= shard_bytes:
            yield _shard(index, held)
            index, held, size = index + 1, [], 0
    if held:
        yield _shard(index, held)


def _shard(index: int, pieces: list[Piece]) -> Shard:
    described = repr([(piece.split_hash, piece.n_bytes, piece.source, piece.id) for piece in pieces])
    return Shard(index, hashlib.sha256(described.encode()).hexdigest()[:16], tuple(pieces))


def tokenize_shard(shard: Shard, tokenizer: Tokenizer, directory: Path) -> Path:
    """Tokenise one shard and write its file, complete or not at all."""
    dtype = token_dtype(tokenizer.vocab_size)
    encoded = iter(
        tokenizer.encode_arrays([text for piece in shard.pieces for text in (piece.prompt or "", piece.text)])
    )
    eos = np.array([tokenizer.eos_id], dtype=dtype)
    tokens: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for prompt, text in zip(encoded, encoded):  # the two are neighbours in one list
        prompt_lengths.append(len(prompt))
        tokens.append(np.concatenate((prompt, text, eos), dtype=dtype, casting="unsafe"))
    arrays = {
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(part) for part in tokens], dtype=np.uint64),
        "prompt_lengths": np.array(prompt_lengths, dtype=np.uint64),
        "n_bytes": np.array([piece.n_bytes for piece in shard.pieces], dtype=np.uint64),
        "source": np.array([piece.source for piece in shard.pieces], dtype=np.uint16),
        "split_hash": np.array([piece.split_hash for piece in shard.pieces], dtype=np.uint64),
        "ids": np.frombuffer("\n".join(_one_line(piece.id) for piece in shard.pieces).encode(), dtype=np.uint8),
    }
    path = directory / shard.file_name
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def tokenize_all(
    shards: Iterable[Shard],
    tokenizer: Tokenizer,
    directory: Path,
    *,
    workers: int,
    done: Callable[[int], None],
) -> list[Path]:
    """Tokenise every shard that `directory` does not hold yet; `done(bytes)` is called as shards are finished.

    With one worker, or where there is only one shard, everything happens in this process.
    """
    paths: list[Path] = []
    fresh: list[Shard] = []
    stream = _skip_finished(shards, directory, paths, done)
    for shard in stream:
        fresh.append(shard)
        if len(fresh) == 2:
            break
    if workers == 1 or len(fresh) < 2:
        for shard in (*fresh, *stream):
            tokenize_shard(shard, tokenizer, directory)
            done(shard.n_bytes)
        return paths
    context = multiprocessing.get_context("spawn")  # forking a process with threads (torch, tokenizers) can hang
    running: deque[tuple[Future[Path], int]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, directory)) as pool:
        try:
            for shard in (*fresh, *stream):
                running.append((pool.submit(_work, shard), shard.n_bytes))
                while len(running) > 2 * workers:
                    _finish(running, done)
            while running:
                _finish(running, done)
        except BrokenProcessPool as error:
            raise StoreError(
                "a tokenisation process was killed, probably for lack of memory: use fewer data.tokenize_workers"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return paths


def _skip_finished(
    shards: Iterable[Shard], directory: Path, paths: list[Path], done: Callable[[int], None]
) -> Iterator[Shard]:
    for shard in shards:
        path = directory / shard.file_name
        paths.append(path)
        if path.is_file() and zipfile.is_zipfile(path):
            done(shard.n_bytes)
        else:
            yield shard


def _finish(running: deque[tuple[Future[Path], int]], done: Callable[[int], None]) -> None:
    future, n_bytes = running.popleft()
    future.result()
    done(n_bytes)


# -- in a worker process ----------------------------------------------------------------------------------------------

_worker: tuple[Tokenizer, Path] | None = None


def _start_worker(tokenizer: Tokenizer, directory: Path) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its pool
    _worker = (tokenizer, directory)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that was killed cannot stop its pool, whose processes would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: Shard) -> Path:
    if _worker is None:
        raise StoreError("this process was not started as a tokenisation worker")
    return tokenize_shard(shard, *_worker)


# -- small parts ------------------------------------------------------------------------------------------------------


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
