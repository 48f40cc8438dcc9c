"""A case run by a backend, by the fp64 reference and by the low-precision twin, and what the comparison finds.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.backend import AttentionBackend, AttentionOutput, AttentionParams
from ..attention.context import AttentionContext
from ..attention.reference import Reference
from .cases import Case
from .judge import judge, magnitudes, twin
from .tensors import Inputs

Attention = Callable[[Tensor, Tensor, Tensor, AttentionContext, AttentionParams], AttentionOutput]
Results = dict[str, Tensor]  # out, lse, dq, dk, dv, dslopes, dsinks: those that the case asks for


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check said of one case. ratio: error over budget (0 or infinity for what is exact)."""

    check: str
    case: Case
    ratio: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What the definition gives, what a plain softmax in the case's dtype makes of it, how large the terms are."""

    exact: Results
    twin: Results
    magnitude: dict[str, float]


# -- running -----------------------------------------------------------------------------------------------------------


def run(backend: AttentionBackend, inputs: Inputs, *, gradients: bool | None = None) -> Results:
    """What the backend makes of a case. Raises what the backend raises, and ValueError for outputs of a wrong kind."""
    case = inputs.case

    def attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, params: AttentionParams):
        return backend(q, k, v, spec=case.spec, context=context, params=params, return_lse=case.lse)

    qkv = (inputs.q.view, inputs.k.view, inputs.v.view)
    _dirty_the_allocator(qkv[0].device, [*qkv, inputs.grad_out.to(case.dtype), inputs.grad_lse.float()])
    with _fresh_memory_is_poison(qkv[0].device):
        return _solve(attention, qkv, inputs.params, inputs, case.backward if gradients is None else gradients)


def truth(inputs: Inputs) -> Truth:
    """What `run` is judged by."""
    case = inputs.case
    # A fresh context: nothing that a backend derived may reach what it is judged by.
    inputs = dataclasses.replace(inputs, context=dataclasses.replace(inputs.context, derived={}))

    def plain(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, params: AttentionParams):
        return twin(q, k, v, spec=case.spec, context=context, params=params)

    wide, params = _values(inputs, torch.float64)
    upstream = [x.to(case.dtype).double() for x in (inputs.grad_out, inputs.grad_lse)]
    if not case.lse:
        upstream[1] = torch.zeros_like(upstream[1])
    return Truth(
        exact=definition(inputs, gradients=case.backward),
        twin=_solve(plain, *_values(inputs, case.dtype), inputs, case.backward),
        magnitude=magnitudes(*wide, *upstream, spec=case.spec, context=inputs.context, params=params),
    )


def definition(inputs: Inputs, *, gradients: bool = False) -> Results:
    """The fp64 reference on a case."""
    case, reference = inputs.case, Reference()
    inputs = dataclasses.replace(inputs, context=dataclasses.replace(inputs.context, derived={}))

    def attention(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, params: AttentionParams):
        return reference(q, k, v, spec=case.spec, context=context, params=params, return_lse=case.lse)

    wide, params = _values(inputs, torch.float64)
    return _solve(attention, wide, params, inputs, gradients)


def _values(inputs: Inputs, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionParams]:
    """q, k, v as numbers in `dtype`, whatever k and v are stored in, and the params without scales (fp64 for fp64)."""
    params, k, v = inputs.params, inputs.k.view, inputs.v.view
    if params.k_scale_BSG is not None and params.v_scale_BSG is not None:
        k, v = k.double() * params.k_scale_BSG[..., None].double(), v.double() * params.v_scale_BSG[..., None].double()
        params = dataclasses.replace(params, k_scale_BSG=None, v_scale_BSG=None)
    if dtype == torch.float64:
        slopes, sinks = params.alibi_slopes, params.sink_logits
        params = dataclasses.replace(
            params,
            alibi_slopes=None if slopes is None else slopes.double(),
            sink_logits=None if sinks is None else sinks.double(),
        )
    return (inputs.q.view.to(dtype), k.to(dtype), v.to(dtype)), params


