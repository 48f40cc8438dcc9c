"""How rotary positions are stretched beyond the length that a model was trained with, as frozen data (no torch here).

`model.positions` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from .config_attention import FORBID_EXTRA

RopeKind = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]

# Beside kind and factor, which every kind has: the fields of each, required first.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "dynamic": ("original_positions",),
    "yarn": ("original_positions",),
    "llama3": ("original_positions",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
_OWN = ("original_positions", *(name for names in _OPTIONAL.values() for name in names))


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies changed so that more positions fit into the angles that a model knows.

    kind                linear: positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
                        ntk: the base times factor^(d/(d-2)), which divides the lowest frequency by `factor` and leaves
                        the highest alone (bloc97 2023).
                        dynamic: ntk by as much as the sequence needs: unchanged up to `original_positions`, then by
                        factor * length / original_positions - (factor - 1). A sequence has one scale: that of its
                        length where it is read at once, of the length declared when its cache was begun where it grows.
                        yarn: by frequency, those that turn fast kept and those that turn slowly divided, and scores
                        sharpened (Peng et al. 2023, arXiv 2309.00071, §3).
                        llama3: by wavelength, with a ramp between two bounds (Grattafiori et al. 2024, arXiv
                        2407.21783, and Meta's reference code)
    factor              how many times longer sequences may be; 1: plain rotation (dynamic: the base times
                        length / original_positions, still)
    original_positions  length that the model was trained with (dynamic, yarn, llama3)
    beta_fast           yarn: turns within that length above which a frequency is kept; null: 32
    beta_slow           yarn: turns below which it is divided by `factor`; null: 1
    attention_factor    yarn: multiplies cosines and sines, so scores by its square; null: 0.1 ln(factor) + 1
    truncate            yarn: the ramp begins and ends at whole dimensions, as the authors' code has it; null: true
    low_freq_factor     llama3: wavelengths above original_positions / this are divided by `factor`; null: 1
    high_freq_factor    llama3: wavelengths below original_positions / this are kept; null: 4
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA

    kind: RopeKind
    factor: float
    original_positions: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ValueError(f"rope_scaling.{problems[0]}")


def _problems(scaling: RopeScaling) -> Iterator[str]:
    kind = scaling.kind
    if kind not in get_args(RopeKind):
        yield f"kind={kind!r}: it is one of {', '.join(get_args(RopeKind))}"
        return
    if not scaling.factor >= 1:
        yield f"factor={scaling.factor}: how many times longer sequences may be is at least 1"
    fields = (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    for name in _REQUIRED[kind]:
        if getattr(scaling, name) is None:
            yield f"{name}: is required by kind={kind}"
    for name in _OWN:
        value = getattr(scaling, name)
        if value is None:
            continue
        if name not in fields:
            yield f"{name}={value}: kind={kind} has no such setting"
        elif name != "truncate" and not value > 0:
            yield f"{name}={value}: it is a positive number"
    if kind == "yarn" and (scaling.beta_fast or 32.0) <= (scaling.beta_slow or 1.0):
        yield f"beta_fast={scaling.beta_fast}: is above beta_slow={scaling.beta_slow or 1.0}"
    if kind == "llama3" and (scaling.high_freq_factor or 4.0) <= (scaling.low_freq_factor or 1.0):
        yield f"high_freq_factor={scaling.high_freq_factor}: is above low_freq_factor={scaling.low_freq_factor or 1.0}"
