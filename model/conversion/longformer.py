"""Longformer (Beltagy et al. 2020) as transformers spells it: RoBERTa with windows, and projections for global tokens.

`attention_window` counts both sides together there and is even; here a window counts each side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.model.config import AttentionPlan, EncoderConfig

from . import encoders
from .decoders import refuse
from .hf import ConversionError
from .roberta import PAD_TOKEN, UNREAD_POOLER, offset_problems
from .translate import CONFIG, Family, irrelevant, only, translated

_LM_HEAD, _POOLED_HEAD = encoders.ROBERTA_LIKE
_NAMES = encoders.Names(classes="Longformer", prefix="longformer.", lm_head=_LM_HEAD, pooled_head=_POOLED_HEAD)

_FIELDS = (
    *encoders.FIELDS,
    PAD_TOKEN,
    translated("vocab_size", int, 30522, "`vocab_size`"),
    translated("attention_window", (int, list), 512, "`window` of each layer's pattern: half of it on either side"),
    *irrelevant("half of transformers' guess which tokens are global; here a context says it", "sep_token_id"),
    only("attention_mode", "longformer", None, meaning="names which of allenai's kernels computes it"),
    only("ignore_attention_mask", False, None, meaning="attention to padding"),
)


def _to_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    ours = encoders.to_ours(values, _NAMES, padding_offset=True)
    attention = from_windows(
        values["attention_window"],
        n_layers=values["num_hidden_layers"],
        dropout=values["attention_probs_dropout_prob"],
    )
    return {**ours, "attention": attention, "global_projections": True}


def from_windows(window: int | list[int], *, n_layers: int, dropout: float) -> AttentionPlan:
    """The attention of an encoder from `attention_window`, one for all layers or one each. Raises ConversionError."""
    windows = [window] * n_layers if isinstance(window, int) else window
    if len(windows) != n_layers or not all(isinstance(w, int) and w > 0 and w % 2 == 0 for w in windows):
        raise ConversionError(
            f"{CONFIG}: attention_window={window}: it is an even number, or one for each of {n_layers} layers"
        )
    patterns: dict[str, AttentionSpec] = {
        f"window_{each}": AttentionSpec(
            causal=False, window=Window.symmetric(each // 2), global_tokens=True, dropout=dropout
        )
        for each in dict.fromkeys(windows)
    }
    layers = tuple(f"window_{each}" for each in windows)
    return AttentionPlan(patterns=patterns, layers=layers if len(patterns) > 1 else layers[:1])


def _to_theirs(config: EncoderConfig) -> dict[str, Any]:
    fields, problems = encoders.to_theirs(config, _NAMES)
    problems += offset_problems(config)
    if config.head_dropout not in (None, config.dropout):
        problems.append(f"head_dropout={config.head_dropout} beside dropout={config.dropout}")
    dropout = config.head_groups(0)[0].spec.dropout
    windows, unsaid = to_windows(config, dropout=dropout)
    refuse("longformer", problems + unsaid)
    return {
        **fields,
        "attention_window": windows,
        "attention_probs_dropout_prob": dropout,
        "pad_token_id": config.position_offset - 1,
    }


def to_windows(config: EncoderConfig, *, dropout: float) -> tuple[list[int], list[str]]:
    """`attention_window` of each layer, and what of its attention that cannot say."""
    problems = [] if config.global_projections else ["global_projections=False"]
    windows: list[int] = []
    for layer in range(config.n_layers):
        name, groups = config.attention.of_layer(layer)[0], config.head_groups(layer)
        spec = groups[0].spec
        if any(group.spec != spec for group in groups):
            problems.append(f"head groups in attention.patterns.{name}")
        side = spec.window.left
        plain = AttentionSpec(
            causal=False,
            window=Window.symmetric(side or 1),
            global_tokens=True,
            documents=spec.documents,  # unsaid on purpose: a sequence that is one document is the same with it
            dropout=dropout,
            scale=spec.scale if spec.scale == config.dim_per_head**-0.5 else None,
        )
        if spec != plain:
            problems.append(f"attention.patterns.{name}, which is more than a symmetric window and global tokens")
        windows.append(2 * (side or 1))
    return windows, list(dict.fromkeys(problems))


LONGFORMER = Family(
    model_type="longformer",
    config=EncoderConfig,
    fields=_FIELDS,
    to_ours=_to_ours,
    to_theirs=_to_theirs,
    tensors=lambda config: encoders.tensors(config, _NAMES),
    settle=lambda config, found: encoders.settle(config, found, _NAMES),
    prefix="longformer.",
    buffers=encoders.BUFFERS,
    unread={r"longformer\.pooler\.dense\.(weight|bias)": UNREAD_POOLER},
    copies=lambda config: encoders.copies(config, _NAMES),
)
