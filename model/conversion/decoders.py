"""What the decoder families of Hugging Face have in common: attention that is full or a window, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.model.config import DecoderConfig

from .hf import ConversionError


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """windows  of each layer, in keys with the query's own; None: everything before it
    dropout  of attention weights, in all layers
    scale    of scores, in all layers; None: head_dim ** -0.5
    """

    windows: tuple[int | None, ...]
    dropout: float
    scale: float | None


def attention_of(config: DecoderConfig) -> tuple[PlainAttention, list[str]]:
    """The attention of a config in the terms of Hugging Face's decoders, and what those terms cannot say.

    `documents` goes unsaid on purpose: a sequence that is one document is the same with and without it.
    """
    problems: list[str] = []
    windows: list[int | None] = []
    specs: list[AttentionSpec] = []
    for layer in range(config.n_layers):
        name, groups = config.attention.of_layer(layer)[0], config.head_groups(layer)
        spec = groups[0].spec
        found = [f"head groups in attention.patterns.{name}"] if any(g.spec != spec for g in groups) else []
        found += [f"{words} in attention.patterns.{name}" for words in _unsaid(spec)]
        problems += [words for words in found if words not in problems]
        windows.append(None if spec.window.left is None else spec.window.left + 1)
        specs.append(spec)
    for word, values in (("dropout", {s.dropout for s in specs}), ("scale", {_scale(s, config) for s in specs})):
        if len(values) > 1:
            problems.append(f"attention {word} that differs between layers")
    return PlainAttention(tuple(windows), specs[0].dropout, _scale(specs[0], config)), problems


def _scale(spec: AttentionSpec, config: DecoderConfig) -> float | None:
    return None if spec.scale == config.dim_per_head**-0.5 else spec.scale


def _unsaid(spec: AttentionSpec) -> list[str]:
    plain = AttentionSpec(causal=True)
    names = ("global_tokens", "alibi", "softcap", "sink_tokens", "learned_sink", "block_sparse")
    found = [name for name in names if getattr(spec, name) != getattr(plain, name)]
    return found + (["window.dilation"] if spec.window.dilation != 1 else [])


def windowed(window: int | None, *, dropout: float, scale: float | None = None) -> AttentionSpec:
    """Causal attention over `window` keys, the query's own among them; None: over all."""
    kept = Window() if window is None else Window.causal_keys(window)
    return AttentionSpec(causal=True, window=kept, dropout=dropout, scale=scale)


def same(config: DecoderConfig, wanted: Mapping[str, object]) -> list[str]:
    """`key=value` for every field that is not what a family has."""
    return [
        f"{name.removeprefix('has_')}={getattr(config, name)}"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]


def refuse(model_type: str, problems: list[str]) -> None:
    """Raises ConversionError where there are problems."""
    if problems:
        raise ConversionError(f"{model_type} cannot say {', '.join(problems)}")
