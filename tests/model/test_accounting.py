"""Accounting against counts of what really happens: parameters, matrix products, visible pairs, bytes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.model import accounting
from longspan.model.cache import ContiguousCache, cache_bytes
from longspan.model.config import AttentionPlan, DecoderConfig, HeadGroup
from longspan.model.decoder import from_config
from longspan.model.zoo import DECODERS, build, configure

PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
LADDER = {
    "llama-20m": 20_746_496,
    "llama-60m": 57_221_632,
    "llama-150m": 148_759_296,
    "llama-300m": 292_725_760,
    "llama-600m": 607_089_920,
    "llama-1b": 975_505_408,
    "llama-1.3b": 1_319_454_720,
    "gpt-tiny": 124_672,
    "llama-tiny": 119_104,
}

SINKS = AttentionPlan(
    patterns={
        "a": (
            HeadGroup(heads=2, spec=AttentionSpec(causal=True, learned_sink=True)),
            HeadGroup(heads=2, spec=AttentionSpec(causal=True)),
        ),
        "b": AttentionSpec(causal=True, learned_sink=True),
    },
    layers=("a", "b"),
)


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_equal_the_models(name: str) -> None:
    model = from_config(DECODERS[name], device="meta")
    count = accounting.parameters(DECODERS[name])
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.blocks == sum(parameter.numel() for parameter in model.blocks.parameters())
    assert count.embedding == model.embedding.weight.numel()
    expected = {**PUBLISHED, **LADDER}.get(name)
    assert expected is None or count.total == expected


@pytest.mark.parametrize("base", ["gpt-tiny", "llama-tiny"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"bias": True},
        {"bias": False},
        {"bias": False, "qkv_bias": True},
        {"bias": True, "qkv_bias": False, "out_bias": False},
        {"positions": "sinusoidal"},
        {"qk_norm": True, "head_dim": 24},
        {"norm": "layernorm", "bias": False},
        {"norm": "rmsnorm", "bias": True},
        {"positions": "none", "tied_head": True},
        {"n_kv_heads": 1, "mlp": "swiglu", "tied_head": False},
        {"attention": SINKS, "n_layers": 3},
    ],
)
def test_parameters_of_every_switch(base: str, overrides: dict[str, object]) -> None:
    config = configure(base, overrides)
    model = from_config(config, device="meta")
    count = accounting.parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    of_attention = sum(p.numel() for block in model.blocks for p in block.attention.parameters())
    assert count.attention == of_attention
    assert count.mlp == sum(p.numel() for block in model.blocks for p in block.mlp.parameters())


@pytest.mark.parametrize("overrides", [{}, {"n_kv_heads": 1}, {"head_dim": 24}, {"n_layers": 3, "d_ff": 100}])
@pytest.mark.parametrize("base", ["gpt-tiny", "llama-tiny"])
def test_forward_flops_equal_the_counted_matrix_products(base: str, overrides: dict[str, object]) -> None:
    """The reference multiplies all T × T pairs, which is what `causal_halved=False` charges a full layer for."""
    model = build(base, overrides, seed=0).eval()
    model.set_backends(train="reference")
    length = 37
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    assert accounting.forward_flops(model.config, length=length, causal_halved=False) == counter.get_total_flops()


def test_linear_flops_equal_a_hook_count_and_halving_touches_only_attention() -> None:
    model = build("llama-tiny", {"attention": SINKS}, seed=0)
    length, flops = 41, 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        nonlocal flops
        assert isinstance(module, torch.nn.Linear)
        flops += 2 * inputs[0].shape[:-1].numel() * module.weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, length, dtype=torch.int64))
    config = model.config
    flops += 2 * length * config.d_model * config.vocab_size  # the head is applied by weight, not by module
    pairs = length * (length + 1) // 2
    attention = 4 * config.dim_per_head * config.n_heads * pairs * config.n_layers
    assert accounting.forward_flops(config, length=length) == flops + attention
    assert accounting.training_flops_per_token(config, length=length) == 3 * (flops + attention) / length


specs = st.builds(
    AttentionSpec,
    causal=st.just(True),
    window=st.builds(Window, left=st.none() | st.integers(0, 9), dilation=st.integers(1, 4)),
    sink_tokens=st.integers(0, 5),
    documents=st.booleans(),
    block_sparse=st.none()
    | st.integers(0, 2**32 - 1).map(
        lambda bits: BlockLayout.from_rows(
            [[bits >> (8 * i + j) & 1 for j in range(8)] for i in range(4)], q_block=16, kv_block=8
        )
    ),
)


@settings(max_examples=25, deadline=None)
@given(spec=specs, documents=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_attention_pairs_equal_the_definition(spec: AttentionSpec, documents: list[int]) -> None:
    length = sum(documents)
    ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None]
    context = AttentionContext(q_documents=ids, kv_documents=ids)
    allowed = context.allowed(spec, slice(0, length), slice(0, length)).expand(1, length, length)
    assert accounting.attention_pairs(spec, length, documents=documents) == int(allowed.sum())


@settings(max_examples=25, deadline=None)
@given(
    spec=specs.filter(lambda spec: spec.block_sparse is None),
    splits=st.lists(st.sets(st.integers(1, 23), max_size=5), min_size=1, max_size=3),
)
def test_packed_flops_are_the_mean_over_the_sequences(spec: AttentionSpec, splits: list[set[int]]) -> None:
    """Each split cuts a sequence of 24 into documents; the other heads of the layer do not look at documents."""
    groups = (HeadGroup(heads=2, spec=spec), HeadGroup(heads=2, spec=AttentionSpec(causal=True)))
    plan = AttentionPlan(patterns={"mixed": groups}, layers=("mixed",))
    config = configure("llama-tiny", {"attention": plan})
    sequences = [[b - a for a, b in pairwise([0, *sorted(split), 24])] for split in splits]
    mean = Counter(length for documents in sequences for length in documents)
    total = sum(accounting.forward_flops(config, length=24, documents=documents) for documents in sequences)
    found = accounting.packed_training_flops_per_token(
        config, length=24, documents={length: number / len(sequences) for length, number in mean.items()}
    )
    assert found == pytest.approx(3 * total / len(sequences) / 24, rel=1e-12)


def test_packed_flops_refuse_what_they_cannot_count() -> None:
    config = DECODERS["llama-tiny"]
    with pytest.raises(ValueError, match="add up to 23 tokens a sequence, not to length=24"):
        accounting.packed_training_flops_per_token(config, length=24, documents={11: 1.0, 12: 1.0})
    layout = BlockLayout.from_rows([[1]], q_block=128, kv_block=128)
    sparse = AttentionPlan(
        patterns={"a": AttentionSpec(causal=True, documents=True, block_sparse=layout)}, layers=("a",)
    )
    assert accounting.countable_when_packed(config)
    with pytest.raises(ValueError, match="where each document starts"):
        accounting.packed_training_flops_per_token(
            configure("llama-tiny", {"attention": sparse}), length=24, documents={24: 1.0}
        )


def test_the_uncut_convention_charges_every_query_for_the_row() -> None:
    def pairs(**fields: object) -> int:
        return accounting.attention_pairs(AttentionSpec(causal=True, **fields), 100, causal_halved=False)

    assert pairs() == 100 * 100
    assert pairs(window=Window(left=9)) == 100 * 10
    assert pairs(window=Window(left=500)) == 100 * 100
    assert (
        accounting.attention_pairs(
            AttentionSpec(causal=True, documents=True), 100, documents=[30, 70], causal_halved=False
        )
        == 30**2 + 70**2
    )


def test_documents_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add up to 30, not to length=31"):
        accounting.forward_flops(DECODERS["gpt-tiny"], length=31, documents=[10, 20])


def test_gpt2_small_flops_per_token_by_hand() -> None:
    """6 * matrices + attention of Radford's 124M at 1024: 6 * (84.9M + 38.6M) + 12 * 12 * 768 * 1025 / 2."""
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    expected = 6 * matrices + 3 * 12 * 4 * 768 * 1025 / 2
    assert accounting.training_flops_per_token(DECODERS["gpt2-small"], length=1024) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), ("bfloat16", 2), (torch.float16, 2), ("float64", 8)])
