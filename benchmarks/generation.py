"""A whole decoding step of a model: ours against Hugging Face's `generate`, and against the bytes that it must read.

    longspan bench suite=generation [shapes=tiny|quick|full] [only=…]

Both continue the same random prompt with random weights of the same shape, greedily. A step's time is that of many
steps divided by their number: ours after a few that do not count; theirs as the difference between generating many
tokens and few, so that neither prefill nor set-up counts. Each repetition runs every contender once.
The limit is the time to read the weights and the keys and values once, at the rate of a copy in the same run.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longspan.evaluation.surgery.speed import step_bytes
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.cache import create_cache
from longspan.model.config import AttentionPlan, DecoderConfig
from longspan.model.decoder import Decoder, from_config
from longspan.model.generation import prefill
from longspan.model.step import DecodeStep

from .attempts import caught, free, missing, short
from .environment import SMOKE, append, facts_of_run, quantiles
from .timing import make_clock, measure_machine

FEW, MANY = 8, 72
REPETITIONS = 5  # each takes theirs two whole texts
OURS = "longspan"
COMPILED = f"{OURS} compiled"
DYNAMIC, STATIC = "transformers dynamic cache", "transformers static cache"  # the second compiles itself
PEERS = {"transformers-dynamic": DYNAMIC, "transformers-static": STATIC}  # as `peers=` spells them
_EVERYBODY = (DYNAMIC, COMPILED, STATIC)
_ON_A_CPU: dict[str, str] = dict.fromkeys(
    (COMPILED, STATIC), "skipped: is compiled, which a smoke test on a CPU does not wait for"
)
_CHUNK = 8192  # tokens of a prompt that are read at a time


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A model, a batch and the context that its step reads; `times_faster` than Hugging Face's generate as it comes
    (dynamic cache) is the target, and `times_limit` times the byte limit at most. `rivals`: who races on a GPU beside
    our recorded step."""

    label: str
    config: DecoderConfig
    batch: int
    context: int
    times_faster: float | None = None
    times_limit: float | None = None
    rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.label} b{self.batch} context {self.context}"


def cases(shapes: str) -> tuple[ModelCase, ...]:
    """tiny: a smoke test; quick: what the targets ask; full: batches 1, 8 and 64, contexts 1K … 128K, with all, a
    quarter and one of the key/value heads, and a window. Cases of one model stand together."""
    if shapes == "tiny":
        small = DecoderConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, d_ff=64, max_positions=256)
        return (ModelCase("tiny", small, 2, 100, rivals=_EVERYBODY),)
    quick: list[ModelCase] = []
    rest: list[ModelCase] = []
    for kv_heads in (4, 16, 1):
        model = ModelCase(f"0.9B {kv_heads} KV head{'s' if kv_heads > 1 else ''}", llama(kv_heads), 1, 32768)
        asked = replace(model, times_faster=4.5, times_limit=1.3, rivals=_EVERYBODY)
        quick += [asked] if kv_heads > 1 else []
        rest += [
            asked if kv_heads > 1 else replace(model, rivals=(COMPILED,)),
            replace(model, batch=8, context=8192, rivals=(COMPILED, DYNAMIC) if kv_heads > 1 else ()),
            replace(model, context=1024),
            replace(model, context=131072),
            replace(model, batch=64, context=1024),
        ]
    pattern = {"local": AttentionSpec(causal=True, window=Window.causal_keys(1024))}
    local = replace(llama(4), attention=AttentionPlan(patterns=pattern, layers=("local",)))
    rest += [ModelCase("0.9B 4 KV heads, window 1024", local, 1, context) for context in (8192, 32768, 131072)]
    gpt2 = ModelCase("GPT-2 124M", DecoderConfig(vocab_size=50257), 1, 900, times_faster=10.0, rivals=_EVERYBODY)
    if shapes == "quick":
        return (gpt2, *quick)
    return (*rest, gpt2, replace(gpt2, batch=16, times_faster=None, rivals=(COMPILED, DYNAMIC)))


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


Measure = Callable[[], float]  # milliseconds a step


@torch.no_grad()
def ours(case: ModelCase, model: Decoder, *, compiled: bool) -> Measure:
    """The prompt is read once; each repetition goes back to its end."""
    device = model.head_weight.device
    cache = create_cache(model, case.batch, case.context + MANY + 8, kind="contiguous")
    first_B = prefill(model, prompt(case, device), cache, chunk=_CHUNK).argmax(dim=-1)
    step = DecodeStep(model, cache, compiled=compiled)

    @torch.no_grad()
    def measure() -> float:
        cache.truncate(case.context)
        token_B = first_B
        for _ in range(FEW):  # recorded on the way, the first time
            token_B = step(token_B).argmax(dim=-1)
        _wait(device)
        began = time.perf_counter()
        for _ in range(MANY - FEW):
            token_B = step(token_B).argmax(dim=-1)
        _wait(device)
        return (time.perf_counter() - began) / (MANY - FEW) * 1e3

    return measure


@torch.no_grad()
def hugging_face(case: ModelCase, device: torch.device, *, static: bool) -> Measure:
    """Its `generate`, with its dynamic or its static cache (which it compiles)."""
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

    def measure() -> float:
        seconds = {}
        for n_tokens in (FEW, MANY):
            _wait(device)
            began = time.perf_counter()
            generate(n_tokens)
            _wait(device)
            seconds[n_tokens] = time.perf_counter() - began
        return (seconds[MANY] - seconds[FEW]) / (MANY - FEW) * 1e3

    return measure


