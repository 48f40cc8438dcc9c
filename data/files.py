"""Local files as documents: plain text, JSON lines, Parquet and Arrow, gzip where it makes sense."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

_TEXT = """.txt .text .md .markdown .rst .tex .org .html .xml .csv .log .py .pyi .c .h .cc .cpp .hpp .cu .java .js
    .ts .go .rs .rb .jl .lean .sh .sql .toml .yaml .yml"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
_ROW_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
_SUPPORTED = ".txt .md .rst .py and other text, .jsonl, .ndjson (each also .gz), .parquet, .arrow"

# A longer text file is read as several documents, cut at line breaks, so that memory stays bounded.
LONGEST_TEXT = 32 << 20


class SourceError(ValueError):
    """Something that was named as data cannot be read as text; the message says what, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One document in a file; `place` tells it from the file's others."""

    text: str
    place: str = ""
    prompt: str | None = None


R_co = TypeVar("R_co", covariant=True)


class Columns(Protocol[R_co]):
    """Which columns of a table are read, and what becomes of a row.

    `names` may hold columns that a table can do without; `check` raises SourceError where one that it needs is missing.
    `of_row` gives None for a row that holds nothing, and raises SourceError for one that cannot be used; `where` names
    the file, `place` the row in it.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    def check(self, present: list[str], where: str) -> None: ...

    def of_row(self, row: object, where: str, place: str) -> R_co | None: ...


Refuse = Callable[[SourceError], None]  # told of each row that cannot be used; it raises where there were too many


def raise_it(error: SourceError) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class TextColumns:
    """Which columns of a row are its text."""

    text: str
    prompt: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    def check(self, present: list[str], where: str) -> None:
        for name in self.names:
            if name not in present:
                key = "text_field" if self.prompt is None else "prompt_field and response_field"
                raise SourceError(
                    f"{where} has no column '{name}': it has {', '.join(present) or 'none'}; choose with {key}"
                )

    def of_row(self, row: object, where: str, place: str) -> Record | None:
        """The document in one row; None when its text is empty or null."""
        if not isinstance(row, Mapping):
            raise SourceError(f"{where} {place}: expected an object with a column '{self.text}', found {_name(row)}")
        row = cast("Mapping[str, object]", row)
        self.check(list(row), f"{where} {place}")
        values = [row[name] for name in self.names]
        for name, value in zip(self.names, values):
            if value is not None and not isinstance(value, str):
                raise SourceError(f"{where} {place}: column '{name}' holds {_name(value)}, not text")
            if isinstance(value, str) and not _encodable(value):
                raise SourceError(
                    f"{where} {place}: column '{name}' has half a surrogate pair, which is not UTF-8 text"
                )
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) < len(values) or not texts[-1]:
            return None
        return Record(texts[-1], f":{place.split()[-1]}", None if self.prompt is None else texts[0])


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files that a path stands for. `skipped` counts those in a directory that are of no supported kind."""

    root: Path
    paths: tuple[Path, ...]
    skipped: int = 0

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def is_plain(self, path: Path) -> bool:
        """Is the file's size the size of its text (nearly so for JSON lines)?"""
        return path.suffix != ".gz" and _kind(path) in ("text", "jsonl", None)


