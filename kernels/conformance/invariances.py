"""What must hold whatever the numbers are: bitwise where nothing may change, within budget where rounding may.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..attention.backend import AttentionBackend
from ..attention.spec import Window
from .accuracy import Finding, Results, definition, run, truth
from .cases import Case
from .judge import judge
from .tensors import Inputs, guard, materialise, poison_empty_slots, positions, visible


def applicable(case: Case) -> tuple[str, ...]:
    """The names of the invariances that a case has."""
    spec = case.spec
    names = ["determinism"]
    plain = case.page is None and case.stored is None and case.memory == "contiguous"
    if plain and case.values == "normal":
        names.append("unseen keys")
        if spec.causal:
            names.append("causality")
        if case.batch > 1:
            names.append("batch independence")
        any_order = spec.window == Window() and not (
            spec.causal or spec.alibi or spec.sink_tokens or spec.block_sparse or spec.dropout
        )
        if any_order and case.positions == "none" and case.kv_lengths == "none" and not spec.global_tokens:
            names.append("key permutation")
        if spec.softcap is None:
            names.append("score shift")
    return tuple(names)


def check(name: str, backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """The invariance `name` on a case whose `results` are at hand. Raises what the backend raises."""
    return _CHECKS[name](backend, inputs, results)


def _exactly(name: str, case: Case, problem: str) -> Finding:
    return Finding(name, case, math.inf if problem else 0.0, problem)


def _differ(first: Results, second: Results, where: Mapping[str, Any]) -> str:
    """Which result differs, and by how much, at the places given: an index for each name."""
    for name, place in where.items():
        if name not in first:
            continue
        one, other = first[name][place], second[name][place]
        if not torch.equal(one, other):
            return f"{name} differs by up to {float((one.double() - other.double()).abs().max()):.3g}"
    return ""


def _with(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """The same case over other q, k, v."""
    case, device = inputs.case, inputs.device
    poison_empty_slots(inputs.context, k, v)
    q, k, v = (x.to(case.dtype).cpu() for x in (q, k, v))
    return dataclasses.replace(
        inputs,
        q=guard(q, case.memory, device),
        k=guard(k, case.memory, device),
        v=guard(v, case.memory, device),
        context=dataclasses.replace(inputs.context, derived={}),
    )


def _noise(like: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed + 1)
    return (3 * torch.randn(like.shape, generator=random)).to(like)


# -- bitwise -----------------------------------------------------------------------------------------------------------


def _determinism(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """The same call, with the same context object and masks derived from it, gives the same bits (dq excepted)."""
    everything = {name: slice(None) for name in ("out", "lse", "dk", "dv")}
    for _ in range(1 if inputs.device == "cpu" else 10):
        if problem := _differ(results, run(backend, inputs), everything):
            return _exactly("determinism", inputs.case, f"{problem} when the call is repeated")
    return _exactly("determinism", inputs.case, "")


def _unseen_keys(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """A row does not change by a bit when the keys and values that it cannot see do."""
    case = inputs.case
    row = case.n_queries // 2
    unseen_BS = ~visible(inputs)[:, row]
    k, v = (torch.where(unseen_BS[:, :, None, None], _noise(x, case.seed), x) for x in (inputs.k.view, inputs.v.view))
    after = run(backend, _with(inputs, inputs.q.view, k, v), gradients=False)
    problem = _differ(results, after, {"out": (slice(None), row), "lse": (slice(None), slice(None), row)})
    return _exactly(
        "unseen keys", case, problem and f"{problem} for query {row} when keys that it cannot see are changed"
    )


def _causality(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """Rows up to a position do not change by a bit when later queries, keys and values do."""
    case = inputs.case
    rows = 1 if case.shared else case.batch
    q_pos, kv_pos = (x.to(inputs.device) for x in positions(case.positions, rows, case.n_queries, case.n_keys))
    q_pos, kv_pos = q_pos.expand(case.batch, -1), kv_pos.expand(case.batch, -1)
    now_B1 = q_pos[:, case.n_queries // 2, None]
    later_q, later_k = ((pos > now_B1)[:, :, None, None] for pos in (q_pos, kv_pos))
    q, k, v = (
        torch.where(later, _noise(x, case.seed), x)
        for later, x in ((later_q, inputs.q.view), (later_k, inputs.k.view), (later_k, inputs.v.view))
    )
    after = run(backend, _with(inputs, q, k, v), gradients=False)
    earlier_BT = q_pos <= now_B1
    at = {"out": earlier_BT, "lse": earlier_BT[:, None].expand(-1, case.heads, -1)}
    problem = _differ(results, after, at)
    return _exactly("causality", case, problem and f"{problem} for earlier queries when later tokens are changed")


def _batch_independence(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """The last sequence does not change by a bit when the others do, their documents and lengths included."""
    case = inputs.case
    other = materialise(dataclasses.replace(case, seed=case.seed + 1), inputs.device)
    others = other.context.tensors()
    mixed = {
        name: torch.cat([others.get(name, mine)[:-1], mine[-1:]]) for name, mine in inputs.context.tensors().items()
    }
    if "kv_lengths" in mixed:
        mixed["kv_lengths"] = torch.cat([mixed["kv_lengths"][:-1] // 2, mixed["kv_lengths"][-1:]])
    changed = [
        torch.cat([theirs.view[:-1].nan_to_num(1.0, 1.0, 1.0), mine.view[-1:]])
        for mine, theirs in ((inputs.q, other.q), (inputs.k, other.k), (inputs.v, other.v))
    ]
    context = dataclasses.replace(inputs.context, derived={}, **mixed)
    after = run(backend, _with(dataclasses.replace(inputs, context=context), *changed))
    problem = _differ(results, after, {name: slice(-1, None) for name in ("out", "lse", "dk", "dv")})
    return _exactly("batch independence", case, problem and f"{problem} in the last row when the others change")


# -- within budget -----------------------------------------------------------------------------------------------------


def _key_permutation(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """Where nothing depends on positions, keys in another order (with their documents) give the same."""
    case = inputs.case
    order = torch.randperm(case.n_keys, generator=torch.Generator().manual_seed(case.seed)).to(inputs.device)
    shuffled = _with(inputs, inputs.q.view, inputs.k.view[:, order], inputs.v.view[:, order])
    if case.spec.documents:
        q_documents, kv_documents = inputs.context.documents(case.n_queries, case.n_keys)
        shuffled.context.q_documents, shuffled.context.kv_documents = q_documents, kv_documents[:, order]
    return _same_numbers("key permutation", run(backend, shuffled, gradients=False), inputs, shuffled, shift=0.0)


def _score_shift(backend: AttentionBackend, inputs: Inputs, results: Results) -> Finding:
    """Adding c to every score (and sink logit) leaves out alone and adds c to lse."""
    case = inputs.case
    q, k = inputs.q.view.clone(), inputs.k.view.clone()
    q[..., 0], k[..., 0] = 1, 0
    base = _with(inputs, q, k, inputs.v.view.clone())
    k[..., 0] = 16
    shifted = _with(inputs, q, k, inputs.v.view.clone())
    shift = 16 * case.spec.softmax_scale(case.head_dim)
    if base.params.sink_logits is not None:
        shifted.params = dataclasses.replace(base.params, sink_logits=base.params.sink_logits + shift)
    return _same_numbers("score shift", run(backend, shifted, gradients=False), base, shifted, shift=shift)


def _same_numbers(name: str, ours: Results, base: Inputs, actual: Inputs, *, shift: float) -> Finding:
    """`ours` on `actual` against what is true of `base` (lse moved by `shift`), with the budget of `actual`."""
    case = base.case
    true = definition(base)
    budget = truth(dataclasses.replace(actual, case=dataclasses.replace(case, backward=False)))
    worst = 0.0
    for result, value in ours.items():
        moved = shift if result == "lse" else 0.0
        rows = true[result] != -torch.inf
        verdict = judge(
            value[rows],
            true[result][rows] + moved,
            # The twin erred on `actual`; what it would say of `base` with the same error.
            true[result][rows] + moved + (budget.twin[result].double() - budget.exact[result])[rows],
            magnitude=budget.magnitude[result],
            score=budget.magnitude["score"],
        )
        if verdict.problem:
            return Finding(name, case, verdict.ratio, f"{result}: {verdict.problem}")
        worst = max(worst, verdict.ratio)
    return Finding(name, case, worst)


_CHECKS: dict[str, Callable[[AttentionBackend, Inputs, Results], Finding]] = {
    "determinism": _determinism,
    "unseen keys": _unseen_keys,
    "causality": _causality,
    "batch independence": _batch_independence,
    "key permutation": _key_permutation,
    "score shift": _score_shift,
}
