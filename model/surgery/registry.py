"""The surgeries by name, and one of them from the keys that a user writes.

A new surgery: a frozen dataclass that satisfies `plan.Surgery`, a line here, and its keys in `model.config_surgery`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.model.config import near
from longspan.model.config_surgery import REQUIRED_KEYS, keys_of

from .copy_global import CopyGlobal
from .errors import SurgeryError
from .gqa import GroupedQuery
from .plan import Surgery
from .positions import ExtendPositions
from .windows import Longformer

SURGERIES: Mapping[str, type[Surgery]] = {
    "longformer": Longformer,
    "positions": ExtendPositions,
    "gqa": GroupedQuery,
    "copy-global": CopyGlobal,
}


def make_surgery(name: str, keys: Mapping[str, Any]) -> Surgery:
    """A surgery from its keys; those that are left out have their defaults.

    Raises SurgeryError for a name that is none, for keys that it does not have and for required ones that are missing.
    """
    if name not in SURGERIES:
        raise SurgeryError(f"surgery={name}: there is no such surgery{near(name, SURGERIES)}")
    problems = [
        f"{key}: is not a key of surgery={name}{near(key, keys_of(name))}" for key in keys if key not in keys_of(name)
    ]
    problems += [f"{key}: is required by surgery={name}" for key in REQUIRED_KEYS[name] if key not in keys]
    if problems:
        raise SurgeryError(*problems)
    return SURGERIES[name](**keys)
