"""One decoding step, recorded once as a CUDA graph and replayed: at batch 1 launching the kernels of a step costs more
than running them.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionCall, Phase
from longspan.kernels.attention.caching import KeyValueCache
from longspan.kernels.attention.registry import get

from .cache import ContiguousCache
from .decoder import Decoder
from .paging import PagedCache

_EAGER_STEPS = 2  # kernels are compiled and libraries set up before anything is recorded


class FixedShapeCache(KeyValueCache, Protocol):
    """A cache whose tensors keep shape and place while it grows: with `fixed_shapes` its lengths live on the device."""

    fixed_shapes: bool

    def reserve(self, n_tokens: int) -> None:
        """Room for `n_tokens` more in every row; on the host, before a step."""
        ...

    def advance_host(self, n_tokens: int) -> None:
        """Counts on the host what the device has counted itself."""
        ...


def recordable(model: Decoder, cache: ContiguousCache | PagedCache) -> bool:
    """Can a step of this model over this cache be recorded: on CUDA, in evaluation mode, without autocast (whose copies
    of weights do not last), every head group by the `decode` backend, which never waits for the device; over block
    layouts it does, because they look at positions."""
    weight, config = model.head_weight, model.config
    if not weight.is_cuda or model.training or torch.is_autocast_enabled("cuda"):
        return False
    if model.backend(Phase.DECODE) not in ("auto", "decode"):
        return False
    backend = get("decode")
    for groups in config.pattern_groups().values():
        for group in groups:
            call = AttentionCall(
                phase=Phase.DECODE,
                device="cuda",
                dtype=weight.dtype,
                head_dim=config.dim_per_head,
                n_heads=group.heads,
                n_kv_heads=group.heads * config.kv_heads // config.n_heads,
                n_queries=1,
                positions=True,
                kv_lengths=True,
                paged=isinstance(cache, PagedCache),
            )
            if group.spec.block_sparse is not None or backend.unsupported(replace(group.spec, dropout=0.0), call):
                return False
    return True


class DecodeStep:
    """`step(token_B)` -> logits [B, V] of the next position: the model over a cache that already holds the prompt.

    On CUDA the first two steps run eagerly, the third is recorded and every later one replays it; on a CPU every step
    runs. The logits stay in one place there: they are those of the latest step. The model is in evaluation mode, and
    keeps its weights where they are.

    `compiled` has torch.compile fuse what lies between the matrix products; that takes a minute for a large model, and
    is worth it for long texts.
    """

    def __init__(self, model: Decoder, cache: FixedShapeCache, *, compiled: bool = False) -> None:
        self._model = model
        self._cache = cache
        self._step = torch.compile(self._eager, fullgraph=True, dynamic=False) if compiled else self._eager
        self._recorded: _Recorded | None = None
        self._taken = 0
        cache.fixed_shapes = True

    @torch.no_grad()
    def __call__(self, token_B: Tensor) -> Tensor:
        """Raises what the cache raises when a row has no room."""
        self._cache.reserve(1)
        if self._recorded is not None:
            logits_BV = self._recorded.replay(token_B)
        elif token_B.is_cuda and self._taken >= _EAGER_STEPS:
            self._recorded = _Recorded(self._step, token_B, self._model)
            logits_BV = self._recorded.replay(token_B)
        else:
            logits_BV = self._step(token_B[:, None])
        self._taken += 1
        self._cache.advance_host(1)
        return logits_BV

    def _eager(self, token_B1: Tensor) -> Tensor:
        hidden_B1D = self._model.hidden(token_B1, cache=self._cache)
        return torch.nn.functional.linear(hidden_B1D[:, -1], self._model.head_weight)


class _Recorded:
    """A CUDA graph of one step. Recording computes nothing, so that the step is taken by the replay that follows."""

    def __init__(self, step: Callable[[Tensor], Tensor], token_B: Tensor, model: Decoder) -> None:
        self._token_B1 = token_B[:, None].clone()
        # The graph knows addresses only: a table that another call replaces by a longer one must not be freed.
        self._held = [each.detach() for each in (*model.parameters(), *model.buffers())]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._logits_BV = step(self._token_B1)

    def replay(self, token_B: Tensor) -> Tensor:
        self._token_B1.copy_(token_B[:, None])
        self._graph.replay()
        return self._logits_BV
