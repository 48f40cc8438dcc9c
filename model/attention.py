"""Multi-head attention: projections, head groups, the cache, and one `attend` per group.

Legend: B batch, T queries, S keys, D model width, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionCall, AttentionContext, AttentionParams, AttentionSpec, Phase
from longspan.kernels.attention.caching import CachedKeys, CacheStep
from longspan.kernels.attention.registry import attend, prepare, resolve

from .config import HeadGroup
from .positions import FixedTable, rotate, slope_table

BackendChoice = str | tuple[str, ...]  # a name, "auto", or names tried in order


@dataclass(frozen=True, slots=True)
class _Group:
    """A head group as the forward pass needs it: where its heads lie, and its spec in every situation."""

    q: tuple[int, int]  # first query head, count
    kv: tuple[int, int]
    sinks: tuple[int, int] | None
    alibi: bool
    variants: dict[tuple[bool, bool, bool], AttentionSpec]


@lru_cache(maxsize=1024)
def effective(spec: AttentionSpec, *, documents: bool, global_tokens: bool, training: bool) -> AttentionSpec:
    """The spec of one call: without document ids every row is one document, without flags no token is global,
    and dropout belongs to training. Equal calls give one object: torch.compile knows a mask's spec by its identity,
    and would make layers that differ in that alone a graph each."""
    return replace(
        spec,
        documents=spec.documents and documents,
        global_tokens=spec.global_tokens and global_tokens,
        dropout=spec.dropout if training else 0.0,
    )


def phase_of(step: CacheStep | None, n_tokens: int) -> Phase:
    if step is None:
        return Phase.TRAIN
    return Phase.DECODE if n_tokens == 1 else Phase.PREFILL


class Attention(nn.Module):
    """q, k, v projections (GQA: query head h reads key/value head h // (H // G)), optional RMSNorm on heads, rotation,
    attention, output projection.

    `fused_qkv` computes the three projections in one matrix product. The state dict is the same either way:
    q_proj, k_proj and v_proj.
    """

    def __init__(
        self,
        *,
        layer: int,
        groups: Sequence[HeadGroup],
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        bias: bool,
        qk_norm_eps: float | None,
        fused_qkv: bool,
        out_bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
            self.register_state_dict_post_hook(_split_qkv)
            self.register_load_state_dict_pre_hook(_merge_qkv)
        else:
            self.q_proj = nn.Linear(d_model, self.widths[0], bias=bias)
            self.k_proj = nn.Linear(d_model, self.widths[1], bias=bias)
            self.v_proj = nn.Linear(d_model, self.widths[2], bias=bias)
        self.o_proj = nn.Linear(self.widths[0], d_model, bias=bias if out_bias is None else out_bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None

        self.groups = _layout(groups, n_heads // n_kv_heads)
        n_sinks = sum(group.heads for group in groups if group.spec.learned_sink)
        self.sink_logits = nn.Parameter(torch.empty(n_sinks)) if n_sinks else None
        biased = any(group.spec.alibi for group in groups)
        self.slopes = FixedTable(partial(slope_table, n_heads)) if biased else None
        self.backends: dict[Phase, BackendChoice] = dict.fromkeys(Phase, "auto")

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
        step: CacheStep | None,
    ) -> Tensor:
        """Attention goes by `context` without a cache; with one, by the context that the cache answers with."""
        return self.o_proj(self.heads(x_BTD, rotation, context, step).flatten(2))

    def heads(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
        step: CacheStep | None = None,
    ) -> Tensor:
        """What the heads read, before the output projection: [B, T, H, K]."""
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, rotation), rotate(k_BTGK, rotation)
        if step is None:
            keys = CachedKeys(k_BTGK, v_BTGK, context)
        else:
            keys = step.append(self.layer, k_BTGK, v_BTGK)
            if keys.k_scale_BSG is None:
                q_BTHK = q_BTHK.to(keys.k_BSGD.dtype)  # a cache may be narrower than the model

        phase, situation = phase_of(step, x_BTD.shape[1]), self._situation(keys.context)
        one_of_many = len(self.groups) > 1
        outputs = []
        for group in self.groups:
            output = attend(
                q_BTHK.narrow(2, *group.q) if one_of_many else q_BTHK,
                keys.k_BSGD.narrow(2, *group.kv) if one_of_many else keys.k_BSGD,
                keys.v_BSGE.narrow(2, *group.kv) if one_of_many else keys.v_BSGE,
                spec=group.variants[situation],
                context=keys.context,
                params=self._params(group, keys),
                backend=self.backends[phase],
            )
            outputs.append(output.out)
        out_BTHK = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return out_BTHK if step is None else out_BTHK.to(x_BTD.dtype)

    def prepare(
        self,
        context: AttentionContext,
        *,
        n_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> None:
        """Has the backend derive its masks from `context` now: once for all layers of this kind, and outside of
        compiled regions, where it would have to be traced for every layer. Only a hint: `attend` needs none of it."""
        situation = self._situation(context)
        for group in self.groups:
            call = AttentionCall(
                phase=Phase.TRAIN,
                device=device.type,
                dtype=dtype,
                head_dim=self.head_dim,
                value_dim=self.head_dim,
                n_heads=group.q[1],
                n_kv_heads=group.kv[1],
                n_queries=n_tokens,
                n_keys=n_tokens,
                needs_grad=needs_grad,
                positions=context.q_positions is not None or context.kv_positions is not None,
                kv_lengths=context.kv_lengths is not None,
            )
            prepare(context, group.variants[situation], call, device=device, backend=self.backends[Phase.TRAIN])

    def check(
        self,
        *,
        asked_by: str,
        device: torch.device | str,
        dtype: torch.dtype,
        phase: Phase,
        needs_grad: bool,
        n_queries: int | None,
        n_keys: int | None,
    ) -> None:
        """Raises UnsupportedAttention unless a backend of `phase` can do all that the spec may ever ask."""
        for group in self.groups:
            call = AttentionCall(
                phase=phase,
                device=torch.device(device).type,
                dtype=dtype,
                head_dim=self.head_dim,
                n_heads=group.q[1],
                n_kv_heads=group.kv[1],
                n_queries=n_queries,
                n_keys=n_keys,
                needs_grad=needs_grad,
            )
            resolve(self.backends[phase], group.variants[True, True, needs_grad], call, asked_by=asked_by)

    def _situation(self, context: AttentionContext) -> tuple[bool, bool, bool]:
        documents = context.q_documents is not None or context.kv_documents is not None
        return documents, context.is_global is not None, self.training

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused_qkv:
            q, k, v = self.qkv_proj(x_BTD).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            # Autocast normalises in fp32 and leaves the result there; attention wants one dtype.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v

    def _params(self, group: _Group, keys: CachedKeys) -> AttentionParams | None:
        slopes = sinks = None
        if group.alibi and self.slopes is not None:
            slopes = self.slopes.values.narrow(0, *group.q)
        if group.sinks is not None and self.sink_logits is not None:
            sinks = self.sink_logits.narrow(0, *group.sinks)
        k_scale, v_scale = (
            None if scale is None else scale.narrow(2, *group.kv) for scale in (keys.k_scale_BSG, keys.v_scale_BSG)
        )
        if slopes is None and sinks is None and k_scale is None:
            return None
        return AttentionParams(alibi_slopes=slopes, sink_logits=sinks, k_scale_BSG=k_scale, v_scale_BSG=v_scale)


def _layout(groups: Sequence[HeadGroup], shared: int) -> tuple[_Group, ...]:
    """Head groups placed one after the other; `shared` query heads read each key/value head."""
    placed: list[_Group] = []
    head = sink = 0
    for group in groups:
        flags = [(d, g, t) for d in (False, True) for g in (False, True) for t in (False, True)]
        placed.append(
            _Group(
                q=(head, group.heads),
                kv=(head // shared, group.heads // shared),
                sinks=(sink, group.heads) if group.spec.learned_sink else None,
                alibi=group.spec.alibi,
                variants={
                    flag: effective(group.spec, documents=flag[0], global_tokens=flag[1], training=flag[2])
                    for flag in flags
                },
            )
        )
        head += group.heads
        sink += group.heads if group.spec.learned_sink else 0
    return tuple(placed)


# State-dict hooks of the fused layout: files and optimizers of other layouts never see `qkv_proj`.


def _split_qkv(module: nn.Module, state: dict[str, Tensor], prefix: str, _local_metadata: object) -> None:
    assert isinstance(module, Attention)
    for part in ("weight", "bias"):
        fused = state.pop(f"{prefix}qkv_proj.{part}", None)
        if fused is not None:
            for name, rows in zip(("q_proj", "k_proj", "v_proj"), fused.split(module.widths), strict=True):
                state[f"{prefix}{name}.{part}"] = rows


def _merge_qkv(module: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: object) -> None:
    for part in ("weight", "bias"):
        names = [f"{prefix}{name}.{part}" for name in ("q_proj", "k_proj", "v_proj")]
        if all(name in state for name in names):
            state[f"{prefix}qkv_proj.{part}"] = torch.cat([state.pop(name) for name in names])
