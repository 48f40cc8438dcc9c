"""GPT-2 directories as transformers writes them: imported with equal logits, exported and loaded back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import DecoderConfig
from longspan.model.conversion import FAMILIES, ConversionError, export_model, import_model
from longspan.model.zoo import build

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
TOKENS_BT = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def gpt2(**changes: object) -> nn.Module:
    """A tiny random one, norms and biases random too, so that none is forgotten or swapped."""
    settings = {"vocab_size": 97, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 4}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **dropouts, **tokens, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("weight") and "ln_" in name else 0.0, 0.1, generator=generator)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS_BT)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 80, "layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.2},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_there_and_back(changes: dict[str, object], tmp_path: Path) -> None:
    theirs = gpt2(**changes)
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    expected = logits(theirs)
    assert expected.std() > 0.2
    torch.testing.assert_close(logits(ours), expected, atol=TOLERANCE, rtol=0)

    back = export_model(tmp_path / "ours", tmp_path / "back")
    again, report = transformers.GPT2LMHeadModel.from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(again.eval()), expected, atol=1e-6, rtol=0)  # gelu_new rounds in its own way
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    was, written = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", back))
    assert {name: was[name] for name in written if name in was and name != "activation_function"} == {
        name: value for name, value in written.items() if name in was and name != "activation_function"
    }
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 2


def test_shards_in_both_directions(tmp_path: Path) -> None:
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    ours = import_model(tmp_path / "hf", tmp_path / "ours")
    torch.testing.assert_close(logits(load_model(ours)), logits(theirs), atol=TOLERANCE, rtol=0)
    back = export_model(ours, tmp_path / "back", shard_bytes=100_000)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 2
    assert all(path.stat().st_size < 110_000 for path in back.glob("*.safetensors"))
    assert torch.equal(logits(transformers.GPT2LMHeadModel.from_pretrained(back).eval()), logits(theirs))


def test_files_of_2019(tmp_path: Path) -> None:
    """The bare model's names, the causal mask among the tensors, pickled, and a head that repeats the embedding."""
    theirs = gpt2()
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    config = {**theirs.config.to_dict(), "n_ctx": 40, "torch_dtype": "float32", "dtype": None}
    for folder, legacy in (("zip", False), ("older", True)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        torch.save(state, tmp_path / folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        ours = load_model(import_model(tmp_path / folder, tmp_path / f"{folder}-ours"))
        torch.testing.assert_close(logits(ours), logits(theirs), atol=TOLERANCE, rtol=0)


def test_the_type_of_the_weights(tmp_path: Path) -> None:
    gpt2().half().save_pretrained(tmp_path / "hf")
    assert load_model(import_model(tmp_path / "hf", tmp_path / "kept")).head_weight.dtype == torch.float16
    wide = import_model(tmp_path / "hf", tmp_path / "wide", dtype=torch.float32)
    assert load_model(wide).head_weight.dtype == torch.float32
    back = export_model(wide, tmp_path / "back", dtype=torch.bfloat16)
    written = json.loads((back / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert transformers.GPT2LMHeadModel.from_pretrained(back).dtype == torch.bfloat16


def test_absent_fields_mean_what_transformers_means() -> None:
    """A config.json of 2019 holds few fields; ours and theirs fill in the same."""
    for family in FAMILIES.values():
        default = transformers.AutoConfig.for_model(family.model_type)
        for field in family.fields:
            # What old files alone hold has no default there.
            if field.fate == "translated" and field.default is not None and hasattr(default, field.name):
                declared = getattr(type(default), field.name, getattr(default, field.name))
                assert declared == field.default, (family.model_type, field.name)


def test_every_field_of_transformers_is_known() -> None:
    """What save_pretrained writes is in the tables, so a new field of a new version is noticed here."""
    from longspan.model.conversion.translate import METADATA

    for family in FAMILIES.values():
        known = {field.name for field in (*METADATA, *family.fields)}
        written = transformers.AutoConfig.for_model(family.model_type).to_dict()
        assert set(written) <= known, family.model_type


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": "rope"}, "positions=rope"),
        ({"norm": "rmsnorm"}, "norm=rmsnorm"),
        ({"mlp": "swiglu"}, "mlp=swiglu"),
        ({"bias": False}, "bias=False"),
        ({"n_kv_heads": 2}, "n_kv_heads=2 of n_heads=4 (repeat_kv=true writes each as often as it is read)"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"head_dim": 32}, "head_dim=32, which is not d_model / n_heads"),
        ({"attention": {"patterns": {"p": {"causal": True, "window": {"left": 3}}}, "layers": ["p"]}}, "windows"),
        (
            {"attention": {"patterns": {"p": {"causal": True, "softcap": 9.0}}, "layers": ["p"]}},
            "softcap in attention.patterns.p",
        ),
    ],
)
def test_what_gpt2_cannot_say_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    save_model(build("gpt-tiny", changes, seed=0), tmp_path / "ours")
    with pytest.raises(ConversionError) as caught:
        export_model(tmp_path / "ours", tmp_path / "out", model_type="gpt2")
    assert str(caught.value) == f"no Hugging Face model type is this model: gpt2 cannot say {reason}"
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_opens_in_transformers(tmp_path: Path) -> None:
    ours = build("gpt-tiny", seed=0).eval()
    assert isinstance(ours.config, DecoderConfig)
    save_model(ours, tmp_path / "ours")
    back = export_model(tmp_path / "ours", tmp_path / "back", eos_token_id=5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=TOLERANCE, rtol=0)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 5
    with torch.no_grad():
        out = theirs.generate(TOKENS_BT[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    from longspan.model.generation import generate

    assert torch.equal(generate(ours, TOKENS_BT[:1, :5], max_new_tokens=8, temperature=0), out)


def test_parts_of_different_types_are_written_in_the_wider_one(tmp_path: Path) -> None:
    """GPT-2 has q, k and v in one tensor."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    theirs.save_pretrained(tmp_path / "hf")
    model = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    state = {name: x.bfloat16() if "q_proj" in name else x for name, x in model.state_dict().items()}
    save_model(model, tmp_path / "mixed", state=state)
    written = load_file(export_model(tmp_path / "mixed", tmp_path / "back") / "model.safetensors")
    before = load_file(tmp_path / "hf/model.safetensors")
    name = next(each for each in before if each.endswith("attn.c_attn.weight"))
    assert written[name].dtype == torch.float32
    expected = before[name].clone()
    expected[:, :32] = expected[:, :32].bfloat16().float()
    assert torch.equal(written[name], expected)
