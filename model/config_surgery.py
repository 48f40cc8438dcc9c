"""What each surgery is called and which keys it reads: what a request is checked with. (No torch here.)

`model.surgery` performs them; there a key is a field of the surgery's dataclass, and a test holds both lists together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Required keys first. A key may belong to several surgeries.
REQUIRED_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"longformer": ("window",), "positions": ("max_positions",), "gqa": ("kv_heads",), "copy-global": ()}
)
OPTIONAL_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "longformer": ("global_tokens", "global_projections", "decoder_window", "sink_tokens", "full_every"),
        "positions": ("mode", "factor", "original_positions", "decoder_positions", "seed"),
        "gqa": ("init", "grouping", "stacks", "seed", "statistics"),
        "copy-global": (),
    }
)
SURGERY_NAMES = tuple(REQUIRED_KEYS)


def keys_of(surgery: str) -> tuple[str, ...]:
    """Every key of a surgery, required ones first."""
    return REQUIRED_KEYS[surgery] + OPTIONAL_KEYS[surgery]
