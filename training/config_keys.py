"""The table of keys that a schema allows, read from the schema itself: `--help`, error messages, "did you mean" and the
reading of command-line values all use this one table.

Works on any tree of dataclasses: pydantic's (which carry descriptions and limits) and plain ones (whose docstrings
list `name   meaning`), so that a key is described where it is defined and nowhere else.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = MISSING  # the default of a key that has none


@dataclass(frozen=True, slots=True)
class Inherited:
    """The default of a key that something else decides where it is not given; `source` in words."""

    source: str


_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "names"}
_LIMITS = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a config.

    path       dotted; `<name>` stands for a name the user gives, `<i>` for a place in a list
    allowed    what it may hold, in words
    default    its default, REQUIRED when there is none, Inherited where another config says it, None for the heads of
               sections
    meaning    one sentence
    choices    the words it (or an item of its list) may be, where they are listed
    is_text    holds text and nothing that looks like YAML
    is_number  holds numbers only, so that `true` is a mistake
    """

    path: str
    allowed: str
    default: object
    meaning: str
    choices: tuple[str, ...] = ()
    is_text: bool = False
    is_number: bool = False

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


@cache
def keys(schema: type) -> tuple[Key, ...]:
    """Every key of a schema in its order, sections before the keys inside them only where the section itself can be
    set to something (a list, null).

    A schema that has sections in common with others may say, by key or section, what is different with it: `decided`
    has keys that it does not take, `inherited` where it takes the values from that are not given.
    """
    decided: Mapping[str, str] = getattr(schema, "decided", {})
    inherited: Mapping[str, str] = getattr(schema, "inherited", {})
    taken = (key for key in _walk(schema, "") if _whose(key.path, decided) is None)
    sources = ((key, _whose(key.path, inherited)) for key in taken)
    return tuple(key if name is None else replace(key, default=Inherited(inherited[name])) for key, name in sources)


def find(schema: type, path: str) -> Key | None:
    """The key that a concrete path (`data.sources.0.kind`, `attention.patterns.local.causal`) belongs to."""
    return next((key for key in keys(schema) if _same(key.path, path)), None)


def sections(schema: type) -> frozenset[str]:
    """Paths that hold other keys: `data`, `data.tokenizer`, `attention.patterns.<name>`."""
    found: set[str] = set()
    for key in keys(schema):
        parts = key.path.split(".")
        found.update(".".join(parts[:n]) for n in range(1, len(parts)))
    return frozenset(found)


def children(schema: type, path: str) -> tuple[str, ...]:
    """The names directly below a section (the table's spelling of its path; "" for the top)."""
    prefix = f"{path}." if path else ""
    below = (key.path[len(prefix) :].partition(".")[0] for key in keys(schema) if key.path.startswith(prefix))
    return tuple(dict.fromkeys(below))


def section(schema: type, path: str) -> str | None:
    """The table's spelling of a section's concrete path: `data.sources.0` is `data.sources.<i>`."""
    return next((name for name in sections(schema) if _same(name, path)), None)


def documented(cls: type) -> dict[str, str]:
    """`name   meaning` lines of a docstring, continuation lines joined."""
    meanings: dict[str, str] = {}
    current: list[str] = []
    for line in (cls.__doc__ or "").splitlines():
        entry = re.match(r"^    (\w+(?:, \w+)*)(?:\s{2,}(\S.*))?$", line)
        if entry and all(name in _names(cls) for name in entry[1].split(", ")):
            current = entry[1].split(", ")
            meanings.update(dict.fromkeys(current, (entry[2] or "").strip()))
        elif current and re.match(r"^\s{8,}\S", line):
            meanings.update({name: f"{meanings[name]} {line.strip()}".strip() for name in current})
        elif line.strip():
            current = []
    # A config file spells it `null`.
    return {name: re.sub(r"\bNone\b", "null", meaning) for name, meaning in meanings.items()}


