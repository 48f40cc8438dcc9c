"""The decoder as a module: initialisation, precision, dropout, positions, backends, compilation."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, Phase, UnsupportedAttention, Window
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.decoder import Decoder, from_config
from longspan.model.positions import FixedTable, Rotary, alibi_slopes, rotate
from longspan.model.zoo import build, configure

TOKENS = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(0))
LOCAL = AttentionSpec(causal=True, window=Window(left=3), documents=True)
FULL = AttentionSpec(causal=True)
LOCAL_AND_FULL = AttentionPlan(patterns={"local": LOCAL, "full": FULL}, layers=("local", "full"))


# -- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gpt-tiny", "llama-tiny"])
def test_initial_values_follow_the_table(base: str) -> None:
    sinks = AttentionPlan(patterns={"s": AttentionSpec(causal=True, learned_sink=True)}, layers=("s",))
    model = build(base, {"d_model": 256, "d_ff": 512, "n_layers": 8, "init_std": 0.05, "attention": sinks}, seed=0)
    for name, tensor in model.state_dict().items():
        if re.search(r"norm\.weight$", name):
            assert (tensor == 1).all(), name
        elif re.search(r"(bias|sink_logits)$", name):
            assert (tensor == 0).all(), name
        else:
            std = 0.05 / 4 if re.search(r"(o_proj|down_proj)\.weight$", name) else 0.05  # sqrt(2 * 8) = 4
            assert float(tensor.std()) == pytest.approx(std, rel=0.02), name
            assert abs(float(tensor.mean())) < 5 * std / tensor.numel() ** 0.5, name


def test_weights_are_a_function_of_seed_and_name() -> None:
    state = build("llama-tiny", seed=3).state_dict()
    again = build("llama-tiny", seed=3).state_dict()
    other = build("llama-tiny", seed=4).state_dict()
    deeper = build("llama-tiny", {"n_layers": 3, "vocab_size": 300}, seed=3).state_dict()
    fused = from_config(configure("llama-tiny"), seed=3, fused_qkv=True).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert all(torch.equal(state[name], fused[name]) for name in state)
    assert not torch.equal(state["embedding.weight"], other["embedding.weight"])
    name = "blocks.0.attention.q_proj.weight"
    assert torch.equal(state[name], deeper[name])
    assert not torch.equal(state[name], state[name.replace("blocks.0", "blocks.1")])
    assert not torch.equal(state["blocks.0.attention.k_proj.weight"], state["blocks.0.attention.v_proj.weight"])


def test_without_a_seed_torch_decides() -> None:
    torch.manual_seed(0)
    first, second = build("gpt-tiny").head_weight, build("gpt-tiny").head_weight
    torch.manual_seed(0)
    assert torch.equal(build("gpt-tiny").head_weight, first)
    assert not torch.equal(first, second)


def test_the_first_loss_is_that_of_guessing() -> None:
    model = build("gpt-tiny", seed=0)
    loss = torch.nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)


# -- one tensor out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gpt-tiny", "llama-tiny"])
def test_logits_are_hidden_times_head(base: str) -> None:
    model = build(base, seed=0)
    assert torch.equal(model(TOKENS), model.hidden(TOKENS) @ model.head_weight.T)
    tied = base == "gpt-tiny"
    assert (model.head_weight is model.embedding.weight) == tied
    assert ("head.weight" in model.state_dict()) != tied


def test_every_parameter_gets_a_gradient() -> None:
    sinks = AttentionSpec(causal=True, learned_sink=True)
    plan = AttentionPlan(
        patterns={"a": (HeadGroup(heads=2, spec=sinks), HeadGroup(heads=2, spec=FULL)), "b": LOCAL}, layers=("a", "b")
    )
    for base in ("gpt-tiny", "llama-tiny"):
        model = build(base, {"attention": plan, "qk_norm": True, "bias": True}, seed=0)
        model(TOKENS).logsumexp(-1).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if not name.endswith("k_proj.bias"):  # adding one vector to all keys changes no softmax
                assert float(parameter.grad.abs().max()) > 0, name


def test_dropout_only_in_training() -> None:
    attention_only = AttentionPlan(patterns={"d": AttentionSpec(causal=True, dropout=0.5)}, layers=("d",))
    for overrides in ({"dropout": 0.5}, {"attention": attention_only}):
        model = build("llama-tiny", {**overrides, "init_std": 0.2}, seed=0)
        plain = build("llama-tiny", {"init_std": 0.2}, seed=0)
        torch.testing.assert_close(model.eval()(TOKENS), plain(TOKENS), atol=1e-5, rtol=0)
        model.train()
        torch.manual_seed(0)
        first, second = model(TOKENS), model(TOKENS)
        assert not torch.allclose(first, second, atol=1e-2)
        torch.manual_seed(0)
        assert torch.equal(model(TOKENS), first)


def test_tokens_without_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens have shape \(21,\); the model reads \[batch, time\]"):
        build("gpt-tiny", seed=0)(TOKENS[0])


# -- positions --------------------------------------------------------------------------------------------------------


def test_learned_positions_end() -> None:
    model = build("gpt-tiny", {"max_positions": 20}, seed=0)
    assert model(TOKENS[:, :20]).shape == (2, 20, 256)
    with pytest.raises(ValueError, match="position 20 is beyond the 20 learned positions of this model"):
        model(TOKENS)
    positions = torch.arange(21)[None] % 20
    assert model(TOKENS, positions_BT=positions).shape == (2, 21, 256)
    with pytest.raises(ValueError, match="position 21 is beyond the 20 learned"):
        model(TOKENS[:, :2], positions_BT=torch.tensor([[3, 21]]))


def test_positions_come_from_the_argument_else_the_context_else_the_order() -> None:
    model = build("gpt-tiny", {"init_std": 0.2}, seed=0)
    shifted = torch.arange(5, 26)[None].expand(2, -1)
    context = AttentionContext(q_positions=shifted, kv_positions=shifted)
    by_context, by_argument = model(TOKENS, context), model(TOKENS, positions_BT=shifted)
    torch.testing.assert_close(by_context, by_argument, atol=1e-5, rtol=0)
    assert not torch.allclose(by_context, model(TOKENS), atol=1e-2)
    order = torch.arange(21)[None]
    torch.testing.assert_close(model(TOKENS, context, positions_BT=order), model(TOKENS), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rotation_depends_on_distance_only_and_keeps_norms() -> None:
    rotary = Rotary(16, 64, 10_000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(at_q: int, at_k: int) -> Tensor:
        q_at = rotate(q, rotary(torch.tensor([[at_q]]), at_q + 1))
        k_at = rotate(k, rotary(torch.tensor([[at_k]]), at_k + 1))
        torch.testing.assert_close(q_at.norm(), q.norm())
        return (q_at * k_at).sum()

    torch.testing.assert_close(score(9, 4), score(1005, 1000), atol=1e-4, rtol=0)
    torch.testing.assert_close(score(9, 4), score(1_000_005, 1_000_000), atol=1e-4, rtol=0)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-3


def test_rotation_is_the_complex_product() -> None:
    """Independent of the implementation: dimensions (j, j + D/2) as one complex number, times exp(i position rate)."""
    x = torch.randn(1, 7, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rates = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * torch.arange(7)[:, None, None] * rates)
    expected = torch.cat([turned.real, turned.imag], dim=-1).float()
    found = rotate(x.float(), Rotary(8, 7, 100.0)(torch.arange(7)[None], 7))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(16)[:3] == (2**-0.5, 2**-1.0, 2**-1.5)
    assert alibi_slopes(1) == (2.0**-8,)
    twelve = alibi_slopes(12)
    assert twelve[:8] == alibi_slopes(8)
    assert [round(slope, 4) for slope in twelve[8:]] == [0.7071, 0.3536, 0.1768, 0.0884]
    assert len(alibi_slopes(25)) == 25


def test_fixed_tables_keep_their_values_through_casts_and_meta() -> None:
    for overrides in ({}, {"positions": "alibi"}):
        config = configure("llama-tiny", overrides)
        exact = [m.values for m in from_config(config, seed=0).modules() if isinstance(m, FixedTable)]
        cast = from_config(config, seed=0).bfloat16()
        materialised = from_config(config, device="meta").to_empty(device="cpu")
        for model in (cast, materialised, copy.deepcopy(cast).float()):
            tables = [m.values for m in model.modules() if isinstance(m, FixedTable)]
            assert len(tables) == len(exact) > 0
            assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(tables, exact, strict=True))
        assert not any("values" in name for name in cast.state_dict())


def test_bf16_stays_close_to_fp32() -> None:
    model = build("llama-tiny", {"init_std": 0.1}, seed=0).eval()
    with torch.no_grad():
        expected = model(TOKENS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(TOKENS)
        true = copy.deepcopy(model).bfloat16()(TOKENS)
    assert true.dtype == torch.bfloat16
    for found in (mixed, true):
        error = (found.float() - expected).abs().max() / expected.std()
        assert float(error) < 0.1


# -- backends ---------------------------------------------------------------------------------------------------------


def check(model: Decoder, **fields: object) -> None:
    call = {"device": "cpu", "dtype": torch.float32, "phase": "train", "needs_grad": True}
    model.check_attention(**{**call, **fields})  # type: ignore[arg-type]


def test_a_backend_that_cannot_is_refused_before_the_first_step() -> None:
    softcapped = AttentionPlan(
        patterns={"full": FULL, "capped": AttentionSpec(causal=True, softcap=5.0)}, layers=("full", "capped")
    )
    model = build("llama-tiny", {"attention": softcapped}, seed=0)
    check(model)
    model.set_backends(train="sdpa")
    with pytest.raises(UnsupportedAttention, match=r"sdpa cannot .*softcap=5\.0.*Asked by layer pattern 'capped'"):
        check(model)
    check(model, phase=Phase.DECODE, needs_grad=False)
    model.set_backends(train=("sdpa", "reference"))
    check(model)
    with pytest.raises(UnsupportedAttention):
        check(build("llama-tiny", seed=0), dtype=torch.int32)


def test_dropout_is_asked_for_only_where_it_happens() -> None:
    plan = AttentionPlan(patterns={"d": AttentionSpec(causal=True, dropout=0.1)}, layers=("d",))
    model = build("llama-tiny", {"attention": plan}, seed=0)
    model.set_backends(train="sdpa", decode="sdpa")
    check(model, needs_grad=False)
    check(model, phase="decode", needs_grad=False)
    with pytest.raises(UnsupportedAttention, match="dropout"):
        check(model)


def test_each_phase_uses_its_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.model import attention

    seen: list[object] = []
    real = attention.attend

    def spy(*tensors: Tensor, **call: object) -> object:
        seen.append(call["backend"])
        return real(*tensors, **call)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend", spy)
    model = build("llama-tiny", {"n_layers": 1}, seed=0).eval()
    model.set_backends(train="reference", prefill=("sdpa", "reference"), decode="sdpa")
    from longspan.model.generation import generate

    model(TOKENS)
    generate(model, TOKENS, max_new_tokens=3, prefill_chunk=20)  # pieces of 20 and 1, then two steps
    assert seen == ["reference", ("sdpa", "reference"), "sdpa", "sdpa", "sdpa"]


def test_reference_and_sdpa_agree_on_gradients() -> None:
    gradients = []
    for backend in ("reference", "sdpa"):
        model = build("llama-tiny", {"attention": LOCAL_AND_FULL, "init_std": 0.1}, seed=0)
        model.set_backends(train=backend)
        model(TOKENS, AttentionContext(q_documents=TOKENS // 128)).logsumexp(-1).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's tracer looks at activations
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention": LOCAL_AND_FULL},
        {"positions": "alibi"},
        {
            "qk_norm": True,
            "attention": AttentionPlan(
                patterns={"m": (HeadGroup(heads=2, spec=LOCAL), HeadGroup(heads=2, spec=FULL))}, layers=("m",)
            ),
        },
    ],
)
def test_blocks_compile_whole_and_once_for_each_kind(overrides: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = build("llama-tiny", {**overrides, "n_layers": 4}, seed=0)

    def context() -> AttentionContext:
        return AttentionContext(q_documents=(torch.arange(21) // 8).expand(2, -1))

    expected = model(TOKENS, context())
    expected.logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        found = model(TOKENS, context())
    found.logsumexp(-1).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for a, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, a, atol=1e-5, rtol=0)
    assert counter.frame_count == len(model.config.pattern_groups())
