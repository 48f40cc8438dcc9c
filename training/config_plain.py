"""Configs as plain mappings: what YAML gives and takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from longspan.kernels.attention.spec import AttentionSpec, Window

from .config_keys import find


def booleans(schema: type, value: Any, path: str) -> Iterable[tuple[str, bool]]:
    """Where `true` stands for a number: pydantic would read it as 1."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from booleans(schema, inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from booleans(schema, inner, f"{path}.{i}")
    elif isinstance(value, bool):
        key = find(schema, path)
        if key is not None and key.is_number:
            yield path, value


def named(value: Any) -> Any:
    """Keys as text throughout: YAML reads `1:` as a number."""
    if isinstance(value, Mapping):
        return {str(name): named(inner) for name, inner in value.items()}
    return value


def written(raw: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """The keys that a config gives in a section; none where the section is missing or no section at all."""
    inside = raw.get(section)
    return inside if isinstance(inside, Mapping) else {}


def without(raw: Any, path: list[str]) -> Any:
    """The mapping without one key; without the list that holds it, where it lies in one."""
    if not isinstance(raw, Mapping) or not path or path[0] not in raw:
        return raw
    if len(path) == 1 or not isinstance(raw[path[0]], Mapping):
        return {name: value for name, value in raw.items() if name != path[0]}
    return {**raw, path[0]: without(raw[path[0]], path[1:])}


def plain(value: Any) -> Any:
    """Dataclasses as mappings, tuples as lists."""
    if isinstance(value, AttentionSpec | Window):  # what is not said there is off
        pairs = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: plain(inner) for field, inner in pairs if inner != field.default}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
