"""What `longspan convert` reads. Each key but a few belongs to a surgery, and is refused where that is not asked for.

`model.config_surgery` says which; the meaning of a key begins with the surgery's name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from longspan.model.config_surgery import SURGERY_NAMES

from .schema_sections import STRICT, Count


def _one_or_several(value: object) -> object:
    return (value,) if isinstance(value, str | int) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_one_or_several)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConvertConfig:
    """`longspan convert`"""

    checkpoint: str = Field(description="a checkpoint directory, or a run (its best, else its last)")
    output: str = Field(description="the checkpoint directory to make")
    surgery: Names = Field(
        min_length=1,
        description=f"what is done to the model, in this order, one name or a list of them: {', '.join(SURGERY_NAMES)}",
    )
    window: Counts | None = Field(
        default=None,
        min_length=1,
        description="longformer: tokens in a layer's window, one number or one for each layer. Encoders: both sides "
        "together, an even number; decoders: the token itself and those before it",
    )
    global_tokens: bool | None = Field(
        default=None, description="longformer, encoders: tokens may be flagged that see all and are seen; null: true"
    )
    global_projections: bool | None = Field(
        default=None,
        description="longformer, encoders: global tokens get projections of their own, copies of the usual ones; null: "
        "as global_tokens",
    )
    decoder_window: Count | None = Field(
        default=None, description="longformer, encoder–decoders: a window of the decoder as well; null: it stays full"
    )
    sink_tokens: int | None = Field(
        default=None, ge=0, description="longformer, decoders: first tokens that every token sees; null: 0"
    )
    full_every: int | None = Field(
        default=None, ge=2, description="longformer, decoders: the last of every so many layers stays full; null: none"
    )
    max_positions: Count | None = Field(
        default=None, description="positions: the new longest input; encoder–decoders: of the source"
    )
    mode: Literal["copy", "interpolate", "random", "linear", "ntk", "dynamic", "yarn", "llama3", "keep"] | None = Field(
        default=None,
        description="positions: how learned tables grow (copy, interpolate, random; null: copy), or how rope is scaled "
        "(linear … llama3, required); keep raises the limit alone",
    )
    factor: float | None = Field(
        default=None, ge=1, description="positions, rope: how many times longer; null: as the new length is"
    )
    original_positions: Count | None = Field(
        default=None, description="positions, rope: the length trained with; null: the model's longest input"
    )
    decoder_positions: Count | None = Field(
        default=None, description="positions, encoder–decoders: the new longest target; null: as it was"
    )
    kv_heads: Count | None = Field(default=None, description="gqa: key/value heads that are left")
    init: Literal["mean", "first", "random", "aligned", "svd"] | None = Field(
        default=None, description="gqa: what a group's one head is made of; null: mean"
    )
    grouping: Literal["contiguous", "similar"] | None = Field(
        default=None, description="gqa: which heads share one; null: contiguous"
    )
    stacks: tuple[Literal["decoder_self", "cross", "encoder"], ...] | None = Field(
        default=None,
        min_length=1,
        description="gqa, encoder–decoders: which attentions; null: decoder_self and cross",
    )
    statistics: str | None = Field(
        default=None,
        description="gqa, init=aligned, init=svd, grouping=similar: texts (a file or a folder) on which heads are "
        "compared by what they compute, or a .safetensors file of such numbers; null: by their weights",
    )
    seed: int | None = Field(
        default=None, ge=0, description="positions with mode=random, gqa with init=random; null: 0"
    )
    overwrite: bool = Field(default=False, description="replace what is in a non-empty output directory")
    dry_run: bool = Field(
        default=False, description="print the resulting model with parameters and cache before and after; do nothing"
    )

    def keys(self) -> dict[str, object]:
        """What was given of the surgeries' keys."""
        own = ("checkpoint", "output", "surgery", "overwrite", "dry_run")
        return {name: value for name, value in vars(self).items() if name not in own and value is not None}
