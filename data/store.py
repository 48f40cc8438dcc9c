"""The token store: tokenised documents in memory-mapped files that say what they are.

    manifest.json                  format, dtype, vocabulary, tokenizer, sources, counts; size and sha256 of every file
    tokenizer.json                 the tokenizer that wrote the tokens
    {train,validation}.tokens.bin  uint16 (uint32 above 65,536 tokens): documents back to back, each ending with eos
    {…}.offsets.bin                uint64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    {…}.sources.bin                uint16 [documents]: index into the manifest's sources
    {…}.bytes.bin                  uint64 [documents]: UTF-8 bytes of the text (prompt included)
    {…}.loss.bin                   uint8 [tokens], only where documents have prompts: 1 where a token carries loss
    {…}.ids.txt                    a line per document: where it came from

All numbers are little-endian. The directory is built beside its place, the manifest is written last, and the whole is
renamed, so a store either is there or is not. Opening one checks the size of every file; their hashes too, once per
process, up to HASHED_ON_OPEN bytes (`check=True` hashes whatever the size).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np

from .shards import (
    Piece,
    StoreError,
    cut_into_shards,
    piece_of,
    token_dtype,
    tokenize_all,
)
from .sources import Document, SourceSpec, fingerprint, read, size_hint
from .tokenizer import Tokenizer
from .writer import ARRAYS, FORMAT, SPLITS, VERSION, SourceCount, Split, assemble, self_hash, sync_directory

__all__ = ["SPLITS", "Documents", "SourceCount", "Split", "StoreError", "TokenStore", "build_store"]

HASHED_ON_OPEN = 1 << 30
SHARD_BYTES = 2 << 20

Progress = Callable[[int, int | None], None]  # (bytes of text done, bytes in all where known)


class Documents:
    """The documents of one split. Arrays are memory maps: nothing is read until it is used."""

    def __init__(self, store: TokenStore, split: Split) -> None:
        self._directory, self._split = store.directory, split
        self._names = store.sources
        n_documents = sum(count.documents for count in store.counts[split].values())
        n_tokens = sum(count.tokens for count in store.counts[split].values())
        self.all_tokens = self._map("tokens", token_dtype(store.vocab_size), n_tokens)
        self.offsets = self._map("offsets", ARRAYS["offsets"], n_documents + 1)
        self.source_ids = self._map("sources", ARRAYS["sources"], n_documents)
        self.byte_counts = self._map("bytes", ARRAYS["bytes"], n_documents)
        self.all_loss = self._map("loss", ARRAYS["loss"], n_tokens) if store.has_loss_mask else None

    def __len__(self) -> int:
        return len(self.source_ids)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids of a document, eos included: a read-only view of the store."""
        return self.all_tokens[int(self.offsets[document]) : int(self.offsets[document + 1])]

    def loss_mask(self, document: int) -> np.ndarray | None:
        """uint8, 1 where the token carries loss as a target; None: everywhere."""
        if self.all_loss is None:
            return None
        return self.all_loss[int(self.offsets[document]) : int(self.offsets[document + 1])]

    def length(self, document: int) -> int:
        return int(self.offsets[document + 1]) - int(self.offsets[document])

    def n_bytes(self, document: int) -> int:
        """UTF-8 bytes of the document's text."""
        return int(self.byte_counts[document])

    def text_sha256(self, _: int) -> None:
        """Of a document's text as it was before it was tokenised: a store does not keep it."""

    def source(self, document: int) -> str:
        return self._names[int(self.source_ids[document])]

    def id(self, document: int) -> str:
        """Where the document came from. (Reads the ids of the whole split, once.)"""
        return self._ids[document]

    @cached_property
    def _ids(self) -> list[str]:
        return (self._directory / f"{self._split}.ids.txt").read_text(encoding="utf-8").splitlines()

    def _map(self, name: str, dtype: np.dtype, length: int) -> np.ndarray:
        if length == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(self._directory / f"{self._split}.{name}.bin", dtype, mode="r", shape=(length,))


