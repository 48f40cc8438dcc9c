"""What `longspan uptrain` reads: a grid of conversions and trainings, and how the parent's recipe is continued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from .schema_sections import (
    STRICT,
    Count,
    DataConfig,
    OptimizerConfig,
    ProtocolConfig,
    TrainerConfig,
)

Init = Literal["mean", "first", "random", "aligned", "svd"]
UptrainSchedule = Literal["constant", "rewarm", "t5"]


def _one_or_several(value: object) -> object:
    return (value,) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistillConfig:
    """distill: the parent as a teacher"""

    enabled: bool = Field(
        default=False,
        description="decoders learn from the parent's distribution too; encoders always learn the parent's hidden "
        "states, and nothing else",
    )
    weight: float = Field(
        default=0.5, gt=0, le=1, description="decoders: share of the loss that is the divergence from the parent"
    )
    temperature: float = Field(default=1.0, gt=0, description="decoders: both distributions are softened by it")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpeedConfig:
    """speed: what a token costs with each number of key/value heads, measured with the model's own shape"""

    enabled: bool = Field(default=True, description="measure it; decoders only")
    batches: Annotated[tuple[Count, ...], BeforeValidator(_one_or_several)] | None = Field(
        default=None, min_length=1, description="sequences at once; null: 1 and 16 on a GPU, 1 and 4 on a CPU"
    )
    contexts: Annotated[tuple[Count, ...], BeforeValidator(_one_or_several)] | None = Field(
        default=None,
        min_length=1,
        description="tokens in the cache; null: a quarter of the model's longest input and nearly all of it",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalConfig:
    """retrieval: whether something said once is found again at the end of a longer text; decoders only"""

    enabled: bool = Field(default=True, description="measure it")
    trials: Count = Field(default=32, description="texts of each length")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _UptrainKeys:
    checkpoint: str = Field(description="the parent: a checkpoint directory, or a run (its best, else its last)")
    output: str = Field(description="directory of the grid: cells, their runs, the report")
    kv_heads: Annotated[tuple[int, ...], BeforeValidator(_one_or_several)] = Field(
        min_length=1, description="key/value heads that are left: one number or a list"
    )
    init: Annotated[tuple[Init, ...], BeforeValidator(_one_or_several)] = Field(
        default=("mean",), min_length=1, description="what a group's one head is made of: one name or a list"
    )
    alpha: Annotated[tuple[float, ...], BeforeValidator(_one_or_several)] = Field(
        default=(0.0, 0.05),
        min_length=1,
        description="extra training as a share of the parent's steps: one number or a list; 0 is conversion alone and "
        "always there",
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(_one_or_several)] = Field(
        default=(0,),
        min_length=1,
        description="of the order of the data, dropout and random heads: one number or a list; intervals need two",
    )
    grouping: Literal["contiguous", "similar"] = Field(default="contiguous", description="which heads share one")
    statistics: str | None = Field(
        default=None,
        description="init=aligned, init=svd, grouping=similar: texts (a file or a folder) on which heads are compared "
        "by what they compute; null: by their weights alone",
    )
    control: bool = Field(
        default=True, description="train the parent, all heads kept, for the same steps: what the rest is compared with"
    )
    parent_steps: Count | None = Field(
        default=None,
        description="optimizer steps that the parent was trained for; null: as its run or its lineage says",
    )
    recipe: str | None = Field(
        default=None,
        description="what is continued (data, optimizer, batch): an experiment's name or a run directory; null: the "
        "parent's own run",
    )
    schedule: UptrainSchedule = Field(
        default="constant",
        description="learning rate: constant and t5 (1/sqrt of the step, counted on from the parent's) are the same "
        "for every alpha, so smaller ones are taken on the way; rewarm warms up and decays anew for each alpha",
    )
    lr_fraction: float = Field(
        default=0.3,
        gt=0,
        le=10,
        description="learning rate (rewarm: its peak), as a share of the recipe's optimizer.lr",
    )
    warmup: float = Field(
        default=0.002, ge=0, description="below 1: a share of the parent's steps; otherwise a number of steps"
    )
    final_ratio: float = Field(
        default=0.1, ge=0, le=1, description="rewarm: last learning rate, as a share of its peak"
    )
    tolerance: float = Field(
        default=0.03,
        ge=0,
        description="how much worse than the control the recommended model may be: nats per token (0.03 is 3 % of "
        "perplexity); encoders: 1 - cosine",
    )
    keep: Literal["recommended", "all"] = Field(
        default="recommended", description="whose weights are kept when the grid is done"
    )
    distill: DistillConfig = Field(default=DistillConfig(), description="see distill.*")
    speed: SpeedConfig = Field(default=SpeedConfig(), description="see speed.*")
    retrieval: RetrievalConfig = Field(default=RetrievalConfig(), description="see retrieval.*")
    workers: int | None = Field(
        default=None, ge=1, description="processes that share the grid; null: one for each GPU, one on a CPU"
    )
    progress: Literal["auto", "table", "lines", "off"] = Field(
        default="auto", description="auto: a live table on a terminal, lines elsewhere"
    )
    resume: Literal["auto"] | None = Field(
        default=None, description="auto: keep the cells that are done in `output`, and make the others"
    )
    overwrite: bool = Field(default=False, description="replace the grid that is in `output`")
    dry_run: bool = Field(default=False, description="print the grid with steps, tokens, time and bytes; do nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UptrainRequest(_UptrainKeys):
    """`longspan uptrain` as a user writes it: of the sections, only what is written counts

    decided    keys of theirs that are refused, and why
    inherited  where the values come from that are not written
    """

    decided: ClassVar[Mapping[str, str]] = {
        "trainer.steps": "alpha says how many steps there are",
        "trainer.devices": "each cell has one device; workers= says how many cells go on at once",
        "trainer.nodes": "each cell has one device; workers= says how many cells go on at once",
        "trainer.strategy": "each cell has one device",
        "trainer.keep": "a cell keeps its last checkpoint alone; keep= says whose weights stay",
        "trainer.label_smoothing": "it is for encoder–decoders, which uptrain does not take",
        **dict.fromkeys(
            ("data.masking", "data.denoising", "data.examples"),
            "cells read plain text: decoders learn the next token, encoders the parent's hidden states",
        ),
    }
    inherited: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("data", "optimizer", "trainer", "evaluation"), "the recipe's"),
        "data.tokenizer": "the parent's; the recipe's where that brings none",
    }

    data: DataConfig = Field(default=DataConfig(), description="what differs from the recipe's; see data.*")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="what differs from the recipe's; see optimizer.*"
    )
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="what differs from the recipe's; see trainer.*")
    evaluation: ProtocolConfig = Field(
        default=ProtocolConfig(), description="how every cell is scored, where that differs from the recipe's"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UptrainConfig(_UptrainKeys):
    """`longspan uptrain` as the code reads it"""

    overrides: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict, description="what was written of the sections data, optimizer, trainer and evaluation"
    )
