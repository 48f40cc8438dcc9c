"""The file of answers to requests: JSON lines, each with what it answers and what it was made with, so that the same
command continues where it was stopped, and another one is told apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from .requests import BadLine, Key, TextRequest, key_of, read_id, whole_number

_PARTS = ("another prompt", "other settings", "another checkpoint")


class AnswersError(ValueError):
    """A file of answers cannot be continued; one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What all answers of a command are made with.

    checkpoint   what tells its weights, config and tokenizer from others (`checkpoint_files.fingerprint`)
    settings     whatever else decides the text, by name
    """

    checkpoint: str
    settings: Mapping[str, object]

    def digest(self, request: TextRequest) -> str:
        """What an answer says of its making: eight hexadecimal digits for prompt, settings and checkpoint each."""
        settings = [asdict(request.sampling), request.stop_strings, request.own_length, dict(self.settings)]
        parts = (request.prompt, json.dumps(settings, sort_keys=True, default=sorted), self.checkpoint)
        return ".".join(hashlib.sha256(part.encode()).hexdigest()[:8] for part in parts)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A good answer: the line as it is, its number in the file, and its digest."""

    raw: bytes
    number: int
    digest: str


class Answers:
    """The file of answers: appended to line by line, each line on its way to the disk before the next is made.

    One that is there keeps its answers; `with` opens it to go on. Lines that answer by an error, and a last line that
    was cut off, are taken out then, so that their requests are tried again and a request never has two answers.
    """

    def __init__(
        self, path: Path | str, origin: Origin, requests: Iterable[TextRequest | BadLine] | None = None
    ) -> None:
        """`requests`: all that this command asks, where they can be known beforehand.

        Raises AnswersError, and leaves the file alone, when it holds something else or answers that are not to these
        requests, made in this way.
        """
        self.path = Path(path)
        self._origin = origin
        self._kept, dropped = _read(self.path)
        if requests is not None and self._kept:
            asked = {request.key for request in requests if self.has(request)}
            for key, kept in self._kept.items():
                if key not in asked:
                    raise self._foreign(kept, f"answers {key[0]} {key[1]}, which is not among the requests")
        self._dropped = dropped

    def __enter__(self) -> Answers:
        if self._dropped:
            fresh = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
            fresh.write_bytes(b"".join(kept.raw for kept in self._kept.values()))
            fresh.replace(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        return self

    def __len__(self) -> int:
        """Good answers that were there when the file was opened."""
        return len(self._kept)

    def has(self, request: TextRequest | BadLine) -> bool:
        """Was it answered before? Raises AnswersError when what stands there was made from something else."""
        kept = self._kept.get(request.key)
        if kept is None:
            return False
        here = f"than line {request.line} of the requests has now"
        if isinstance(request, BadLine):
            raise self._foreign(kept, f"was made from another prompt {here}")
        pairs = zip(_PARTS, kept.digest.split("."), self._origin.digest(request).split("."), strict=False)
        if changed := [name for name, was, now in pairs if was != now]:
            raise self._foreign(kept, f"was made from {' and '.join(changed)} {here}")
        return True

    def _foreign(self, kept: _Kept, what: str) -> AnswersError:
        return AnswersError(
            f"{self.path}: line {kept.number} {what}; choose another output, or remove this file to answer "
            "everything anew"
        )

    def write(self, answer: Mapping[str, object]) -> None:
        self._file.write(as_line(answer))
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def as_line(answer: Mapping[str, object]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


_BEGINNING = b'{"line": '


def _read(path: Path) -> tuple[dict[Key, _Kept], bool]:
    """Good answers by request, and whether anything else is in the file."""
    kept: dict[Key, _Kept] = {}
    if not path.exists():
        return kept, False
    lines = path.read_bytes().splitlines(keepends=True)
    dropped = False
    for number, raw in enumerate(lines, start=1):
        try:
            answer = json.loads(raw)
            name = answer.get("id")
            key = key_of(whole_number(answer["line"]), None if name is None else read_id(name))
            good = "error" not in answer
            digest = str(answer["digest"]) if good else ""
        except (ValueError, TypeError, KeyError, AttributeError):
            begun = kept or dropped or raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)
            if number == len(lines) and not raw.endswith(b"\n") and begun:
                dropped = True  # the process was killed while it wrote
                continue
            raise AnswersError(
                f"{path}: line {number} is no answer of `longspan generate`; remove the file or choose another"
            ) from None
        if good and raw.endswith(b"\n"):
            kept[key] = _Kept(raw, number, digest)
        else:
            dropped = True
    return kept, dropped
