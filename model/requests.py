"""Requests for text as JSON lines, and the file of their answers.

A request is one line, `{"prompt": "…"}` with settings of its own; an answer is one line, with the number of the
request's line and its id. A line that cannot be read or served is answered by an error, and the others go on. Answers
that are there already are kept, so that the same command continues where it was stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any

from .completion import Completion
from .prompts import fitting
from .sampling import Sampling, sequence_seed
from .session import Request, Session

_Reader = Callable[[object], object]


class AnswersError(ValueError):
    """A file of answers cannot be continued; one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A line that was understood.

    id           what the user calls it; without one it is called by its line
    own_length   it says max_new_tokens itself
    """

    line: int
    id: str | int | None
    prompt: str
    sampling: Sampling
    stop_strings: tuple[str, ...]
    own_length: bool

    @property
    def key(self) -> tuple[str, str | int]:
        return _key(self.line, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that was not, and why."""

    line: int
    id: str | int | None
    error: str

    @property
    def key(self) -> tuple[str, str | int]:
        return _key(self.line, self.id)


# -- requests ----------------------------------------------------------------------------------------------------------


def read_requests(
    lines: Iterable[bytes], defaults: Sampling, *, stop_strings: tuple[str, ...] = ()
) -> Iterator[TextRequest | BadLine]:
    """Each line that is not blank, numbered from 1, with `defaults` for what it does not set.

    Without a seed of its own a line has `sequence_seed(defaults.seed, line - 1)`, whatever else is in the file.
    """
    ids: dict[str | int, int] = {}
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        request = _read(number, raw, defaults, stop_strings)
        if request.id is not None:
            first = ids.setdefault(request.id, number)
            if first != number:
                request = BadLine(
                    line=number, id=None, error=f"id={json.dumps(request.id)}: line {first} has it already"
                )
        yield request


def _read(number: int, raw: bytes, defaults: Sampling, stop_strings: tuple[str, ...]) -> TextRequest | BadLine:
    name: str | int | None = None
    try:
        fields = _object(raw)
        if "id" in fields:
            name = _id(fields["id"])
        if unknown := [field for field in fields if field not in _FIELDS]:
            near = get_close_matches(unknown[0], _FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"a request has {', '.join(_FIELDS)}"
            raise ValueError(f"{unknown[0]}: unknown field; {hint}")
        if "prompt" not in fields:
            raise ValueError("prompt: is missing; it is the text to continue")
        values: dict[str, Any] = {field: _value(field, value) for field, value in fields.items()}
        prompt, stop = values.pop("prompt"), values.pop("stop", stop_strings)
        values.pop("id", None)
        seed = values.pop("seed", sequence_seed(defaults.seed or 0, number - 1))
        sampling = replace(defaults, seed=seed, **values)
        return TextRequest(
            line=number,
            id=name,
            prompt=prompt,
            sampling=sampling,
            stop_strings=stop,
            own_length="max_new_tokens" in fields,
        )
    except ValueError as error:
        return BadLine(line=number, id=name, error=str(error))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("is not a request: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError('is not a JSON object; a request looks like {"prompt": "…"}')
    return value


def _value(field: str, value: object) -> object:
    """Raises ValueError naming the field when its type is wrong; Sampling judges the values."""
    read, expected = _FIELDS[field]
    try:
        return read(value)
    except TypeError:
        shown = json.dumps(value)
        raise ValueError(f"{field}={shown if len(shown) < 60 else shown[:57] + '...'}: expected {expected}") from None


def _id(value: object) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"id={json.dumps(value)}: expected text or a whole number")
    return _text(value) if isinstance(value, str) else value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair (character {error.start + 1}) is no text") from None
    return value


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise TypeError
    texts = tuple(_text(each) for each in value)
    if "" in texts:
        raise ValueError('stop="": an empty text would stop before the first token')
    return texts


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    try:
        return float(value)
    except OverflowError:
        raise TypeError from None


def _optional(read: _Reader) -> _Reader:
    return lambda value: None if value is None else read(value)


_FIELDS: Mapping[str, tuple[_Reader, str]] = {
    "id": (_id, "text or a whole number"),
    "prompt": (_text, "text"),
    "max_new_tokens": (_whole, "a whole number"),
    "temperature": (_number, "a number"),
    "top_k": (_optional(_whole), "a whole number or null"),
    "top_p": (_optional(_number), "a number or null"),
    "min_p": (_optional(_number), "a number or null"),
    "repetition_penalty": (_number, "a number"),
    "seed": (_whole, "a whole number"),
    "stop": (_texts, "text or a list of texts"),
}


# -- answers -----------------------------------------------------------------------------------------------------------


def answer(
    session: Session,
    requests: Iterable[TextRequest | BadLine],
    *,
    start_token: int,
    shorten: bool = False,
    logprobs: bool = False,
) -> Iterator[dict[str, object]]:
    """The answer to each request, as soon as there is one: line, id, and either text, finish_reason and the numbers of
    tokens, or error. Lines are read as the session has room, so there may be any number of them.

    session       with a tokenizer
    start_token   what an empty prompt is taken for
    shorten       requests that do not say max_new_tokens end where learned positions do, and are not refused for it
    logprobs      with the new tokens and their log-probabilities
    """
    if session.tokenizer is None:
        raise ValueError("requests are texts: make the session with a tokenizer")
    running: dict[int, tuple[TextRequest, int]] = {}
    remaining = iter(requests)
    more = True
    while more or running:
        while more and session.unfinished < 2 * session.max_batch:
            request = next(remaining, None)
            if request is None:
                more = False
                break
            if isinstance(request, BadLine):
                yield _named(request, {"error": request.error})
                continue
            tokens = session.tokenizer.encode(request.prompt) or [start_token]
            sampling = request.sampling
            if shorten and not request.own_length:
                fits = fitting(session.model.config, len(tokens), sampling.max_new_tokens)
                sampling = replace(sampling, max_new_tokens=fits)
            try:
                number = session.submit(Request(prompt=tokens, sampling=sampling, stop_strings=request.stop_strings))
            except ValueError as error:
                yield _named(request, {"error": str(error)})
            else:
                running[number] = request, len(tokens)
        for event in session.step():
            if event.completion is not None:
                request, n_tokens = running.pop(event.request)
                yield _answered_by(request, n_tokens, event.completion, logprobs=logprobs)


def _answered_by(
    request: TextRequest, prompt_tokens: int, completion: Completion, *, logprobs: bool
) -> dict[str, object]:
    fields: dict[str, object] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(completion.tokens),
    }
    if logprobs:
        fields |= {"tokens": completion.tokens, "logprobs": [round(each, 6) for each in completion.logprobs]}
    return _named(request, fields)


