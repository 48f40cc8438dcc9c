"""Requests for text as JSON lines: each is `{"prompt": "…"}` with settings of its own. A line that cannot be read is
a `BadLine`, which `answering` answers by an error, and the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from .sampling import Sampling, sequence_seed

_Reader = Callable[[object], object]
Key = tuple[str, str | int]  # ("id", its id), or ("line", its number) of a line without one


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
    def key(self) -> Key:
        return key_of(self.line, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that was not, and why."""

    line: int
    id: str | int | None
    error: str

    @property
    def key(self) -> Key:
        return key_of(self.line, self.id)


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
            name = read_id(fields["id"])
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


def read_id(value: object) -> str | int:
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


def whole_number(value: object) -> int:
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
    "id": (read_id, "text or a whole number"),
    "prompt": (_text, "text"),
    "max_new_tokens": (whole_number, "a whole number"),
    "temperature": (_number, "a number"),
    "top_k": (_optional(whole_number), "a whole number or null"),
    "top_p": (_optional(_number), "a number or null"),
    "min_p": (_optional(_number), "a number or null"),
    "repetition_penalty": (_number, "a number"),
    "seed": (whole_number, "a whole number"),
    "stop": (_texts, "text or a list of texts"),
}


def key_of(line: int, name: str | int | None) -> Key:
    return ("line", line) if name is None else ("id", name)
