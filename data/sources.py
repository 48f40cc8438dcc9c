"""Where documents come from: the running Python's own library, local files, or a data set on the hub.

Sources are read one document at a time, in an order that depends on nothing but their content, so that a store built
twice is the same twice.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Literal

from .files import Columns, FileSet, R_co, Refuse, SourceError, TextColumns, find_files, raise_it, read_file, read_rows

__all__ = [
    "Document",
    "SourceError",
    "SourceSpec",
    "StdlibFiles",
    "fingerprint",
    "from_path",
    "read",
    "read_table",
    "size_hint",
    "stdlib_files",
]

# Not documents: other people's packages, tests (most distributions leave them out, so the corpus would depend on the
# packaging), tables of characters, and what is written at build time.
_STDLIB_SKIP_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_STDLIB_SKIP_PREFIXES = ("_sysconfigdata", "config-")
_TOPICS = "pydoc_data/topics.py"  # its texts are documents of their own


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `prompt`, where there is one, precedes the text and carries no loss."""

    text: str
    source: str
    id: str
    prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One source of documents in a mixture.

    kind            stdlib: the running Python's library and its help topics; files; hub
    path            files: a file, directory or glob; hub: the data set's name
    name            what the source is called in counts and reports; None: the kind or the path
    weight          share of the training stream, relative to the other sources
    split, config, revision, streaming   hub only
    text_field      column with the text (jsonl, parquet, arrow, hub)
    limit           read at most this many documents
    prompt_field, response_field         columns to train on responses only; both or neither; they replace text_field

    Raises SourceError where these contradict each other.
    """

    kind: Literal["stdlib", "files", "hub"] = "stdlib"
    path: str | None = None
    name: str | None = None
    weight: float = 1.0
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    text_field: str = "text"
    limit: int | None = None
    prompt_field: str | None = None
    response_field: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("stdlib", "files", "hub"):
            raise SourceError(f"source kind '{self.kind}' is unknown: use stdlib, files or hub")
        if self.kind != "stdlib" and not self.path:
            what = "a file, directory or glob" if self.kind == "files" else "the data set's name"
            raise SourceError(f"a source of kind '{self.kind}' needs a path: {what}")
        if self.kind == "stdlib" and self.path:
            raise SourceError(
                f"a source of kind 'stdlib' takes no path, but got '{self.path}'; for files say kind=files"
            )
        if not self.weight > 0:
            raise SourceError(f"source '{self.label}' has weight {self.weight}; weights are greater than 0")
        if self.limit is not None and self.limit < 1:
            raise SourceError(f"source '{self.label}' has limit {self.limit}; a limit is at least 1 document")
        if (self.prompt_field is None) != (self.response_field is None):
            raise SourceError("prompt_field and response_field go together: give both or neither")
        if self.prompt_field is not None and self.kind == "stdlib":
            raise SourceError("prompt_field and response_field name columns, and the stdlib source has none")

    @property
    def label(self) -> str:
        return self.name or self.path or self.kind

    @property
    def columns(self) -> TextColumns:
        return TextColumns(self.response_field or self.text_field, self.prompt_field)


def from_path(path: str) -> SourceSpec:
    """The source that a user means by one string: `hub:<name>`, or a file, directory or glob."""
    if path.startswith("hub:"):
        return SourceSpec(kind="hub", path=path.removeprefix("hub:"))
    return SourceSpec(kind="files", path=path)


def read(spec: SourceSpec) -> Iterator[Document]:
    """The documents of a source, in order; empty ones are left out.

    Raises SourceError, in one line that names file and place, for anything that cannot be read as text.
    """
    readers = {"stdlib": _read_stdlib, "files": _read_files, "hub": _read_hub}
    empty = True
    for document in islice(readers[spec.kind](spec), spec.limit):
        empty = False
        yield document
    if empty:
        raise SourceError(f"{spec.label} holds no text: every document in it is empty")


def read_table(spec: SourceSpec, columns: Columns[R_co], refuse: Refuse) -> Iterator[R_co]:
    """What `columns` makes of each row of a source's files (jsonl, parquet, arrow) or hub data set, in order.

    Rows that cannot be used go to `refuse`. Raises SourceError for what cannot be read at all.
    """
    return islice(
        _hub_rows(spec, columns, refuse) if spec.kind == "hub" else _file_rows(spec, columns, refuse), spec.limit
    )


def fingerprint(spec: SourceSpec) -> dict[str, object]:
    """What the content of a source depends on, as plain data: equal fingerprints mean that nothing needs rebuilding.

    Files are told apart by relative path, size and modification time; a hub data set by name, configuration, split
    and revision (without a revision, a data set that changes on the hub is not noticed).
    Raises SourceError where the source cannot be found.
    """
    columns = {"text": spec.columns.text, "prompt": spec.columns.prompt}
    common: dict[str, object] = {"kind": spec.kind, "name": spec.label, "limit": spec.limit}
    if spec.kind == "stdlib":
        found = stdlib_files()
        entries = [(name, os.stat(found.root / name).st_size) for name in found.names]
        return common | {"python": sys.version, "files": _digest(entries)}
    if spec.kind == "files":
        files = _file_set(spec)
        entries = [(files.name_of(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths]
        return common | columns | {"count": len(entries), "skipped": files.skipped, "files": _digest(entries)}
    hub = {"path": spec.path, "config": spec.config, "split": spec.split, "revision": spec.revision}
    return common | columns | hub


def size_hint(spec: SourceSpec) -> int | None:
    """About how many bytes of text a source holds, without reading it; None where that is not known beforehand."""
    if spec.limit is not None or spec.kind == "hub":
        return None
    if spec.kind == "stdlib":
        found = stdlib_files()
        return sum(os.stat(found.root / name).st_size for name in found.names) + sum(map(len, _topics().values()))
    files = _file_set(spec)
    if not all(files.is_plain(path) for path in files.paths):
        return None
    return sum(path.stat().st_size for path in files.paths)


def _digest(entries: list[tuple[str, int]] | list[tuple[str, int, int]]) -> str:
    return hashlib.sha256(repr(entries).encode()).hexdigest()


# -- stdlib -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StdlibFiles:
    root: Path
    names: tuple[str, ...]


def stdlib_files() -> StdlibFiles:
    """The modules of the running interpreter's library, sorted; see the top of this file for what is left out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_SKIP_FOLDERS and not name.startswith(_STDLIB_SKIP_PREFIXES)
        ]
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(_STDLIB_SKIP_PREFIXES)
        ]
    names = sorted(name for name in names if name != _TOPICS)
    if not names:
        raise SourceError(f"this Python has no library source under {root}: give data.path=… instead")
    return StdlibFiles(root, tuple(names))


