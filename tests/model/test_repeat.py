"""Grouped models for readers that know no shared heads: repeated without loss, or refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.kernels.attention import AttentionContext
from longspan.model.build import Model, build_from
from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from longspan.model.conversion import ConversionError, export_model, import_model, plan_export
from longspan.model.conversion.repeat import repeated_config
from longspan.model.zoo import configure

transformers = pytest.importorskip("transformers")

TOKENS_BT = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
FLAGS_BT = torch.zeros(2, 24, dtype=torch.bool)
FLAGS_BT[:, [0, 7]] = True


def grouped(name: str) -> ModelConfig:
    if name in ("bart-tiny", "led-tiny"):
        stack = {"n_heads": 4, "d_ff": 96, "max_positions": 64}
        changes = {"encoder": {**stack, "n_kv_heads": 2}, "decoder": {**stack, "n_kv_heads": 1}, "cross_kv_heads": 2}
        return configure(name, {"vocab_size": 97, "d_model": 48, **changes})
    return configure(name, {"vocab_size": 97, "d_model": 48, "n_kv_heads": 2, "max_positions": 64})


def random_model(config: ModelConfig) -> Model:
    model = build_from(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model.eval()


@torch.no_grad()
def ours(model: Model) -> torch.Tensor:
    if isinstance(model.config, Seq2SeqConfig):
        is_global = FLAGS_BT if model.config.global_projections else None
        return model(TOKENS_BT, TOKENS_BT[:, :9], is_global_BS=is_global)
    if isinstance(model.config, EncoderConfig) and model.config.global_projections:
        return model(TOKENS_BT, AttentionContext(is_global=FLAGS_BT))
    return model(TOKENS_BT)


@torch.no_grad()
def theirs(directory: Path, model_type: str) -> torch.Tensor:
    kinds = {"gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}
    kinds |= {"longformer": "AutoModelForMaskedLM", "bart": "AutoModelForSeq2SeqLM", "led": "AutoModelForSeq2SeqLM"}
    model, report = getattr(transformers, kinds[model_type]).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    arguments = {} if model_type in ("gpt2", "llama", "bert", "bart") else {"global_attention_mask": FLAGS_BT.long()}
    if model_type in ("bart", "led"):
        arguments["decoder_input_ids"] = TOKENS_BT[:, :9]
    return model.eval()(TOKENS_BT, **arguments).logits


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("gpt-tiny", "gpt2"),
        ("bert-tiny", "bert"),
        ("longformer-tiny", "longformer"),
        ("bart-tiny", "bart"),
        ("led-tiny", "led"),
        ("llama-tiny", "llama"),
    ],
)
def test_repeated_heads_compute_the_same(name: str, model_type: str, tmp_path: Path) -> None:
    config = grouped(name)
    model = random_model(config)
    save_model(model, tmp_path / "ours")
    expected = ours(model)
    assert expected.std() > 0.3
    exported = export_model(tmp_path / "ours", tmp_path / "theirs", repeat_kv=True)
    assert plan_export(tmp_path / "ours", repeat_kv=True).model_type == model_type
    torch.testing.assert_close(theirs(exported, model_type), expected, atol=1e-4, rtol=1e-4)
    again = load_model(import_model(exported, tmp_path / "again"))
    half = again.config.decoder_half if isinstance(again.config, Seq2SeqConfig) else again.config
    assert half.kv_heads == half.n_heads
    torch.testing.assert_close(ours(again), expected, atol=1e-5, rtol=1e-5)

    if model_type == "llama":  # says shared heads itself
        assert plan_export(tmp_path / "ours").config["num_key_value_heads"] == 2
    else:
        with pytest.raises(ConversionError, match=r"n_kv_heads=\d of .*repeat_kv=true writes each as often as it is"):
            export_model(tmp_path / "ours", tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_cross_attention_alone_is_refused_by_its_name(tmp_path: Path) -> None:
    config = configure("bart-tiny", {"cross_kv_heads": 2})
    save_model(build_from(config, seed=0), tmp_path / "ours")
    with pytest.raises(ConversionError, match=r"cross_kv_heads=2 of decoder.n_heads=4 \(repeat_kv=true"):
        plan_export(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"cross_kv_heads=3: decoder\.n_heads=4 is not a multiple of it"):
        configure("bart-tiny", {"cross_kv_heads": 3})


def test_a_multi_head_model_has_nothing_to_repeat(tmp_path: Path) -> None:
    config = DecoderConfig(vocab_size=97, n_layers=1, d_model=48, n_heads=4, d_ff=64, max_positions=32)
    assert repeated_config(config) == config
    save_model(build_from(config, seed=0), tmp_path / "ours")
    plain = export_model(tmp_path / "ours", tmp_path / "plain")
    repeated = export_model(tmp_path / "ours", tmp_path / "repeated", repeat_kv=True)
    assert (plain / "model.safetensors").read_bytes() == (repeated / "model.safetensors").read_bytes()
