"""Accounting of encoders against counts of what really happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.model import accounting
from longspan.model.attention_pairs import attention_pairs, pairs_by_length
from longspan.model.config import AttentionPlan, EncoderConfig
from longspan.model.encoder import from_config
from longspan.model.zoo import ENCODERS

# transformers' BertForMaskedLM, RobertaForMaskedLM and LongformerForMaskedLM of the published configs.
PUBLISHED = {
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "longformer-base": 148_711_257,
}
BASE = ENCODERS["longformer-tiny"]


def check(config: EncoderConfig) -> None:
    model = from_config(config, device="meta")
    count = accounting.parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.blocks == sum(parameter.numel() for parameter in model.blocks.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_equal_the_models(name: str) -> None:
    check(ENCODERS[name])
    if name in PUBLISHED:
        assert accounting.parameters(ENCODERS[name]).total == PUBLISHED[name]


@pytest.mark.parametrize(
    "overrides",
    [
        {"bias": False},
        {"norm": "rmsnorm", "norm_order": "pre", "mlp": "swiglu"},
        {"n_types": 0, "positions": "rope", "position_offset": 0, "n_kv_heads": 2, "head_dim": 24},
        {"head": "none", "pooler": True, "bias": False},
        {"head": "mlm", "tied_head": False},
        {"head": "classification", "pooler": True, "labels": ("a", "b", "c")},
        {"head": "qa", "global_projections": False},
        {
            "n_layers": 3,
            "attention": AttentionPlan(
                patterns={
                    "global": AttentionSpec(causal=False, global_tokens=True),
                    "sink": AttentionSpec(causal=False, learned_sink=True),
                },
                layers=("global", "sink"),
            ),
        },
    ],
)
def test_parameters_of_every_switch(overrides: dict[str, object]) -> None:
    check(replace(BASE, **overrides))  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["none", "mlm", "qa", "classification"])
def test_forward_flops_equal_the_counted_matrix_products(head: str) -> None:
    labels = ("a", "b", "c") if head == "classification" else ()
    config = replace(ENCODERS["bert-tiny"], head=head, labels=labels, pooler=head == "classification", n_kv_heads=2)  # type: ignore[arg-type]
    model = from_config(config, seed=0).eval()
    model.set_backend("reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 37, dtype=torch.int64))
    assert accounting.forward_flops(config, length=37) == counter.get_total_flops()


@pytest.mark.parametrize("n_global", [1, 16])  # other numbers are filled up with rows that count for nothing
def test_global_tokens_cost_their_projections_and_rows(n_global: int) -> None:
    """The reference multiplies every pair; a window as wide as the sequence lets the formula count every pair too."""
    spec = AttentionSpec(causal=False, window=Window.symmetric(40), global_tokens=True)
    config = replace(BASE, attention=AttentionPlan(patterns={"p": spec}, layers=("p",)))
    model = from_config(config, seed=0).eval()
    model.set_backend("reference")
    is_global = torch.zeros(1, 37, dtype=torch.bool)
    is_global[:, :n_global] = True
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 37, dtype=torch.int64), AttentionContext(is_global=is_global))
    assert accounting.forward_flops(config, length=37, n_global=n_global) == counter.get_total_flops()
    without = accounting.forward_flops(config, length=37)
    assert accounting.training_flops_per_token(config, length=37) == 3 * without / 37


def test_a_window_makes_attention_linear() -> None:
    config = ENCODERS["longformer-base"]
    pairs = [
        attention_pairs(config.attention.patterns["layer"], length, n_global=1)  # type: ignore[arg-type]
        for length in (8192, 16384, 32768)
    ]
    assert (pairs[2] - pairs[1]) / (pairs[1] - pairs[0]) == pytest.approx(2, rel=1e-3)


sides = st.none() | st.integers(0, 9)
specs = st.builds(
    AttentionSpec,
    causal=st.booleans(),
    window=st.builds(Window, left=sides, right=sides, dilation=st.integers(1, 4)),
    sink_tokens=st.integers(0, 5),
    documents=st.booleans(),
    global_tokens=st.booleans(),
    block_sparse=st.none()
    | st.integers(0, 2**32 - 1).map(
        lambda bits: BlockLayout.from_rows(
            [[bits >> (8 * i + j) & 1 for j in range(8)] for i in range(4)], q_block=16, kv_block=8
        )
    ),
)


@settings(max_examples=25, deadline=None)
@given(spec=specs, documents=st.lists(st.integers(1, 20), min_size=1, max_size=3), n_global=st.integers(0, 4))
def test_attention_pairs_equal_the_definition(spec: AttentionSpec, documents: list[int], n_global: int) -> None:
    length = sum(documents)
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None]
    places = torch.cat([torch.arange(count) for count in documents])
    is_global = (places if spec.documents else torch.arange(length))[None] < n_global
    context = AttentionContext(q_documents=ids, kv_documents=ids, is_global=is_global)
    allowed = context.allowed(spec, slice(0, length), slice(0, length)).expand(1, length, length)
    assert attention_pairs(spec, length, documents=documents, n_global=n_global) == int(allowed.sum())
    if spec.block_sparse is None and spec.documents:
        by_length = pairs_by_length(spec, documents)
        assert sum(by_length[count] for count in documents) == attention_pairs(spec, length, documents=documents)


def test_packed_documents_of_an_encoder_are_counted() -> None:
    spec = AttentionSpec(causal=False, window=Window.symmetric(3), documents=True)
    config = replace(ENCODERS["bert-tiny"], attention=AttentionPlan(patterns={"p": spec}, layers=("p",)))
    each = accounting.forward_flops(config, length=24, documents=[10, 10, 4])
    found = accounting.packed_training_flops_per_token(config, length=24, documents={10: 2.0, 4: 1.0})
    assert found == pytest.approx(3 * each / 24, rel=1e-12)