def describe(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """A type in words: `a whole number, at least 1, or null`."""
    plain, inner = _unwrap(annotation)
    limits = (*limits, *inner)
    origin = get_origin(plain)
    arguments: tuple[Any, ...] = get_args(plain)
    if plain in _WORDS:
        return ", ".join([_WORDS[plain], *_bounds(limits)]) if plain in (int, float) else _WORDS[plain]
    if origin in (Union, types.UnionType):
        words = [describe(option, limits) for option in arguments if option is not type(None)]
        if type(None) in arguments:
            words.append("null")
        comma = ", or " if any("," in word for word in words) else " or "
        return comma.join(words)
    if origin is Literal:
        choices = [str(choice) for choice in arguments]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin is tuple and Ellipsis in arguments:
        item = _unwrap(arguments[0])[0]
        a_list = "a non-empty list" if any(getattr(limit, "min_length", 0) for limit in _flat(limits)) else "a list"
        return f"{a_list} of {_PLURALS[item]}" if item in _PLURALS else f"{a_list}, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_PLURALS.get(_unwrap(arguments[0])[0], 'values')}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "names, each for " + describe(arguments[1])
    if is_dataclass(plain) or hasattr(plain, "model_fields"):
        return "a section with " + ", ".join(_names(plain))
    return str(plain)


def _whose(path: str, names: Mapping[str, str]) -> str | None:
    """The name among `names` of a key, or else of the innermost section that it lies in."""
    while path and path not in names:
        path = path.rpartition(".")[0]
    return path or None


def _same(pattern: str, path: str) -> bool:
    wanted, parts = pattern.split("."), path.split(".")
    return len(wanted) == len(parts) and all(
        want == part or want == "<name>" or (want == "<i>" and part.isdigit()) for want, part in zip(wanted, parts)
    )


def _walk(schema: type, prefix: str) -> Iterator[Key]:
    for name, annotation, default, meaning, limits in _fields(schema):
        yield from _expand(f"{prefix}{name}", annotation, default, meaning, limits)


def _expand(path: str, annotation: Any, default: object, meaning: str, limits: tuple[Any, ...]) -> Iterator[Key]:
    """The key itself, unless it is nothing but a section, then the keys inside it."""
    plain = _unwrap(annotation)[0]
    if _is_section(plain):
        yield from _walk(plain, f"{path}.")
        return
    options = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)
    kinds = {_unwrap(option)[0] for option in options} - {type(None)}
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    items = {_unwrap(item)[0] for each in lists for item in get_args(each) if item is not Ellipsis}
    yield Key(
        path=path,
        allowed=describe(annotation, limits),
        default=default,
        meaning=meaning,
        choices=tuple(
            str(choice) for kind in (*kinds, *items) if get_origin(kind) is Literal for choice in get_args(kind)
        ),
        is_text=kinds == {str},
        is_number=bool(kinds) and kinds <= {int, float},
    )
    for option in options:
        plain_option = _unwrap(option)[0]
        arguments = get_args(plain_option)
        if _is_section(plain_option):
            yield from _walk(plain_option, f"{path}.")
        elif get_origin(plain_option) is tuple and _is_section(_unwrap(arguments[0])[0]):
            yield from _walk(_unwrap(arguments[0])[0], f"{path}.<i>.")
        elif isinstance(get_origin(plain_option), type) and issubclass(get_origin(plain_option), Mapping):
            yield from _expand(f"{path}.<name>", arguments[1], None, "one of them, by the name you give it", ())


def _fields(schema: type) -> Iterator[tuple[str, Any, object, str, tuple[Any, ...]]]:
    """(name, annotation, default, meaning, limits) of each field of a pydantic or a plain dataclass."""
    own = getattr(schema, "__pydantic_fields__", None)
    if own is not None:
        for name, info in own.items():
            yield (
                name,
                info.annotation,
                REQUIRED if info.is_required() else info.get_default(call_default_factory=True),
                info.description or "",
                tuple(info.metadata),
            )
        return
    hints, meanings = get_type_hints(schema, include_extras=True), documented(schema)
    for field in fields(schema):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield field.name, hints[field.name], default, meanings.get(field.name, ""), ()


def _names(schema: Any) -> tuple[str, ...]:
    own = getattr(schema, "__pydantic_fields__", None)
    return tuple(own) if own is not None else tuple(field.name for field in fields(schema))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and (is_dataclass(annotation) or hasattr(annotation, "model_fields"))


def _unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        plain, *metadata = get_args(annotation)
        inner, more = _unwrap(plain)
        return inner, (*metadata, *more)
    return annotation, ()


def _flat(limits: tuple[Any, ...]) -> list[Any]:
    """Limits with those that a FieldInfo inside Annotated keeps in a list of its own."""
    return [each for limit in limits for each in (limit, *getattr(limit, "metadata", ()))]


def _bounds(limits: tuple[Any, ...]) -> list[str]:
    return [
        text.format(f"{getattr(limit, name):g}")
        for limit in _flat(limits)
        for name, text in _LIMITS
        if hasattr(limit, name)
    ]
