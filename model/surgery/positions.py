"""More positions than a model was trained with.

Learned tables grow by copies of themselves, tile by tile from the row on that the model has for position 0 (Beltagy et
al. 2020, arXiv 2004.05150, §5), by stretching, or by noise. Rotations are slowed down (`config_rope` has the sources).
Sinusoids, ALiBi and no positions at all have no table: only the limit changes.

Legend: P rows of a table, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, RopeScaling, Seq2SeqConfig
from longspan.model.config_rope import RopeKind
from longspan.model.lazy import Weights

from .errors import SurgeryError
from .plan import Report

TableMode = Literal["copy", "interpolate", "random"]
PositionMode = Literal[TableMode, RopeKind, "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendPositions:
    """`positions`: a longer longest input.

    max_positions       the new one; of an encoder–decoder, of the source
    mode                learned tables: copy (position p has the row of p modulo the old length), interpolate (the old
                        rows stretched linearly, both ends kept), random (old rows kept, new ones normal(0, init_std));
                        None: copy.
                        rope: linear, ntk, dynamic, yarn, llama3, or keep, which raises the limit alone; required.
                        other positions: keep, or None
    factor              rope: how many times longer than original_positions; None: as many times as the new length is
    original_positions  rope: the length that the model was trained with; None: its old longest input
    decoder_positions   encoder–decoders: the new longest target, too; None: as it was
    seed                of mode=random; None: 0
    """

    max_positions: int
    mode: PositionMode | None = None
    factor: float | None = None
    original_positions: int | None = None
    decoder_positions: int | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        return "positions"

    def config(self, before: ModelConfig) -> ModelConfig:
        if problems := self._problems(before):
            raise SurgeryError(*problems)
        if isinstance(before, Seq2SeqConfig):
            decoder = before.decoder
            if self.decoder_positions is not None:
                decoder = replace(decoder, max_positions=self.decoder_positions)
            return replace(before, encoder=replace(before.encoder, max_positions=self.max_positions), decoder=decoder)
        if isinstance(before, DecoderConfig) and before.positions == "rope" and self.mode != "keep":
            return replace(before, max_positions=self.max_positions, rope_scaling=self._scaling(before))
        return replace(before, max_positions=self.max_positions)

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        made = dict(weights)
        offset = 0 if isinstance(before, DecoderConfig) else before.position_offset
        for index, (name, old, new) in enumerate(self._tables(before)):
            table = weights[name]
            made[name] = table.then(
                self._grown(offset, old, new, before.init_std, index), shape=(offset + new, table.shape[1])
            )
        return made

    def changes(self, before: ModelConfig) -> dict[str, object]:
        after = self.config(before)
        said: dict[str, object] = {"mode": self.mode or self._default_mode(before)}
        if isinstance(before, Seq2SeqConfig) and isinstance(after, Seq2SeqConfig):
            said["max_positions"] = _change(before.encoder.max_positions, after.encoder.max_positions)
            said["decoder_positions"] = _change(before.decoder.max_positions, after.decoder.max_positions)
        elif not isinstance(before, Seq2SeqConfig) and not isinstance(after, Seq2SeqConfig):
            said["max_positions"] = _change(before.max_positions, after.max_positions)
        if isinstance(before, DecoderConfig) and isinstance(after, DecoderConfig) and after.positions == "rope":
            said["rope_scaling"] = _change(_said(before.rope_scaling), _said(after.rope_scaling))
        if self.mode == "random":
            said["seed"] = self.seed or 0
        return said

    # -- tables -------------------------------------------------------------------------------------------------------

    def _tables(self, before: ModelConfig) -> list[tuple[str, int, int]]:
        """(tensor, old positions, new positions) of each learned table that grows."""
        if isinstance(before, Seq2SeqConfig):
            found = [("encoder.position_embedding.weight", before.encoder.max_positions, self.max_positions)]
            if self.decoder_positions is not None:
                found.append(("position_embedding.weight", before.decoder.max_positions, self.decoder_positions))
            return [entry for entry in found if entry[2] != entry[1]]
        learned = before.positions == "learned"
        return [("position_embedding.weight", before.max_positions, self.max_positions)] if learned else []

    def _grown(self, offset: int, old: int, new: int, std: float, index: int) -> Callable[[Tensor], Tensor]:
        """The old table's rows -> the new one's. Rows before the offset stay."""
        if self.mode == "interpolate":
            grow = partial(_stretched, new=new)
        elif self.mode == "random":
            grow = partial(_with_noise, new=new, std=std, seed=(self.seed or 0) + index)
        else:
            grow = partial(_tiled, new=new)
        return lambda rows_PD: torch.cat([rows_PD[:offset], grow(rows_PD[offset : offset + old])])

    # -- rotations ----------------------------------------------------------------------------------------------------

    def _scaling(self, before: DecoderConfig) -> RopeScaling:
        """A model that is scaled already goes on from there: by the same kind, and by a factor of the length that it
        had in the beginning. Raises SurgeryError for a factor that no scaling can have."""
        scaled = before.rope_scaling
        original = self.original_positions or (scaled.original_positions if scaled is not None else None)
        factor = self.factor
        if factor is None and scaled is not None and self.original_positions is None:
            factor = scaled.factor * self.max_positions / before.max_positions
        elif factor is None:
            factor = self.max_positions / (original or before.max_positions)
        try:
            if scaled is not None:
                return replace(scaled, factor=factor)
            (kind,) = (kind for kind in get_args(RopeKind) if kind == self.mode)
            if kind in _WITHOUT_ORIGINAL:
                return RopeScaling(kind=kind, factor=factor)
            return RopeScaling(kind=kind, factor=factor, original_positions=original or before.max_positions)
        except ValueError as error:
            raise SurgeryError(str(error)) from error

    # -- what it cannot do --------------------------------------------------------------------------------------------

    def _default_mode(self, before: ModelConfig) -> str:
        return "copy" if _positions(before) == "learned" else "keep"

    def _problems(self, before: ModelConfig) -> list[str]:
        return [*self._length_problems(before), *self._mode_problems(before)]

    def _length_problems(self, before: ModelConfig) -> list[str]:
        if not isinstance(before, Seq2SeqConfig):
            problems = _not_longer("max_positions", self.max_positions, before.max_positions)
            if self.decoder_positions is not None:
                problems.append(
                    f"decoder_positions={self.decoder_positions}: is of an encoder–decoder; write max_positions"
                )
            return problems
        source, target = before.encoder.max_positions, before.decoder.max_positions
        if self.decoder_positions is None:
            return _not_longer("max_positions", self.max_positions, source)
        problems = _not_longer("decoder_positions", self.decoder_positions, target)
        if self.max_positions != source:  # a longer target alone is asked for by the old length of the source
            problems += _not_longer("max_positions", self.max_positions, source)
        return problems

    def _mode_problems(self, before: ModelConfig) -> list[str]:
        kind = _positions(before)
        tables, rotations = get_args(TableMode), get_args(RopeKind)
        if isinstance(before, EncoderConfig) and kind == "rope":
            rotations = ()  # no config of an encoder can say it
        allowed = {"learned": tables, "rope": (*rotations, "keep")}.get(kind, ("keep",))
        problems: list[str] = []
        if self.mode is None and kind == "rope":
            problems.append(f"mode: is required for a model with positions=rope: {', '.join(allowed)}")
        elif self.mode is not None and self.mode not in allowed:
            problems.append(
                f"mode={self.mode}: this model has positions={kind}, for which mode is one of {', '.join(allowed)}"
            )
        if self.mode not in get_args(RopeKind):
            problems += [
                f"{key}={getattr(self, key)}: is read with rope's scaling alone ({', '.join(get_args(RopeKind))})"
                for key in ("factor", "original_positions")
                if getattr(self, key) is not None
            ]
        elif isinstance(before, DecoderConfig) and not problems:
            problems += self._scaling_problems(before.rope_scaling)
        if self.seed is not None and self.mode != "random":
            problems.append(f"seed={self.seed}: only mode=random draws numbers")
        return problems

    def _scaling_problems(self, scaled: RopeScaling | None) -> list[str]:
        original = self.original_positions
        if scaled is not None and scaled.kind != self.mode:
            return [
                f"mode={self.mode}: this model's rotation is scaled already ({scaled.kind} by {scaled.factor:g}); mode "
                f"is {scaled.kind}, which goes on from there, or keep"
            ]
        if original is None:
            return []
        if scaled is not None and scaled.original_positions not in (None, original):
            return [
                f"original_positions={original}: this model's scaling starts from {scaled.original_positions} already; "
                "leave it out"
            ]
        if self.mode in _WITHOUT_ORIGINAL and self.factor is not None:
            return [f"original_positions={original}: mode={self.mode} asks for the factor alone; give one of them"]
        return []


_WITHOUT_ORIGINAL = ("linear", "ntk")  # a factor says it all


def _positions(config: ModelConfig) -> str:
    return "learned" if isinstance(config, Seq2SeqConfig) else config.positions


def _not_longer(key: str, new: int, old: int) -> list[str]:
    if new > old:
        return []
    return [f"{key}={new}: this model has {old} positions already; the new length is longer than that"]


def _change(before: object, after: object) -> dict[str, object]:
    return {"before": before, "after": after}


def _said(scaling: RopeScaling | None) -> dict[str, object] | None:
    if scaling is None:
        return None
    names = ("kind", "factor", "original_positions")
    return {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}


def _tiled(rows_PD: Tensor, *, new: int) -> Tensor:
    """Row p is the old row p modulo their number; the last tile may be a part."""
    copies = -(-new // rows_PD.shape[0])
    return rows_PD.repeat(copies, 1)[:new]


def _stretched(rows_PD: Tensor, *, new: int) -> Tensor:
    """Row p is at p (old - 1) / (new - 1) between the old rows, in fp32: first and last are kept, none extrapolated."""
    stretched = F.interpolate(rows_PD.float().T[None], size=new, mode="linear", align_corners=True)
    return stretched[0].T.to(rows_PD.dtype)


def _with_noise(rows_PD: Tensor, *, new: int, std: float, seed: int) -> Tensor:
    """The old rows, then normal(0, std)."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(new - rows_PD.shape[0], rows_PD.shape[1], generator=generator) * std
    return torch.cat([rows_PD, more.to(rows_PD.dtype)])
