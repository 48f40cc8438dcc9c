"""Records → example store, kept in the cache and made again only when something it depends on has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from .example_records import ExampleColumns, ExampleRecord, token_span
from .examples import FORMAT, VERSION, ExampleStore
from .prepare import Progress, TokenizerSettings, built_once, file_name
from .refused import Refused
from .shards import StoreError, split_hash, token_dtype
from .sources import SourceError, SourceSpec, fingerprint, read_table
from .tokenizer import Tokenizer, byte_level
from .writer import SPLITS, HashedFiles, save_tokenizer, sync_directory, tokenizer_facts, write_manifest

_GROUP = 1 << 20  # characters of records tokenised at once


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """Records that a function makes of what every machine has.

    name, version  tell its results apart
    of_library     whether they depend on the running Python's library
    limit          make at most this many
    """

    name: str
    version: int
    make: Callable[[], Iterator[ExampleRecord]] = field(compare=False)
    of_library: bool = True
    limit: int | None = None

    def described(self) -> dict[str, object]:
        described: dict[str, object] = {"made": self.name, "version": self.version}
        if self.of_library:
            described["of"] = fingerprint(SourceSpec())
        if self.limit is not None:
            described["limit"] = self.limit
        return described

    def records(self) -> Iterator[ExampleRecord]:
        return islice(self.make(), self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleSettings:
    """What an example store is made of.

    name                 first part of its directory's name
    source               jsonl, parquet, arrow or a hub data set (or records made by a function)
    validation           records that are held out; None: a share of the source's
    columns              what is read of each record
    tokenizer            bpe and words are trained on the source's texts
    validation_fraction  share of the source held out, by a hash of each record's group, answered text or texts; only
                         where `validation` is None
    tolerance            largest share of records that may be unusable; they are counted and named
    cache                where stores are kept
    """

    name: str = "examples"
    source: SourceSpec | BuiltIn
    validation: SourceSpec | BuiltIn | None = None
    columns: ExampleColumns
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    validation_fraction: float = 0.1
    tolerance: float = 0.01
    cache: str | Path = "cache"


def prepare_examples(settings: ExampleSettings, *, progress: Progress | None = None) -> ExampleStore:
    """The store of some settings, from the cache where it is there.

    The directory is `<cache>/<name>-<hash>`, as for token stores; one process builds it, others wait.
    Raises SourceError, StoreError, TokenizerError or FileNotFoundError for wrong requests, OSError where the disk is
    full.
    """
    if not 0 <= settings.validation_fraction < 1:
        raise StoreError(f"validation_fraction={settings.validation_fraction}: it is at least 0 and below 1")
    loaded = Tokenizer.load(settings.tokenizer.path) if settings.tokenizer.path is not None else None
    directory = Path(settings.cache) / f"{file_name(settings.name)}-{_key(settings, loaded)}"

    def build(building: Path) -> None:
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
            _build(settings, building, loaded or _trained(settings, progress), progress)
            building.rename(directory)
            sync_directory(directory.parent)
        except (ValueError, OSError):
            shutil.rmtree(building, ignore_errors=True)
            raise

    built_once(directory, build, progress)
    return ExampleStore.open(directory)


@dataclass(frozen=True, slots=True)
class PreparedExamples:
    """As `prepare.Prepared`, of labelled examples."""

    store: ExampleStore
    tokenizer: Tokenizer
    directory: Path


def _build(settings: ExampleSettings, directory: Path, tokenizer: Tokenizer, progress: Progress | None) -> None:
    """One pass over the records into the files of a store; the manifest comes last."""
    refused = Refused()
    labels: list[str | None] = []
    hashes: list[int] = []
    n_characters = n_train = 0
    with ExitStack() as opened:
        writer = _Writer(settings.columns, tokenizer, directory, opened)
        for source in (settings.source, settings.validation):
            for group in _grouped(_read(source, settings.columns, refused)):
                writer.append(group)
                labels += [record.label for record in group]
                hashes += [_identity(record, settings.columns) for record in group]
                n_characters += sum(_size(record) for record in group)
                if progress is not None:
                    progress("tokens", n_characters, None)
            n_train = len(hashes) if source is settings.source else n_train
        files = writer.seal()
    _check(settings, refused, n_records=len(hashes), n_train=n_train)
    held_out = np.arange(len(hashes)) >= n_train
    if settings.validation is None and settings.validation_fraction > 0:
        held_out = np.array(hashes, dtype=np.uint64) < _threshold(hashes, settings.validation_fraction)
    names = sorted_labels(labels)
    arrays = {
        f"{split}.bin": np.flatnonzero(chosen).astype("<u8")
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True)
    }
    if settings.columns.label is not None:
        numbers = {name: number for number, name in enumerate(names)}
        arrays["labels.bin"] = np.array([numbers[str(label)] for label in labels], dtype="<i4")
    with ExitStack() as opened:
        whole = HashedFiles(directory, arrays, opened)
        for name, array in arrays.items():
            whole.write(name, array.tobytes())
        files |= whole.seal()
    files |= save_tokenizer(tokenizer, directory)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **tokenizer_facts(tokenizer),
        "texts": list(writer.n_tokens),
        "tokens": writer.n_tokens,
        "labels": names,
        "has_labels": settings.columns.label is not None,
        "answered": _answered(settings.columns),
        "records": len(hashes),
        "counts": {split: len(arrays[f"{split}.bin"]) for split in SPLITS},
        "refused": {"count": refused.count, "first": refused.first},
        "files": files,
    }
    write_manifest(manifest, directory)


class _Writer:
    """Appends records to the files that grow with them, hashing as it writes. `opened` closes the files."""

    def __init__(self, columns: ExampleColumns, tokenizer: Tokenizer, directory: Path, opened: ExitStack) -> None:
        self.n_tokens = dict.fromkeys((name for name, _ in columns.texts), 0)
        self._answered = _answered(columns)
        self._tokenizer = tokenizer
        self._n_line_bytes = 0
        names = [f"{name}.{part}.bin" for name in self.n_tokens for part in ("tokens", "offsets")]
        names += ["spans.bin", "chars.bin"] if self._answered is not None else []
        self._files = HashedFiles(directory, [*names, "records.jsonl", "lines.bin"], opened)
        for name in ("lines.bin", *(f"{name}.offsets.bin" for name in self.n_tokens)):
            self._files.write(name, _u8([0]))

    def append(self, group: Sequence[ExampleRecord]) -> None:
        for name in self.n_tokens:
            texts = [record.texts[name] for record in group]
            if name == self._answered:
                encoded = self._tokenizer.encode_offsets(texts)
                spans = [_span(record, chars_T2) for record, (_, chars_T2) in zip(group, encoded, strict=True)]
                self._files.write("spans.bin", np.array(spans, dtype="<i8").tobytes())
                chars = np.concatenate([chars_T2 for _, chars_T2 in encoded])
                self._files.write("chars.bin", chars.astype("<u4").tobytes())
                arrays = [ids for ids, _ in encoded]
            else:
                arrays = self._tokenizer.encode_arrays(texts)
            dtype = token_dtype(self._tokenizer.vocab_size)
            self._files.write(f"{name}.tokens.bin", np.concatenate(arrays).astype(dtype).tobytes())
            ends = self.n_tokens[name] + np.cumsum([len(ids) for ids in arrays])
            self._files.write(f"{name}.offsets.bin", _u8(ends))
            self.n_tokens[name] = int(ends[-1])
        for record in group:
            line = _line_of(record, self._answered)
            self._n_line_bytes += len(line)
            self._files.write("records.jsonl", line)
            self._files.write("lines.bin", _u8([self._n_line_bytes]))

    def seal(self) -> dict[str, dict[str, object]]:
        return self._files.seal()


def _read(
    source: SourceSpec | BuiltIn | None, columns: ExampleColumns, refuse: Callable[[SourceError], None]
) -> Iterator[ExampleRecord]:
    if source is None:
        return iter(())
    return source.records() if isinstance(source, BuiltIn) else read_table(source, columns, refuse)


def _grouped(records: Iterator[ExampleRecord]) -> Iterator[list[ExampleRecord]]:
    """Groups of about _GROUP characters."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += _size(record)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _trained(settings: ExampleSettings, progress: Progress | None) -> Tokenizer:
    asked = settings.tokenizer
    if asked.kind == "bytes":
        return byte_level(mask=asked.mask)
    return asked.train(_training_texts(settings, progress))