class TokenStore:
    """An opened token store. Pickles as its path, so loader processes map the same pages."""

    def __init__(self, directory: Path, manifest: dict) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer_sha256: str = manifest["tokenizer_sha256"]
        self.has_loss_mask: bool = manifest["loss_mask"]
        self.sources: tuple[str, ...] = tuple(source["name"] for source in manifest["sources"])
        self.counts: dict[Split, dict[str, SourceCount]] = {
            split: {name: SourceCount(**manifest["counts"][split][name]) for name in self.sources} for split in SPLITS
        }
        self._documents: dict[Split, Documents] = {}

    def __reduce__(self) -> tuple[Callable[..., TokenStore], tuple[Path, dict]]:
        return TokenStore, (self.directory, self.manifest)

    @classmethod
    def open(
        cls, directory: Path | str, *, tokenizer_sha256: str | None = None, check: bool | None = None
    ) -> TokenStore:
        """Open a store after verifying it against its manifest.

        tokenizer_sha256   refuse a store whose tokens another tokenizer wrote
        check              hash every file: True always, False never, None once per process for stores up to
                           HASHED_ON_OPEN bytes. Sizes are always compared.
        Raises StoreError, in one line.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, what="token store", format=FORMAT, version=VERSION)
        if tokenizer_sha256 is not None and manifest["tokenizer_sha256"] != tokenizer_sha256:
            raise StoreError(
                f"{directory} was written with another tokenizer (sha256 {manifest['tokenizer_sha256'][:12]}…, "
                f"not {tokenizer_sha256[:12]}…): prepare the data again with this one"
            )
        verify_files(directory, manifest, check)
        return cls(directory, manifest)

    def documents(self, split: Split) -> Documents:
        if split not in self._documents:
            self._documents[split] = Documents(self, split)
        return self._documents[split]

    @property
    def skipped_files(self) -> dict[str, int]:
        """How many files in a source's directory were of no supported kind, where there were any."""
        return {source["name"]: source["skipped"] for source in self.manifest["sources"] if source.get("skipped")}

    def n_tokens(self, split: Split) -> int:
        return sum(count.tokens for count in self.counts[split].values())

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that wrote this store."""
        return Tokenizer.load(self.directory)


# -- opening ------------------------------------------------------------------------------------------------------

_hashed: set[tuple[Path, str]] = set()  # stores whose hashes this process has compared


def read_manifest(directory: Path, *, what: str, format: str, version: int) -> dict:
    """The manifest of a prepared directory. Raises StoreError for a missing, foreign, outdated or changed one."""
    path = directory / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{directory} is not a {what}: it has no manifest.json") from error
    except ValueError as error:
        raise StoreError(f"{path} is damaged: delete {directory} and prepare the data again") from error
    if not isinstance(content, dict) or content.get("format") != format:
        raise StoreError(f"{directory} is not a {what}: its manifest.json belongs to something else")
    if content.get("version") != version:
        raise StoreError(
            f"{directory} has store version {content.get('version')}, this program reads {version}: "
            "prepare the data again"
        )
    if content.get("self_sha256") != self_hash(content):
        raise StoreError(f"{path} was changed after it was written: delete {directory} and prepare the data again")
    return content


def verify_files(directory: Path, manifest: dict, check: bool | None) -> None:
    """Compares sizes and, as `TokenStore.open` says of `check`, hashes with the manifest. Raises StoreError."""
    files: dict[str, dict] = manifest["files"]
    for name, expected in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {expected['bytes']:,}"
            raise StoreError(f"{path} {found}: delete {directory} and prepare the data again")
    key = (directory.resolve(), manifest["self_sha256"])
    if check is None:
        check = key not in _hashed and sum(expected["bytes"] for expected in files.values()) <= HASHED_ON_OPEN
    if check:
        for name, expected in files.items():
            with (directory / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise StoreError(
                        f"{directory / name} was changed after it was written (its sha256 differs): "
                        f"delete {directory} and prepare the data again"
                    )
        _hashed.add(key)


# -- building -----------------------------------------------------------------------------------------------------


def build_store(
    directory: Path | str,
    sources: Sequence[SourceSpec],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    building: Path | None = None,
) -> TokenStore:
    """Tokenise the sources into a new store at `directory`.

    The split is decided by a hash of each document's text, so equal texts are never on both sides. Where chance holds
    out nothing (few documents), the document with the smallest hash is held out; a single document is cut at a line
    break and its end is held out.

    Work goes on in `building` (default: the directory's name with `.building`); what a killed process left there is
    used, whatever else goes wrong clears it.
    Raises SourceError, StoreError, or OSError where the disk is full.
    """
    directory = Path(directory)
    building = building or directory.with_name(directory.name + ".building")
    if directory.exists():
        raise StoreError(f"{directory} exists already")
    if not 0 <= validation_fraction < 1:
        raise StoreError(f"validation_fraction={validation_fraction}: it is at least 0 and below 1")
    names = [source.label for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise StoreError(f"{names.count(name)} sources are called '{name}': give each a name of its own")
    done_bytes, hints = 0, [size_hint(source) for source in sources]
    total = None if None in hints else sum(hint for hint in hints if hint is not None)

    def report(n_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += n_bytes
        if progress is not None:
            progress(done_bytes, None if total is None else max(total, done_bytes))

    try:
        _start_building(building, tokenizer, shard_bytes)
        pieces = _pieces(sources, validation_fraction)
        shards = cut_into_shards(pieces, shard_bytes)
        paths = tokenize_all(shards, tokenizer, building / "shards", workers=workers, done=report)
        # Without what tells files apart by their times: the same text gives the same store, byte for byte.
        described = [{key: value for key, value in fingerprint(source).items() if key != "files"} for source in sources]
        finished = assemble(building / "store", paths, described, tokenizer, validation_fraction)
        (building / "store").rename(directory)
        sync_directory(directory.parent)
    except (ValueError, OSError):
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(building, ignore_errors=True)
    if progress is not None:
        progress(done_bytes, done_bytes)
    _hashed.add((directory.resolve(), finished["self_sha256"]))
    return TokenStore.open(directory)


def _start_building(building: Path, tokenizer: Tokenizer, shard_bytes: int) -> None:
    """Keep the shards that a killed process left, if they were made by the same tokenizer in the same sizes."""
    plan = {"version": VERSION, "tokenizer": tokenizer.sha256, "eos": tokenizer.eos_id, "shard_bytes": shard_bytes}
    path = building / "plan.json"
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == plan
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        shutil.rmtree(building / "shards", ignore_errors=True)
    shutil.rmtree(building / "store", ignore_errors=True)
    (building / "shards").mkdir(parents=True, exist_ok=True)
    for partial in (building / "shards").glob("*.tmp"):
        partial.unlink()
    path.write_text(json.dumps(plan), encoding="utf-8")


def _pieces(sources: Sequence[SourceSpec], validation_fraction: float) -> Iterator[Piece]:
    documents = ((index, document) for index, source in enumerate(sources) for document in read(source))
    head = list(islice(documents, 2))
    if len(head) == 1 and validation_fraction > 0:
        return iter(_cut_single(*head[0], validation_fraction))
    return (piece_of(document, index) for index, document in chain(head, documents))


def _cut_single(source: int, document: Document, validation_fraction: float) -> list[Piece]:
    """The only document of a corpus as two: its end is held out."""
    text = document.text
    cut = text.rfind("\n", 0, int(len(text) * (1 - validation_fraction))) + 1 or int(
        len(text) * (1 - validation_fraction)
    )
    pieces = []
    for part, place, split_hash in ((text[:cut], "start", 2**64 - 1), (text[cut:], "end", 0)):
        n_bytes = len(part.encode()) + len((document.prompt or "").encode())
        pieces.append(Piece(part, document.prompt, source, f"{document.id}#{place}", split_hash, n_bytes))
    return [piece for piece in pieces if piece.text]
