"""The loss of a language-model head without its logits: chunk by chunk, gradients computed on the way forward.

A vocabulary of 50k and 16k tokens make 3 GB of fp32 logits; here they exist a chunk of rows at a time, and because the
gradient of a cross entropy needs nothing that comes later, it is finished with the chunk (the idea of Liger Kernel's
fused linear cross entropy, Hsu et al. 2024, arXiv 2410.10989, §3.2).

Legend: N tokens, D hidden width, V vocabulary; n rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time by default: what keeps a GPU's matmul busy (128 MiB in bf16), what fits a CPU's caches.
CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
# On CUDA, rows of a chunk and columns of the logits come in multiples of this: tensor cores read aligned rows several
# times faster than, say, GPT-2's 50,257 columns.
ALIGN = {"cuda": 128}


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of `-log softmax(hidden @ weight.T + bias)[target]`, in nats: a scalar in fp32 (fp64 for fp64).

    Tokens whose target is `ignore_index` add nothing; divide by the number of the others for a mean. Matmuls run in
    the inputs' dtype (autocast's under autocast), softmax and sums in fp32. `chunk` is the number of rows whose logits
    exist at a time; None: CHUNK_LOGITS[device] // V. First derivatives only.

    Raises ValueError for shapes or dtypes that do not fit, and on CPU for a target outside the vocabulary.
    """
    dtype, chunk = _check(hidden_ND, weight_VD, targets_N, bias_V, ignore_index, chunk)
    if not torch.is_grad_enabled():
        return token_nll(hidden_ND, weight_VD, targets_N, bias_V=bias_V, ignore_index=ignore_index, chunk=chunk).sum()
    return _loss_and_gradients(hidden_ND, weight_VD, bias_V, targets_N, ignore_index, chunk, dtype)[0]


