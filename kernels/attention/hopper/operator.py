"""The launches as torch sees them: differentiable, and two operators, `longspan::hopper_attention` and its backward,
which are opaque to torch.compile."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..spec import AttentionSpec
from ..triton.launch import cached_spec_text, spec_text
from .backward_launch import backward
from .launch import forward

_forward_op = torch.library.custom_op("longspan::hopper_attention", forward, mutates_args=())
_backward_op = torch.library.custom_op("longspan::hopper_attention_backward", backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, slopes, sinks, q_doc, k_doc, q_span, k_span, tile_span, spec):
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)


@_backward_op.register_fake
def _(d_out, d_lse, out, lse, q, k, v, slopes, sinks, q_doc, k_doc, q_span, k_span, spec):
    per_head = (q.new_empty(0 if x is None else q.shape[2], dtype=torch.float32) for x in (slopes, sinks))
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *per_head)


def _save(ctx, inputs, output):
    *tensors, _, ctx.spec = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(run, ctx, d_out, d_lse):
    out, lse, q, k, v, slopes, sinks, *documents = ctx.saved_tensors
    dq, dk, dv, d_slopes, d_sinks = run(d_out, d_lse, out, lse, q, k, v, slopes, sinks, *documents, ctx.spec)
    return (
        dq,
        dk,
        dv,
        None if slopes is None else d_slopes.to(slopes.dtype),
        None if sinks is None else d_sinks.to(sinks.dtype),
        *(None for _ in range(6)),
    )


_forward_op.register_autograd(partial(_gradients, _backward_op), setup_context=_save)


def _on_its_device(run, x, inputs):
    """Triton launches on the current device. Changing it costs as much as a launch, so only where it is another."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return run(*inputs)
    with torch.cuda.device_of(x):
        return run(*inputs)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, which costs several times what the kernel's launch does."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _on_its_device(forward, inputs[0], inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # create_graph=True: torch's own once_differentiable would let autograd.grad pass
            raise RuntimeError("hopper attention has no second derivative; backend='reference' has")
        return _on_its_device(_gradients, gradients[0], (backward, ctx, *gradients))


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """`forward`, differentiable: as an operator while torch.compile traces, directly otherwise."""
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, slopes, sinks, *rest, spec_text(spec))
    inputs = (q, k, v, slopes, sinks, *rest, cached_spec_text(spec))
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (slopes is not None and slopes.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        return _Eager.apply(*inputs)
    return _on_its_device(forward, q, inputs)
