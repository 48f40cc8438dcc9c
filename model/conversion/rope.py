"""Rotary positions as transformers spells them: `rope_theta` and `rope_scaling` in 4, `rope_parameters` in 5.

Both may stand in one config; then they have to agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longspan.model.config_rope import RopeScaling

from .hf import ConversionError
from .translate import translated

THETA = 10_000.0  # what no spelling at all means, in every family here

FIELDS = (
    translated("rope_theta", float, None, "`rope_theta`; absent: 10,000"),
    translated("rope_scaling", dict, None, "`rope_scaling`: linear, dynamic, yarn, llama3; other types are refused"),
    translated("rope_parameters", dict, None, "`rope_theta` and `rope_scaling` in one"),
    translated("original_max_position_embeddings", int, None, "`rope_scaling.original_positions`"),
)

# rope type -> its parameters, required ones first, and ours that they become
_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
    "llama3": {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
}
_ALSO = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LENGTH = "original_max_position_embeddings"
_TEMPERATURE = ("mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    scaling: RopeScaling | None


def read_rope(values: Mapping[str, Any], max_positions: int) -> Rope:
    """Base and scaling from the fields above. Raises ConversionError, naming the parameter that is in the way."""
    old, new = values["rope_scaling"], values["rope_parameters"]
    found = [
        _one(raw, key, values, max_positions) for key, raw in (("rope_scaling", old), ("rope_parameters", new)) if raw
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise ConversionError("config.json: rope_scaling (with rope_theta) and rope_parameters contradict each other")
    return found[0] if found else Rope(values["rope_theta"] or THETA, None)


def _one(raw: Mapping[str, Any], key: str, values: Mapping[str, Any], max_positions: int) -> Rope:
    where = f"config.json: {key}"
    if any(isinstance(value, Mapping) for value in raw.values()):
        raise ConversionError(f"{where} differs by kind of layer, which cannot be translated")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in _PARAMETERS:
        raise ConversionError(f"{where}.rope_type={kind!r} cannot be translated; known are {', '.join(_PARAMETERS)}")
    theta = raw.get("rope_theta", values["rope_theta"]) or THETA
    if values["rope_theta"] not in (None, theta):
        raise ConversionError(f"{where}.rope_theta={theta} contradicts rope_theta={values['rope_theta']}")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            f"{where}.partial_rotary_factor={raw['partial_rotary_factor']} cannot be translated: heads turn whole"
        )
    names = _PARAMETERS[kind]
    extra = (_LENGTH, *_TEMPERATURE) if kind == "yarn" else (_LENGTH,) if kind in ("llama3", "dynamic") else ()
    if unknown := [name for name in raw if name not in (*names, *_ALSO, *extra)]:
        raise ConversionError(
            f"{where}.{unknown[0]}={raw[unknown[0]]!r}: {kind} has no parameter that this version knows by that name"
        )
    if wrong := [name for name in (*names, *extra) if not _is_number(raw.get(name))]:
        raise ConversionError(f"{where}.{wrong[0]}={raw[wrong[0]]!r}: it is a number")
    if not isinstance(theta, int | float) or isinstance(theta, bool):
        raise ConversionError(f"{where}.rope_theta={theta!r}: it is a number")
    if kind == "default":
        return Rope(float(theta), None)
    # transformers 5 lets the config's own field of that name go first.
    length = values[_LENGTH] or raw.get(_LENGTH) or max_positions
    if kind == "dynamic" and length != max_positions:
        raise ConversionError(
            f"{where}.{_LENGTH}={length}: dynamic scaling starts at max_position_embeddings={max_positions}"
        )
    given: dict[str, Any] = {ours: raw[name] for name, ours in names.items() if raw.get(name) is not None}
    given |= {name: float(value) for name, value in given.items() if name != "truncate"}
    if kind != "linear":
        given["original_positions"] = length
    if kind == "yarn":
        given.setdefault("factor", max_positions / length)
        above, below = (raw.get(name) for name in _TEMPERATURE)
        if above and below:
            ratio = _temperature(given["factor"], above) / _temperature(given["factor"], below)
            given.setdefault("attention_factor", ratio)
    if "factor" not in given:
        raise ConversionError(f"{where} has no factor, which {kind} needs")
    try:
        return Rope(float(theta), RopeScaling(kind=kind, **given))
    except ValueError as error:
        raise ConversionError(f"{where} translates to what cannot be: {error}") from error


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)  # a truth value too: `truncate`


def _temperature(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(theta: float, scaling: RopeScaling | None, *, head_dim: int, max_positions: int) -> dict[str, Any]:
    """The fields of config.json in both spellings. Raises ConversionError for what no spelling has."""
    if scaling is not None and scaling.kind == "ntk":  # a larger base, no more
        return write_rope(
            theta * scaling.factor ** (head_dim / (head_dim - 2)), None, head_dim=head_dim, max_positions=max_positions
        )
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    if scaling.kind == "dynamic" and scaling.original_positions != max_positions:
        raise ConversionError(
            f"rope_scaling.original_positions={scaling.original_positions} with max_positions={max_positions}, "
            "where dynamic scaling starts elsewhere"
        )
    parameters: dict[str, Any] = {"rope_type": scaling.kind}
    for name, ours in _PARAMETERS[scaling.kind].items():
        if getattr(scaling, ours) is not None:
            parameters[name] = getattr(scaling, ours)
    if scaling.kind == "llama3":  # required there
        parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **parameters}
    if scaling.kind in ("yarn", "llama3"):
        parameters[_LENGTH] = scaling.original_positions
    return {
        "rope_theta": theta,
        "rope_scaling": parameters,
        "rope_parameters": {**parameters, "rope_theta": theta},
    }