@torch.no_grad()
def token_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """[N] the negative log-likelihood of each target in nats, fp32 (fp64 for fp64), 0 where ignored; no gradient.

    Arguments and errors as in `linear_cross_entropy`.
    """
    dtype, chunk = _check(hidden_ND, weight_VD, targets_N, bias_V, ignore_index, chunk)
    nll_N = torch.empty(hidden_ND.shape[0], dtype=_accumulator(dtype), device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        V = weight_VD.shape[0]
        weight_VD = _aligned(weight_VD, dtype)
        bias_V = None if bias_V is None else _aligned(bias_V, dtype)
        for rows in _chunks(hidden_ND.shape[0], chunk):
            logits_nV = F.linear(hidden_ND[rows].to(dtype), weight_VD, bias_V)
            log_p_nV = torch.log_softmax(logits_nV[:, :V], dim=-1, dtype=_accumulator(dtype))
            target_n1, kept_n1 = _kept(targets_N[rows], ignore_index)
            nll_N[rows] = torch.where(kept_n1, -log_p_nV.gather(1, target_n1), 0.0)[:, 0]
    return nll_N


@torch.library.custom_op("longspan::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum of nll, its gradients for hidden, weight and bias); an operator, so that torch.compile takes it whole."""
    accumulator = _accumulator(dtype)
    V, fused = weight_VD.shape[0], _has_compiler(hidden_ND)
    w_VD, b_V = _aligned(weight_VD, dtype), None if bias_V is None else _aligned(bias_V, dtype)
    total, d_hidden_ND, _, d_bias_V = _results(hidden_ND, weight_VD, bias_V, dtype)
    d_weight_VD = torch.zeros_like(w_VD, dtype=accumulator)
    nll_and_gradient = _compiled() if fused else _nll_and_gradient
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for rows in _chunks(hidden_ND.shape[0], chunk):
            h_nD, targets_n = hidden_ND[rows].to(dtype), targets_N[rows]
            n_rows = h_nD.shape[0]
            missing = _filled(n_rows, chunk) - n_rows if fused else 0
            if missing:
                h_nD, targets_n = F.pad(h_nD, (0, 0, 0, missing)), F.pad(targets_n, (0, missing), value=ignore_index)
            target_n1, kept_n1 = _kept(targets_n, ignore_index)
            nll_n1, d_logits_nV = nll_and_gradient(F.linear(h_nD, w_VD, b_V), target_n1, V)
            total += torch.where(kept_n1, nll_n1, 0.0).sum()
            # Ignored rows are masked on the narrow factors, not on [n, V].
            d_hidden_ND[rows] = ((d_logits_nV @ w_VD) * kept_n1)[:n_rows].to(hidden_ND.dtype)
            h_nD = h_nD * kept_n1
            if dtype == accumulator:
                d_weight_VD.addmm_(d_logits_nV.T, h_nD)
            elif fused:
                d_weight_VD = torch.addmm(d_weight_VD, d_logits_nV.T, h_nD, out_dtype=accumulator)
            else:
                d_weight_VD += d_logits_nV.T @ h_nD
            if bias_V is not None:
                d_bias_V += (d_logits_nV[:, :V] * kept_n1).sum(dim=0, dtype=accumulator)
    d_weight_VD = d_weight_VD[:V]
    return total, d_hidden_ND, d_weight_VD, d_bias_V


def _results(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    accumulator = _accumulator(dtype)
    return (
        torch.zeros((), dtype=accumulator, device=hidden_ND.device),
        torch.zeros_like(hidden_ND),
        torch.zeros_like(weight_VD, dtype=accumulator),
        torch.zeros(0 if bias_V is None else bias_V.shape[0], dtype=accumulator, device=hidden_ND.device),
    )


@_loss_and_gradients.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(hidden_ND, weight_VD, bias_V, dtype)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, d_hidden_ND, d_weight_VD, d_bias_V = output
    ctx.save_for_backward(d_hidden_ND, d_weight_VD, d_bias_V)
    ctx.set_materialize_grads(False)
    _, weight_VD, bias_V, *_ = inputs
    ctx.weight_dtype, ctx.bias_dtype = weight_VD.dtype, None if bias_V is None else bias_V.dtype


def _scale(ctx: Any, d_total: Tensor | None, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(d is not None for d in d_gradients):
        raise RuntimeError("linear_cross_entropy has first derivatives only")
    if d_total is None:
        return (None,) * 7
    d_hidden_ND, d_weight_VD, d_bias_V = ctx.saved_tensors
    return (
        (d_hidden_ND * d_total).to(d_hidden_ND.dtype),
        (d_weight_VD * d_total).to(ctx.weight_dtype),
        None if ctx.bias_dtype is None else (d_bias_V * d_total).to(ctx.bias_dtype),
        *(None,) * 4,
    )


_loss_and_gradients.register_autograd(_scale, setup_context=_save)


def _nll_and_gradient(logits_nP: Tensor, target_n1: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """(nll [n, 1] of the targets, d nll / d logits = softmax - onehot(target) in the logits' dtype); P == V."""
    log_p_nV = torch.log_softmax(logits_nP, dim=-1, dtype=_accumulator(logits_nP.dtype))
    nll_n1 = -log_p_nV.gather(1, target_n1)
    d_logits_nV = log_p_nV.exp_()
    d_logits_nV.scatter_add_(1, target_n1, torch.full_like(target_n1, -1, dtype=d_logits_nV.dtype))
    return nll_n1, d_logits_nV.to(logits_nP.dtype)


def _nll_and_gradient_functional(logits_nP: Tensor, target_n1: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The same without in-place steps, for the compiler, which makes one pass over the logits of it; columns beyond V
    are padding: they take no part in the softmax and their gradient is zero."""
    logits_nV = logits_nP[:, :V].to(_accumulator(logits_nP.dtype))
    lse_n1 = torch.logsumexp(logits_nV, dim=-1, keepdim=True)
    p_nV = torch.exp(logits_nV - lse_n1)
    hit_nV = torch.arange(V, device=logits_nP.device)[None, :] == target_n1
    d_logits_nV = torch.where(hit_nV, p_nV - 1, p_nV).to(logits_nP.dtype)
    return lse_n1 - logits_nV.gather(1, target_n1), F.pad(d_logits_nV, (0, logits_nP.shape[1] - V))


def _has_compiler(hidden_ND: Tensor) -> bool:
    return hidden_ND.is_cuda


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Measured on an H100 at 50,257 × 768: see docs/log.md."""
    return torch.compile(_nll_and_gradient_functional, dynamic=False)


def _kept(targets_n: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(targets [n, 1] with 0 for ignored ones; which are kept [n, 1])."""
    kept_n1 = (targets_n != ignore_index)[:, None]
    return torch.where(kept_n1, targets_n[:, None], 0), kept_n1


def _aligned(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[V, …] in `dtype`, with zero rows appended up to the device's alignment."""
    missing = -rows.shape[0] % ALIGN.get(rows.device.type, 1)
    rows = rows.to(dtype)
    return F.pad(rows, (*(0, 0) * (rows.dim() - 1), 0, missing)) if missing else rows


def _filled(n_rows: int, chunk: int) -> int:
    """Rows that the last chunk is filled up to: the compiled pass over the logits has a graph for each size, and a
    batch of texts of their own lengths may leave any number of rows."""
    return min(chunk, max(ALIGN["cuda"], 1 << (n_rows - 1).bit_length()))


def _chunks(n_rows: int, chunk: int) -> Iterator[slice]:
    for start in range(0, n_rows, chunk):
        yield slice(start, min(start + chunk, n_rows))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    ignore_index: int,
    chunk: int | None,
) -> tuple[torch.dtype, int]:
    """(dtype of the matmuls, rows a chunk)."""
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden {list(hidden_ND.shape)} and weight {list(weight_VD.shape)} must be [N, D] and [V, D] with one D"
        )
    if targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"targets have shape {list(targets_N.shape)}; they must be [{hidden_ND.shape[0]}]")
    V = weight_VD.shape[0]
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias has shape {list(bias_V.shape)}; it must be [{V}]")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one row at a time")
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_ND.dtype} and weight {weight_VD.dtype}: one dtype, or autocast")
    else:
        dtype = hidden_ND.dtype
    # Looking at values would stall a GPU and cannot be traced; there the gather itself fails.
    if device == "cpu" and not torch.compiler.is_compiling() and targets_N.numel():
        outside = ((targets_N < 0) | (targets_N >= V)) & (targets_N != ignore_index)
        if bool(outside.any()):
            raise ValueError(f"target {int(targets_N[outside][0])} is outside the vocabulary 0 … {V - 1}")
    if chunk is None:
        align = ALIGN.get(device, 1)
        chunk = max(align, CHUNK_LOGITS.get(device, 2**25) // V // align * align)
    return dtype, chunk
