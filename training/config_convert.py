"""What the keys of `longspan convert` must agree on, found before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from longspan.model.config import near
from longspan.model.config_surgery import REQUIRED_KEYS, SURGERY_NAMES, keys_of

from .config_errors import Problem, assignment
from .config_plain import plain
from .schema_convert import ConvertConfig


def check_convert(config: ConvertConfig, raw: Mapping[str, object]) -> Iterator[Problem]:
    """Every key of a surgery that is asked for, and none of another; `raw` tells which were written."""
    asked = ", ".join(config.surgery)
    for name in config.surgery:
        if name not in SURGERY_NAMES:
            yield Problem(("surgery",), f"surgery={name}: there is no such surgery{near(name, SURGERY_NAMES)}")
            return
    for name in dict.fromkeys(name for name in config.surgery if config.surgery.count(name) > 1):
        yield Problem(("surgery",), f"surgery=[{asked}]: {name} is there twice; convert the result once more instead")
    known = {key for name in config.surgery for key in keys_of(name)}
    for key, value in config.keys().items():
        if key not in known:
            owners = " and ".join(name for name in SURGERY_NAMES if key in keys_of(name))
            yield Problem(
                (key,),
                f"{assignment(key, plain(value))}: is read by surgery={owners}; asked for is {asked}",
            )
    for name in dict.fromkeys(config.surgery):
        for key in REQUIRED_KEYS[name]:
            if raw.get(key) is None:
                yield Problem((key,), f"{key}: is required by surgery={name}")
