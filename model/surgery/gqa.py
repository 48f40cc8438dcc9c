"""Fewer key/value heads: a multi-head or grouped-query model becomes one with fewer groups (Ainslie et al. 2023, arXiv
2305.13245, §2.1). `docs/gqa.md` has the equations.

Legend: H query heads, G key/value heads, K head dim, D model width, C the same and one more where there is a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from longspan.model.config import DecoderConfig, EncoderConfig, HeadGroup, ModelConfig, Seq2SeqConfig
from longspan.model.initial import drawn
from longspan.model.lazy import LazyTensor, Weights

from .alignment import Freedom
from .calibration import Moments, read_moments
from .errors import SurgeryError
from .grouping import Groups, contiguous_groups
from .heads import Branch, Heads, Init, Lost, find_groups, reordered, shared
from .plan import Report

Grouping = Literal["contiguous", "similar"]
Stack = Literal["decoder_self", "cross", "encoder"]

# Which attentions of an encoder–decoder the paper converts (§2.2): the encoder reads everything at once anyway.
PAPER_STACKS: tuple[Stack, ...] = ("decoder_self", "cross")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQuery:
    """`gqa`: groups of key/value heads are made one each; query heads stay.

    kv_heads    how many there are afterwards: a divisor of how many there are; 1: multi-query
    init        what a group becomes. mean: its mean (the paper's choice). first: its first head. random: new, as a
                fresh model has it. aligned: the mean of heads turned onto each other, what reads them turned with them.
                svd: the best basis of a group's scores and of its contributions, what reads them fitted to it
    grouping    which heads share one. contiguous: neighbours, as the paper has it. similar: those that differ least;
                query heads change places with them
    stacks      of an encoder–decoder, which attentions: decoder_self, cross, encoder; None: decoder_self and cross
    seed        of init=random
    statistics  a file of `calibration.save_moments`: heads are then compared by what they compute on a text, not by
                their weights alone (init=aligned and svd, grouping=similar); None: by their weights
    """

    kv_heads: int
    init: Init = "mean"
    grouping: Grouping = "contiguous"
    stacks: Sequence[Stack] | None = None
    seed: int = 0
    statistics: str | None = None

    @property
    def name(self) -> str:
        return "gqa"

    def config(self, before: ModelConfig) -> ModelConfig:
        if problems := list(self._problems(before)):
            raise SurgeryError(*problems)
        if isinstance(before, Seq2SeqConfig):
            return _with_stacks(before, dict.fromkeys(self._stacks(before), self.kv_heads))
        return before if before.kv_heads == self.kv_heads else replace(before, n_kv_heads=self.kv_heads)

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        made, latest = dict(weights), _Latest()
        moments = None if self.statistics is None else read_moments(self.statistics)
        for site in self._sites(before):
            if self.init == "random":
                made |= _fresh(site, weights, seed=self.seed, std=before.init_std)
                continue
            operation = _Operation(site, weights, self.init, self.grouping, moments, report)
            turns = self.grouping == "similar" or self.init in ("aligned", "svd")
            for name in site.tensors(weights):
                if turns or _is_kv(name):
                    lazy = weights[name]
                    shape = (lazy.shape[0] // site.size, *lazy.shape[1:]) if _is_kv(name) else lazy.shape
                    made[name] = LazyTensor(shape, lazy.dtype, partial(latest.tensor, operation, name))
        return made

    def changes(self, before: ModelConfig) -> dict[str, object]:
        sites = tuple(self._sites(before))
        return {
            "kv_heads": {site.kind: {"before": site.kv_heads, "after": self.kv_heads} for site in sites},
            "init": self.init,
            "grouping": self.grouping,
            **({"seed": self.seed} if self.init == "random" else {}),
            **({"statistics": Path(self.statistics).stem} if self.statistics is not None else {}),
        }

    def _stacks(self, before: ModelConfig) -> tuple[Stack, ...]:
        return PAPER_STACKS if self.stacks is None else tuple(self.stacks)

    def _sites(self, before: ModelConfig) -> Iterator[_Site]:
        """The attentions that change."""
        for site in _all_sites(before, self._stacks(before)):
            if site.kv_heads != self.kv_heads:
                yield replace(site, size=site.kv_heads // self.kv_heads)

    def _problems(self, before: ModelConfig) -> Iterator[str]:
        known: dict[str, tuple[str, ...]] = {"init": get_args(Init), "grouping": get_args(Grouping)}
        for key, values in known.items():
            if getattr(self, key) not in values:
                yield f"{key}={getattr(self, key)}: it is one of {', '.join(values)}"
        if self.stacks is not None and not isinstance(before, Seq2SeqConfig):
            yield f"stacks={list(self.stacks)}: only an encoder–decoder has several; leave it out"
        elif strange := [stack for stack in self._stacks(before) if stack not in get_args(Stack)]:
            yield f"stacks={strange[0]}: they are of {', '.join(get_args(Stack))}"
        elif not self._stacks(before):
            yield f"stacks=[]: names at least one of {', '.join(get_args(Stack))}"
        else:
            counts = {site.kind: site.kv_heads for site in _all_sites(before, self._stacks(before))}
            fitting = [n for n in range(min(counts.values()), 0, -1) if not any(count % n for count in counts.values())]
            for kind, count in counts.items():
                if self.kv_heads < 1 or count % self.kv_heads:
                    where = f" of {kind}" if len(counts) > 1 else ""
                    more = ", and heads can only be made fewer" if self.kv_heads > count else ""
                    yield (
                        f"kv_heads={self.kv_heads}: the {count} key/value heads{where} are shared out evenly{more}; "
                        f"choose one of {', '.join(map(str, fitting))}"
                    )
        if self.init == "random" and self.grouping == "similar":
            yield "grouping=similar with init=random: new heads are like no others; choose grouping=contiguous"
        elif self.grouping == "similar":
            sites = [site for site in _all_sites(before, self._stacks(before)) if site.kv_heads != self.kv_heads]
            if any(group.spec.alibi for site in sites for group in site.patterns):
                yield (
                    "grouping=similar: with ALiBi a query head's slope goes by its place, so heads cannot change "
                    "places; choose grouping=contiguous"
                )
        if self.statistics is not None and self.init not in ("aligned", "svd") and self.grouping != "similar":
            yield f"statistics: init={self.init} with grouping={self.grouping} compares no heads; leave it out"


# -- where attentions are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """One attention of a model.

    kind      of which stack, in words
    modules   names of the modules with its projections; the first has the output projection
    kv_heads  how many it has before
    size      how many of them become one
    patterns  its query heads by what they see, in order
    freedom   of its keys
    normed    whether its keys are normalised after their projection
    """

    kind: str
    modules: tuple[str, ...]
    n_heads: int
    kv_heads: int
    size: int = 1
    patterns: tuple[HeadGroup, ...]
    freedom: Freedom
    normed: bool = False

    def tensors(self, weights: Weights) -> Iterator[str]:
        """Their names; the output projection's bias belongs to no head."""
        for module in self.modules:
            for projection in ("q_proj", "k_proj", "v_proj"):
                yield from (name for part in ("weight", "bias") if (name := f"{module}.{projection}.{part}") in weights)
        yield f"{self.modules[0]}.o_proj.weight"
        if self.sinks in weights:
            yield self.sinks

    @property
    def sinks(self) -> str:
        return f"{self.modules[0]}.sink_logits"

    @property
    def sink_heads(self) -> list[int]:
        """Query heads that have a learned sink, in order."""
        heads = [group.spec.learned_sink for group in self.patterns for _ in range(group.heads)]
        return [head for head, has_sink in enumerate(heads) if has_sink]

    @property
    def runs(self) -> list[int]:
        """Key/value heads under each pattern."""
        return [group.heads * self.kv_heads // self.n_heads for group in self.patterns]


def _is_kv(name: str) -> bool:
    return ".k_proj." in name or ".v_proj." in name


def _all_sites(config: ModelConfig, stacks: Sequence[Stack]) -> Iterator[_Site]:
    if not isinstance(config, Seq2SeqConfig):
        kind = "decoder_self" if isinstance(config, DecoderConfig) else "encoder"
        yield from _self_attentions(config, kind, "")
        return
    if "encoder" in stacks:
        yield from _self_attentions(config.encoder_half, "encoder", "encoder.")
    half = config.decoder_half
    if "decoder_self" in stacks:
        yield from _self_attentions(half, "decoder_self", "")
    for layer in range(half.n_layers) if "cross" in stacks else ():
        yield _Site(
            kind="cross",
            modules=(f"blocks.{layer}.cross_attention",),
            n_heads=half.n_heads,
            kv_heads=config.cross_heads,
            patterns=(HeadGroup(heads=half.n_heads, spec=config.cross_attention),),
            freedom="all",
        )


def _self_attentions(config: DecoderConfig | EncoderConfig, kind: str, prefix: str) -> Iterator[_Site]:
    normed = isinstance(config, DecoderConfig) and config.qk_norm
    freedom: Freedom = "none" if normed else "planes" if config.positions == "rope" else "all"
    for layer in range(config.n_layers):
        has_globals = isinstance(config, EncoderConfig) and config.has_global_projections(layer)
        modules = ("attention", "global_attention") if has_globals else ("attention",)
        yield _Site(
            kind=kind,
            modules=tuple(f"{prefix}blocks.{layer}.{module}" for module in modules),
            n_heads=config.n_heads,
            kv_heads=config.kv_heads,
            patterns=config.head_groups(layer),
            freedom=freedom,
            normed=normed,
        )


def _with_stacks(config: Seq2SeqConfig, kv_heads: Mapping[Stack, int]) -> Seq2SeqConfig:
    """Numbers that stay the same stay as they are written, so that a change of nothing changes nothing."""
    encoder, decoder = config.encoder, config.decoder
    now = kv_heads.get("decoder_self", config.decoder_half.kv_heads)
    if now != config.decoder_half.kv_heads:
        decoder = replace(decoder, n_kv_heads=now)
    if (wanted := kv_heads.get("encoder", config.encoder_half.kv_heads)) != config.encoder_half.kv_heads:
        encoder = replace(encoder, n_kv_heads=wanted)
    cross = kv_heads.get("cross", config.cross_heads)
    return replace(config, encoder=encoder, decoder=decoder, cross_kv_heads=None if cross == now else cross)


# -- one attention ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Latest:
    """The tensors of the attention that was operated on last: they are made together and read one by one, in the order
    of the layers, so no more than one attention's is ever held."""

    modules: tuple[str, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, operation: _Operation, name: str) -> Tensor:
        if self.modules != operation.site.modules:
            self.tensors = {}
            self.tensors, self.modules = operation.perform(), operation.site.modules
        return self.tensors[name]


@dataclass(frozen=True, slots=True)
class _Operation:
    site: _Site
    weights: Weights
    init: Init
    grouping: Grouping
    moments: Moments | None
    report: Report

    def perform(self) -> dict[str, Tensor]:
        """All tensors of the attention's heads, in the types that they are stored in."""
        site, heads = self.site, self._read()
        groups = contiguous_groups(site.kv_heads, site.size)
        if self.grouping == "similar":
            groups = find_groups(
                heads, site.size, runs=site.runs, init=self.init, freedom=site.freedom, normed=site.normed
            )
            heads = reordered(heads, [head for group in groups for head in group])
        heads, lost = shared(heads, site.size, init=self.init, freedom=site.freedom, normed=site.normed)
        self._tell(groups, lost)
        return self._written(heads)

    def _read(self) -> Heads:
        site, module = self.site, self.site.modules[0]
        branches: list[Branch] = []
        for each in site.modules:
            q, k, v = (self._heads(f"{each}.{name}") for name in ("q_proj", "k_proj", "v_proj"))
            branches.append(Branch(q, k, v, self._moment(each, "keys"), self._moment(each, "queries")))
        out_HKD = self.weights[f"{module}.o_proj.weight"].read().double().T.unflatten(0, (site.n_heads, -1))
        sinks_H = None
        if site.sinks in self.weights:
            sinks_H = torch.zeros(site.n_heads, dtype=torch.float64)
            sinks_H[site.sink_heads] = self.weights[site.sinks].read().double()
        return Heads(tuple(branches), out_HKD, sinks_H)

    def _heads(self, projection: str) -> Tensor:
        """[heads, K, C]."""
        rows_XC = self.weights[f"{projection}.weight"].read().double()
        if (bias := self.weights.get(f"{projection}.bias")) is not None:
            rows_XC = torch.cat([rows_XC, bias.read().double()[:, None]], dim=1)
        count = self.site.n_heads if projection.endswith("q_proj") else self.site.kv_heads
        return rows_XC.unflatten(0, (count, -1))

    def _moment(self, module: str, of: str) -> Tensor | None:
        """Without the constant input where there is no bias."""
        if self.moments is None:
            return None
        moment = self.moments.of(module, of)
        return moment if f"{module}.k_proj.bias" in self.weights else moment[:-1, :-1]

    def _tell(self, groups: Groups, lost: Lost) -> None:
        told = self.report.setdefault("attentions", {})
        assert isinstance(told, dict)
        told[self.site.modules[0]] = {
            "groups": [list(group) for group in groups],
            "lost": {"keys": round(lost.keys, 6), "values": round(lost.values, 6)},
        }

    def _written(self, heads: Heads) -> dict[str, Tensor]:
        site, made = self.site, dict[str, Tensor]()
        for module, branch in zip(site.modules, heads.branches, strict=True):
            for name, heads_NKC in (("q_proj", branch.q_HKC), ("k_proj", branch.k_GKC), ("v_proj", branch.v_GKC)):
                rows_XC, projection = heads_NKC.flatten(0, 1), f"{module}.{name}"
                if f"{projection}.bias" in self.weights:
                    made[f"{projection}.bias"] = rows_XC[:, -1]
                    rows_XC = rows_XC[:, :-1]
                made[f"{projection}.weight"] = rows_XC
        made[f"{site.modules[0]}.o_proj.weight"] = heads.out_HKD.flatten(0, 1).T
        if heads.sinks_H is not None:
            made[site.sinks] = heads.sinks_H[site.sink_heads]
        return {name: tensor.to(self.weights[name].dtype).contiguous() for name, tensor in made.items()}


def _fresh(site: _Site, weights: Weights, *, seed: int, std: float) -> dict[str, LazyTensor]:
    """Key and value heads as a fresh model has them: normal(0, init_std), biases 0."""
    made: dict[str, LazyTensor] = {}
    for name in site.tensors(weights):
        if _is_kv(name):
            lazy = weights[name]
            shape = (lazy.shape[0] // site.size, *lazy.shape[1:])
            made[name] = LazyTensor(shape, lazy.dtype, partial(_draw, name, shape, lazy.dtype, seed, std))
    return made


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, std: float) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    return (drawn(name, shape, seed) * std).to(dtype)