def test_kv_bytes_are_the_caches(dtype: torch.dtype | str, size: int) -> None:
    config = configure("llama-tiny", {"n_layers": 3, "n_kv_heads": 1})
    assert accounting.kv_bytes_per_token(config, dtype) == 2 * 3 * 1 * 16 * size
    real = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    cache = ContiguousCache(config, 2, 7, dtype=real)
    assert cache.nbytes == cache_bytes(config, 2, 7, dtype)
    assert cache.nbytes.keys_values == 14 * accounting.kv_bytes_per_token(config, dtype)


def test_opt_13b_has_the_published_kv_bytes() -> None:
    config = DecoderConfig(n_layers=40, d_model=5120, n_heads=40, d_ff=20480)  # Kwon et al. 2023, §3: 800 KB a token
    assert accounting.kv_bytes_per_token(config, "float16") == 819_200


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype=int8: it is one of float64"):
        accounting.bytes_of("int8")


def saved_bytes(config: DecoderConfig, batch: int, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of the stack, parameters aside, each storage once."""
    model = from_config(config, seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.zeros(batch, length, dtype=torch.int64))
    return sum(nbytes for nbytes, _ in storages.values())


@pytest.mark.parametrize("name", ["gpt2-small", "llama-20m"])
def test_activation_estimate_matches_what_autograd_keeps(name: str) -> None:
    """fp32 on CPU keeps the same tensors as the formula counts, and some more (rotation tables, masks): within 15 %."""
    overrides = {"n_layers": 2, "vocab_size": 64, "d_model": 256, "n_heads": 4, "d_ff": 1024, "n_kv_heads": 4}
    config = configure(name, overrides)
    estimate = accounting.training_memory(config, micro_batch=2, length=128, precision="fp32")
    assert estimate.activations == pytest.approx(saved_bytes(config, 2, 128), rel=0.15)


def test_training_memory_terms_add_up() -> None:
    config = DECODERS["gpt2-small"]
    n = accounting.parameters(config).total
    fp32 = accounting.training_memory(config, micro_batch=4, length=1024, precision="fp32")
    mixed = accounting.training_memory(config, micro_batch=4, length=1024, precision="bf16-mixed")
    true = accounting.training_memory(config, micro_batch=4, length=1024, precision="bf16-true")
    light = accounting.training_memory(
        config, micro_batch=4, length=1024, precision="bf16-mixed", activation_checkpointing=True
    )
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (6 * n, 4 * n, 8 * n)
    assert (true.weights, true.gradients, true.optimizer) == (2 * n, 2 * n, 4 * n)
    assert fp32.total == fp32.weights + fp32.gradients + fp32.optimizer + fp32.activations + fp32.logits
    assert true.activations < mixed.activations < fp32.activations
    assert light.activations < mixed.activations / 4
    with pytest.raises(ValueError, match="precision='fp8': it is one of fp32, bf16-mixed, bf16-true"):
        accounting.training_memory(config, micro_batch=1, length=8, precision="fp8")  # type: ignore[arg-type]


def test_peak_flops_by_device_name() -> None:
    assert accounting.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.4e12
    assert accounting.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert accounting.peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert accounting.peak_flops("NVIDIA GeForce RTX 4090", torch.float16) == 165.2e12
    assert accounting.peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert accounting.peak_flops("NVIDIA L40S", "bfloat16") == 362e12
    assert accounting.peak_flops("Intel(R) Xeon(R) Platinum 8481C", "bfloat16") is None
    assert accounting.peak_flops("Tesla T4", "bfloat16") is None


def test_configs_zoo_and_accounting_need_no_torch() -> None:
    code = (
        "import sys; import longspan.model.zoo as z, longspan.model.accounting as a; "
        "a.training_memory(z.configure('llama-1b'), micro_batch=1, length=8192, precision='bf16-true'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
