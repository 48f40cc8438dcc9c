"""Speed beside its limit: the bytes of a decoding step, counted by hand."""

from __future__ import annotations

import pytest
import torch

from longspan.evaluation.surgery.speed import copy_rate, measure_speed, step_bytes
from longspan.model.config import DecoderConfig


def test_speed_and_the_bytes_of_a_step() -> None:
    config = DecoderConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, max_positions=128)
    weights, kv = step_bytes(config, batch=3, context=100, dtype=torch.float32)
    assert kv == 3 * 100 * 2 * 2 * 2 * 8 * 4  # batch, context, keys and values, layers, heads, head dim, bytes
    assert step_bytes(config, batch=1, context=100, dtype=torch.bfloat16)[1] == kv // 6
    found = measure_speed(config, batch=3, context=100, device=torch.device("cpu"), copied=1e9, repetitions=1)
    assert found.weight_bytes == weights
    assert found.limit_ms == pytest.approx((found.weight_bytes + found.kv_bytes) / 1e6)
    assert 0 < found.decode_low_ms <= found.decode_ms <= found.decode_high_ms
    assert found.prefill_ms > 0
    assert copy_rate(torch.device("cpu")) > 1e8
    with pytest.raises(ValueError, match=r"speed.contexts=127: .* beyond the model's 128 learned positions"):
        measure_speed(config, batch=1, context=127, device=torch.device("cpu"), copied=1e9)
