"""Local projections over the global ones: how Longformer's are initialised, and again after pretraining.

Masked language modelling has no global tokens, so it leaves the global projections as they were while the local ones
move on; the authors copy them a second time when it is done (Beltagy et al. 2020, arXiv 2004.05150, and the conversion
notebook of their repository).
"""

from __future__ import annotations

from dataclasses import dataclass

from longspan.model.config import EncoderConfig, ModelConfig, Seq2SeqConfig
from longspan.model.lazy import Weights, renamed_copies

from .errors import SurgeryError
from .plan import Report

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyGlobal:
    """`copy-global`: the q, k and v projections of every layer that has global ones are copied over those."""

    @property
    def name(self) -> str:
        return "copy-global"

    def config(self, before: ModelConfig) -> ModelConfig:
        if not global_layers(before):
            raise SurgeryError(
                "surgery=copy-global: this model has no projections for global tokens to copy over; surgery=longformer "
                "makes them"
            )
        return before

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        return renamed_copies(weights, global_copies(before))

    def changes(self, before: ModelConfig) -> dict[str, object]:
        return {"layers": list(global_layers(before)), "projections": list(PROJECTIONS)}


def global_layers(config: ModelConfig) -> tuple[int, ...]:
    """Layers with projections for global tokens; of an encoder–decoder, of its encoder."""
    half = encoder_of(config)
    return () if half is None else tuple(i for i in range(half.n_layers) if half.has_global_projections(i))


def global_copies(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """(local tensor, global tensor) of every such layer."""
    half, prefix = encoder_of(config), "encoder." if isinstance(config, Seq2SeqConfig) else ""
    parts = ("weight", "bias") if half is not None and half.bias else ("weight",)
    return tuple(
        (f"{block}.attention.{projection}.{part}", f"{block}.global_attention.{projection}.{part}")
        for block in (f"{prefix}blocks.{layer}" for layer in global_layers(config))
        for projection in PROJECTIONS
        for part in parts
    )


def encoder_of(config: ModelConfig) -> EncoderConfig | None:
    """What reads in both directions; None in a decoder."""
    if isinstance(config, Seq2SeqConfig):
        return config.encoder_half
    return config if isinstance(config, EncoderConfig) else None
