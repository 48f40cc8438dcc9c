"""GPT-2 and Llama as Hugging Face computes them: tiny random models, weights copied, equal logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config
from longspan.model.generation import generate

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def filled(config: DecoderConfig, weights: dict[str, Tensor], *, fused_qkv: bool = False) -> Decoder:
    model = from_config(config, seed=0, fused_qkv=fused_qkv)
    model.load_state_dict(weights)
    return model.eval()


def randomised(model: nn.Module) -> nn.Module:
    """Norms and biases too, so that none is forgotten or swapped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.normal_(1.0 if scale else 0.0, 0.1, generator=generator)
    return model.eval()


def gpt2_weights(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Conv1D stores [in, out], and q, k, v side by side."""
    weights = {
        "embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
    }
    names = {"attn.c_proj": "attention.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    for layer in range(n_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        for part in ("weight", "bias"):
            weights[f"{ours}.attention_norm.{part}"] = state[f"{theirs}.ln_1.{part}"]
            weights[f"{ours}.mlp_norm.{part}"] = state[f"{theirs}.ln_2.{part}"]
            qkv = state[f"{theirs}.attn.c_attn.{part}"].chunk(3, dim=-1)
            for name, tensor in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
                weights[f"{ours}.attention.{name}.{part}"] = tensor.T if part == "weight" else tensor
            for old, new in names.items():
                tensor = state[f"{theirs}.{old}.{part}"]
                weights[f"{ours}.{new}.{part}"] = tensor.T if part == "weight" else tensor
    for part in ("weight", "bias"):
        weights[f"norm.{part}"] = state[f"transformer.ln_f.{part}"]
    return weights


def llama_weights(state: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    names = {
        "model.embed_tokens": "embedding",
        "model.layers": "blocks",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn": "attention",
        "model.norm": "norm",
        "lm_head": "head",
    }
    weights = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not (tied and name == "head.weight"):
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(("activation", "mlp"), [("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
@pytest.mark.parametrize("fused_qkv", [False, True])
def test_gpt2(activation: str, mlp: str, fused_qkv: bool) -> None:
    theirs = randomised(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=97,
                n_positions=40,
                n_embd=48,
                n_layer=3,
                n_head=4,
                activation_function=activation,
                layer_norm_epsilon=1e-5,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    )
    config = DecoderConfig(vocab_size=97, max_positions=40, d_model=48, n_layers=3, n_heads=4, d_ff=192, mlp=mlp)
    ours = filled(config, gpt2_weights(theirs.state_dict(), 3), fused_qkv=fused_qkv)
    tokens_BT = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT), expected, atol=TOLERANCE, rtol=0)
    assert expected.std() > 0.2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(kv_heads: int, tied: bool) -> None:
    theirs = randomised(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=80,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=kv_heads,
                max_position_embeddings=64,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    )
    config = DecoderConfig(
        vocab_size=97,
        d_model=64,
        d_ff=80,
        n_layers=3,
        n_heads=4,
        n_kv_heads=kv_heads,
        max_positions=32,  # shorter than the input: the rotary table grows
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rope",
        rope_theta=500.0,
        mlp="swiglu",
        bias=False,
        tied_head=tied,
    )
    ours = filled(config, llama_weights(theirs.state_dict(), tied=tied))
    tokens_BT = torch.randint(0, 97, (2, 61), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT), expected, atol=TOLERANCE, rtol=0)
    assert expected.std() > 0.2


def test_qwen3_has_our_qk_norm() -> None:
    theirs = randomised(
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=97,
                hidden_size=64,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=24,
                max_position_embeddings=64,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    )
    config = DecoderConfig(
        vocab_size=97,
        d_model=64,
        d_ff=80,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=24,
        max_positions=64,
        norm="rmsnorm",
        norm_eps=1e-6,
        positions="rope",
        mlp="swiglu",
        bias=False,
        tied_head=False,
        qk_norm=True,
    )
    ours = filled(config, llama_weights(theirs.state_dict(), tied=False))
    tokens_BT = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT).logits, atol=TOLERANCE, rtol=0)


STOPS = [1, 5, 8, 11, 13, 17, 23, 31]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@torch.no_grad()
def test_beam_search(length_penalty: float) -> None:
    """With early_stopping="never", which stops, like ours, when nothing better can come."""
    theirs: Any = randomised(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    )
    config = DecoderConfig(
        vocab_size=40, max_positions=64, d_model=32, n_layers=2, n_heads=4, d_ff=128, mlp="gelu_tanh"
    )
    ours = filled(config, gpt2_weights(theirs.state_dict(), 2))
    prompts = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    stopped = set()
    for beams in (2, 5):
        expected = theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, num_beams=beams, do_sample=False,
            length_penalty=length_penalty, early_stopping="never", eos_token_id=STOPS, pad_token_id=39,
        )  # fmt: skip
        found = generate(
            ours, prompts, max_new_tokens=20, temperature=0, num_beams=beams, stop_tokens=STOPS, pad_token=39,
            length_penalty=length_penalty,
        )  # fmt: skip
        assert torch.equal(found[:, : expected.shape[1]], expected)
        assert (found[:, expected.shape[1] :] == 39).all()
        stopped |= set(torch.isin(expected[:, 7:], torch.tensor(STOPS)).any(dim=1).tolist())
    assert True in stopped or length_penalty > 1  # a high one prefers the longest
