"""BART and LED directories as transformers writes them: imported with equal numbers and texts, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext, AttentionSpec, Window
from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import AttentionPlan, HeadGroup, Seq2SeqConfig
from longspan.model.conversion import ConversionError, config_to, export_model, import_model, plan_import
from longspan.model.generation import generate
from longspan.model.seq2seq import Seq2Seq, from_config
from longspan.model.zoo import SEQ2SEQS

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
V, PAD = 61, 1
STOPS = [2, 8, 40]
SIZES = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
KINDS: dict[str, dict[str, object]] = {
    "bart": {"max_position_embeddings": 40, "scale_embedding": True},
    "led": {
        "max_encoder_position_embeddings": 48,
        "max_decoder_position_embeddings": 40,
        "attention_window": [4, 12, 6],
    },
}
CLASSES = {"bart": "Bart", "led": "LED"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers says on which windows it pads; nothing here is about that."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def theirs(kind: str, head: str = "ForConditionalGeneration", **changes: object) -> nn.Module:
    """A tiny random one, norms, biases and the bias of the logits random too, so that none is forgotten or swapped."""
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**SIZES, **KINDS[kind], **changes})
    model = getattr(transformers, f"{CLASSES[kind]}{head}")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale = "norm" in name.lower() and name.endswith("weight")
            tensor.normal_(1.0 if scale else 0.0, 0.2, generator=generator)
    return model.eval()


def ours_of(model: nn.Module, directory: Path) -> Seq2Seq:
    model.save_pretrained(directory / "hf")  # type: ignore[operator]
    ours = load_model(import_model(directory / "hf", directory / "ours"))
    assert isinstance(ours, Seq2Seq)
    return ours


def drawn(n_rows: int, n_tokens: int) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def sources(lengths: list[int], n_tokens: int) -> tuple[Tensor, Tensor]:
    """Padded tokens, and which are real."""
    real = torch.arange(n_tokens)[None] < torch.tensor(lengths)[:, None]
    return torch.where(real, drawn(len(lengths), n_tokens), PAD), real


def global_tokens(kind: str, n_tokens: int, *, which: str) -> Tensor | None:
    if kind == "bart" or which == "none":
        return None
    is_global = torch.zeros(3, n_tokens, dtype=torch.bool)
    is_global[:, 0] = True
    if which == "varying":
        is_global[0, [4, n_tokens - 1]] = True
        is_global[2, 0] = False  # a row without any
    return is_global


def told(real: Tensor, is_global: Tensor | None) -> dict[str, Tensor]:
    flags = {} if is_global is None else {"global_attention_mask": is_global.long()}
    return {"attention_mask": real.long(), **flags}


# 24 is a multiple of every window, 29 of none: transformers pads to one, here there is nothing to pad.
@pytest.mark.parametrize("n_tokens", [24, 29])
@pytest.mark.parametrize(("kind", "which"), [("bart", "none"), ("led", "none"), ("led", "first"), ("led", "varying")])
def test_there_and_back(kind: str, which: str, n_tokens: int, tmp_path: Path) -> None:
    model = theirs(kind)
    ours = ours_of(model, tmp_path)
    lengths = [n_tokens, 17, 2]
    source, real = sources(lengths, n_tokens)
    target, is_global = drawn(3, 11), global_tokens(kind, n_tokens, which=which)
    with torch.no_grad():
        found = model(source, decoder_input_ids=target, **told(real, is_global))
        logits = ours(source, target, source_lengths_B=torch.tensor(lengths), is_global_BS=is_global)
        states = ours.encoder.hidden(source, AttentionContext(kv_lengths=torch.tensor(lengths), is_global=is_global))
    assert found.logits.std() > 0.1
    torch.testing.assert_close(states[real], found.encoder_last_hidden_state[real], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits, found.logits, atol=TOLERANCE, rtol=0)

    back = export_model(tmp_path / "ours", tmp_path / "back")
    again, report = type(model).from_pretrained(back, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(report.values())
    with torch.no_grad():
        exported = again.eval()(source, decoder_input_ids=target, **told(real, is_global)).logits
    torch.testing.assert_close(exported, found.logits, atol=1e-6, rtol=0)
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for file in ("config.json", "generation_config.json"):
        was, written = (json.loads((path / file).read_text()) for path in (tmp_path / "hf", back))
        assert {name: value for name, value in written.items() if name in was} == {
            name: was[name] for name in written if name in was
        }


# -- texts ------------------------------------------------------------------------------------------------------------


def lively(kind: str) -> nn.Module:
    """One that writes more than a few words: token embeddings have one length, lest the longest of them be all text,
    and the last norm turns around, lest every token be repeated."""
    model = theirs(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                last = name.endswith("decoder.layers.1.final_layer_norm.weight")
                tensor.fill_(-1.0 if last else float(name.endswith("weight")))
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                std = 0.1 if "encoder_attn" in name else 0.5 if "embed_positions" in name else 0.6
                tensor.normal_(0.0, std, generator=generator)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        embedding.mul_(3.0 / embedding.norm(dim=1, keepdim=True))
    return model


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(("kind", "forced"), [("bart", {}), ("bart", {"forced_bos_token_id": 0}), ("led", {})])
def test_texts_are_equal_token_by_token(kind: str, forced: dict[str, int], num_beams: int, tmp_path: Path) -> None:
    model = lively(kind)
    model.generation_config.update(**forced)  # type: ignore[union-attr, operator]
    ours = ours_of(model, tmp_path)
    source, real = sources([29, 17, 6], 29)
    is_global = global_tokens(kind, 29, which="varying")
    beams = {"num_beams": num_beams, "early_stopping": "never"} if num_beams > 1 else {}
    with torch.no_grad():
        expected = model.generate(  # type: ignore[operator]
            source, **told(real, is_global), max_new_tokens=30, do_sample=False, eos_token_id=STOPS, **beams
        )
    actual = generate(
        ours,
        source,
        max_new_tokens=30,
        temperature=0,
        num_beams=num_beams,
        stop_tokens=STOPS,
        pad_token=PAD,
        prompt_mask_BT=real,
        is_global_BT=is_global,
    )
    assert torch.equal(actual[:, : expected.shape[1]], expected)
    assert (actual[:, expected.shape[1] :] == PAD).all()
    assert len(expected.unique(dim=0)) == 3
    assert len(expected.unique()) > 5


# -- files and fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bare_models_and_old_files_are_read(kind: str, tmp_path: Path) -> None:
    """Without head and prefix; with the embedding under every name."""
    model = theirs(kind)
    model.final_logits_bias.zero_()  # type: ignore[operator, union-attr]
    ours = ours_of(model, tmp_path)
    bare = theirs(kind, "Model")
    bare.load_state_dict(model.get_submodule("model" if kind == "bart" else "led").state_dict())
    bare.save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    again = load_model(import_model(tmp_path / "bare", tmp_path / "again"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())

    file = tmp_path / "bare/model.safetensors"
    tensors = load_file(file)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    save_file({name: tensor for name, tensor in tensors.items() if name != "shared.weight"}, file, {"format": "pt"})
    assert load_model(import_model(tmp_path / "bare", tmp_path / "again", overwrite=True)).config == ours.config
    tensors["decoder.embed_tokens.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"decoder.embed_tokens.weight differs from .*shared.weight"):
        import_model(tmp_path / "bare", tmp_path / "again", overwrite=True)
    del tensors["encoder.layers.0.fc1.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"the weights lack 1 tensor .*encoder.layers.0.fc1.bias"):
        import_model(tmp_path / "bare", tmp_path / "again", overwrite=True)


def test_windows_count_both_sides_there(tmp_path: Path) -> None:
    ours = ours_of(theirs("led"), tmp_path)
    half = ours.config.encoder_half
    assert [half.head_groups(layer)[0].spec.window for layer in range(3)] == [Window.symmetric(n) for n in (2, 6, 3)]
    assert ours.position_offset == 0
    assert len(ours.encoder.position_embedding.weight) == 48  # type: ignore[union-attr]


def test_forced_tokens_are_read_from_where_transformers_reads_them(tmp_path: Path) -> None:
    """generation_config.json is heard alone where it says any of them; without it, config.json."""
    theirs("bart").save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    file = tmp_path / "hf/generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "forced_bos_token_id": 5, "decoder_start_token_id": 7}))
    found = plan_import(tmp_path / "hf").config
    assert [found[f"{name}_token"] for name in ("decoder_start", "forced_bos", "forced_eos")] == [7, 5, 2]
    del said["forced_eos_token_id"]
    file.write_text(json.dumps(said))
    assert plan_import(tmp_path / "hf").config["forced_eos_token"] is None
    file.unlink()
    assert plan_import(tmp_path / "hf").config["forced_eos_token"] == 2


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("bart", {"normalize_before": True}, "normalize_before=true cannot be translated"),
        ("bart", {"activation_function": "relu"}, "activation_function='relu' is not known; known are gelu"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=false cannot be translated"),
        ("bart", {"force_bos_token_to_be_generated": True}, "without forced_bos_token_id: transformers 4 and 5"),
        ("bart", {"num_hidden_layers": 7}, "num_hidden_layers=7 contradicts encoder_layers=3"),
        ("bart", {"relative_attention": 3}, "relative_attention=3 is no field that this version knows"),
        ("led", {"attention_window": [4, 12]}, "it is an even number, or one for each of 3 layers"),
        ("led", {"attention_window": 5}, "attention_window=5: it is an even number"),
        ("led", {"scale_embedding": True}, "scale_embedding=true cannot be translated"),
        ("led", {"d_model": 30}, "encoder: d_model=30 is not a multiple of n_heads=4"),
    ],
)
def test_fields_that_stand_in_the_way_are_named(
    kind: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    theirs(kind).save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConversionError) as caught:
        plan_import(tmp_path)
    assert said in str(caught.value)


# As the hub has them: what was written before 2021, and a fine-tuned one.
OLD_BART = {
    "_num_labels": 3,
    "activation_dropout": 0.1,
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "classif_dropout": 0.1,
    "early_stopping": True,
    "force_bos_token_to_be_generated": True,
    "forced_bos_token_id": 0,
    "gradient_checkpointing": False,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "normalize_embedding": True,
    "num_hidden_layers": 3,
    "output_past": True,
    "prefix": " ",
    "static_position_embeddings": False,
    "task_specific_params": {"summarization": {"num_beams": 4}},
    "torch_dtype": "float32",
}


def test_old_configs_are_read(tmp_path: Path) -> None:
    theirs("bart").save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "generation_config.json").unlink()
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **OLD_BART}))
    assert plan_import(tmp_path).config["forced_bos_token"] == 0


BART, LED = SEQ2SEQS["bart-tiny"], SEQ2SEQS["led-tiny"]
LOCAL = AttentionSpec(causal=True, window=Window.causal_keys(4))
MIXED = (
    HeadGroup(heads=2, spec=AttentionSpec(causal=False, window=Window.symmetric(2, dilation=2), global_tokens=True)),
    HeadGroup(heads=2, spec=AttentionSpec(causal=False, window=Window.symmetric(2), global_tokens=True)),
)


def plan(pattern: AttentionSpec | tuple[HeadGroup, ...]) -> AttentionPlan:
    return AttentionPlan(patterns={"p": pattern}, layers=("p",))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(BART, mlp="swiglu"), "bart cannot say mlp=swiglu"),
        (replace(BART, norm_eps=1e-6), "bart cannot say norm_eps=1e-06"),
        (replace(BART, position_offset=1), "bart cannot say position_offset=1"),
        (replace(BART, decoder=replace(BART.decoder, n_kv_heads=2)), "decoder.n_kv_heads=2 of decoder.n_heads=4"),
        (replace(BART, decoder=replace(BART.decoder, attention=plan(LOCAL))), "decoder.attention.patterns.p, which is"),
        (replace(BART, encoder=replace(BART.encoder, max_positions=9)), "encoder.max_positions=9 with decoder.max"),
        (replace(BART, cross_attention=AttentionSpec(causal=False, softcap=9.0)), "cross_attention with a scale or a"),
        (replace(LED, position_offset=2), "led cannot say position_offset=2"),
        (replace(LED, scale_embedding=True), "led cannot say scale_embedding=True"),
        (replace(LED, global_projections=False), "led cannot say in the encoder global_projections=False"),
        (replace(LED, encoder=replace(LED.encoder, attention=plan(MIXED))), "head groups in attention.patterns.p"),
    ],
)
def test_models_that_no_family_can_say_are_refused(config: Seq2SeqConfig, said: str) -> None:
    with pytest.raises(ConversionError) as caught:
        config_to(config)
    assert said in str(caught.value)


@pytest.mark.parametrize("config", [BART, LED], ids=["bart", "led"])
def test_models_of_our_own_go_out_and_write_there(config: Seq2SeqConfig, tmp_path: Path) -> None:
    config = replace(config, decoder_start_token=9, forced_bos_token=4)
    ours = from_config(config, seed=0).eval()
    save_model(ours, tmp_path / "ours")
    back = export_model(tmp_path / "ours", tmp_path / "back", eos_token_id=2)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(back).eval()
    source = drawn(2, 20)
    expected = generate(ours, source, max_new_tokens=6, temperature=0)
    actual = model.generate(source, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    assert torch.equal(actual, expected)
    assert expected[:, :2].tolist() == [[9, 4], [9, 4]]
    again = load_model(import_model(back, tmp_path / "again"))
    assert config_to(again.config)[1] == config_to(config)[1]
    assert torch.equal(generate(again, source, max_new_tokens=6, temperature=0), expected)  # type: ignore[arg-type]