def build(config: DecoderConfig, device: torch.device) -> Decoder:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return from_config(config, seed=0, fused_qkv=True).to(device=device, dtype=dtype).eval()


def prompt(case: ModelCase, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.config.vocab_size, (case.batch, case.context), generator=generator).to(device)


def limit_bytes(case: ModelCase) -> int:
    """Read in one step in the middle of what is timed: weights, keys and values."""
    return sum(step_bytes(case.config, case.batch, case.context + (FEW + MANY) // 2, torch.bfloat16))


@dataclass(slots=True)
class _Entrant:
    """A contender in one case: what came of it."""

    status: str = "ok"
    samples: list[float] = field(default_factory=list)
    measure: Measure | None = None

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """p20, p50 and p80 of the milliseconds."""
        if len(self.samples) > 1:
            return quantiles(self.samples)
        only = self.samples[0] if self.samples else math.nan
        return only, only, only


def run(
    shapes: str,
    device: torch.device,
    output: Path,
    *,
    command: str,
    only: str | None = None,
    repetitions: int = REPETITIONS,
    peers: Collection[str] = tuple(PEERS),
) -> bool:
    """Measure, print, append to `generation.csv`. False when ours failed. `peers`: names of PEERS; others of a case
    stay out of it."""
    invited = {PEERS[name] for name in peers}
    facts = facts_of_run()
    copy = None if device.type == "cpu" else measure_machine(make_clock(device)).copy_tb_per_s
    if copy is None:
        print(SMOKE)
    sound = True
    built: tuple[DecoderConfig, Decoder] | None = None  # neighbouring cases share it: a billion numbers take a while
    for case in cases(shapes):
        if only is not None and only not in case.name:
            continue
        if built is None or built[0] != case.config:
            built = None
            free(device)
            built = case.config, build(case.config, device)
        rivals = tuple(name for name in case.rivals if name == COMPILED or name in invited)
        entrants = _raced(replace(case, rivals=rivals), built[1], device, repetitions)
        own = {name: each.status for name, each in entrants.items() if name.startswith(OURS)}
        sound = sound and all(status in ("ok", _ON_A_CPU.get(name)) for name, status in own.items())
        rows = _rows(case, entrants, copy)
        for row in rows:
            print("  ".join(f"{key}={row[key]}" for key in row if row[key] != ""))
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        append("generation.csv", [{"date": date, "command": command, **row, **facts} for row in rows], output)
    return sound


def _raced(case: ModelCase, model: Decoder, device: torch.device, repetitions: int) -> dict[str, _Entrant]:
    """Everybody prepared, then each in turn, a different one first each time, so that clocks and heat favour nobody."""
    every: dict[str, Callable[[], Measure]] = {
        OURS: lambda: ours(case, model, compiled=False),
        DYNAMIC: lambda: hugging_face(case, device, static=False),
        COMPILED: lambda: ours(case, model, compiled=True),
        STATIC: lambda: hugging_face(case, device, static=True),
    }
    chosen = {OURS, *case.rivals}
    makers = {name: make for name, make in every.items() if name in chosen}
    torch.compiler.reset()
    entrants = {name: _Entrant() for name in makers}
    absent = missing("transformers", "transformers")

    def attempt(entrant: _Entrant, work: Callable[[], None]) -> None:
        problem = caught(work)
        if problem is not None:
            entrant.status, entrant.measure, entrant.samples = f"{problem[0]}: {problem[1]}", None, []

    for name, make in makers.items():
        entrant = entrants[name]
        if device.type == "cpu" and name in _ON_A_CPU:
            entrant.status = _ON_A_CPU[name]
            continue
        if absent is not None and not name.startswith(OURS):
            entrant.status = f"skipped: {absent}"
            continue

        def prepare(entrant: _Entrant = entrant, make: Callable[[], Measure] = make) -> None:
            entrant.measure = make()
            entrant.measure()  # what is compiled (for each length) or recorded at first does not count

        attempt(entrant, prepare)
        free(device)
    names = [name for name, entrant in entrants.items() if entrant.measure is not None]
    for repetition in range(repetitions if names else 0):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            entrant = entrants[name]
            if entrant.measure is not None:

                def measure(entrant: _Entrant = entrant, once: Measure = entrant.measure) -> None:
                    entrant.samples.append(once())

                attempt(entrant, measure)
    for entrant in entrants.values():
        entrant.measure = None
    free(device)
    return entrants


def _rows(case: ModelCase, entrants: Mapping[str, _Entrant], copy: float | None) -> list[dict[str, object]]:
    limit = math.nan if copy is None else limit_bytes(case) / copy * 1e-9
    medians = {name: entrant.quantiles[1] for name, entrant in entrants.items()}
    rows: list[dict[str, object]] = []
    for name, entrant in entrants.items():
        p20, p50, p80 = entrant.quantiles
        factors = {peer: medians.get(peer, math.nan) / p50 for peer in (DYNAMIC, STATIC)}
        own = name.startswith(OURS)
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "status": entrant.status,
                "n": len(entrant.samples),
                "ms_p20": short(p20),
                "ms_per_step": short(p50),
                "ms_p80": short(p80),
                "tokens_per_s": short(case.batch / p50 * 1e3),
                "byte_limit_ms": short(limit),
                "times_limit": short(p50 / limit),
                "times_dynamic": short(factors[DYNAMIC]),
                "times_static": short(factors[STATIC]),
                "target": _target(case) if own else "",
                "target_met": _verdict(case, factors[DYNAMIC], p50 / limit) if own else "",
                "smoke": copy is None,
            }
        )
    return rows


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
