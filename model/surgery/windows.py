"""Windows for full attention: BERT and RoBERTa become Longformer, BART becomes LED, a GPT sees a stretch of the past.

Inputs that fit the window entirely come out as before: no weight of the old model changes. What is new is the
projections of global tokens, which begin as copies of the usual ones (Beltagy et al. 2020, arXiv 2004.05150, §5), and
the row at which a position table begins, where Hugging Face's Longformer and LED have it elsewhere than their origin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.model.config import AttentionPlan, DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from longspan.model.lazy import LazyTensor, Weights, renamed_copies

from .copy_global import global_copies, global_layers
from .errors import SurgeryError
from .plan import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Longformer:
    """`longformer`: windows instead of full attention, of the decoder or of the encoder.

    window              tokens in the window of a layer, for all layers or a list, one each. Of an encoder both sides
                        together without the token itself, so an even number (Hugging Face's `attention_window`, the
                        paper's w); of a decoder the token itself and those before it
    global_tokens       encoders: tokens that a context flags see everything and are seen by all; None: they do
    global_projections  encoders: global tokens have projections of their own; None: as global_tokens
    decoder_window      encoder–decoders: a window of the decoder, as of a decoder; None: it stays as it is
    sink_tokens         decoders: the first tokens that stay visible (Xiao et al. 2024, arXiv 2309.17453); None: 0
    full_every          decoders: every so many layers one keeps full attention, the last of each; None: none does
    """

    window: int | Sequence[int]
    global_tokens: bool | None = None
    global_projections: bool | None = None
    decoder_window: int | None = None
    sink_tokens: int | None = None
    full_every: int | None = None

    @property
    def name(self) -> str:
        return "longformer"

    def config(self, before: ModelConfig) -> ModelConfig:
        if problems := self._problems(before):
            raise SurgeryError(*problems)
        if isinstance(before, DecoderConfig):
            return replace(before, attention=self._causal(before, self._windows(before.n_layers), self.full_every))
        half = before.encoder_half if isinstance(before, Seq2SeqConfig) else before
        plan = self._symmetric(half)
        projections = before.global_projections or self._projections
        if isinstance(before, EncoderConfig):
            offset = 1 if projections and _table_starts_at_zero(before) else before.position_offset
            return replace(before, attention=plan, global_projections=projections, position_offset=offset)
        decoder = before.decoder
        if self.decoder_window is not None:
            windows = (self.decoder_window,) * decoder.n_layers
            decoder = replace(decoder, attention=self._causal(before.decoder_half, windows, None))
        return replace(
            before,
            encoder=replace(before.encoder, attention=plan),
            decoder=decoder,
            global_projections=projections,
            position_offset=0,
        )

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        after = self.config(before)
        made = dict(weights)
        if isinstance(before, EncoderConfig) and isinstance(after, EncoderConfig):
            if after.position_offset > before.position_offset:
                made["position_embedding.weight"] = _with_a_row_before(made["position_embedding.weight"])
        elif isinstance(before, Seq2SeqConfig):
            for name in ("encoder.position_embedding.weight", "position_embedding.weight"):
                made[name] = _without_rows(made[name], before.position_offset)
        new = set(global_layers(after)) - set(global_layers(before))
        return renamed_copies(made, [pair for pair in global_copies(after) if pair[1] not in weights]) if new else made

    def changes(self, before: ModelConfig) -> dict[str, object]:
        after = self.config(before)
        said: dict[str, object] = {"window": list(_listed(self.window))}
        if isinstance(before, DecoderConfig) or isinstance(after, DecoderConfig):
            return said | {"sink_tokens": self.sink_tokens or 0, "full_every": self.full_every}
        said |= {
            "global_tokens": self._global_tokens,
            "global_projections_from_local_ones_in_layers": sorted(
                set(global_layers(after)) - set(global_layers(before))
            ),
        }
        if after.position_offset != before.position_offset:
            said["position_offset"] = {"before": before.position_offset, "after": after.position_offset}
        if isinstance(before, Seq2SeqConfig):
            said["decoder_window"] = self.decoder_window
        return said

    # -- what it is asked for -----------------------------------------------------------------------------------------

    @property
    def _global_tokens(self) -> bool:
        return self.global_tokens is not False

    @property
    def _projections(self) -> bool:
        return self._global_tokens if self.global_projections is None else self.global_projections

    def _windows(self, n_layers: int) -> tuple[int, ...]:
        windows = _listed(self.window)
        return windows * n_layers if len(windows) == 1 else windows

    def _symmetric(self, half: EncoderConfig) -> AttentionPlan:
        windows = [Window.symmetric(window // 2) for window in self._windows(half.n_layers)]
        return _windowed(half.attention, windows, {"global_tokens": self._global_tokens})

    def _causal(self, half: DecoderConfig, windows: Sequence[int], full_every: int | None) -> AttentionPlan:
        of_layers = [
            None if full_every is not None and (layer + 1) % full_every == 0 else Window.causal_keys(window)
            for layer, window in enumerate(windows)
        ]
        return _windowed(half.attention, of_layers, {"sink_tokens": self.sink_tokens or 0})

    # -- what it cannot do --------------------------------------------------------------------------------------------

    def _problems(self, before: ModelConfig) -> list[str]:
        problems = [
            f"{key}={str(getattr(self, key)).lower()}: {why}"
            for key, why in _ELSEWHERE[before.architecture].items()
            if getattr(self, key) is not None
        ]
        if isinstance(before, DecoderConfig):
            if self.full_every is not None and not 2 <= self.full_every <= before.n_layers:
                problems.append(
                    f"full_every={self.full_every}: every so many layers one stays full, so it is 2 to the model's "
                    f"{before.n_layers} layers"
                )
            if self.sink_tokens is not None and self.sink_tokens < 0:
                problems.append(f"sink_tokens={self.sink_tokens}: a count of tokens is 0 or more")
            return problems + _causal_problems("window", self.window, before) + _pattern_problems(before)
        if self._projections and not self._global_tokens:
            problems.append("global_projections=true: nobody would use them without global_tokens=true")
        if isinstance(before, Seq2SeqConfig) and self.decoder_window is not None:
            problems += _causal_problems("decoder_window", self.decoder_window, before.decoder_half)
            problems += _pattern_problems(before.decoder_half)
        half = before.encoder_half if isinstance(before, Seq2SeqConfig) else before
        return problems + _symmetric_problems(self.window, half) + _pattern_problems(half)


_OF_ENCODERS = "is for encoders; a decoder keeps tokens in sight by sink_tokens"
_OF_DECODERS = {
    "sink_tokens": "is for decoders; an encoder keeps tokens in sight by global_tokens",
    "full_every": "is for decoders; every layer of an encoder has its window",
}
_OF_BOTH = {"decoder_window": "is of an encoder–decoder; write window"}
_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "decoder": {"global_tokens": _OF_ENCODERS, "global_projections": _OF_ENCODERS, **_OF_BOTH},
    "encoder": {**_OF_DECODERS, **_OF_BOTH},
    "seq2seq": _OF_DECODERS,
}


def _listed(window: int | Sequence[int]) -> tuple[int, ...]:
    return (window,) if isinstance(window, int) else tuple(window)


def _symmetric_problems(window: int | Sequence[int], half: EncoderConfig) -> list[str]:
    problems = _count_problems("window", window, half.n_layers)
    for each in () if problems else dict.fromkeys(_listed(window)):
        if each % 2:
            problems.append(f"window={each}: counts both sides of a token together, so it is even; {each + 1} is")
        elif each < 2:
            problems.append(f"window={each}: has a neighbour on either side at least, so it is 2 or more")
        elif each > 2 * half.max_positions:
            problems.append(
                f"window={each}: reaches {each // 2} to either side, further than the model's {half.max_positions} "
                f"positions; at most {2 * half.max_positions}, or {_FIRST}"
            )
    return problems


def _causal_problems(key: str, window: int | Sequence[int], half: DecoderConfig) -> list[str]:
    problems = _count_problems(key, window, half.n_layers)
    for each in () if problems else dict.fromkeys(_listed(window)):
        if each < 1:
            problems.append(f"{key}={each}: the token itself is in it, so it is 1 or more")
        elif each > half.max_positions:
            problems.append(
                f"{key}={each}: is wider than the model's {half.max_positions} positions; at most that, or {_FIRST}"
            )
    return problems


_FIRST = "more positions first: surgery=[positions,longformer]"


def _count_problems(key: str, window: int | Sequence[int], n_layers: int) -> list[str]:
    windows = _listed(window)
    if len(windows) in (1, n_layers):
        return []
    return [f"{key}={list(windows)}: is one number, or one for each of {n_layers} layers, not {len(windows)}"]


def _pattern_problems(half: EncoderConfig | DecoderConfig) -> list[str]:
    problems: list[str] = []
    for name, groups in half.pattern_groups().items():
        if len(groups) > 1:
            problems.append(f"attention.patterns.{name}: its heads differ, and one window for all would lose that")
        elif any(group.spec.block_sparse is not None for group in groups):
            problems.append(f"attention.patterns.{name}: its block_sparse layout thins what a window would see")
    return problems


def _windowed(plan: AttentionPlan, windows: Sequence[Window | None], features: Mapping[str, Any]) -> AttentionPlan:
    """The plan with a window, and what goes with it, in every layer but those of None."""
    patterns: dict[str, AttentionSpec] = {}
    layers: list[str] = []
    for layer, window in enumerate(windows):
        _, spec = plan.of_layer(layer)
        if not isinstance(spec, AttentionSpec):
            (spec,) = (group.spec for group in spec)
        new = spec if window is None else replace(spec, window=window, **features)
        name = _pattern_name(new)
        while patterns.get(name, new) != new:  # layers that differed in something else than their windows
            name += "'"
        patterns[name] = new
        layers.append(name)
    return AttentionPlan(patterns=patterns, layers=tuple(layers if len(patterns) > 1 else layers[:1]))


def _pattern_name(spec: AttentionSpec) -> str:
    each = spec.window.left
    if each is None:
        return "full"
    return f"window_{each + 1 if spec.causal else 2 * each}"


def _table_starts_at_zero(config: EncoderConfig) -> bool:
    """BERT's: Hugging Face's Longformer keeps the row before position 0 for its padding token, which BERT numbers 0."""
    return config.positions == "learned" and config.position_offset == 0


def _with_a_row_before(table: LazyTensor) -> LazyTensor:
    rows, width = table.shape
    return table.then(lambda rows_PD: torch.cat([torch.zeros_like(rows_PD[:1]), rows_PD]), shape=(rows + 1, width))


def _without_rows(table: LazyTensor, count: int) -> LazyTensor:
    rows, width = table.shape
    return table.then(lambda rows_PD: rows_PD[count:], shape=(rows - count, width))
