"""Writing a store: finished shards become the files that `store.py` describes, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .shards import StoreError, token_dtype
from .tokenizer import Tokenizer

FORMAT = "longspan token store"
VERSION = 1

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

ARRAYS = {"offsets": np.dtype("<u8"), "sources": np.dtype("<u2"), "bytes": np.dtype("<u8"), "loss": np.dtype("u1")}


@dataclass(frozen=True, slots=True)
class SourceCount:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class HashedFiles:
    """Files of a directory that are hashed as they are written. `opened` closes them."""

    def __init__(self, directory: Path, names: Iterable[str], opened: ExitStack) -> None:
        self._files = {name: opened.enter_context((directory / name).open("wb")) for name in names}
        self._hashes = {name: hashlib.sha256() for name in self._files}

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def seal(self) -> dict[str, dict[str, object]]:
        """Flush to disk; sizes and hashes for the manifest."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {
            name: {"bytes": file.tell(), "sha256": self._hashes[name].hexdigest()} for name, file in self._files.items()
        }


class SplitWriter:
    """Appends documents to the files of one split. `opened` closes the files."""

    def __init__(self, directory: Path, split: Split, with_loss: bool, opened: ExitStack) -> None:
        self._split = split
        self._with_loss = with_loss
        names = [
            "tokens.bin",
            "offsets.bin",
            "sources.bin",
            "bytes.bin",
            "ids.txt",
            *(["loss.bin"] if with_loss else []),
        ]
        self._files = HashedFiles(directory, (f"{split}.{name}" for name in names), opened)
        self._n_tokens = 0
        self.counts: dict[int, SourceCount] = {}
        self.write("offsets.bin", np.zeros(1, ARRAYS["offsets"]).tobytes())

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._files.write(f"{self._split}.{name}", data)

    def append(self, shard: dict[str, np.ndarray], ids: list[str], chosen: np.ndarray) -> None:
        """Add the documents of a shard that the bool array `chosen` names."""
        if not chosen.any():
            return
        lengths, per_token = shard["lengths"], np.repeat(chosen, shard["lengths"].astype(np.int64))
        ends = np.cumsum(lengths[chosen], dtype=np.uint64) + np.uint64(self._n_tokens)
        self.write("tokens.bin", shard["tokens"][per_token].tobytes())
        self.write("offsets.bin", ends.astype(ARRAYS["offsets"]).tobytes())
        self.write("sources.bin", shard["source"][chosen].astype(ARRAYS["sources"]).tobytes())
        self.write("bytes.bin", shard["n_bytes"][chosen].astype(ARRAYS["bytes"]).tobytes())
        self.write("ids.txt", "".join(f"{ids[index]}\n" for index in np.flatnonzero(chosen)).encode())
        if self._with_loss:
            starts = np.cumsum(lengths) - lengths
            place = np.arange(len(shard["tokens"]), dtype=np.uint64) - np.repeat(starts, lengths.astype(np.int64))
            carries = place >= np.repeat(shard["prompt_lengths"], lengths.astype(np.int64))
            self.write("loss.bin", carries[per_token].astype(np.uint8).tobytes())
        self._n_tokens = int(ends[-1])
        for source in np.unique(shard["source"][chosen]):
            mine = chosen & (shard["source"] == source)
            old = self.counts.get(int(source), SourceCount())
            self.counts[int(source)] = SourceCount(
                old.documents + int(mine.sum()),
                old.tokens + int(lengths[mine].sum()),
                old.bytes + int(shard["n_bytes"][mine].sum()),
            )

    def seal(self) -> dict[str, dict[str, object]]:
        """Flush to disk; sizes and hashes for the manifest."""
        return self._files.seal()


def assemble(
    directory: Path,
    shards: list[Path],
    sources: list[dict[str, object]],
    tokenizer: Tokenizer,
    validation_fraction: float,
) -> dict:
    """Join the shards into the files of a store; the manifest comes last. `sources`: a name and a fingerprint each."""
    directory.mkdir()
    threshold = _threshold(shards, validation_fraction)
    with_loss = any(_load(path, "prompt_lengths")["prompt_lengths"].any() for path in shards)
    files: dict[str, dict[str, object]] = {}
    with ExitStack() as opened:
        writers = {split: SplitWriter(directory, split, with_loss, opened) for split in SPLITS}
        for path in shards:
            shard = _load(path)
            ids = shard["ids"].tobytes().decode().split("\n")
            held_out = shard["split_hash"] < np.uint64(threshold)
            writers["train"].append(shard, ids, ~held_out)
            writers["validation"].append(shard, ids, held_out)
        for writer in writers.values():
            files |= writer.seal()
    files |= save_tokenizer(tokenizer, directory)
    counts = {
        split: {
            str(source["name"]): asdict(writers[split].counts.get(index, SourceCount()))
            for index, source in enumerate(sources)
        }
        for split in SPLITS
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **tokenizer_facts(tokenizer),
        "validation_fraction": validation_fraction,
        "loss_mask": with_loss,
        "sources": sources,
        "counts": counts,
        "files": files,
    }
    return write_manifest(manifest, directory)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, dict[str, object]]:
    """Writes it; sizes and hashes for the manifest."""
    tokenizer.save(directory)
    files: dict[str, dict[str, object]] = {}
    for path in sorted(directory.glob("tokenizer*.json")):
        with path.open("rb") as file:
            content = file.read()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return files


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, object]:
    """What a manifest says of the tokens: how they are stored, and whose they are."""
    return {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
    }


def write_manifest(manifest: dict, directory: Path) -> dict:
    """The manifest with its own hash, written and flushed; the directory is whole then."""
    manifest = {**manifest, "self_sha256": self_hash(manifest)}
    with (directory / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)
    return manifest


def _threshold(shards: list[Path], validation_fraction: float) -> int:
    """Documents with a hash below this are held out."""
    if validation_fraction == 0:
        return 0
    threshold = int(validation_fraction * 2**64)
    hashes = [_load(path, "split_hash")["split_hash"] for path in shards]
    smallest, largest = min(int(part.min()) for part in hashes), max(int(part.max()) for part in hashes)
    if smallest == largest:
        raise StoreError("all documents are the same text, so none can be held out: set data.validation_fraction=0")
    return min(max(threshold, smallest + 1), largest)


def _load(path: Path, *names: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return {name: content[name] for name in names or content.files}


def self_hash(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "self_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
