"""The sections `model` and `attention` of a config, and who computes attention. (`schema` says how they are used.)

A key of `model` is a field of some architecture's config and described there; what a named size does not have is
refused when the model is put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from longspan.kernels.attention.spec import AttentionSpec
from longspan.model.config import DecoderConfig, EncoderConfig, HeadGroup, Seq2SeqConfig, StackConfig
from longspan.model.zoo import CONFIGS

from .config_keys import documented
from .schema_sections import STRICT

# Of kernels.attention; to ask it would import torch.
BACKENDS = ("reference", "sdpa", "flex", "triton", "hopper")


def _branch(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<one>"


def _every_phase(value: object) -> object:
    """`backend: sdpa` and `backend: [flex, reference]` mean all phases."""
    if not isinstance(value, str | list) or not value:
        return value
    for name in [value] if isinstance(value, str) else value:
        if isinstance(name, str):  # wrong names once, not once a phase
            _known_backend(name)
    if isinstance(value, list):
        _alternatives(tuple(value))
    return dict.fromkeys(("train", "prefill", "decode"), value)


def _known_backend(name: str) -> str:
    """The names that are built in, told before torch is imported. A backend that others register is known only at run
    time: a dot in its name (`lab.sparse`) says that it is one of those, and then the registry is asked, not this list.
    """
    if name in ("auto", *BACKENDS) or "." in name:
        return name
    near = get_close_matches(name, ["auto", *BACKENDS], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(BACKENDS)
    raise ValueError(f"no backend is called {name!r}; {hint}there are auto, {known}, and registered names with a dot")


def _alternatives(names: tuple[str, ...]) -> tuple[str, ...]:
    if "auto" in names:
        raise ValueError("auto chooses by itself and stands alone, not in a list")
    return names


# The branch of a union is told by the value's shape, so that an error speaks of the branch that was meant.
BackendName = Annotated[str, AfterValidator(_known_backend)]
Backend = Annotated[
    Annotated[BackendName, Tag("<one>")]
    | Annotated[tuple[BackendName, ...], Field(min_length=1), AfterValidator(_alternatives), Tag("<list>")],
    Discriminator(_branch),
]
Pattern = Annotated[
    Annotated[AttentionSpec, Tag("<one>")] | Annotated[tuple[HeadGroup, ...], Tag("<list>"), Field(min_length=1)],
    Discriminator(_branch),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BackendPlan:
    """attention.backend: who computes attention in each phase: a name, `auto`, or a list tried in order."""

    train: Backend = Field(
        default="auto",
        description="backend of training and evaluation: auto, triton, sdpa, flex, reference, or a list to try; a "
        "backend that others register has a dot in its name",
    )
    prefill: Backend = Field(default="auto", description="backend that reads a prompt into the cache")
    decode: Backend = Field(default="auto", description="backend that generates token by token")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttentionPlanConfig:
    """What each layer of a stack attends to."""

    patterns: Mapping[str, Pattern] | None = Field(
        default=None,
        description="kinds of attention by name: an attention spec each, or a list of {heads, spec} where the heads of "
        "a layer differ; null: those of model.name",
    )
    layers: tuple[str, ...] | None = Field(
        default=None,
        description="the pattern of each layer, repeated cyclically over the stack; null: the only pattern there is",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AttentionConfig(AttentionPlanConfig):
    """attention: what each layer attends to, and who computes it"""

    backend: Annotated[BackendPlan, BeforeValidator(_every_phase)] = Field(
        default=BackendPlan(), description="see attention.backend.*; a name or a list alone means every phase"
    )


def _override(name: str, hint: object, meaning: str) -> tuple[str, Any, Any]:
    return name, hint, Field(default=None, description=meaning)


def _stack_section() -> type:
    """`model.encoder.*` and `model.decoder.*`: every field of StackConfig as an override of the named size's."""
    hints, meanings = get_type_hints(StackConfig), documented(StackConfig)
    overrides = [
        _override(name, hints[name], f"encoder–decoders: {meanings[name]}") for name in hints if name in meanings
    ]
    plain = make_dataclass(
        "StackSection",
        [each for each in overrides if each[0] != "attention"]
        + [("attention", AttentionPlanConfig, field(default=AttentionPlanConfig()))],
        frozen=True,
        kw_only=True,
    )
    return dataclass(frozen=True, kw_only=True, config=STRICT)(plain)


StackSection = _stack_section()


def _model_section() -> type:
    """`model.*`: a named size, and every field of any architecture's config as an override of it."""
    kinds = {"encoder–decoders": Seq2SeqConfig, "encoders": EncoderConfig, "decoders": DecoderConfig}
    # Where several have a field, the last one's type and meaning stand: a decoder's positions may be sinusoidal too.
    hints = {name: hint for kind in kinds.values() for name, hint in get_type_hints(kind).items()}
    meanings = {name: meaning for kind in kinds.values() for name, meaning in documented(kind).items()}
    names = dict.fromkeys(item.name for kind in reversed(kinds.values()) for item in fields(kind))
    overrides: list[tuple[str, Any, Any]] = []
    for name in names:
        owners = [owner for owner, kind in kinds.items() if name in kind.__dataclass_fields__]
        whose = "" if "decoders" in owners else f"{' and '.join(reversed(owners))}: "
        if name in ("encoder", "decoder"):
            overrides.append((name, StackSection, field(default=StackSection())))
        elif name not in ("architecture", "attention"):  # below; a section of its own
            overrides.append(_override(name, hints[name], whose + meanings.get(name, "")))
    known = Literal[tuple(CONFIGS)]
    optional = known | None  # pyright: ignore[reportOperatorIssue]: the names are known at run time
    named = ("name", optional, Field(default=None, description="named size to start from; null: the keys below"))
    architecture = (
        "architecture",
        Literal["decoder", "encoder", "seq2seq"] | None,
        Field(default=None, description="where there is no name: decoder, encoder or seq2seq; null: decoder"),
    )
    plain = make_dataclass("ModelConfig", [named, architecture, *overrides], frozen=True, kw_only=True)
    return dataclass(frozen=True, kw_only=True, config=STRICT)(plain)


ModelConfig = _model_section()
