"""A whole decoding step of a model: ours against Hugging Face's `generate`, and against the bytes that it must read.

    longspan bench suite=generation [shapes=tiny|quick|full] [only=…]

Both continue the same random prompt with random weights of the same shape, greedily. A step's time is the difference
between generating many tokens and few, divided by the difference in tokens, so that neither prefill nor set-up counts.
The limit is the time to read the weights and the keys and values once, at the rate of a copy in the same run.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.kernels.attention import UnsupportedAttention
from longspan.model import accounting
from longspan.model.cache import create_cache
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config
from longspan.model.generation import prefill
from longspan.model.step import DecodeStep

from .environment import append, facts_of_run, installed
from .timing import make_clock, measure_machine

FEW, MANY = 8, 72
DYNAMIC, STATIC = "transformers dynamic cache", "transformers static cache"  # the second compiles itself
_CHUNK = 8192  # tokens of a prompt that are read at a time


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A model, a batch and the context that its step reads; `times_faster` than Hugging Face's generate as it comes
    (dynamic cache) is the target, and `times_limit` times the byte limit at most."""

    label: str
    config: DecoderConfig
    batch: int
    context: int
    times_faster: float | None = None
    times_limit: float | None = None

    @property
    def name(self) -> str:
        return f"{self.label} b{self.batch} context {self.context}"


def cases(shapes: str) -> tuple[ModelCase, ...]:
    if shapes == "tiny":
        small = DecoderConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, d_ff=64, max_positions=256)
        return (ModelCase("tiny", small, 2, 100),)
    gpt2 = DecoderConfig(vocab_size=50257)
    mha, gqa = llama(16), llama(4)
    quick = (
        ModelCase("GPT-2 124M", gpt2, 1, 900, times_faster=10.0),
        ModelCase("0.9B 16 KV heads", mha, 1, 32768, times_faster=4.5, times_limit=1.3),
        ModelCase("0.9B 4 KV heads", gqa, 1, 32768, times_faster=4.5, times_limit=1.3),
    )
    if shapes == "quick":
        return quick
    return (
        *quick,
        ModelCase("GPT-2 124M", gpt2, 16, 900),
        ModelCase("0.9B 16 KV heads", mha, 8, 8192),
        ModelCase("0.9B 4 KV heads", gqa, 8, 8192),
    )


def llama(kv_heads: int) -> DecoderConfig:
    """16 layers of width 2048, heads of 128, SwiGLU."""
    return DecoderConfig(
        vocab_size=32000,
        n_layers=16,
        d_model=2048,
        n_heads=16,
        n_kv_heads=kv_heads,
        d_ff=5632,
        max_positions=65536,
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        tied_head=False,
    )


@torch.no_grad()
def ours(case: ModelCase, device: torch.device, *, compiled: bool) -> float:
    """Milliseconds a step."""
    model = build(case.config, device)
    tokens_BT = prompt(case, device)
    cache = create_cache(model, case.batch, case.context + MANY + 8)
    logits_BV = prefill(model, tokens_BT, cache, chunk=_CHUNK)
    step = DecodeStep(model, cache, compiled=compiled)
    token_B = logits_BV.argmax(dim=-1)
    for _ in range(FEW):  # recorded on the way
        token_B = step(token_B).argmax(dim=-1)
    _wait(device)
    began = time.perf_counter()
    for _ in range(MANY - FEW):
        token_B = step(token_B).argmax(dim=-1)
    _wait(device)
    return (time.perf_counter() - began) / (MANY - FEW) * 1e3


