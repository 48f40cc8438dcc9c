"""Second moments of what attentions read, and what they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspan.model.attention import Attention
from longspan.model.build import Model, build_from
from longspan.model.checkpoint import CheckpointError
from longspan.model.config import DecoderConfig
from longspan.model.surgery import GroupedQuery, LazyTensor, operate, plan_steps
from longspan.model.surgery.calibration import Moments, read_moments, save_moments, second_moments
from longspan.model.zoo import build

CONFIG = DecoderConfig(vocab_size=31, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=16)
GENERATOR = torch.Generator().manual_seed(0)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 31, shape, generator=GENERATOR)


def converted(model: Model, **keys: object) -> dict[str, Tensor]:
    steps = plan_steps(model.config, [GroupedQuery(**keys)])  # pyright: ignore[reportArgumentType]: keys of tests
    lazy, _ = operate(steps, {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()})
    return {name: tensor.read() for name, tensor in lazy.items()}


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_moments_are_those_of_the_inputs(fused_qkv: bool) -> None:
    model = build_from(CONFIG, seed=0, fused_qkv=fused_qkv).eval()
    batches = [(tokens(2, 16),), (tokens(3, 5),)]
    seen: list[Tensor] = []
    layer = model.get_submodule("blocks.1.attention")
    assert isinstance(layer, Attention)
    hook = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, 1)))
    moments = second_moments(model, batches)
    hook.remove()
    assert set(moments) == {"blocks.0.attention.keys", "blocks.1.attention.keys"}
    x_NC = torch.cat([torch.cat(seen), torch.ones(2 * 16 + 3 * 5, 1)], dim=1)
    torch.testing.assert_close(moments["blocks.1.attention.keys"], x_NC.T @ x_NC / len(x_NC))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no text to gather statistics on"):
        second_moments(model, [])


def test_cross_attention_has_inputs_of_two_kinds(tmp_path: Path) -> None:
    model = build("led-tiny", seed=0).eval()
    path = save_moments(second_moments(model, [(tokens(2, 20), tokens(2, 7))]), tmp_path / "moments")
    moments = read_moments(path)
    crossing = "blocks.0.cross_attention"
    assert not torch.equal(moments.of(crossing, "keys"), moments.of(crossing, "queries"))
    assert torch.equal(moments.of(crossing, "keys"), moments.of("blocks.1.cross_attention", "keys"))
    ours = "encoder.blocks.1.attention"
    assert torch.equal(moments.of("encoder.blocks.1.global_attention", "queries"), moments.of(ours, "keys"))
    for init in ("aligned", "svd"):
        made = converted(
            model, kv_heads=2, init=init, stacks=("encoder", "cross"), statistics=str(path), grouping="similar"
        )
        assert all(torch.isfinite(tensor).all() for tensor in made.values())


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_text_never_asks_is_given_up_first(bias: bool, tmp_path: Path) -> None:
    """Inputs that lie in half of their space: what heads do in the other half does not count, so heads that agree where
    inputs are come out exact."""
    config = replace(CONFIG, bias=bias, positions="rope")
    model = build_from(config, seed=0).eval()
    basis = torch.linalg.qr(torch.randn(32, 32, generator=GENERATOR)).Q
    used, unused = basis[:, :16], basis[:, 16:]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                heads = tensor.unflatten(0, (2, 2, 8))
                heads[:, 1] = heads[:, 0] @ used @ used.T + 5 * torch.randn(2, 8, 32) @ unused @ unused.T
    x_NC = torch.cat([torch.randn(200, 16, generator=GENERATOR) @ used.T, torch.ones(200, 1)], dim=1)
    moment = x_NC.T @ x_NC / 200
    path = save_moments({f"blocks.{layer}.attention.keys": moment.clone() for layer in range(2)}, tmp_path / "moments")
    before = model.state_dict()
    x_ND = x_NC[:, :-1]

    def values(weights: dict[str, Tensor], kv_heads: int) -> Tensor:
        v_GKD = (
            weights["blocks.0.attention.v_proj.weight"].unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, 0)
        )
        o_HKD = weights["blocks.0.attention.o_proj.weight"].T.unflatten(0, (4, 8))
        return torch.einsum("hkd,hkc,nc->hnd", o_HKD, v_GKD, x_ND)

    expected = values(before, 4)
    with_text = values(converted(model, kv_heads=2, init="svd", statistics=str(path)), 2)
    without = values(converted(model, kv_heads=2, init="svd"), 2)
    torch.testing.assert_close(with_text, expected, atol=1e-4, rtol=0)
    assert (without - expected).abs().max() > 100 * (with_text - expected).abs().max()


def test_statistics_of_another_model_and_of_none(tmp_path: Path) -> None:
    model = build_from(CONFIG, seed=0)
    path = save_moments({"blocks.7.attention.keys": torch.eye(33)}, tmp_path / "moments")
    with pytest.raises(CheckpointError, match=r"has no statistics of blocks.0.attention: it was made of another model"):
        converted(model, kv_heads=2, init="svd", statistics=str(path))
    with pytest.raises(CheckpointError, match="no such file"):
        read_moments(tmp_path / "nowhere")
    (tmp_path / "text").write_text("words")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_moments(tmp_path / "text")
    assert isinstance(read_moments(path), Moments)