def find_files(path: str) -> FileSet:
    """A file, all supported files below a directory, or the files that match a glob (`**` crosses directories).

    A file named directly or by a glob is read as plain text when its suffix says nothing; in a directory such files
    and hidden ones are skipped. Raises SourceError when there is nothing to read.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return FileSet(place.parent, (place,))
    if place.is_dir():
        return _walk(place)
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))
        if not found:
            raise SourceError(f"no file matches data path '{path}'")
        return FileSet(Path(os.path.commonpath([name.parent for name in found])), tuple(found))
    raise SourceError(f"data path '{path}' does not exist")


def _walk(root: Path) -> FileSet:
    found: list[Path] = []
    skipped = 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if not name.startswith(".") and _kind(path) is not None and path.is_file():
                found.append(path)
            else:
                skipped += 1
    if not found:
        what = f"only {skipped} files of other kinds" if skipped else "no files"
        raise SourceError(f"data path '{root}' has {what}; supported are {_SUPPORTED}")
    return FileSet(root, tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix())), skipped)


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not suffixes:
        return None
    zipped = suffixes[-1] == ".gz"
    last = suffixes[-2] if zipped and len(suffixes) > 1 else suffixes[-1]
    kind = "text" if last in TEXT_SUFFIXES else _ROW_SUFFIXES.get(last)
    return None if zipped and kind not in ("text", "jsonl") else kind


def read_file(path: Path, columns: TextColumns) -> Iterator[Record]:
    """The documents in a file: one for plain text, one a row otherwise. Raises SourceError."""
    if _kind(path) not in ("text", None):
        yield from read_rows(path, columns)
        return
    if columns.prompt is not None:
        raise SourceError(
            f"{path} is plain text, but prompt_field and response_field name columns: use .jsonl or .parquet"
        )
    with _failures_of(path), _open(path) as file:
        yield from _read_text(path, file)


def read_rows(path: Path, columns: Columns[R_co], refuse: Refuse = raise_it) -> Iterator[R_co]:
    """What `columns` makes of each row of a .jsonl, .parquet or .arrow file.

    A row that cannot be used (not JSON, a column of another type) is handed to `refuse` and left out. Raises
    SourceError for a file that is of another kind or cannot be read at all.
    """
    kind = _kind(path)
    if kind in ("text", None):
        raise SourceError(f"{path} has no columns ({', '.join(columns.names)}): use .jsonl, .parquet or .arrow")
    with _failures_of(path):
        if kind == "jsonl":
            with _open(path) as file:
                yield from _read_jsonl(path, file, columns, refuse)
        else:
            yield from _read_table(path, kind, columns, refuse)


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is not a complete gzip file ({error})") from error
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read: permission denied") from error


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _read_text(path: Path, file: BinaryIO) -> Iterator[Record]:
    offset, number, rest, more = 0, 0, b"", True
    while more:
        block = rest + file.read(LONGEST_TEXT - len(rest))
        more = len(block) == LONGEST_TEXT
        cut = _last_break(block) if more else len(block)
        text = _decode(block[:cut], path, offset).removeprefix("\ufeff" if offset == 0 else "")
        if text.strip():
            yield Record(text, f"#{number}" if more or number else "")
            number += 1
        offset, rest = offset + cut, block[cut:]


def _last_break(block: bytes) -> int:
    """Where to cut a block: after its last line break, else before its last character."""
    cut = block.rfind(b"\n") + 1
    if cut == 0:
        cut = len(block) - 1
        while cut > 1 and block[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
            cut -= 1
    return cut


def _decode(data: bytes, path: Path, offset: int) -> str:
    nul = data.find(b"\0", 0, 1 << 16)
    if nul >= 0:
        raise SourceError(f"{path} is a binary file, not text (zero byte at offset {offset + nul})")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}; "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error


def _read_jsonl(path: Path, file: BinaryIO, columns: Columns[R_co], refuse: Refuse) -> Iterator[R_co]:
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                record = columns.of_row(_json_of(line, path, number, offset), str(path), f"line {number}")
            except SourceError as error:
                refuse(error)
                record = None
            if record is not None:
                yield record
        offset += len(line)


def _json_of(line: bytes, path: Path, number: int, offset: int) -> object:
    text = _decode(line, path, offset).removeprefix("\ufeff" if number == 1 else "")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} line {number}: not valid JSON ({error.msg}, column {error.colno})") from error


def _read_table(path: Path, kind: str | None, columns: Columns[R_co], refuse: Refuse) -> Iterator[R_co]:
    import pyarrow as pa  # comes with datasets; only tables need it
    import pyarrow.parquet as pq

    try:
        row = 0
        with pa.OSFile(str(path)) if kind == "parquet" else pa.memory_map(str(path)) as file:
            if kind == "parquet":
                table = pq.ParquetFile(file)
                wanted = _wanted(columns, table.schema_arrow.names, path)
                batches = table.iter_batches(batch_size=64, columns=wanted)
            else:
                batches = _arrow_batches(path, file, columns)
            for batch in batches:
                for values in batch.to_pylist():
                    try:
                        record = columns.of_row(values, str(path), f"row {row}")
                    except SourceError as error:
                        refuse(error)
                        record = None
                    if record is not None:
                        yield record
                    row += 1
    except pa.ArrowException as error:
        raise SourceError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error


def _arrow_batches(path: Path, file: object, columns: Columns[object]) -> Iterator:  # of pyarrow.RecordBatch
    import pyarrow as pa

    with path.open("rb") as head:
        is_file_format = head.read(6) == b"ARROW1"
    if is_file_format:
        reader = pa.ipc.open_file(file)
        wanted = _wanted(columns, reader.schema.names, path)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index).select(wanted)
    else:
        stream = pa.ipc.open_stream(file)
        wanted = _wanted(columns, stream.schema.names, path)
        for batch in stream:
            yield batch.select(wanted)


def _wanted(columns: Columns[object], present: list[str], path: Path) -> list[str]:
    columns.check(present, str(path))
    return [name for name in columns.names if name in present]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)
