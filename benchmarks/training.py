"""Throughput of one training step of GPT-2 124M against Hugging Face's, in one process on one GPU.

    python -m longspan.benchmarks.training [length batch]      (default: 1024 32)

Both train the same weights on the same random tokens: bf16 autocast, fused AdamW, `torch.compile`, no dropout. The
timing is void unless both report the same first loss. Rounds are interleaved, so that clocks favour nobody.
MFU: causal-halved model FLOPs (`model.accounting`) over the GPU's dense bf16 peak; recomputation is not counted.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.kernels.cross_entropy import linear_cross_entropy
from longspan.model import accounting, zoo
from longspan.model.config import DecoderConfig
from longspan.model.decoder import from_config

from .environment import append, describe, quantiles
from .timing import DeviceClock

WARMUP, ROUNDS, STEPS = 5, 3, 20


@dataclass
class Contender:
    """One implementation of the step, and what was measured of it."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    milliseconds: list[float]
    first_loss: float = float("nan")
    peak_bytes: int = 0

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.loss(tokens_BT, targets_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _config(length: int) -> DecoderConfig:
    return replace(zoo.DECODERS["gpt2-small"], max_positions=length)


def ours(length: int) -> tuple[torch.nn.Module, Contender]:
    model = from_config(_config(length), seed=0).cuda()
    for block in model.blocks:
        block.compile()

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_ND = model.hidden(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, model.head_weight, targets_BT.flatten()) / targets_BT.numel()

    return model, Contender("longspan", loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), [])


def hugging_face(weights: torch.nn.Module, length: int) -> Contender:
    """GPT2LMHeadModel with the same weights, SDPA attention, compiled as a whole with its loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # SDPA is its default
    with torch.device("cuda"):
        peer = GPT2LMHeadModel(config)
    peer.load_state_dict(_as_gpt2(weights.state_dict(), config.n_layer), strict=False)

    @torch.compile
    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = peer(tokens_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    return Contender("transformers", loss, torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True), [])


def _as_gpt2(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names; its Conv1D weights are transposed, its q, k and v are one."""
    named = {
        "transformer.wte.weight": state["embedding.weight"],
        "lm_head.weight": state["embedding.weight"],
        "transformer.wpe.weight": state["position_embedding.weight"],
        "transformer.ln_f.weight": state["norm.weight"],
        "transformer.ln_f.bias": state["norm.bias"],
    }
    for layer in range(n_layers):
        ours_at, theirs_at = f"blocks.{layer}", f"transformer.h.{layer}"
        for part in ("weight", "bias"):
            qkv = torch.cat([state[f"{ours_at}.attention.{name}_proj.{part}"] for name in "qkv"])
            named[f"{theirs_at}.attn.c_attn.{part}"] = qkv.T if part == "weight" else qkv
            for mine, other in (
                ("attention.o_proj", "attn.c_proj"),
                ("mlp.up_proj", "mlp.c_fc"),
                ("mlp.down_proj", "mlp.c_proj"),
            ):
                tensor = state[f"{ours_at}.{mine}.{part}"]
                named[f"{theirs_at}.{other}.{part}"] = tensor.T if part == "weight" else tensor
            named[f"{theirs_at}.ln_1.{part}"] = state[f"{ours_at}.attention_norm.{part}"]
            named[f"{theirs_at}.ln_2.{part}"] = state[f"{ours_at}.mlp_norm.{part}"]
    return named


def measure(contenders: list[Contender], vocab_size: int, length: int, batch: int) -> None:
    """Fill in each contender's step times. Raises RuntimeError when their first losses differ."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random_tokens() -> Tensor:
        return torch.randint(vocab_size, (batch, length), device="cuda", generator=generator)

    tokens_BT, targets_BT = random_tokens(), random_tokens()
    for contender in contenders:
        contender.first_loss = float(contender.step(tokens_BT, targets_BT))
        for _ in range(WARMUP):
            contender.step(tokens_BT, targets_BT)
    losses = [contender.first_loss for contender in contenders]
    if max(losses) - min(losses) > 2e-3 * min(losses):
        raise RuntimeError(f"the contenders do not compute the same thing: first losses {losses}")
    clock = DeviceClock(flush=False)  # a step touches far more than a cache holds
    for _ in range(ROUNDS):
        for contender in contenders:
            torch.cuda.reset_peak_memory_stats()
            for _ in range(STEPS):
                _, took = clock.time(lambda contender=contender: contender.step(tokens_BT, targets_BT))
                clock.synchronize()
                contender.milliseconds.append(took())
            contender.peak_bytes = max(contender.peak_bytes, torch.cuda.max_memory_allocated())


def main(length: int, batch: int) -> None:
    torch.set_float32_matmul_precision("high")
    model, contender = ours(length)
    config = _config(length)
    contenders = [contender, hugging_face(model, length)]
    measure(contenders, config.vocab_size, length, batch)

    facts = describe()
    flops = accounting.training_flops_per_token(config, length=length) * batch * length
    peak = accounting.peak_flops(facts["device"], "bfloat16")
    rows = []
    for one in contenders:
        p20, p50, p80 = quantiles(one.milliseconds)
        rate = flops / (p50 * 1e-3)
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "command": f"python -m longspan.benchmarks.training {length} {batch}",
                "provider": one.name,
                "model": "gpt2-small",
                "length": length,
                "batch": batch,
                "n": len(one.milliseconds),
                "ms_p20": round(p20, 2),
                "ms_p50": round(p50, 2),
                "ms_p80": round(p80, 2),
                "tokens_per_second": round(batch * length / (p50 * 1e-3)),
                "tflops_causal_halved": round(rate / 1e12, 1),
                "mfu": "" if peak is None else round(rate / peak, 4),
                "peak_gib": round(one.peak_bytes / 2**30, 2),
                "first_loss": round(one.first_loss, 4),
                **facts,
            }
        )
        print(", ".join(f"{key}={value}" for key, value in rows[-1].items()))
    print(f"longspan / transformers: {rows[0]['tokens_per_second'] / rows[1]['tokens_per_second']:.3f}")
    print(f"appended to {append('training_step.csv', rows)}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3] or ("1024", "32")))
