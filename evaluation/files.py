"""Files that others can rely on: never seen half-written, and JSON without what JSON does not have."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, then rename onto it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: object) -> object:
    """Plain data in which numbers that are not finite are None: JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return finite_or_none(value) if isinstance(value, float) else value


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else value
