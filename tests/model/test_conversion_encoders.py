"""BERT, RoBERTa and Longformer directories as transformers writes them: imported with equal numbers, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext, Window
from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import EncoderConfig
from longspan.model.conversion import ConversionError, export_model, import_model
from longspan.model.encoder import Encoder, left_padded
from longspan.model.zoo import build

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
V, PAD = 97, 1
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KINDS = {
    "bert": {"type_vocab_size": 3, "pad_token_id": 0},
    "roberta": {"type_vocab_size": 2, "pad_token_id": PAD},
    "longformer": {"type_vocab_size": 2, "pad_token_id": PAD, "attention_window": [4, 12, 6], "sep_token_id": 2},
}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "longformer": "Longformer"}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers says on which windows it pads; nothing here is about that."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def theirs(kind: str, head: str, **changes: object) -> nn.Module:
    """A tiny random one, norms and biases random too, so that none is forgotten or swapped."""
    labels = {"num_labels": 3} if head == "ForSequenceClassification" else {}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**SIZES, **KINDS[kind], **labels, **changes})
    model = getattr(transformers, f"{CLASSES[kind]}{head}")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if scale else 0.0, 0.15, generator=generator)
    return model.eval()


def drawn(n_rows: int, n_tokens: int) -> Tensor:
    """Random tokens, none of them the padding."""
    return torch.randint(3, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def output(result: Any) -> Tensor:
    if hasattr(result, "start_logits"):
        return torch.stack([result.start_logits, result.end_logits], dim=-1)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def settings(kind: str, *, lengths: list[int], n_tokens: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Tokens, what transformers is told beside them, and which tokens are global."""
    tokens = drawn(len(lengths), n_tokens)
    real = torch.arange(n_tokens)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.where(real, tokens, KINDS[kind]["pad_token_id"])
    types = ((torch.arange(n_tokens)[None] >= 3) & real).long()
    told = {"attention_mask": real.long(), "token_type_ids": types}
    is_global = torch.zeros(len(lengths), n_tokens, dtype=torch.bool)
    if kind == "longformer":
        is_global[:, 0] = True
        is_global[0, [4, n_tokens - 1]] = True
        is_global[-1, 0] = False  # a row without any
        told["global_attention_mask"] = is_global.long()
    return tokens, told, is_global


# 24 is a multiple of every window, 29 of none: transformers pads to one, here there is nothing to pad.
@pytest.mark.parametrize("n_tokens", [24, 29])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, head: str, n_tokens: int, tmp_path: Path) -> None:
    model = theirs(kind, head)
    model.save_pretrained(tmp_path / "hf")
    ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    assert isinstance(ours, Encoder)
    lengths = [n_tokens, 17, 2]
    tokens, told, is_global = settings(kind, lengths=lengths, n_tokens=n_tokens)
    context = AttentionContext(is_global=is_global)
    real = told["attention_mask"].bool()
    with torch.no_grad():
        expected = output(model(tokens, **told))
        found = ours(tokens, context, lengths_B=torch.tensor(lengths), token_types_BT=told["token_type_ids"])
        if head != "ForSequenceClassification":
            expected, found = expected[real], found[real]
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)

    back = export_model(tmp_path / "ours", tmp_path / "back")
    again, report = type(model).from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        exported = output(again.eval()(tokens, **told))
    torch.testing.assert_close(exported if exported.dim() == 2 else exported[real], expected, atol=1e-6, rtol=0)
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(back / "model.safetensors")
    bare = f"{kind}."
    assert {name.removeprefix(bare) for name in before} == {name.removeprefix(bare) for name in after}
    was, written = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", back))
    assert {name: value for name, value in written.items() if name in was} == {
        name: was[name] for name in written if name in was
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_pooler(kind: str, tmp_path: Path) -> None:
    model = theirs(kind, "Model")
    model.save_pretrained(tmp_path / "hf")
    ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    tokens = drawn(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.pooled(ours.hidden(tokens)),  # type: ignore[operator]
            model(tokens).pooler_output,
            atol=TOLERANCE,
            rtol=0,
        )


def test_roberta_padded_on_the_left(tmp_path: Path) -> None:
    """transformers finds RoBERTa's positions by counting what is no padding, so that both sides mean the same."""
    model = theirs("roberta", "Model")
    model.save_pretrained(tmp_path / "hf")
    ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    tokens, lengths = drawn(2, 12), torch.tensor([12, 5])
    tokens[1, :7] = PAD
    real = tokens != PAD
    with torch.no_grad():
        expected = model(tokens, attention_mask=real.long()).last_hidden_state
        found = ours(tokens, left_padded(lengths, 12))
    torch.testing.assert_close(found[real], expected[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_other_activations(activation: str, tmp_path: Path) -> None:
    model = theirs("bert", "ForMaskedLM", hidden_act=activation)
    model.save_pretrained(tmp_path / "hf")
    ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    tokens = drawn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, atol=TOLERANCE, rtol=0)


def test_what_the_config_says(tmp_path: Path) -> None:
    theirs("longformer", "ForSequenceClassification", id2label={0: "no", 1: "yes"}, num_labels=2).save_pretrained(
        tmp_path / "hf"
    )
    config = load_model(import_model(tmp_path / "hf", tmp_path / "ours")).config
    assert isinstance(config, EncoderConfig)
    assert (config.labels, config.max_positions, config.position_offset) == (("no", "yes"), 64, 2)
    # transformers' window counts both sides together.
    windows = [config.head_groups(layer)[0].spec.window for layer in range(3)]
    assert windows == [Window.symmetric(2), Window.symmetric(6), Window.symmetric(3)]
    written = json.loads((export_model(tmp_path / "ours", tmp_path / "back") / "config.json").read_text())
    assert written["id2label"] == {"0": "no", "1": "yes"}
    assert (written["pad_token_id"], written["attention_window"]) == (1, [4, 12, 6])


def test_files_as_they_were_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """bert-base-uncased: TensorFlow's names of norms, a buffer, tied tensors twice, and the head of an objective that
    nobody trains any more."""
    model = theirs("bert", "ForPreTraining")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(66)[None]
    config = {**model.config.to_dict(), "architectures": ["BertForMaskedLM"], "dtype": None}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "hf/model.safetensors")
    with caplog.at_level(logging.WARNING, "longspan.model"):
        ours = load_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    assert "not imported: cls.seq_relationship.bias, cls.seq_relationship.weight (the head for next-" in caplog.text
    assert isinstance(ours.config, EncoderConfig)
    assert (ours.config.pooler, ours.config.head) == (True, "mlm")
    tokens = drawn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).prediction_logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu' is not known; known are gelu, gelu_new"),
        ("bert", {"is_decoder": True}, "is_decoder=true cannot be translated"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' cannot be"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "there is no such head here; known are BertModel"),
        ("bert", {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("bert", {"rope_scaling": {}}, "rope_scaling={} is no field that this version knows"),
        ("bert", {"hidden_size": 64}, "contradict config.json in shape: bert.embeddings"),
        ("roberta", {"architectures": ["RobertaForMaskedLM"]}, "the weights lack 5 tensors"),
        (
            "roberta",
            {"architectures": ["RobertaForMaskedLM"], "hidden_act": "gelu_new"},
            "the masked-LM head has the exact GELU",
        ),
        ("longformer", {"attention_window": [4, 8]}, "an even number, or one for each of 3 layers"),
        ("longformer", {"attention_window": 5}, "attention_window=5: it is an even number"),
        ("longformer", {"attention_mode": "tvm"}, "attention_mode='tvm' cannot be translated"),
        (
            "longformer",
            {"architectures": ["LongformerForSequenceClassification"], "id2label": {"0": "a", "2": "b"}},
            "does not number its labels from 0 on",
        ),
    ],
)
def test_refusals_of_imports(kind: str, change: dict[str, object], said: str, tmp_path: Path) -> None:
    theirs(kind, "Model").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConversionError) as caught:
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert said in str(caught.value)
    assert not (tmp_path / "ours").exists()


