"""Whole calls of `hopper` with global tokens on a CPU: its launches as they are, its own kernels over
`interpreted_gluon`, the dense ones by Triton's interpreter.

`test_hopper.py` runs this file in a process of its own, because Triton looks at TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.kernels.attention import AttentionContext, AttentionParams, AttentionSpec, Window, attend
from longspan.kernels.attention.hopper import backend, backward_launch, launch, tiles
from longspan.kernels.attention.triton.mask import INTERPRETED

_file = importlib.util.spec_from_file_location("interpreted_gluon", Path(__file__).with_name("interpreted_gluon.py"))
assert _file is not None
assert _file.loader is not None
gluon = importlib.util.module_from_spec(_file)
_file.loader.exec_module(gluon)

# B, T, S, H, G, D, E
CASES = (
    (AttentionSpec(causal=True, learned_sink=True), (2, 150, 170, 4, 2, 64, 64)),  # dq on the way
    (AttentionSpec(causal=False), (1, 130, 128, 2, 1, 104, 96)),  # so, too
    (AttentionSpec(causal=True, window=Window(left=40), sink_tokens=5), (2, 150, 150, 4, 2, 64, 64)),
    (AttentionSpec(causal=False, window=Window.symmetric(30), global_tokens=True), (3, 150, 150, 2, 2, 64, 64)),
    (
        AttentionSpec(causal=False, window=Window(20, 5), global_tokens=True, sink_tokens=2, learned_sink=True),
        (2, 170, 120, 2, 1, 40, 64),
    ),
    (
        AttentionSpec(
            causal=True, documents=True, window=Window(left=50), alibi=True, softcap=3.0, learned_sink=True,
            global_tokens=True, sink_tokens=3,
        ),
        (2, 170, 200, 4, 2, 64, 64),
    ),
)  # fmt: skip


def first(kernel: Any, programs: int, given: Sequence[object], options: object) -> None:
    """In place of a launch."""

    def argument(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            data = x.base.detach().numpy()
            if len(x.shape) == 1:
                return gluon.Vector(data.reshape(-1), x.block_shape[0])
            if len(x.shape) == 2:
                return gluon.Lines(data, x.block_shape[0])
            return gluon.Descriptor(data, x.block_shape[1], x.block_shape[3])
        if isinstance(x, Tensor):
            assert x.is_contiguous()
            return gluon.Pointer(x.detach().numpy().reshape(-1))
        return gluon.Int(x) if type(x) is int else x

    with pytest.MonkeyPatch.context() as patch:
        gluon.kernel(patch, gluon.Machine(programs, 0), kernel.fn.__name__)(*map(argument, given))


def results(spec: AttentionSpec, shape: tuple[int, ...], seed: int, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, lse, and the gradients of all that has one."""
    B, T, S, H, G, D, E = shape
    random = torch.Generator().manual_seed(seed)
    context: AttentionContext = gluon.context_of(spec, shape, np.random.default_rng(seed), sorted_ids=True)
    drawn = [torch.randn(B, *rest, generator=random).half() for rest in ((T, H, D), (S, G, D), (S, G, E), (T, H, E))]
    *leaves, d_out = (x.to(dtype) for x in drawn)
    slopes, sinks = torch.rand(H, generator=random), torch.randn(H, generator=random)
    leaves += [x for x, used in ((slopes, spec.alibi), (sinks, spec.learned_sink)) if used]
    for x in leaves:
        x.requires_grad_()
    params = AttentionParams(
        alibi_slopes=slopes if spec.alibi else None, sink_logits=sinks if spec.learned_sink else None
    )
    result = attend(*leaves[:3], spec=spec, context=context, params=params, backend=name, return_lse=True)
    assert result.lse is not None
    seen = torch.isfinite(result.lse)
    d_lse = torch.full_like(result.lse, 0.5) * seen
    gradients = torch.autograd.grad((result.out, result.lse), leaves, (d_out, d_lse))
    return [result.out, result.lse.masked_fill(~seen, 0), *gradients]


def main() -> None:
    assert INTERPRETED
    patch = pytest.MonkeyPatch()
    for module in (launch, backward_launch):
        patch.setattr(module, "first", first)
    patch.setattr(tiles, "_WORTH_IT", dict.fromkeys(tiles._WORTH_IT, 0))  # as in long calls
    patch.setattr(backend.Hopper, "unsupported", lambda self, spec, call: ())
    for seed, (spec, shape) in enumerate(CASES):
        found = results(spec, shape, seed, "hopper", torch.float16)
        for x, y in zip(found, results(spec, shape, seed, "reference", torch.float64), strict=True):
            error = float((x.detach().double() - y.detach()).norm() / y.detach().norm())
            assert error < 2e-3, (seed, tuple(x.shape), error)
    print(f"{len(CASES)} calls agree")


if __name__ == "__main__":
    sys.exit(main())
