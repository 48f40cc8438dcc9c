"""The reference by rows, the sample of long cases, and the error budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longspan.benchmarks import contenders as peers
from longspan.benchmarks import tensors
from longspan.benchmarks.contenders import Flex, Longformer, Prepared, Sdpa
from longspan.benchmarks.shapes import FLASH, Case, suite
from longspan.benchmarks.tensors import (
    Error,
    Values,
    by_rows,
    definition,
    errors,
    exact_values,
    excess,
    low_precision,
    make_context,
    make_inputs,
    sample,
)
from longspan.kernels.attention import AttentionSpec, Window, attend

CPU = torch.device("cpu")
TINY = [case for name in ("attention", "window", "documents", "sparse", "dilation") for case in suite(name, "tiny")]
GLOBALS = next(case for case in TINY if len(case.global_at) == 5)


def at_once(case: Case, inputs: tensors.Inputs) -> Values:
    """The definition over all rows in one call."""
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = attend(q, k, v, spec=case.spec, context=make_context(case, CPU), backend="reference").out
    return Values(out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.gradient.double()))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_rows_in_turn_are_the_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(case, CPU, torch.float32)
    monkeypatch.setattr(tensors, "_PAIRS", 7 * case.batch * case.heads * case.length)  # seven rows at a time
    found = errors(exact_values(case, inputs, sample(case, CPU)), at_once(case, inputs))
    assert set(found) == {"out", "dq", "dk", "dv"}
    assert max(error.worst for error in found.values()) < 1e-12
    twin = by_rows(case, inputs, sample(case, CPU), attention=low_precision, dtype=torch.float32)
    assert max(error.relative for error in errors(twin, at_once(case, inputs)).values()) < 1e-5


@pytest.mark.parametrize(
    ("spec", "global_at"),
    [
        (AttentionSpec(causal=False, window=Window(5, 9)), ()),
        (AttentionSpec(causal=True, window=Window(7, 0)), ()),
        (AttentionSpec(causal=False, window=Window(3, 3, dilation=2)), ()),
        (AttentionSpec(causal=False, window=Window.symmetric(6), global_tokens=True), (0, 70, 127)),
    ],
)
def test_a_sample_of_a_long_window_is_complete(
    spec: AttentionSpec, global_at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of a sample are those that its rows alone see: dk and dv there are the whole call's."""
    monkeypatch.setattr(tensors, "_CHECKED_WHOLE", 100)
    monkeypatch.setattr(tensors, "_SAMPLED_ROWS", 16)
    case = Case(name="long", spec=spec, heads=2, kv_heads=1, length=128, head_dim=8, global_at=global_at)
    inputs, chosen = make_inputs(case, CPU, torch.float32), sample(case, CPU)
    assert 10 <= len(chosen.keys) <= 16
    assert len(chosen.rows) < 128
    ours = by_rows(case, inputs, chosen, attention=definition, dtype=torch.float64)
    found = errors(ours, at_once(case, inputs).at(chosen))
    assert max(error.worst for error in found.values()) < 1e-12


def test_a_long_case_that_cannot_be_sampled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_CHECKED_WHOLE", 100)
    case = Case(name="long causal", spec=AttentionSpec(causal=True), heads=1, kv_heads=1, length=128, head_dim=8)
    with pytest.raises(ValueError, match="long causal: beyond 100 positions only windows"):
        sample(case, CPU)


def test_errors_are_absolute_and_relative_and_see_nan() -> None:
    exact = Values(torch.tensor([3.0, 4.0]))
    assert errors(Values(torch.tensor([3.0, 4.5])), exact) == {"out": Error(0.5, 0.1)}
    assert errors(Values(torch.tensor([3.0, float("nan")])), exact)["out"].worst == float("inf")