def _training_texts(settings: ExampleSettings, progress: Progress | None) -> Iterator[str]:
    """The texts of the first training records, `train_bytes` characters of them."""
    held_out = int(settings.validation_fraction * 2**64) if settings.validation is None else 0
    room, done = settings.tokenizer.train_bytes, 0
    for record in _read(settings.source, settings.columns, Refused()):
        if _identity(record, settings.columns) < held_out:
            continue
        for text in record.texts.values():
            yield text[: room - done]
            done += len(text[: room - done])
        if progress is not None:
            progress("tokenizer", done, None)
        if done >= room:
            return


def _check(settings: ExampleSettings, refused: Refused, *, n_records: int, n_train: int) -> None:
    """Raises StoreError where too much cannot be used, or nothing is left."""
    objection = refused.objection(n_records, settings.tolerance, what="examples", key="data.examples.tolerance")
    if objection is not None:
        raise StoreError(objection)
    if n_train == 0:
        raise StoreError("data.examples.path holds no examples")
    if settings.validation is not None and n_train == n_records:
        raise StoreError("data.examples.validation_path holds no examples")


def sorted_labels(labels: Sequence[str | None]) -> list[str]:
    """Each class once: whole numbers by their value, words by the alphabet."""
    names = {label for label in labels if label is not None}
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name))