def _topics() -> dict[str, str]:
    try:
        return dict(sorted(import_module("pydoc_data.topics").topics.items()))
    except ModuleNotFoundError:  # some distributions package the help texts apart
        return {}


def _read_stdlib(spec: SourceSpec) -> Iterator[Document]:
    found = stdlib_files()
    for name in found.names:
        with tokenize.open(found.root / name) as file:  # honours a coding cookie (PEP 263)
            text = file.read()
        if text.strip():
            yield Document(text, spec.label, name)
    for topic, text in _topics().items():
        yield Document(text, spec.label, f"topics/{topic}")


# -- files and hub --------------------------------------------------------------------------------------------------


def _file_set(spec: SourceSpec) -> FileSet:
    return find_files(spec.path or "")


def _read_files(spec: SourceSpec) -> Iterator[Document]:
    files = _file_set(spec)
    for path in files.paths:
        for record in read_file(path, spec.columns):
            name = files.name_of(path)
            yield Document(record.text, spec.label, f"{name}{record.place}", record.prompt)


def _file_rows(spec: SourceSpec, columns: Columns[R_co], refuse: Refuse) -> Iterator[R_co]:
    for path in _file_set(spec).paths:
        yield from read_rows(path, columns, refuse)


def _read_hub(spec: SourceSpec) -> Iterator[Document]:
    for record in _hub_rows(spec, spec.columns, raise_it):
        yield Document(record.text, spec.label, f"{spec.path}/{spec.split}{record.place}", record.prompt)


def _hub_rows(spec: SourceSpec, columns: Columns[R_co], refuse: Refuse) -> Iterator[R_co]:
    import datasets  # slow to import, and only this source needs it
    from datasets.exceptions import DatasetsError

    name = spec.path or ""
    where = f"hub data set '{name}'"
    load = partial(datasets.load_dataset, name, spec.config, split=spec.split, revision=spec.revision)
    try:
        rows = load(streaming=True) if spec.streaming else load()
        for number, row in enumerate(rows):
            try:
                record = columns.of_row(row, where, f"row {number}")
            except SourceError as error:
                refuse(error)
                record = None
            if record is not None:
                yield record
    except SourceError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            hint = "HF_HUB_OFFLINE is set: only data sets in the local cache can be read"
        else:
            hint = "check its name, configuration, split and revision, and that this machine is online"
        raise SourceError(f"{where} cannot be read: {reason} ({hint})") from error