def test_the_budget_is_twice_the_yardstick_or_one_rounding() -> None:
    exact = Values(torch.tensor([1.0, -2.0]))
    yardstick = {"out": Error(0.1, 0.1)}
    bf16 = torch.bfloat16
    assert excess({"out": Error(0.2, 0.2)}, yardstick, exact, bf16) is None
    assert "out errs by 0.21, the yardstick by 0.1" in str(excess({"out": Error(0.21, 0.1)}, yardstick, exact, bf16))
    assert "relative" in str(excess({"out": Error(0.1, 0.21)}, yardstick, exact, bf16))
    assert excess({"out": Error(float("nan"), 0.0)}, yardstick, exact, bf16) is not None
    tight = {"out": Error(0.0, 0.0)}
    assert excess({"out": Error(2 * 2**-8, 2**-8)}, tight, exact, bf16) is None
    assert excess({"out": Error(2.1 * 2**-8, 0.0)}, tight, exact, bf16) is not None
    assert excess({"out": Error(1.0, 1.0)}, {}, exact, bf16) is None  # nothing to compare with


# -- peers that a CPU can run ------------------------------------------------------------------------------------------


def run(prepared: Prepared) -> Values:
    out = prepared.step.forward()
    return prepared.values(out, prepared.step.backward(out))


@pytest.mark.parametrize("case", suite("attention", "tiny"), ids=lambda case: case.name)
def test_sdpa_is_put_back_into_our_layout(case: Case) -> None:
    inputs = make_inputs(case, CPU, torch.float32)
    prepared = Sdpa(FLASH, torch.nn.attention.SDPBackend.FLASH_ATTENTION).prepare(case, inputs)
    found = errors(run(prepared), at_once(case, inputs))
    assert max(error.worst for error in found.values()) < 1e-5


@pytest.mark.parametrize("case", [c for c in TINY if not c.dense], ids=lambda case: case.name)
def test_flex_computes_the_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and without gradients, which is what torch has on a CPU: the call and the block mask are right."""
    from longspan.kernels.attention.flex import _uncompiled

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: object) -> torch.Tensor:
        q, k, v = q.detach(), k.detach(), v.detach()
        return _uncompiled(q, k, v, score_mod=None, scale=None, return_aux=None, kernel_options=None, **given)

    monkeypatch.setattr(peers, "flex_attention", eager)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = make_inputs(case, CPU, torch.float32)
    prepared = Flex().prepare(case, inputs)
    values = prepared.values(prepared.step.forward(), ())
    assert errors(values, at_once(case, inputs))["out"].worst < 1e-5


@pytest.mark.parametrize("n_globals", [0, 1, 5])
def test_longformer_computes_what_the_spec_says(n_globals: int) -> None:
    """Hugging Face's window and global tokens are ours, with equal local and global projections."""
    case = next(c for c in suite("window", "tiny") if c.name.startswith("window") and len(c.global_at) == n_globals)
    prepared = Longformer().prepare(case, make_inputs(case, CPU, torch.float32))
    assert prepared.inputs is not None
    exact = exact_values(case, prepared.inputs, sample(case, CPU))
    assert errors(run(prepared), exact)["out"].worst < 1e-5
    wider = replace(case, spec=replace(case.spec, window=Window.symmetric(17)))
    assert errors(run(prepared), exact_values(wider, prepared.inputs, sample(case, CPU)))["out"].worst > 1e-3


def test_peers_say_why_they_cannot() -> None:
    said = {
        name: contender.refuses(GLOBALS, CPU) for name, contender in peers.contenders("sdpa").items() if name != "flex"
    }
    assert said == {
        "longspan-sdpa": None,
        "sdpa-flash": "this kernel takes no mask but causal",
        "sdpa-cudnn": "this kernel takes no mask but causal",
        "longformer-hf": None,
        "flash-attn-4": "has no global tokens, no dilation, and block masks by CuTe functions only",
        "longspan-triton": None,
    }
    causal = next(case for case in TINY if case.name.startswith("causal window"))
    assert Longformer().refuses(causal, CPU) == "has symmetric undilated windows only"
    assert Longformer().refuses(replace(GLOBALS, length=100), CPU) == "needs a length that is a multiple of 32"
    dense = suite("attention", "tiny")[0]
    assert peers.Flash4().refuses(dense, torch.device("cuda")) in (None, "flash-attn-4 is not installed")
