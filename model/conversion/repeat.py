"""Shared key/value heads for readers that know none: each written as often as it is read. The function is the same; the
weights and the cache are those of a multi-head model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from longspan.model.build import build_from
from longspan.model.config import ModelConfig, Seq2SeqConfig
from longspan.model.lazy import LazyTensor

# Said where a family has no word for shared heads.
REMEDY = "repeat_kv=true writes each as often as it is read"


def repeated_config(config: ModelConfig) -> ModelConfig:
    """The same model with a key/value head for every query head."""
    if not isinstance(config, Seq2SeqConfig):
        return replace(config, n_kv_heads=None)
    encoder, decoder = (replace(stack, n_kv_heads=None) for stack in (config.encoder, config.decoder))
    return replace(config, encoder=encoder, decoder=decoder, cross_kv_heads=None)


def repeated_weights(config: ModelConfig, weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Its tensors, of those of `config`: query head h reads key/value head h, which is the old h // (H // G)."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in build_from(repeated_config(config), device="meta").state_dict().items()
    }
    return {
        name: lazy
        if lazy.shape == shapes[name]
        else lazy.then(partial(_repeated, rows=shapes[name][0], head_dim=_head_dim(config, name)), shape=shapes[name])
        for name, lazy in weights.items()
    }


def _repeated(tensor: Tensor, *, rows: int, head_dim: int) -> Tensor:
    return tensor.unflatten(0, (-1, head_dim)).repeat_interleave(rows // tensor.shape[0], dim=0).flatten(0, 1)


def _head_dim(config: ModelConfig, name: str) -> int:
    if isinstance(config, Seq2SeqConfig):
        config = config.encoder_half if name.startswith("encoder.") else config.decoder_half
    return config.dim_per_head
