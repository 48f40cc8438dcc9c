"""What models are made of, as frozen data that every layer of the framework can read, and its way through plain dicts.

Configs never enter modules: `from_config` of each architecture turns them into constructor arguments. (No torch here.)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from longspan.kernels.attention.spec import AttentionSpec, BlockLayout, Window

from .config_attention import MLP, AttentionPlan, HeadGroup, ModelConfigError, Norm, Positions
from .config_decoder import DecoderConfig
from .config_encoder import EncoderConfig, EncoderHead, NormOrder
from .config_rope import RopeScaling
from .config_seq2seq import Seq2SeqConfig, StackConfig

__all__ = [
    "ARCHITECTURES",
    "MLP",
    "AttentionPlan",
    "DecoderConfig",
    "EncoderConfig",
    "EncoderHead",
    "HeadGroup",
    "ModelConfig",
    "ModelConfigError",
    "Norm",
    "NormOrder",
    "Positions",
    "RopeScaling",
    "Seq2SeqConfig",
    "StackConfig",
    "from_dict",
    "near",
    "plan_from_dict",
    "to_dict",
]

ModelConfig = DecoderConfig | EncoderConfig | Seq2SeqConfig

# What `architecture` says in a config.
ARCHITECTURES: Mapping[str, type[ModelConfig]] = MappingProxyType(
    {"decoder": DecoderConfig, "encoder": EncoderConfig, "seq2seq": Seq2SeqConfig}
)


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON-able dicts, lists and scalars; `from_dict` is its inverse."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def from_dict(raw: Mapping[str, Any]) -> ModelConfig:
    """A config from plain dicts (a checkpoint's config.json, overrides). Missing keys take their defaults; a missing
    `architecture` means a decoder.

    Raises ModelConfigError naming every unknown key (with the nearest known one) and every value of a wrong type.
    """
    architecture = raw.get("architecture", "decoder")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelConfigError([f"architecture={architecture!r}: it is one of {', '.join(ARCHITECTURES)}"])
    problems: list[str] = []
    config = _read(ARCHITECTURES[architecture], raw, "", problems)
    if problems or not isinstance(config, ModelConfig):
        raise ModelConfigError(problems)
    return config


def plan_from_dict(raw: Mapping[str, Any]) -> AttentionPlan:
    """The `attention` part of a config alone; raises like `from_dict`."""
    problems: list[str] = []
    plan = _read(AttentionPlan, raw, "attention", problems)
    if problems or not isinstance(plan, AttentionPlan):
        raise ModelConfigError(problems)
    return plan


_DATA = (
    *ARCHITECTURES.values(),
    StackConfig,
    AttentionPlan,
    HeadGroup,
    AttentionSpec,
    RopeScaling,
    Window,
    BlockLayout,
)


def _plain(value: object) -> object:
    if isinstance(value, _DATA):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _read(kind: type, raw: object, where: str, problems: list[str]) -> object:
    """`raw` as `kind`, one of the dataclasses of a config; problems are collected, and then the result is None."""
    if isinstance(raw, kind):
        return raw
    if not isinstance(raw, Mapping):
        problems.append(f"{where or 'config'}: a mapping of keys, not {raw!r}")
        return None
    before = len(problems)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values: dict[str, object] = {}
    for key, value in raw.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            problems.append(f"{path}: unknown key{near(str(key), known)}")
        else:
            values[key] = _value(hints[key], value, path, problems)
    required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    problems.extend(f"{where or 'config'}: '{name}' is missing" for name in required if name not in raw)
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ModelConfigError as error:
        problems.extend(error.problems)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where and not str(error).startswith(where) else str(error))
    return None


def _value(hint: Any, value: object, where: str, problems: list[str]) -> object:
    """One value as its annotated type; lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not NoneType]
        if isinstance(value, (Mapping, *_DATA)):
            kinds = [kind for kind in kinds if kind in _DATA] or kinds
        elif isinstance(value, list | tuple):
            kinds = [kind for kind in kinds if get_origin(kind) is tuple] or kinds
        return _value(kinds[0], value, where, problems)
    if hint in _DATA:
        return _read(hint, value, where, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where}: a list, not {value!r}")
            return ()
        return tuple(_value(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{where}: a mapping of names, not {value!r}")
            return {}
        return {str(key): _value(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where}={value!r}: it is one of {', '.join(map(str, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        problems.append(f"{where}={value!r}: it is {words.get(hint, hint.__name__)}")
    return value


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'n_heads'?`, or the known names when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
