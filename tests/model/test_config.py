"""What a model config refuses, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.kernels.attention import AttentionSpec, BlockLayout, Window
from longspan.model.config import (
    AttentionPlan,
    DecoderConfig,
    HeadGroup,
    ModelConfigError,
    from_dict,
    plan_from_dict,
    to_dict,
)
from longspan.model.zoo import CONFIGS, configure

CAUSAL = AttentionSpec(causal=True)


def problems(**fields: object) -> tuple[str, ...]:
    with pytest.raises(ModelConfigError) as caught:
        DecoderConfig(**fields)  # type: ignore[arg-type]
    return caught.value.problems


def grouped(*heads: int) -> AttentionPlan:
    return AttentionPlan(patterns={"p": tuple(HeadGroup(heads=n, spec=CAUSAL) for n in heads)}, layers=("p",))


def test_all_problems_come_at_once() -> None:
    found = problems(n_heads=7, n_kv_heads=3, dropout=1.0, norm="batchnorm", init_std=0.0)
    assert [text.split("=")[0] for text in found] == ["norm", "init_std", "dropout", "d_model", "n_heads"]
    with pytest.raises(
        ModelConfigError, match=r"dropout=1\.0: a probability in \[0, 1\); d_model=768 is not a multiple"
    ):
        DecoderConfig(n_heads=7, dropout=1.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_heads": 7}, "d_model=768 is not a multiple of n_heads=7"),
        ({"n_kv_heads": 5}, "n_heads=12 is not a multiple of n_kv_heads=5"),
        ({"n_kv_heads": 24}, "n_heads=12 is not a multiple of n_kv_heads=24"),
        ({"n_kv_heads": 0}, "n_kv_heads=0: it is at least 1"),
        ({"head_dim": 33, "positions": "rope"}, "head_dim=33 with positions=rope"),
        ({"d_model": 36, "n_heads": 12, "positions": "rope"}, "head_dim=3 with positions=rope"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"positions": "sine"}, "positions='sine': it is one of learned, sinusoidal, rope, alibi, none"),
        ({"mlp": "relu"}, "mlp='relu': it is one of gelu, gelu_tanh, swiglu"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"attention": grouped(6, 5)}, "[6, 5] heads, 11 together, but n_heads=12"),
        ({"attention": grouped()}, "have [] heads; each group has at least 1"),
        ({"attention": grouped(12, 0)}, "have [12, 0] heads; each group has at least 1"),
        ({"attention": grouped(9, 3), "n_kv_heads": 6}, "groups of [9, 3] heads split a key/value head"),
        (
            {"attention": AttentionPlan(patterns={"p": AttentionSpec(causal=False)}, layers=("p",))},
            "attention.patterns.p: causal=false, but a decoder predicts the next token",
        ),
        (
            {
                "attention": AttentionPlan(
                    patterns={
                        "p": AttentionSpec(causal=True, block_sparse=BlockLayout.from_rows([[1] * 7] * 8, kv_block=128))
                    },
                    layers=("p",),
                )
            },
            "block_sparse covers 896 positions, but max_positions=1024",
        ),
    ],
)
def test_each_refusal_names_the_value_and_what_is_allowed(fields: dict[str, object], said: str) -> None:
    found = problems(**fields)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"n_heads": 7, "head_dim": 33},  # heads need not divide the width when their size is given
        {"head_dim": 33, "positions": "learned"},
        {"n_kv_heads": 12},
        {"n_kv_heads": 1, "attention": grouped(12)},
        {"attention": grouped(8, 4), "n_kv_heads": 6},
        {"dropout": 0.999},
        {"d_ff": 1, "n_layers": 1, "vocab_size": 1, "max_positions": 1},
    ],
)
def test_the_other_side_of_each_boundary(fields: dict[str, object]) -> None:
    DecoderConfig(**fields)  # type: ignore[arg-type]


def test_derived_sizes_follow_overrides() -> None:
    config = configure("gpt2-small", {"d_model": 384, "n_heads": 6})
    assert (config.dim_per_head, config.kv_heads) == (64, 6)
    assert replace(config, n_kv_heads=2).kv_heads == 2


def test_alibi_positions_reach_every_spec() -> None:
    plan = AttentionPlan(
        patterns={"a": CAUSAL, "b": (HeadGroup(heads=4, spec=CAUSAL), HeadGroup(heads=8, spec=CAUSAL))},
        layers=("a", "b"),
    )
    config = DecoderConfig(positions="alibi", attention=plan)
    assert all(spec.alibi for specs in config.attention.specs().values() for spec in specs)
    assert not any(spec.alibi for specs in plan.specs().values() for spec in specs)
    assert from_dict(to_dict(config)) == config
    single = AttentionPlan(patterns={"a": AttentionSpec(causal=True, alibi=True), "b": CAUSAL}, layers=("a", "b"))
    assert DecoderConfig(positions="rope", attention=single).attention == single


def test_layers_repeat_and_only_used_patterns_count() -> None:
    plan = AttentionPlan(
        patterns={"local": AttentionSpec(causal=True, window=Window(left=3)), "full": CAUSAL, "spare": CAUSAL},
        layers=("local", "local", "full"),
    )
    config = DecoderConfig(n_layers=5, attention=plan)
    assert [config.attention.of_layer(layer)[0] for layer in range(5)] == ["local", "local", "full", "local", "local"]
    assert list(config.pattern_groups()) == ["local", "full"]
    assert config.head_groups(2) == (HeadGroup(heads=12, spec=CAUSAL),)


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_zoo_survives_json(name: str) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(CONFIGS[name])))) == CONFIGS[name]


windows = st.builds(
    Window, left=st.none() | st.integers(0, 5), right=st.none() | st.just(0), dilation=st.integers(1, 3)
)
layouts = st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=8, max_size=8).map(
    lambda rows: BlockLayout.from_rows(rows, q_block=128, kv_block=128)
)
specs = st.builds(
    AttentionSpec,
    causal=st.just(True),
    window=windows,
    global_tokens=st.booleans(),
    documents=st.booleans(),
    softcap=st.none() | st.floats(0.5, 50),
    sink_tokens=st.integers(0, 4),
    scale=st.none() | st.floats(0.01, 2),
    dropout=st.floats(0, 0.5),
    block_sparse=st.none() | layouts,
)
patterns = specs | st.tuples(
    st.builds(HeadGroup, heads=st.just(4), spec=specs), st.builds(HeadGroup, heads=st.just(8), spec=specs)
)


@settings(max_examples=25, deadline=None)
@given(kinds=st.dictionaries(st.text("abc", min_size=1), patterns, min_size=1, max_size=3), alibi=st.booleans())
def test_any_plan_survives_json(kinds: dict[str, object], alibi: bool) -> None:
    plan = AttentionPlan(patterns=kinds, layers=tuple(kinds))  # type: ignore[arg-type]
    config = DecoderConfig(attention=plan, positions="alibi" if alibi else "learned")
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"n_head": 12}, "n_head: unknown key; did you mean 'n_heads'?"),
        ({"zzz": 1}, "zzz: unknown key; known: architecture, vocab_size"),
        ({"n_layers": "twelve"}, "n_layers='twelve': it is a whole number"),
        ({"n_layers": 12.0}, "n_layers=12.0: it is a whole number"),
        ({"n_layers": True}, "n_layers=True: it is a whole number"),
        ({"bias": 1}, "bias=1: it is true or false"),
        ({"dropout": "0.1"}, "dropout='0.1': it is a number"),
        ({"positions": "rotary"}, "positions='rotary': it is one of learned, sinusoidal, rope"),
        ({"architecture": "encodr"}, "architecture='encodr': it is one of decoder, encoder"),
        ({"attention": []}, "attention: a mapping of keys, not []"),
        ({"attention": {"patterns": {"a": {}}, "layers": ["a"]}}, "attention.patterns.a: 'causal' is missing"),
        ({"attention": {"patterns": {"a": {"causal": True, "windw": {}}}, "layers": ["a"]}}, "did you mean 'window'?"),
        (
            {"attention": {"patterns": {"a": {"causal": True, "window": {"left": -1}}}, "layers": ["a"]}},
            "attention.patterns.a.window: window.left=-1",
        ),
        (
            {"attention": {"patterns": {"a": [{"heads": 12, "spec": {"causal": 3}}]}, "layers": ["a"]}},
            "attention.patterns.a[0].spec.causal=3: it is true or false",
        ),
        ({"attention": {"layers": ["a"]}}, "attention.layers names the pattern 'a', but attention.patterns has full"),
        ({"attention": {"layers": "full"}}, "attention.layers: a list, not 'full'"),
    ],
)
def test_wrong_plain_data_is_named_by_its_path(raw: dict[str, object], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        from_dict(raw)
    assert len(caught.value.problems) == 1
    assert said in str(caught.value)


def test_wrong_plain_data_comes_all_at_once() -> None:
    with pytest.raises(ModelConfigError) as caught:
        from_dict({"n_head": 1, "bias": "yes", "attention": {"layer": []}})
    assert len(caught.value.problems) == 3


def test_plan_from_dict() -> None:
    plan = plan_from_dict({"patterns": {"a": {"causal": True, "window": {"left": 4}}}, "layers": ["a"]})
    assert plan.specs() == {"a": (AttentionSpec(causal=True, window=Window(left=4)),)}


# -- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("gpt2-smal", {}, "no model is named 'gpt2-smal'; did you mean 'gpt2-small'? known: gpt2-small"),
        ("llama-20m", {"n_kv_head": 2}, "n_kv_head: unknown key; did you mean 'n_kv_heads'?"),
        ("llama-20m", {"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
    ],
)
def test_configure_refuses_by_name(name: str, overrides: dict[str, object], said: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        configure(name, overrides)
    assert said in str(caught.value)


def test_configure_takes_attention_as_data_or_object() -> None:
    raw = {"patterns": {"local": {"causal": True, "window": {"left": 7, "right": 0}}}, "layers": ["local"]}
    config = configure("llama-tiny", {"attention": raw})
    assert config == configure("llama-tiny", {"attention": plan_from_dict(raw)})
    assert config.attention.of_layer(1) == ("local", AttentionSpec(causal=True, window=Window.causal_keys(8)))
