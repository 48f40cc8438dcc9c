"""Attention of a target over its source, and the source's keys and values, computed once.

Cross-attention sees the whole source whatever the target's position, so a source that several hypotheses share is not
copied for them: theirs are further queries of one and the same row.

Legend: B sources, N = B * beams targets, T target tokens, S source tokens, D model width, H query heads, G key/value
heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionCall, AttentionContext, AttentionSpec, Phase
from longspan.kernels.attention.registry import attend, prepare, resolve

from .attention import BackendChoice, effective
from .cache_plan import CacheBytes


@dataclass(frozen=True, slots=True)
class Source:
    """The encoder's output as the decoder's layers read it: each makes keys and values of it.

    states_BSD   after the encoder's last block
    context      which of the S tokens exist (kv_lengths, kv_positions)
    """

    states_BSD: Tensor
    context: AttentionContext
    beams = 1

    @property
    def n_tokens(self) -> int:
        return self.states_BSD.shape[1]

    def keys_values(self, attention: CrossAttention) -> tuple[Tensor, Tensor]:
        return attention.keys_values(self.states_BSD)


@dataclass(frozen=True, slots=True)
class CrossCache:
    """Every layer's keys and values of a source, computed once by `Seq2Seq.remember`.

    layers    (k_BSGK, v_BSGK) of each decoder layer, head-major in memory, so that one head's keys are contiguous
    context   as in `Source`
    beams     how many targets read each source; they stand side by side in the batch. No number of them takes memory
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    context: AttentionContext
    beams: int = 1

    @property
    def n_tokens(self) -> int:
        return self.layers[0][0].shape[1]

    @property
    def nbytes(self) -> CacheBytes:
        """Counted from the tensors that exist."""
        keys_values = sum(x.nbytes for layer in self.layers for x in layer)
        return CacheBytes(keys_values, bookkeeping=sum(x.nbytes for x in self.context.tensors().values()))

    def keys_values(self, attention: CrossAttention) -> tuple[Tensor, Tensor]:
        return self.layers[attention.layer]

    def shared_by(self, beams: int) -> CrossCache:
        """The same tensors for `beams` targets of each source."""
        return replace(self, beams=beams)

    def select(self, sources: Sequence[int]) -> CrossCache:
        """The given sources alone, in that order; a copy, unless they are all of them as they stand."""
        if list(sources) == list(range(self.layers[0][0].shape[0])):
            return self
        index_B = torch.tensor(sources, device=self.layers[0][0].device)
        context = self.context
        return replace(
            self,
            layers=tuple((_rows(k_BSGK, index_B), _rows(v_BSGK, index_B)) for k_BSGK, v_BSGK in self.layers),
            context=AttentionContext(
                kv_lengths=None if context.kv_lengths is None else context.kv_lengths[index_B],
                kv_positions=None if context.kv_positions is None else context.kv_positions[index_B],
            ),
        )


def _rows(x_BSGK: Tensor, index_B: Tensor) -> Tensor:
    return x_BSGK.transpose(1, 2)[index_B].transpose(1, 2)


class CrossAttention(nn.Module):
    """Queries of the target, keys and values of the source, output projection; query head h reads key/value head
    h // (H // G)."""

    def __init__(
        self,
        *,
        layer: int,
        spec: AttentionSpec,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        bias: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias)
        self.specs = {
            training: effective(spec, documents=False, global_tokens=False, training=training)
            for training in (False, True)
        }
        self.backends: dict[Phase, BackendChoice] = dict.fromkeys(Phase, "auto")

    def keys_values(self, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """k_BSGK and v_BSGK of the encoder's output."""
        k_BSGK = self.k_proj(states_BSD).unflatten(-1, (-1, self.head_dim))
        return k_BSGK, self.v_proj(states_BSD).unflatten(-1, (-1, self.head_dim))

    def forward(self, x_NTD: Tensor, source: Source | CrossCache, phase: Phase) -> Tensor:
        k_BSGK, v_BSGK = source.keys_values(self)
        q_NTHK = self.q_proj(x_NTD).unflatten(-1, (-1, self.head_dim))
        n_targets, n_tokens = q_NTHK.shape[:2]
        q_BQHK = q_NTHK.reshape(n_targets // source.beams, source.beams * n_tokens, *q_NTHK.shape[2:])
        output = attend(
            q_BQHK,
            k_BSGK,
            v_BSGK,
            spec=self.specs[self.training],
            context=_standing_anywhere(source.context, q_BQHK.shape[1]),
            backend=self.backends[phase],
        )
        return self.o_proj(output.out.reshape(n_targets, n_tokens, -1))

    def prepare(
        self,
        context: AttentionContext,
        *,
        n_tokens: int,
        n_keys: int,
        device: torch.device,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> None:
        """As `Attention.prepare`, for targets of `n_tokens` over sources of `n_keys`."""
        if context.kv_positions is None:
            call = self._call(device, dtype, Phase.TRAIN, needs_grad, n_tokens, n_keys)
            call = replace(call, kv_lengths=context.kv_lengths is not None)
            spec, backend = self.specs[self.training], self.backends[Phase.TRAIN]
            prepare(context, spec, call, device=device, backend=backend)

    def check(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        phase: Phase,
        needs_grad: bool,
        n_queries: int | None,
        n_keys: int | None,
    ) -> None:
        """Raises UnsupportedAttention unless a backend of `phase` can run it."""
        call = self._call(torch.device(device), dtype, phase, needs_grad, n_queries, n_keys)
        resolve(self.backends[phase], self.specs[needs_grad], call, asked_by="cross_attention")

    def _call(
        self,
        device: torch.device,
        dtype: torch.dtype,
        phase: Phase,
        needs_grad: bool,
        n_queries: int | None,
        n_keys: int | None,
    ) -> AttentionCall:
        return AttentionCall(
            phase=phase,
            device=device.type,
            dtype=dtype,
            head_dim=self.head_dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            n_queries=n_queries,
            n_keys=n_keys,
            needs_grad=needs_grad,
            kv_lengths=True,
        )


def _standing_anywhere(context: AttentionContext, n_queries: int) -> AttentionContext:
    """Where a context says which slots hold a token by positions, queries need one, too; any will do."""
    if context.kv_positions is None:
        return context
    anywhere = torch.zeros(1, n_queries, dtype=torch.int64, device=context.kv_positions.device)
    return replace(context, q_positions=anywhere, derived={})
