"""Llama, Mistral, Qwen2 and Qwen3 directories as transformers writes them: equal logits, there and back."""
# ruff: noqa: E501 (what a user reads is quoted whole)

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from longspan.kernels.attention import AttentionContext
from longspan.model.checkpoint import load_decoder, save_model
from longspan.model.conversion import ConversionError, config_from, config_to, export_model, import_model
from longspan.model.generation import generate
from longspan.model.zoo import build

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
LENGTH = 61
TOKENS_BT = torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def foreign(model_type: str, **changes: object) -> nn.Module:
    """A tiny random model, norms and biases random too, so that none is forgotten or swapped."""
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    return model.eval()


def logits(model: nn.Module, tokens_BT: torch.Tensor = TOKENS_BT) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens_BT)
    return out if isinstance(out, torch.Tensor) else out.logits


HYBRID = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama tied, one kv head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True}),
    "llama mlp biases": ("llama", {"mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 24, "rms_norm_eps": 1e-3, "attention_dropout": 0.1}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral full": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2 hybrid": ("qwen2", HYBRID),
    "qwen2 later layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3 hybrid": ("qwen3", {**HYBRID, "head_dim": 16, "attention_bias": True}),
    **{
        f"llama {kind}": ("llama", {"rope_parameters": parameters, "max_position_embeddings": 32})
        for kind, parameters in ROPES.items()
    },
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    theirs = foreign(model_type, **changes)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_decoder(import_model(tmp_path / "hf", tmp_path / "ours"))
    expected = logits(theirs)
    assert expected.std() > 0.2
    torch.testing.assert_close(logits(ours), expected, atol=TOLERANCE, rtol=0)

    back = export_model(tmp_path / "ours", tmp_path / "back", model_type=model_type)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(again.eval()), expected, atol=1e-6, rtol=0)
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    written = json.loads((back / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (model_type, [type(theirs).__name__])
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert config_from(written) == ours.config
    assert again.config.rope_parameters["rope_theta"] == written["rope_theta"]  # version 4 reads the latter


@pytest.mark.parametrize("case", ["mistral", "qwen2 hybrid", "llama yarn", "llama llama3", "llama linear"])
def test_greedy_generation_is_theirs(case: str, tmp_path: Path) -> None:
    """With both caches, past windows and past the length trained."""
    model_type, changes = CASES[case]
    theirs = foreign(model_type, **changes)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_decoder(import_model(tmp_path / "hf", tmp_path / "ours"))
    with torch.no_grad():
        expected = theirs.generate(
            TOKENS_BT[:1, :11], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(generate(ours, TOKENS_BT[:1, :11], max_new_tokens=30, temperature=0), expected)


def test_mistrals_window_counts_keys_with_the_querys_own() -> None:
    config = config_from({"model_type": "mistral", **SMALL, "sliding_window": 3})
    (group,) = config.head_groups(0)
    allowed = AttentionContext().allowed(group.spec, slice(0, 5), slice(0, 5))[0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_mistrals_window_has_a_default() -> None:
    absent = config_from({"model_type": "mistral", **SMALL})
    assert absent.head_groups(0)[0].spec.window.left == 4095
    assert (
        config_from({"model_type": "mistral", **SMALL, "sliding_window": None}).head_groups(0)[0].spec.window.unlimited
    )


def test_qwens_window_counts_only_where_it_is_used() -> None:
    unused = config_from({"model_type": "qwen2", **SMALL, "sliding_window": 3})
    assert unused.attention.layers == ("full",)
    later = config_from(
        {"model_type": "qwen2", **SMALL, "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2}
    )
    assert later.attention.layers == ("full", "full", "local")


OLD = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}


def test_both_spellings_of_rotation_mean_the_same() -> None:
    base = {"model_type": "llama", **SMALL}
    old, new, both = (config_from({**base, **spelling}) for spelling in (OLD, NEW, {**OLD, **NEW}))
    assert old == new == both
    assert (old.rope_theta, old.rope_scaling.kind, old.rope_scaling.factor) == (500.0, "linear", 2.0)
    assert config_from(base).rope_theta == 10_000.0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_scaling.rope_type='longrope' cannot be translated; known are default, linear, dynamic, yarn, llama3",
        ),
        (
            {**OLD, "rope_parameters": {**NEW["rope_parameters"], "factor": 3.0}},
            "rope_scaling (with rope_theta) and rope_parameters contradict each other",
        ),
        ({**NEW, "rope_theta": 7.0}, "rope_parameters.rope_theta=500.0 contradicts rope_theta=7.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor=0.5 cannot be translated: heads turn whole",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters differs by kind of layer, which cannot be translated",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "slope": 1.0}},
            "rope_scaling.slope=1.0: linear has no parameter that this version knows by that name",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor, which linear needs"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2': it is a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope_scaling translates to what cannot be: rope_scaling.factor=0.5: how many times longer sequences may be "
            "is at least 1",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' cannot be translated (the MLP is SwiGLU); it has to be 'silu' or 'swish'"),
        ({"layer_types": ["full_attention"]}, "layer_types=['full_attention'] is no field that this version knows, and may matter"),
        ({"sliding_window": 9}, "sliding_window=9 is no field that this version knows, and may matter"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_named(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConversionError) as caught:
        config_from({"model_type": "llama", **SMALL, **changes})
    assert caught.value.problems == (f"config.json: {line}",)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types has 'chunked_attention'; a layer is full_attention or sliding_attention"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types names 2 layers, num_hidden_layers is 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention, but use_sliding_window is false"),
        (
            {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True, "sliding_window": None},
            "layer_types has sliding_attention, but sliding_window is null",
        ),
    ],
)  # fmt: skip
def test_layers_that_contradict_the_rest(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConversionError) as caught:
        config_from({"model_type": "qwen3", **SMALL, **changes})
    assert str(caught.value) == f"config.json: {line}"


def test_yarn_in_the_words_of_deepseek() -> None:
    """mscale and mscale_all_dim are a quotient of temperatures; a missing factor, of lengths."""
    scaling = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16}
    found = config_from({"model_type": "llama", **SMALL, "rope_scaling": scaling}).rope_scaling
    assert found.factor == 4.0
    assert found.attention_factor == pytest.approx((0.1 * math.log(4) + 1) / (0.07 * math.log(4) + 1))


LOCAL = {"patterns": {"local": {"causal": True, "window": {"left": 7}}}, "layers": ["local"]}
HALF = {"patterns": {**LOCAL["patterns"], "full": {"causal": True}}, "layers": ["local", "full"]}
PACKED = {"patterns": {"packed": {"causal": True, "documents": True}}, "layers": ["packed"]}
SINKS = {"patterns": {"sinks": {"causal": True, "sink_tokens": 4}}, "layers": ["sinks"]}


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({}, "llama"),
        ({"bias": True}, "llama"),
        ({"attention": PACKED}, "llama"),  # one sequence is one document
        ({"attention": LOCAL}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "attention": HALF}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "attention": HALF}, "qwen3"),
        ({"rope_scaling": {"kind": "ntk", "factor": 4.0}}, "llama"),
        ({"attention": SINKS}, None),
        ({"attention": HALF}, None),
        ({"positions": "none"}, None),
        ({"positions": "sinusoidal"}, None),
    ],
)
def test_a_model_of_ours_finds_its_type(changes: dict[str, object], model_type: str | None, tmp_path: Path) -> None:
    model = build("llama-tiny", {"rope_theta": 500.0, "n_layers": 4, "vocab_size": 97, **changes}, seed=0).eval()
    if model_type is None:
        with pytest.raises(ConversionError, match="no Hugging Face model type is this model: gpt2 cannot say "):
            config_to(model.config)
        return
    save_model(model, tmp_path / "ours")
    back = export_model(tmp_path / "ours", tmp_path / "back", eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    assert theirs.config.model_type == model_type
    torch.testing.assert_close(logits(theirs), logits(model), atol=TOLERANCE, rtol=0)


def test_one_that_only_another_type_can_say_is_told_why(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        config_to(build("llama-tiny", {"attention": HALF, "qkv_bias": True}, seed=0).config, "llama")
    assert str(caught.value) == (
        "no Hugging Face model type is this model: llama cannot say windows, qkv_bias=True beside out_bias=False"
    )


def test_a_tied_file_may_hold_the_head_alone(tmp_path: Path) -> None:
    theirs = foreign("llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    from safetensors.torch import save_file

    save_file(state, file)
    ours = load_decoder(import_model(tmp_path / "hf", tmp_path / "ours"))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=TOLERANCE, rtol=0)
