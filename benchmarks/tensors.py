"""The inputs of a case, what they must give, and how far a contender is from it.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionParams, AttentionSpec, attend
from longspan.kernels.testing import plain_attention

from .shapes import Case

_CHECKED_WHOLE = 65536  # up to this length every row and key is checked; beyond, a sample in the middle
_SAMPLED_ROWS = 256
_PAIRS = 2**26  # scores that are materialised at a time

Attention = Callable[[Tensor, Tensor, Tensor, AttentionSpec, AttentionContext], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """q and gradient (of the output) [B, T, H, D], k and v [B, S, G, D], standard normal; q, k and v require theirs."""

    q: Tensor
    k: Tensor
    v: Tensor
    gradient: Tensor


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (case.batch, case.length, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q_BTHD, k_BSGD, v_BSGD = (normal(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
    return Inputs(q_BTHD, k_BSGD, v_BSGD, normal(case.heads))


def document_ids(case: Case, device: torch.device) -> Tensor:
    """[S] which document each position lies in."""
    lengths = torch.tensor(case.documents, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)


def global_flags(case: Case, device: torch.device) -> Tensor:
    """[S] bool"""
    flags = torch.zeros(case.length, dtype=torch.bool, device=device)
    flags[list(case.global_at)] = True
    return flags


def make_context(case: Case, device: torch.device, rows: Tensor | None = None) -> AttentionContext:
    """The context of the whole call, or of the queries in `rows` alone over all keys."""
    context = AttentionContext()
    if case.spec.global_tokens:
        context.is_global = global_flags(case, device).expand(case.batch, -1)
    if case.spec.documents:
        context.kv_documents = document_ids(case, device).expand(case.batch, -1)
        context.q_documents = context.kv_documents if rows is None else context.kv_documents[:, rows]
    if rows is not None:
        context.q_positions = rows.expand(case.batch, -1)
    return context


# -- what must come out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """Which rows of out and dq, and which of dk and dv, are checked."""

    rows: Tensor
    keys: Tensor


def sample(case: Case, device: torch.device) -> Sample:
    """Everything, or for long windows some rows in the middle and the global ones, and the keys that only those see.

    Raises ValueError for a longer case whose keys are seen from everywhere.
    """
    everything = torch.arange(case.length, device=device)
    if case.length <= _CHECKED_WHOLE:
        return Sample(everything, everything)
    left, right = case.spec.window.span
    if left is None or right is None or case.spec.documents or case.spec.block_sparse is not None:
        raise ValueError(f"{case.name}: beyond {_CHECKED_WHOLE} positions only windows can be checked")
    first = case.length // 2
    rows = everything[first : first + left + right + _SAMPLED_ROWS]
    keys = rows[right : len(rows) - left]  # key j is seen by the queries j - right … j + left, and by the global ones
    flagged = torch.tensor(case.global_at, dtype=torch.long, device=device)
    return Sample(torch.cat([flagged[~torch.isin(flagged, rows)], rows]), keys[~torch.isin(keys, flagged)])


@dataclass(frozen=True, slots=True)
class Values:
    """Output and gradients as [B, rows or keys, heads, D]; who projects has no gradients of q, k and v to show."""

    out: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None

    def at(self, chosen: Sample) -> Values:
        """The rows and keys of a sample, of whole tensors."""
        dq, dk, dv = self.dq, self.dk, self.dv
        return Values(
            self.out[:, chosen.rows],
            None if dq is None else dq[:, chosen.rows],
            None if dk is None else dk[:, chosen.keys],
            None if dv is None else dv[:, chosen.keys],
        )

    def named(self) -> dict[str, Tensor]:
        pairs = (("out", self.out), ("dq", self.dq), ("dk", self.dk), ("dv", self.dv))
        return {name: tensor for name, tensor in pairs if tensor is not None}


def definition(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    return attend(q, k, v, spec=spec, context=context, backend="reference").out


def low_precision(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, context: AttentionContext) -> Tensor:
    return plain_attention(q, k, v, spec=spec, context=context, params=AttentionParams())


def exact_values(case: Case, inputs: Inputs, chosen: Sample) -> Values:
    """The definition in fp64; in fp32 beyond the length that is checked whole, for room."""
    dtype = torch.float64 if case.length <= _CHECKED_WHOLE else torch.float32
    return by_rows(case, inputs, chosen, attention=definition, dtype=dtype)


def by_rows(case: Case, inputs: Inputs, chosen: Sample, *, attention: Attention, dtype: torch.dtype) -> Values:
    """The values of a sample in `dtype`, some rows at a time, so that S² scores never exist together.

    A sample's keys are those that only its rows see, so dk and dv summed over the rows are complete there.
    """
    k_BSGD, v_BSGD = (x.detach().to(dtype).requires_grad_() for x in (inputs.k, inputs.v))
    wide = torch.promote_types(dtype, torch.float32)
    dk_BSGD, dv_BSGD = (torch.zeros_like(x, dtype=wide) for x in (k_BSGD, v_BSGD))
    outs, dqs = [], []
    for rows in chosen.rows.split(max(1, _PAIRS // (case.batch * case.heads * case.length))):
        q_BtHD = inputs.q.detach()[:, rows].to(dtype).requires_grad_()
        out_BtHD = attention(q_BtHD, k_BSGD, v_BSGD, case.spec, make_context(case, rows.device, rows))
        dq_BtHD, dk, dv = torch.autograd.grad(
            out_BtHD, (q_BtHD, k_BSGD, v_BSGD), inputs.gradient[:, rows].to(out_BtHD.dtype)
        )
        dk_BSGD += dk
        dv_BSGD += dv
        outs.append(out_BtHD.detach())
        dqs.append(dq_BtHD)
    return Values(torch.cat(outs, 1), torch.cat(dqs, 1), dk_BSGD[:, chosen.keys], dv_BSGD[:, chosen.keys])


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Error:
    """worst: largest absolute difference; relative: norm of the difference over the norm of the exact values."""

    worst: float
    relative: float


def errors(values: Values, exact: Values) -> dict[str, Error]:
    """Of each tensor that both have. Not-finite values give infinite errors."""
    found = {}
    of_exact = exact.named()
    for name, tensor in values.named().items():
        difference = (tensor.detach().double() - of_exact[name].double()).abs()
        difference = torch.where(torch.isfinite(difference), difference, torch.inf)
        relative = float(difference.norm()) / max(float(of_exact[name].double().norm()), 1e-300)
        found[name] = Error(float(difference.max()), relative)
    return found


def excess(mine: Mapping[str, Error], yardstick: Mapping[str, Error], exact: Values, dtype: torch.dtype) -> str | None:
    """Which error exceeds twice the yardstick's, in words; None: none does.

    An error within the rounding of the largest exact value to `dtype` is never too large; within 32 of them in fp32,
    whose sums and exponentials round at every term (half-precision kernels compute in fp32 and round once).
    """
    roundings = 32 if dtype == torch.float32 else 1
    of_exact = exact.named()
    for name, error in mine.items():
        if name not in yardstick:
            continue
        rounding = roundings * torch.finfo(dtype).eps / 2
        if not error.worst <= max(2 * yardstick[name].worst, rounding * float(of_exact[name].abs().max())):
            return f"{name} errs by {error.worst:.3g}, the yardstick by {yardstick[name].worst:.3g}"
        if not error.relative <= max(2 * yardstick[name].relative, rounding):
            return f"{name} errs by {error.relative:.3g} relative, the yardstick by {yardstick[name].relative:.3g}"
    return None
