"""A file of JSON lines that finished work is appended to, so that the next try goes on from there.

Its first line is the protocol that the work was done by; work by another one is refused. A line that a stop cut in half
is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def kept_records(path: Path, protocol: Mapping[str, object]) -> list[dict]:
    """The records that the file holds already; a file without any is removed.

    protocol   plain data; kept fields that it does not have are not looked at
    Raises ValueError for records by another protocol.
    """
    header = json.loads(json.dumps(protocol))
    raw = path.read_bytes() if path.is_file() else b""
    whole, _, torn = raw.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    if len(lines) < 2:
        path.unlink(missing_ok=True)
        return []
    written = json.loads(lines[0])["protocol"]
    differing = [key for key in header if written.get(key) != header[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path} holds results by another protocol ({key}={written.get(key)!r}, now {header[key]!r}); give "
            "another output, or overwrite=true to begin again"
        )
    if torn:
        os.truncate(path, len(whole) + 1)
    return [json.loads(line) for line in lines[1:]]


def keep(path: Path, protocol: Mapping[str, object], record: Mapping[str, object]) -> None:
    """Appends a record; the first one brings the protocol, and the file, into being."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record] if path.is_file() else [{"protocol": protocol}, record]
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