@torch.no_grad()
def hugging_face(case: ModelCase, device: torch.device, *, static: bool) -> float:
    """Milliseconds a step of `generate`, with its dynamic or its static cache (which it compiles)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    config = case.config
    peer: Any  # its classes do not type-check against their own mixins
    with torch.device(device):
        if config.positions == "learned":
            peer = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=config.vocab_size,
                    n_positions=config.max_positions,
                    n_embd=config.d_model,
                    n_layer=config.n_layers,
                    n_head=config.n_heads,
                )
            )
        else:
            peer = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.d_model,
                    intermediate_size=config.d_ff,
                    num_hidden_layers=config.n_layers,
                    num_attention_heads=config.n_heads,
                    num_key_value_heads=config.kv_heads,
                    max_position_embeddings=config.max_positions,
                )
            )
    peer = peer.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    tokens_BT = prompt(case, device)

    def generate(n_tokens: int) -> None:
        peer.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static" if static else None,
        )

    for n_tokens in (FEW, MANY):  # a static cache is as long as the text, and compiled for its length
        generate(n_tokens)
    seconds = {}
    for n_tokens in (FEW, MANY):
        _wait(device)
        began = time.perf_counter()
        generate(n_tokens)
        _wait(device)
        seconds[n_tokens] = time.perf_counter() - began
    return (seconds[MANY] - seconds[FEW]) / (MANY - FEW) * 1e3


def build(config: DecoderConfig, device: torch.device) -> Decoder:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return from_config(config, seed=0, fused_qkv=True).to(device=device, dtype=dtype).eval()


def prompt(case: ModelCase, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.config.vocab_size, (case.batch, case.context), generator=generator).to(device)


def limit_bytes(case: ModelCase, bytes_per_element: int = 2) -> int:
    """Read in one step: all weights but the embedding's rows that nobody asks for, and every key and value."""
    weights = accounting.parameters(case.config).total
    if not case.config.tied_head:
        weights -= case.config.vocab_size * case.config.d_model
    if case.config.positions == "learned":
        weights -= case.config.max_positions * case.config.d_model
    kv = case.batch * (case.context + (FEW + MANY) // 2) * accounting.kv_bytes_per_token(case.config, "bfloat16")
    return weights * bytes_per_element + kv


def run(shapes: str, device: torch.device, output: Path, *, command: str, only: str | None = None) -> bool:
    """Measure, print, append to `generation.csv`. False when ours failed."""
    facts = facts_of_run()
    copy = None if device.type == "cpu" else measure_machine(make_clock(device)).copy_tb_per_s
    contenders: dict[str, Callable[[ModelCase], float]] = {
        DYNAMIC: lambda case: hugging_face(case, device, static=False),
        "longspan": lambda case: ours(case, device, compiled=False),
        "longspan compiled": lambda case: ours(case, device, compiled=True),
        STATIC: lambda case: hugging_face(case, device, static=True),
    }
    if device.type == "cpu":
        contenders = {name: contenders[name] for name in ("longspan", DYNAMIC)}
    if installed("transformers") == "none":
        contenders = {name: each for name, each in contenders.items() if name.startswith("longspan")}
    sound = True
    for case in cases(shapes):
        if only is not None and only not in case.name:
            continue
        limit = math.nan if copy is None else limit_bytes(case) / copy * 1e-9
        rows: list[dict[str, object]] = []
        for name, measure in contenders.items():
            torch.compiler.reset()
            status, milliseconds = "ok", math.nan
            try:
                milliseconds = measure(case)
            except (UnsupportedAttention, RuntimeError, ValueError, ImportError) as error:
                status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                sound = sound and not name.startswith("longspan")
            _free(device)
            rows.append(
                {
                    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                    "command": command,
                    "case": case.name,
                    "contender": name,
                    "status": status,
                    "ms_per_step": _short(milliseconds),
                    "tokens_per_s": _short(case.batch / milliseconds * 1e3),
                    "byte_limit_ms": _short(limit),
                    "times_limit": _short(milliseconds / limit),
                }
            )
        for row in rows:
            own = str(row["contender"]).startswith("longspan")
            factors = {
                name: _milliseconds(rows, name) / float(str(row["ms_per_step"] or "nan")) for name in (DYNAMIC, STATIC)
            }
            row["times_dynamic"], row["times_static"] = (_short(factors[name]) for name in (DYNAMIC, STATIC))
            row["target"] = _target(case) if own else ""
            met = _verdict(case, factors[DYNAMIC], float(str(row["times_limit"] or "nan")))
            row["target_met"] = met if own else ""
            row["smoke"] = copy is None
            print("  ".join(f"{key}={row[key]}" for key in list(row)[2:] if row[key] != ""))
        append("generation.csv", [{**row, **facts} for row in rows], output)
    return sound


def _milliseconds(rows: Sequence[dict[str, object]], contender: str) -> float:
    return next((float(str(row["ms_per_step"] or "nan")) for row in rows if row["contender"] == contender), math.nan)


def _target(case: ModelCase) -> str:
    parts = []
    if case.times_faster is not None:
        parts.append(f"≥ {case.times_faster}× Hugging Face's generate")
    if case.times_limit is not None:
        parts.append(f"≤ {case.times_limit}× the byte limit")
    return ", ".join(parts)


def _verdict(case: ModelCase, factor: float, times_limit: float) -> str:
    asked = []
    if case.times_faster is not None:
        asked.append(factor >= case.times_faster)
    if case.times_limit is not None:
        asked.append(times_limit <= case.times_limit)
    return "" if not asked or math.isnan(factor) else "yes" if all(asked) else "no"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