WIDE = {"patterns": {"p": {"causal": False, "window": {"left": 3, "right": 2}, "global_tokens": True}}, "layers": ["p"]}
GROUPS = {
    "patterns": {
        "p": [
            {"heads": 2, "spec": {"causal": False, "window": {"left": 3, "right": 3}, "global_tokens": True}},
            {
                "heads": 2,
                "spec": {"causal": False, "window": {"left": 3, "right": 3, "dilation": 2}, "global_tokens": True},
            },
        ]
    },
    "layers": ["p"],
}


@pytest.mark.parametrize(
    ("name", "overrides", "model_type", "said"),
    [
        ("bert-tiny", {"norm_order": "pre"}, None, "bert cannot say norm_order=pre"),
        ("bert-tiny", {"positions": "rope"}, "bert", "bert cannot say positions=rope"),
        ("bert-tiny", {"n_types": 0}, "bert", "n_types=0"),
        ("bert-tiny", {"tied_head": False}, "bert", "tied_head=False"),
        ("bert-tiny", {}, "roberta", "position_offset=0"),
        ("longformer-tiny", {}, "roberta", "window in attention.patterns.layer"),
        ("longformer-tiny", {"attention": WIDE}, "longformer", "more than a symmetric window and global tokens"),
        ("longformer-tiny", {"attention": GROUPS}, "longformer", "head groups in attention.patterns.p"),
        ("longformer-tiny", {"mlp": "gelu_tanh"}, "longformer", "mlp=gelu_tanh with head=mlm, whose GELU is exact"),
    ],
)
def test_refusals_of_exports(
    name: str, overrides: dict[str, object], model_type: str | None, said: str, tmp_path: Path
) -> None:
    save_model(build(name, overrides, seed=0), tmp_path / "ours")
    with pytest.raises(ConversionError) as caught:
        export_model(tmp_path / "ours", tmp_path / "hf", model_type=model_type)
    assert said in str(caught.value)


def test_an_export_finds_its_family(tmp_path: Path) -> None:
    for name, overrides, expected in (
        ("bert-tiny", {}, "bert"),
        ("bert-tiny", {"position_offset": 2}, "roberta"),
        ("longformer-tiny", {}, "longformer"),
    ):
        directory = tmp_path / expected
        model = build(name, overrides, seed=0)
        save_model(model, directory / "ours")
        written = json.loads((export_model(directory / "ours", directory / "hf") / "config.json").read_text())
        assert written["model_type"] == expected
        again = load_model(import_model(directory / "hf", directory / "again"))
        assert again.config.head_groups(0)[0].spec.window == model.config.head_groups(0)[0].spec.window  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
