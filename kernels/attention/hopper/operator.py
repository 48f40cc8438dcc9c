"""The launches as torch sees them: differentiable, and two operators, `longspan::hopper_attention` and its backward,
which are opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import AttentionSpec
from ..triton.launch import cached_spec_text, spec_text
from .backend import NO_MASKS
from .backward_launch import backward
from .launch import forward

_forward_op = torch.library.custom_op("longspan::hopper_attention", forward, mutates_args=())
_backward_op = torch.library.custom_op("longspan::hopper_attention_backward", backward, mutates_args=())


@_forward_op.register_fake
def _(q, k, v, slopes, sinks, q_doc, k_doc, spans, q_spans, k_spans, always, n_always, outside, always_doc,
      is_global, rows, n_rows, seen_from, row_doc, most_always, most_rows, spec):  # fmt: skip
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)


@_backward_op.register_fake
def _(d_out, d_lse, out, lse, q, k, v, slopes, sinks, q_doc, k_doc, q_spans, k_spans, always, n_always, outside,
      always_doc, is_global, rows, n_rows, seen_from, row_doc, most_always, most_rows, spec):  # fmt: skip
    per_head = (q.new_empty(0 if x is None else q.shape[2], dtype=torch.float32) for x in (slopes, sinks))
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *per_head)


def _save(ctx, inputs, output):
    q, k, v, slopes, sinks, q_doc, k_doc, _, *masks = inputs
    *masks, most_always, most_rows, spec = masks
    ctx.save_for_backward(*output, q, k, v, slopes, sinks, q_doc, k_doc, *masks)
    ctx.rest = most_always, most_rows, spec


def _gradients(run, saved, rest, d_out, d_lse):
    """Of q, k, v, slopes and sinks."""
    out, lse, q, k, v, slopes, sinks, *masks = saved
    dq, dk, dv, d_slopes, d_sinks = run(d_out, d_lse, out, lse, q, k, v, slopes, sinks, *masks, *rest)
    return (
        dq,
        dk,
        dv,
        None if slopes is None else d_slopes.to(slopes.dtype),
        None if sinks is None else d_sinks.to(sinks.dtype),
    )


def _traced_gradients(ctx, d_out, d_lse):
    return *_gradients(_backward_op, ctx.saved_tensors, ctx.rest, d_out, d_lse), *(None for _ in (*NO_MASKS, "spec"))


_forward_op.register_autograd(_traced_gradients, setup_context=_save)


def _on_its_device(run, x, inputs):
    """Triton launches on the current device. Changing it costs as much as a launch, so only where it is another."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return run(*inputs)
    with torch.cuda.device_of(x):
        return run(*inputs)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, which costs several times what the kernel's launch does."""

    @staticmethod
    def forward(ctx, q, k, v, slopes, sinks, masks, spec):
        inputs = (q, k, v, slopes, sinks, *masks, spec)
        output = _on_its_device(forward, q, inputs)
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # zeros for an lse that nobody used would have to be written and read
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse):
        if torch.is_grad_enabled():  # create_graph=True: torch's own once_differentiable would let autograd.grad pass
            raise RuntimeError("hopper attention has no second derivative; backend='reference' has")
        saved = ctx.saved_tensors
        d_out = torch.zeros_like(saved[0]) if d_out is None else d_out
        return *_on_its_device(_gradients, saved[0], (backward, saved, ctx.rest, d_out, d_lse)), None, None


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    *masks: Tensor | int | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """`forward`, differentiable: as an operator while torch.compile traces, directly otherwise."""
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, slopes, sinks, *masks, spec_text(spec))
    text = cached_spec_text(spec)
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (slopes is not None and slopes.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        return _Eager.apply(q, k, v, slopes, sinks, masks, text)
    return _on_its_device(forward, q, (q, k, v, slopes, sinks, *masks, text))