def _named(request: TextRequest | BadLine, fields: Mapping[str, object]) -> dict[str, object]:
    name = {} if request.id is None else {"id": request.id}
    return {"line": request.line, **name, **fields}


class Answers:
    """The file of answers: appended to line by line, each line on its way to the disk before the next is made.

    Opening one that is there keeps its answers. Lines that answer by an error, and a last line that was cut off, are
    taken out first, so that their requests are tried again and a request never has two answers.
    """

    def __init__(self, path: Path | str) -> None:
        """Raises AnswersError for a file that holds something else, and leaves it alone."""
        self.path = Path(path)
        kept, dropped = _answered(self.path)
        if dropped:
            fresh = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
            fresh.write_bytes(b"".join(kept.values()))
            fresh.replace(self.path)
        self.answered = frozenset(kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")

    def write(self, answer: Mapping[str, object]) -> None:
        self._file.write(as_line(answer))
        self._file.flush()

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def as_line(answer: Mapping[str, object]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


_BEGINNING = b'{"line": '


def _answered(path: Path) -> tuple[dict[tuple[str, str | int], bytes], bool]:
    """Lines of good answers by request, and whether anything else is in the file."""
    kept: dict[tuple[str, str | int], bytes] = {}
    if not path.exists():
        return kept, False
    lines = path.read_bytes().splitlines(keepends=True)
    dropped = False
    for number, raw in enumerate(lines, start=1):
        try:
            answer = json.loads(raw)
            name = answer.get("id")
            key = _key(_whole(answer["line"]), None if name is None else _id(name))
            good = "error" not in answer
        except (ValueError, TypeError, KeyError, AttributeError):
            begun = kept or dropped or raw.startswith(_BEGINNING) or _BEGINNING.startswith(raw)
            if number == len(lines) and not raw.endswith(b"\n") and begun:
                dropped = True  # the process was killed while it wrote
                continue
            raise AnswersError(
                f"{path}: line {number} is no answer of `longspan generate`; remove the file or choose another"
            ) from None
        if good and raw.endswith(b"\n"):
            kept[key] = raw
        else:
            dropped = True
    return kept, dropped


def _key(line: int, name: str | int | None) -> tuple[str, str | int]:
    return ("line", line) if name is None else ("id", name)
