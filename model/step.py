"""One decoding step, recorded once as a CUDA graph and replayed: at batch 1 launching the kernels of a step costs more
than running them.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Literal, get_args

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionCall, Phase
from longspan.kernels.attention.registry import get

from .cache import ContiguousCache
from .conditional import Generative, Unread
from .decoder import Decoder
from .paging import PagedCache

# How the steps of a text are taken:
#   auto      recorded where that can be and pays, else plain
#   plain     the model is called for every token
#   recorded  one step is recorded as a CUDA graph, and replayed
#   compiled  the same, of a step whose kernels torch.compile has fused: minutes for a large model, faster steps after
Steps = Literal["auto", "plain", "recorded", "compiled"]

_EAGER_STEPS = 2  # kernels are compiled and libraries set up before anything is recorded
_WORTH_RECORDING = 8  # tokens: recording takes about as long as a few steps


def why_not_recorded(model: Generative | Unread, *, paged: bool) -> str | None:
    """Why no step of this model can be recorded; None where it can: on CUDA, in evaluation mode, without autocast
    (whose copies of weights do not last), every head group by the `decode` backend, which never waits for the device;
    over block layouts it does, because they look at positions."""
    if not isinstance(model, Decoder):
        return "the steps of an encoder–decoder are not recorded"
    weight, config = model.head_weight, model.config
    if not weight.is_cuda:
        return f"CUDA graphs are recorded on CUDA, and the model is on {weight.device}"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on, whose copies of weights do not last; convert the model instead"
    if model.backend(Phase.DECODE) not in ("auto", "decode"):
        return f"set_backends chose {model.backend(Phase.DECODE)!r} to decode, and only 'decode' can be recorded"
    backend = get("decode")
    for name, groups in config.pattern_groups().items():
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
                paged=paged,
            )
            if group.spec.block_sparse is not None:
                return f"layer pattern '{name}' has a block layout, which waits for the device"
            if reasons := backend.unsupported(replace(group.spec, dropout=0.0), call):
                return f"layer pattern '{name}': decode cannot: {'; '.join(map(str, reasons))}"
    return None


def records(model: Generative | Unread, steps: Steps, *, paged: bool, n_steps: int | None = None) -> bool:
    """Shall steps be recorded? With auto, where that can be and `n_steps` (None: very many) are worth it.

    Raises ValueError for an unknown way, and for recorded or compiled steps where there can be none.
    """
    if steps not in get_args(Steps):
        raise ValueError(f"steps={steps!r}: it is one of {', '.join(get_args(Steps))}")
    if steps == "plain" or (steps == "auto" and n_steps is not None and n_steps <= _WORTH_RECORDING):
        return False
    reason = why_not_recorded(model, paged=paged)
    if reason is not None and steps != "auto":
        raise ValueError(f"steps={steps!r}: {reason}; 'plain' and 'auto' work")
    return reason is None


class DecodeStep:
    """`step(token_B)` -> logits [B, V] of the next position: the model over a cache that already holds the prompt.

    On CUDA the first two steps run eagerly, the third is recorded and every later one replays it; on a CPU every step
    runs. The logits stay in one place there: they are those of the latest step. The model is in evaluation mode, and
    keeps its weights where they are.

    `compiled` has torch.compile fuse what lies between the matrix products; that takes a minute for a large model, and
    is worth it for long texts.
    """

    def __init__(self, model: Decoder, cache: ContiguousCache | PagedCache, *, compiled: bool = False) -> None:
        self._model = model
        self._cache = cache
        self._step: _Step = _compiled() if compiled else _step
        self._token_B1: Tensor | None = None  # where every step reads: what is compiled knows its strides
        self._recorded: _Recorded | None = None
        self._taken = 0

    @torch.no_grad()
    def __call__(self, token_B: Tensor) -> Tensor:
        """Raises what the cache raises when a row has no room."""
        if self._token_B1 is None:
            self._token_B1 = torch.empty((*token_B.shape, 1), dtype=token_B.dtype, device=token_B.device)
        self._token_B1.copy_(token_B[:, None])
        with self._cache.fixed_step():
            if self._recorded is not None:
                logits_BV = self._recorded.replay()
            elif token_B.is_cuda and self._taken >= _EAGER_STEPS:
                self._recorded = _Recorded(self._step, self._model, self._cache, self._token_B1)
                logits_BV = self._recorded.replay()
            else:
                logits_BV = self._step(self._model, self._cache, self._token_B1)
        self._taken += 1
        return logits_BV


_Cache = ContiguousCache | PagedCache
_Step = Callable[[Decoder, _Cache, Tensor], Tensor]


def _step(model: Decoder, cache: _Cache, token_B1: Tensor) -> Tensor:
    hidden_B1D = model.hidden(token_B1, cache=cache)
    return torch.nn.functional.linear(hidden_B1D[:, -1], model.head_weight)


def _compiled() -> _Step:
    """Of a copy of the code: torch.compile keeps but a few variants of one, in all that a process compiles."""
    copy = FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False)


class _Recorded:
    """A CUDA graph of one step. Recording computes nothing, so that the step is taken by the replay that follows."""

    def __init__(self, step: _Step, model: Decoder, cache: _Cache, token_B1: Tensor) -> None:
        # The graph knows addresses only: a table that another call replaces by a longer one must not be freed.
        self._held = [token_B1, *(each.detach() for each in (*model.parameters(), *model.buffers()))]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _nothing_collected(), torch.cuda.graph(self._graph):
            self._logits_BV = step(model, cache, token_B1)

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._logits_BV


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage may hold another graph, and destroying that ends a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
