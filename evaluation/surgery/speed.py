"""What reading a prompt and writing a token cost in milliseconds, beside the time that reading the bytes would take.

The model has random weights: its speed depends on its shape alone. The limit of a decoding step is the time to read all
weights that it needs and every key and value once, at the rate of a copy measured in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from longspan.model.accounting import parameters
from longspan.model.cache import create_cache
from longspan.model.cache_plan import cache_bytes
from longspan.model.config import DecoderConfig
from longspan.model.decoder import from_config
from longspan.model.prompts import prefill
from longspan.model.step import DecodeStep

_CHUNK = 8192  # tokens of a prompt that are read at a time
_COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes: beyond the caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """prefill_ms   to read `context` tokens of each of `batch` sequences, median of `repetitions`
    decode_ms       to write one token of each with that context in the cache, median of `steps`; `decode_low_ms` and
                    `decode_high_ms`, their 20 % and 80 % quantiles
    limit_ms        that a step takes at least, where memory is read as fast as it is copied
    kv_bytes        of the cache that a step reads
    weight_bytes    that a step reads
    copy_gb_per_s   read and written
    """

    kv_heads: int
    batch: int
    context: int
    prefill_ms: float
    decode_ms: float
    decode_low_ms: float
    decode_high_ms: float
    limit_ms: float
    kv_bytes: int
    weight_bytes: int
    copy_gb_per_s: float
    dtype: str
    device: str
    repetitions: int
    steps: int


def step_bytes(config: DecoderConfig, batch: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """(weights, keys and values) that one decoding step reads: all weights but the rows of the embedding and of the
    position table that nobody asks for, and every key and value that some layer still sees."""
    weights = parameters(config).total
    if not config.tied_head:
        weights -= config.vocab_size * config.d_model
    if config.positions == "learned":
        weights -= config.max_positions * config.d_model
    return weights * dtype.itemsize, cache_bytes(config, batch, context, dtype).keys_values


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy, the best of several."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * source.nbytes / min(times)


@torch.no_grad()
def measure_speed(
    config: DecoderConfig, *, batch: int, context: int, device: torch.device, copied: float, repetitions: int = 3
) -> Speed:
    """`copied`: `copy_rate(device)`. Raises ValueError where the context does not fit into learned positions."""
    steps = 48 if device.type == "cuda" else 8
    warm = 4 if device.type == "cuda" else 1
    longest = context + steps + warm
    if config.positions == "learned" and longest > config.max_positions:
        raise ValueError(
            f"speed.contexts={context}: with {steps + warm} tokens written behind it, that is beyond the model's "
            f"{config.max_positions} learned positions; lower it"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = from_config(config, seed=0, fused_qkv=True).to(device=device, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(config.vocab_size, (batch, context), generator=generator).to(device)

    def read() -> DecodeStep:
        cache = create_cache(model, batch, longest)
        prefill(model, tokens_BT, cache, chunk=_CHUNK)
        return DecodeStep(model, cache)

    advance = read()
    prefills = [_seconds(read, device) for _ in range(repetitions)]
    token_B = tokens_BT[:, 0]
    for _ in range(warm):
        advance(token_B)
    decodes = [_seconds(lambda: advance(token_B), device) for _ in range(steps)]
    weights, kv = step_bytes(config, batch, context + warm + steps // 2, dtype)
    return Speed(
        kv_heads=config.kv_heads,
        batch=batch,
        context=context,
        prefill_ms=1e3 * median(prefills),
        decode_ms=1e3 * median(decodes),
        decode_low_ms=1e3 * quantiles(decodes, n=5)[0],
        decode_high_ms=1e3 * quantiles(decodes, n=5)[-1],
        limit_ms=1e3 * (weights + kv) / copied,
        kv_bytes=kv,
        weight_bytes=weights,
        copy_gb_per_s=copied / 1e9,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        repetitions=repetitions,
        steps=steps,
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
