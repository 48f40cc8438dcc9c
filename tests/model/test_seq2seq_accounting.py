"""What training an encoder–decoder costs, against what torch counts and keeps."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.spec import AttentionSpec
from longspan.model import accounting
from longspan.model.accounting_seq2seq import seq2seq_cache_bytes, seq2seq_training_flops, seq2seq_training_memory
from longspan.model.config import AttentionPlan, Seq2SeqConfig, StackConfig
from longspan.model.cross_attention import Source
from longspan.model.seq2seq import from_config

S, T = 96, 40
FULL = AttentionPlan(patterns={"full": AttentionSpec(causal=False, global_tokens=True)}, layers=("full",))
CONFIG = Seq2SeqConfig(
    vocab_size=61,
    d_model=256,
    encoder=StackConfig(n_layers=3, n_heads=8, d_ff=1024, max_positions=128, attention=FULL),
    decoder=StackConfig(n_layers=2, n_heads=4, d_ff=768, max_positions=64),
    position_offset=0,
    global_projections=True,
)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def test_training_flops_are_the_counted_products() -> None:
    """The reference multiplies every pair, forward and backward; the formula counts all but the causal ones."""
    model = from_config(CONFIG, seed=0)
    model.set_backends(train="reference")
    is_global = torch.zeros(1, S, dtype=torch.bool)
    is_global[:, 0] = True
    with FlopCounterMode(display=False) as counter:
        model(tokens(1, S), tokens(1, T), is_global_BS=is_global).sum().backward()
    causal = 3 * 4 * CONFIG.d_model * CONFIG.decoder.n_layers * (T * T - T * (T + 1) // 2)
    counted = seq2seq_training_flops(CONFIG, source=S, target=T, n_global=1)
    assert counted == counter.get_total_flops() - causal


def saved_bytes(config: Seq2SeqConfig, batch: int) -> int:
    """Bytes that autograd keeps for the backward pass of both stacks, parameters aside, each storage once."""
    model = from_config(config, seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.encode(tokens(batch, S))
        model.hidden(tokens(batch, T), Source(states, AttentionContext()))
    return sum(nbytes for nbytes, _ in storages.values())


def test_the_activation_estimate_matches_what_autograd_keeps() -> None:
    """fp32 on CPU keeps the same tensors as the formula counts, and some more: within 15 %."""
    plain = Seq2SeqConfig(
        vocab_size=61,
        d_model=256,
        encoder=StackConfig(n_layers=3, n_heads=8, d_ff=1024, max_positions=128),
        decoder=StackConfig(n_layers=2, n_heads=4, d_ff=768, max_positions=64),
    )
    estimate = seq2seq_training_memory(plain, micro_batch=2, source=S, target=T, precision="fp32")
    assert estimate.activations == pytest.approx(saved_bytes(plain, 2), rel=0.15)
    with_globals = seq2seq_training_memory(CONFIG, micro_batch=2, source=S, target=T, precision="fp32")
    # Keys and values of 2 x 96 tokens, 256 wide, in fp32, in each of the three layers.
    assert with_globals.activations - estimate.activations == 3 * 2 * 2 * S * 256 * 4


def test_memory_terms() -> None:
    n = accounting.parameters(CONFIG).total
    mixed = seq2seq_training_memory(CONFIG, micro_batch=4, source=S, target=T, precision="bf16-mixed")
    light = seq2seq_training_memory(
        CONFIG, micro_batch=4, source=S, target=T, precision="bf16-mixed", activation_checkpointing=True
    )
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (6 * n, 4 * n, 8 * n)
    assert light.activations < mixed.activations / 2
    double = seq2seq_training_memory(CONFIG, micro_batch=4, source=2 * S, target=T, precision="bf16-mixed")
    assert double.logits == mixed.logits
    assert double.activations < 2 * mixed.activations


def test_the_cache_of_a_pair_by_hand() -> None:
    # 2 layers, keys and values, 4 heads of 64, bf16: of 96 source and 40 target tokens.
    assert seq2seq_cache_bytes(CONFIG, source=S, target=T) >= 2 * 2 * 256 * 2 * (S + T)
    assert seq2seq_cache_bytes(CONFIG, source=S, target=T) - seq2seq_cache_bytes(CONFIG, source=S - 10, target=T) == (
        2 * 2 * 256 * 2 * 10
    )
