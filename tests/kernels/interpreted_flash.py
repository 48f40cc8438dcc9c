"""The fused kernels in Triton's interpreter: what the conformance suite does not draw.

`test_flash.py` runs this file in a process of its own, because Triton looks at TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    BlockLayout,
    Window,
    attend,
)
from longspan.kernels.attention.flash import Triton
from longspan.kernels.attention.triton.launch import parse_spec, spec_text

TRITON = Triton()
T, S, H, G, D = 21, 24, 4, 2, 16


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((T, H, D), (S, G, D), (S, G, D))]


def results(
    triton: bool,
    spec: AttentionSpec,
    context: AttentionContext | None = None,
    params: AttentionParams | None = None,
    *,
    inputs: list[Tensor] | None = None,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (inputs or tensors())]
    context, params = context or AttentionContext(), params or AttentionParams()
    if triton:
        out = TRITON(*leaves, spec=spec, context=context, params=params).out
    else:
        out = attend(*leaves, spec=spec, context=context, params=params, backend="reference").out
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def assert_same(
    spec: AttentionSpec, context: AttentionContext | None = None, params: AttentionParams | None = None
) -> None:
    for x, y in zip(results(True, spec, context, params), results(False, spec, context, params), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: torch.stack([x, -9 * x], dim=1)[:, 0], id="every second"),
        pytest.param(lambda x: x[:1].expand(H), id="expanded"),
    ],
)
def test_slopes_and_sinks_of_any_stride(view) -> None:
    params = AttentionParams(alibi_slopes=view(torch.rand(H)), sink_logits=view(torch.randn(H)))
    assert_same(AttentionSpec(causal=True, alibi=True, learned_sink=True), params=params)


@pytest.mark.parametrize(
    "window", [Window(2**31 - 1), Window(2**31 - 1, 2**31 - 1), Window(2**30, 2**30, 4), Window(2**40)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_windows_wider_than_32_bits(window: Window, causal: bool) -> None:
    assert_same(AttentionSpec(causal=causal, window=window))


def test_positions_that_cannot_be_counted_are_refused_by_name() -> None:
    far = torch.arange(S)[None] + 2**31
    context = AttentionContext(q_positions=far[:, :T], kv_positions=far)
    with pytest.raises(ValueError, match=r"context.q_positions reaches 21474836\d\d; triton takes positions below"):
        results(True, AttentionSpec(causal=True), context)


def test_an_empty_slot_is_empty_however_negative() -> None:
    positions = torch.arange(S)[None].clone()
    positions[:, :5] = -(2**32)  # 0 in 32 bits
    assert_same(AttentionSpec(causal=True), AttentionContext(q_positions=positions[:, S - T :], kv_positions=positions))


def test_positions_past_a_layout_are_refused_by_name() -> None:
    layout = BlockLayout.from_rows([[1, 0], [1, 1]], q_block=16, kv_block=16)
    context = AttentionContext(q_positions=torch.arange(T)[None], kv_positions=torch.arange(30, 30 + S)[None])
    with pytest.raises(ValueError, match=r"block_sparse covers 32 positions, but context\.kv_positions reaches 53"):
        results(True, AttentionSpec(causal=False, block_sparse=layout), context)


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = TRITON(q, k, v, spec=AttentionSpec(causal=True), context=AttentionContext(), params=AttentionParams()).out
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad((q * out).sum(), q, create_graph=True)


@pytest.mark.parametrize("shape", ["no queries", "no batch"])
def test_nothing_to_do(shape: str) -> None:
    q, k, v = tensors()
    inputs = [q[:, :0], k, v] if shape == "no queries" else [x[:0] for x in (q, k, v)]
    out, *gradients = results(True, AttentionSpec(causal=True, window=Window(3), sink_tokens=1), inputs=inputs)
    assert out.shape == inputs[0].shape
    assert all(bool((x == 0).all()) for x in gradients)


SPECS = [
    AttentionSpec(causal=True),
    AttentionSpec(
        causal=False,
        window=Window(3, None, 2),
        global_tokens=True,
        documents=True,
        alibi=True,
        softcap=0.1,
        sink_tokens=3,
        learned_sink=True,
        scale=1 / 3,
        dropout=1e-3,
        block_sparse=BlockLayout.from_rows([[1, 0, 1], [1, 1, 0]], q_block=64, kv_block=32),
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "everything"])
def test_a_spec_survives_as_text(spec: AttentionSpec) -> None:
    assert parse_spec(spec_text(spec)) == spec


def test_every_field_of_a_spec_reaches_the_text() -> None:
    plain, everything = SPECS
    for field in dataclasses.fields(AttentionSpec):
        changed = dataclasses.replace(plain, **{field.name: getattr(everything, field.name)})
        assert spec_text(changed) != spec_text(plain), field.name


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(causal=True),
        AttentionSpec(causal=True, window=Window(4), sink_tokens=2, documents=True, dropout=0.1),
    ],
    ids=["causal", "window, sinks, documents, dropout"],
)
def test_one_node_for_torch_compile(spec: AttentionSpec) -> None:
    params = AttentionParams(dropout_seed=torch.tensor(5))

    def loss(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        return TRITON(q, k, v, spec=spec, context=context, params=params).out.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_() for x in tensors()]
    gradients = []
    for function in (loss, compiled):
        ids = torch.arange(S)[None] // 9
        context = (
            AttentionContext(q_documents=ids[:, S - T :], kv_documents=ids) if spec.documents else AttentionContext()
        )
        gradients.append(torch.autograd.grad(function(*leaves, context), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_the_operator_passes_torchs_own_checks() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    operator = torch.ops.longspan.flash_attention.default
    arguments = (q, k, v, *([None] * 15), 0, 0, spec_text(AttentionSpec(causal=True)))
    torch.library.opcheck(operator, arguments)


def test_bf16_is_refused_by_the_interpreter() -> None:
    call = AttentionCall(device="cuda", dtype=torch.bfloat16)
    assert any("interpreter" in str(reason) for reason in TRITON.unsupported(AttentionSpec(causal=True), call))


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("on", True), ("0", False), ("", False), ("off", False)])
def test_the_switch_reads_as_triton_reads_it(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    from longspan.kernels.attention.flash import interpreted

    assert interpreted() is expected
    if not expected:
        reasons = Triton().unsupported(AttentionSpec(causal=True), AttentionCall())
        assert any("set TRITON_INTERPRET=1" in str(reason) for reason in reasons)