def _answered(columns: ExampleColumns) -> str | None:
    """The text that answers are in, where there are answers."""
    return columns.answered if columns.answer is not None else None


def _size(record: ExampleRecord) -> int:
    return sum(len(text) for text in record.texts.values())


def _identity(record: ExampleRecord, columns: ExampleColumns) -> int:
    """What the split is decided by: equal ones are on the same side."""
    if record.group is not None:
        return split_hash(record.group)
    answered = _answered(columns)
    return split_hash(record.texts[answered] if answered is not None else "\0".join(record.texts.values()))


def _threshold(hashes: Sequence[int], fraction: float) -> np.uint64:
    """Records with a hash below this are held out: at least one is, and not all are. Raises StoreError."""
    smallest, largest = min(hashes), max(hashes)
    if smallest == largest:
        raise StoreError("all examples are the same text, so none can be held out: give data.examples.validation_path")
    return np.uint64(min(max(int(fraction * 2**64), smallest + 1), largest))


def _span(record: ExampleRecord, chars_T2: np.ndarray) -> tuple[int, int]:
    if not record.answers or record.answers[0].start is None:
        return -1, -1
    start = record.answers[0].start
    return token_span(chars_T2, start, start + len(record.answers[0].text)) or (-1, -1)


def _line_of(record: ExampleRecord, answered: str | None) -> bytes:
    line: dict[str, object] = {"place": record.place}
    if answered is not None:
        line |= {"text": record.texts[answered], "answers": [answer.text for answer in record.answers]}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _u8(values: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(values, dtype="<u8").tobytes()


def _key(settings: ExampleSettings, loaded: Tokenizer | None) -> str:
    asked = settings.tokenizer
    tokenizer: dict[str, object] = asked.described() if asked.is_trained else {"kind": asked.kind, "mask": asked.mask}
    if loaded is not None:
        tokenizer = {"sha256": loaded.sha256, "eos": loaded.eos_id}
    given = (settings.source, settings.validation)
    described = {
        "version": VERSION,
        "sources": [
            source.described() if isinstance(source, BuiltIn) else None if source is None else fingerprint(source)
            for source in given
        ],
        "columns": asdict(settings.columns),
        "tokenizer": tokenizer,
        "validation_fraction": settings.validation_fraction if settings.validation is None else None,
        "tolerance": settings.tolerance,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
