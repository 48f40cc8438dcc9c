"""What every suite does with contenders: try them, say in one line what went wrong, make room for the next."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch

from longspan.kernels.attention import UnsupportedAttention


def caught(work: Callable[[], object]) -> tuple[Literal["skipped", "failed"], str] | None:
    """What `work` raised, as a status and one line."""
    try:
        work()
    except UnsupportedAttention as error:
        return "skipped", one_line(error)
    except Exception as error:  # noqa: BLE001 (whatever a peer or a compiler raises is a result, and the suite goes on)
        return "failed", one_line(error)
    return None


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def free(device: torch.device) -> None:
    """Memory that nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def short(value: float) -> str:
    """Four significant digits; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.4g}"


def missing(module: str, package: str) -> str | None:
    """Why a peer cannot take part: it is not installed."""
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # not even its parent is there
        found = None
    return f"{package} is not installed" if found is None else None
