"""The public face of attention. Names load on first use, so that `spec` can be read without importing torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backend import (
        AttentionBackend,
        AttentionCall,
        AttentionOutput,
        AttentionParams,
        Capabilities,
        Feature,
        Phase,
        Reason,
        UnsupportedAttention,
    )
    from .context import AttentionContext
    from .merge import merge_partials
    from .registry import attend, available, explain, register
    from .spec import AttentionSpec, BlockLayout, Window

_HOME = {
    "AttentionBackend": "backend",
    "AttentionCall": "backend",
    "AttentionContext": "context",
    "AttentionOutput": "backend",
    "AttentionParams": "backend",
    "AttentionSpec": "spec",
    "BlockLayout": "spec",
    "Capabilities": "backend",
    "Feature": "backend",
    "Phase": "backend",
    "Reason": "backend",
    "UnsupportedAttention": "backend",
    "Window": "spec",
    "attend": "registry",
    "available": "registry",
    "explain": "registry",
    "merge_partials": "merge",
    "register": "registry",
}

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "AttentionContext",
    "AttentionOutput",
    "AttentionParams",
    "AttentionSpec",
    "BlockLayout",
    "Capabilities",
    "Feature",
    "Phase",
    "Reason",
    "UnsupportedAttention",
    "Window",
    "attend",
    "available",
    "explain",
    "merge_partials",
    "register",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
