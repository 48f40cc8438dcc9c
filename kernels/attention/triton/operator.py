"""The launches as torch sees them: differentiable, and two operators, `longspan::flash_attention` and its backward,
which are opaque to torch.compile (one node each, with fake kernels that tell the shapes)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .launch import backward, forward

_forward_op = torch.library.custom_op("longspan::flash_attention", forward, mutates_args=())
backward_op = torch.library.custom_op("longspan::flash_attention_backward", backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, slopes, sinks, seed, q_pos, k_pos, q_doc, k_doc, q_span, k_span, lengths, always, n_always, is_global,
      rows, n_rows, most_always, most_rows, spec):  # fmt: skip
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)


@backward_op.register_fake
def _(d_out, d_lse, out, lse, q, k, v, slopes, sinks, seed, q_pos, k_pos, q_doc, k_doc, q_span, k_span, lengths, always,
      n_always, is_global, rows, n_rows, most_always, most_rows, spec):  # fmt: skip
    none = q.new_empty(0, dtype=torch.float32)
    per_head = q.new_empty(q.shape[2], dtype=torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        none if slopes is None else per_head,
        torch.empty_like(none if sinks is None else per_head),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.most_always, ctx.most_rows, ctx.spec = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(run, ctx, d_out, d_lse):
    out, lse, q, k, v, slopes, sinks, *rest = ctx.saved_tensors
    dq, dk, dv, d_slopes, d_sinks = run(
        d_out, d_lse, out, lse, q, k, v, slopes, sinks, *rest, ctx.most_always, ctx.most_rows, ctx.spec
    )
    return (
        dq,
        dk,
        dv,
        None if slopes is None else d_slopes.to(slopes.dtype),
        None if sinks is None else d_sinks.to(sinks.dtype),
        *(None for _ in range(len(rest) + 3)),
    )


_forward_op.register_autograd(partial(_gradients, backward_op), setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, which costs several times what the kernel's launch does."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device
            output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # create_graph=True: torch's own once_differentiable would let autograd.grad pass
            raise RuntimeError("triton attention has no second derivative; backend='reference' has")
        with torch.cuda.device_of(gradients[0]):
            return _gradients(backward, ctx, *gradients)


def flash_attention(*inputs: Tensor | float | str | None) -> tuple[Tensor, Tensor]:
    """`forward`, differentiable: as an operator while torch.compile traces, directly otherwise."""
    return _forward_op(*inputs) if torch.compiler.is_compiling() else _Eager.apply(*inputs)
