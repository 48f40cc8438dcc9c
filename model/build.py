"""A model of any architecture from its config: the one table of what each is built by."""

from __future__ import annotations

import torch

from . import decoder, encoder, seq2seq
from .config import DecoderConfig, EncoderConfig, ModelConfig

Model = decoder.Decoder | encoder.Encoder | seq2seq.Seq2Seq


def build_from(
    config: ModelConfig,
    *,
    seed: int | None = None,
    fused_qkv: bool = False,
    device: torch.device | str = "cpu",
) -> Model:
    """A model with freshly initialised weights, a function of the seed (None: drawn from torch's generator); on
    `device="meta"`, the bare structure."""
    if isinstance(config, DecoderConfig):
        return decoder.from_config(config, seed=seed, fused_qkv=fused_qkv, device=device)
    if isinstance(config, EncoderConfig):
        return encoder.from_config(config, seed=seed, fused_qkv=fused_qkv, device=device)
    return seq2seq.from_config(config, seed=seed, fused_qkv=fused_qkv, device=device)
