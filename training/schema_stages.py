"""The section `stages`: a run whose context, windows, batch and learning rate change on the way.

A list says each stage; a mapping says a geometric series of them, as Longformer's schedule is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

from .schema_model import Pattern
from .schema_sections import STRICT, Count

Carry = Literal["kept", "fresh"]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig:
    """stages[i]: one stage of a run; what it leaves out is what the rest of the config says"""

    name: str | None = Field(default=None, description="what metrics and messages call it; null: stage1, stage2, …")
    steps: Count = Field(description="optimizer steps of the stage")
    context: int | None = Field(default=None, ge=2, description="tokens in a training sequence; null: data.context")
    window_factor: Positive = Field(
        default=1.0,
        description="times every window of the model: the keys of one-sided windows, the neighbours on either side of "
        "others; what is unlimited stays so",
    )
    patterns: Mapping[str, Pattern] | None = Field(
        default=None, description="instead of window_factor: attention in place of the model's pattern of the same name"
    )
    lr_factor: Positive = Field(default=1.0, description="times optimizer.lr: the stage's peak learning rate")
    warmup: float | None = Field(
        default=None, ge=0, description="as schedule.warmup, of the stage; null: schedule.warmup"
    )
    global_batch: int | None = Field(default=None, ge=1, description="null: trainer.global_batch")
    micro_batch: int | None = Field(default=None, ge=1, description="null: trainer.micro_batch")
    optimizer: Carry = Field(
        default="kept", description="the optimizer's moments at the beginning: those of the stage before, or none"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageSeries:
    """stages: each stage in proportion to the one before (the defaults are Beltagy et al. 2020, arXiv 2004.05150,
    §4.2)"""

    steps: tuple[Count, ...] = Field(min_length=1, description="series: optimizer steps of each stage")
    window_ratio: Positive = Field(default=2.0, description="series: windows, times this from stage to stage")
    context_ratio: Positive = Field(
        default=2.0, description="series: tokens in a sequence, times this from stage to stage; data.context at first"
    )
    max_context: int | None = Field(default=None, ge=2, description="series: the longest context; null: no limit")
    lr_ratio: Positive = Field(default=0.5, description="series: the learning rate, times this from stage to stage")
    warmup: float | None = Field(
        default=None, ge=0, description="series: as schedule.warmup, of each stage; null: schedule.warmup"
    )
    global_batch: tuple[Count, ...] | None = Field(
        default=None, description="series: trainer.global_batch of each stage; null: trainer.global_batch"
    )
    micro_batch: tuple[Count, ...] | None = Field(
        default=None, description="series: trainer.micro_batch of each stage; null: trainer.micro_batch"
    )
    optimizer: Carry = Field(
        default="kept", description="series: the optimizer's moments when a stage begins: kept, or fresh ones"
    )


def _form(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<one>"


def _none_is_no_stages(value: object) -> object:
    return () if value is None else value


# (The section of the series alone has its keys; StageConfig's are those of list items.)
Stages = Annotated[
    Annotated[tuple[StageConfig, ...], Tag("<list>")] | Annotated[StageSeries, Tag("<one>")],
    Discriminator(_form),
    BeforeValidator(_none_is_no_stages),
]