def _solve(
    attention: Attention, qkv: tuple[Tensor, ...], params: AttentionParams, inputs: Inputs, gradients: bool
) -> Results:
    case = inputs.case
    leaves = {name: x.detach().requires_grad_(case.backward) for name, x in zip(("dq", "dk", "dv"), qkv)}
    for name, learned in (("dslopes", params.alibi_slopes), ("dsinks", params.sink_logits)):
        if learned is not None:
            leaves[name] = learned.detach().requires_grad_(case.backward)
    given = dataclasses.replace(params, alibi_slopes=leaves.get("dslopes"), sink_logits=leaves.get("dsinks"))
    result = attention(leaves["dq"], leaves["dk"], leaves["dv"], inputs.context, given)
    out_BTHE, lse_BHT = result.out, result.lse
    _check_kind("out", out_BTHE, (case.batch, case.n_queries, case.heads, case.value_dim), qkv[0].dtype)
    results = {"out": out_BTHE}
    if case.lse:
        if lse_BHT is None:
            raise ValueError("lse was asked for and is None")
        wide = torch.float64 if qkv[0].dtype == torch.float64 else torch.float32
        _check_kind("lse", lse_BHT, (case.batch, case.heads, case.n_queries), wide)
        results["lse"] = lse_BHT
    values = {name: x.detach() for name, x in results.items()}
    if not gradients:
        return values
    if missing := [name for name, x in results.items() if not x.requires_grad]:
        raise ValueError(f"{' and '.join(missing)} carry no gradient, though q, k and v require one")
    # The same numbers for all: rounded to the case's dtype, in the memory order that upstream operations give.
    upstream = [_upstream(inputs.grad_out.to(case.dtype).to(out_BTHE.dtype), case)]
    if lse_BHT is not None and case.lse:
        upstream.append(inputs.grad_lse.to(case.dtype).to(lse_BHT.dtype))
    found = torch.autograd.grad(
        list(results.values()), list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    return values | dict(zip(leaves, found))


def _check_kind(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {list(shape)}")


def _upstream(grad_BTHE: Tensor, case: Case) -> Tensor:
    if case.memory == "transposed":
        return grad_BTHE.transpose(1, 2).contiguous().transpose(1, 2)
    if case.memory == "expanded":  # what `out.sum().backward()` gives: one number, seen everywhere
        return grad_BTHE[:1, :1, :1, :1].expand_as(grad_BTHE)
    return grad_BTHE


# -- poison in fresh memory --------------------------------------------------------------------------------------------


def _dirty_the_allocator(device: torch.device, like: list[Tensor]) -> None:
    """Leaves NaN in the memory that the next allocations of these sizes get from CUDA's caching allocator."""
    if device.type == "cuda":
        for _ in range(2):
            floats = [x for x in like if x.is_floating_point()]
            poisoned = [torch.full(x.shape, torch.nan, dtype=x.dtype, device=device) for x in floats]
            del poisoned


@contextmanager
def _fresh_memory_is_poison(device: torch.device) -> Iterator[None]:
    """On CPU, `torch.empty` gives NaN: torch's own switch, which comes with that for deterministic algorithms (and
    changes none of CPU's)."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(results: Results, truth: Truth, case: Case) -> list[Finding]:
    """A finding for each result: forward, lse, the gradients, and rows that see no key."""
    return [*_judge_each(results, truth, case), *_empty_rows(results, truth, case)]


def _judge_each(results: Results, truth: Truth, case: Case) -> Iterator[Finding]:
    score = truth.magnitude["score"]
    for name, ours in results.items():
        exact, plain = truth.exact[name], truth.twin[name]
        if name == "lse":
            sees_BHT = exact != -torch.inf
            ours, exact, plain = ours[sees_BHT], exact[sees_BHT], plain[sees_BHT]
        # A fused backward subtracts rowsum(dO ∘ O), made of an output that was rounded to the inputs' dtype.
        rounded = case.dtype if name in ("dslopes", "dsinks") else None
        verdict = judge(ours, exact, plain, magnitude=truth.magnitude[name], score=score, rounded=rounded)
        yield Finding("forward" if name == "out" else name, case, verdict.ratio, verdict.problem)


def _empty_rows(results: Results, truth: Truth, case: Case) -> Iterator[Finding]:
    if "lse" in truth.exact:
        empty_BHT = truth.exact["lse"] == -torch.inf
    else:
        empty_BHT = (truth.exact["out"] == 0).all(dim=-1).transpose(1, 2)
    if not bool(empty_BHT.any()):
        return
    problem = ""
    if bool((results["out"].transpose(1, 2)[empty_BHT] != 0).any()):
        problem = "out of a query that sees no key is not exactly 0"
    elif "lse" in results and bool((results["lse"][empty_BHT] != -torch.inf).any()):
        problem = f"lse of a query that sees no key is {float(results['lse'][empty_BHT].max())}, not -inf"
    yield Finding("empty rows", case, float("inf") if problem else 0.0, problem)


def untouched(inputs: Inputs) -> Finding:
    """Nobody wrote to q, k or v, nor beside them."""
    touched = [name for name in ("q", "k", "v") if getattr(inputs, name).touched()]
    problem = f"the memory of {' and '.join(touched)}, or beside it, was written to" if touched else ""
    return Finding("inputs untouched", inputs.case, float("inf") if problem else 0.0, problem)
