"""What an encoder's config refuses, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.checkpoint_files import CheckpointError, load_config, load_decoder_config
from longspan.model.config import AttentionPlan, EncoderConfig, HeadGroup, ModelConfigError, from_dict, to_dict
from longspan.model.zoo import ENCODERS, configure

LOCAL = AttentionSpec(causal=False, window=Window.symmetric(4), global_tokens=True)


def plan(*groups: HeadGroup, spec: AttentionSpec = LOCAL) -> AttentionPlan:
    return AttentionPlan(patterns={"p": groups or spec}, layers=("p",))


def problems(**fields: object) -> tuple[str, ...]:
    with pytest.raises(ModelConfigError) as caught:
        EncoderConfig(**fields)  # type: ignore[arg-type]
    return caught.value.problems


def test_all_problems_come_at_once() -> None:
    found = problems(n_heads=7, norm_order="sandwich", n_types=-1, head="classification", head_dropout=1.0)
    assert [text.split("=")[0].split(" ")[0] for text in found] == [
        "norm_order",
        "head_dropout",
        "n_types",
        "labels",
        "pooler",
        "d_model",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"attention": plan(spec=AttentionSpec(causal=True))},
            "attention.patterns.p: causal=true, but an encoder",
        ),
        ({"attention": plan(HeadGroup(heads=5, spec=LOCAL))}, "[5] heads, 5 together, but n_heads=12"),
        ({"position_offset": 2, "positions": "rope"}, "position_offset=2 with positions=rope"),
        ({"position_offset": -1}, "position_offset=-1: it is 0 or more"),
        ({"labels": ("a", "b")}, "labels=['a', 'b'] with head=mlm: only head=classification has classes"),
        ({"head": "classification", "pooler": True, "labels": ()}, "names at least 1 class"),
        ({"head": "classification", "labels": ("a", "b")}, "pooler=False: head=classification reads the pooled"),
        ({"global_projections": True}, "global_projections=True, but no layer's attention has global_tokens"),
        (
            {
                "global_projections": True,
                "attention": plan(
                    HeadGroup(heads=6, spec=LOCAL), HeadGroup(heads=6, spec=replace(LOCAL, global_tokens=False))
                ),
            },
            "attention.patterns.p: with global_projections its groups have global_tokens all or none",
        ),
        (
            {"global_projections": True, "attention": plan(spec=replace(LOCAL, learned_sink=True))},
            "attention.patterns.p: learned_sink does not go with global_projections",
        ),
    ],
)
def test_each_refusal_names_the_value_and_what_is_allowed(fields: dict[str, object], said: str) -> None:
    found = problems(**fields)
    assert len(found) == 1
    assert said in found[0]


def test_alibi_positions_reach_every_spec() -> None:
    assert EncoderConfig(positions="alibi", attention=plan()).attention.of_layer(0)[1] == replace(LOCAL, alibi=True)


def test_layers_without_global_tokens_have_no_global_projections() -> None:
    attention = AttentionPlan(patterns={"a": LOCAL, "b": replace(LOCAL, global_tokens=False)}, layers=("a", "b"))
    config = EncoderConfig(attention=attention, global_projections=True)
    assert [config.has_global_projections(layer) for layer in range(3)] == [True, False, True]
    assert not EncoderConfig(attention=attention).has_global_projections(0)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_zoo_survives_json(name: str) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(ENCODERS[name])))) == ENCODERS[name]


def test_labels_and_groups_survive_json() -> None:
    groups = (HeadGroup(heads=4, spec=LOCAL), HeadGroup(heads=8, spec=replace(LOCAL, window=Window.symmetric(4, 2))))
    config = EncoderConfig(head="classification", pooler=True, labels=("no", "yes"), attention=plan(*groups))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"architecture": "encoder", "n_type": 2}, "n_type: unknown key; did you mean 'n_types'?"),
        ({"architecture": "encoder", "labels": [1]}, "labels[0]=1: it is a text"),
        ({"n_types": 2}, "n_types: unknown key"),  # without an architecture it is a decoder
        ({"architecture": ["encoder"]}, "architecture=['encoder']: it is one of decoder, encoder"),
    ],
)
def test_wrong_plain_data_is_named_by_its_path(raw: dict[str, object], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        from_dict(raw)
    assert len(caught.value.problems) == 1
    assert said in str(caught.value)


def test_configure_takes_encoders() -> None:
    config = configure("longformer-tiny", {"n_layers": 3})
    assert isinstance(config, EncoderConfig)
    assert (config.n_layers, config.position_offset, config.global_projections) == (3, 2, True)


def test_a_checkpoint_of_an_encoder_is_no_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(ENCODERS["bert-tiny"])))
    assert load_config(tmp_path) == ENCODERS["bert-tiny"]
    with pytest.raises(CheckpointError, match="holds an encoder; this needs a decoder"):
        load_decoder_config(tmp_path)
