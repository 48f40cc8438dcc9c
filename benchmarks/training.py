"""Throughput of a whole training step of a decoder: ours under several attention backends, torch's cuDNN attention in
the same model, and for the GPT-2 family Hugging Face's model; in one process on one GPU.

    python -m longspan.benchmarks.training [model=gpt2-small] [length=1024] [batch=32] [recompute=false]
        [contenders=auto,transformers] [steps=20] [output=DIR]

A contender is a backend (`auto`, `hopper`, `triton`, `flex`, `sdpa`), `sdpa-cudnn` (`sdpa` with nothing but cuDNN
allowed) or `transformers` (GPT2LMHeadModel with SDPA, compiled as a whole). All train the same weights on the same
random tokens: bf16 autocast, fused AdamW, compiled blocks, no dropout. The timing is void unless all report the same
first loss. Rounds are interleaved, so that clocks favour nobody. `recompute=true` keeps a block's input only.
MFU: causal-halved model FLOPs (`model.accounting`) over the GPU's dense bf16 peak; recomputation is not counted.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.kernels.attention.registry import available
from longspan.kernels.cross_entropy import linear_cross_entropy
from longspan.model import accounting, zoo
from longspan.model.config import DecoderConfig
from longspan.model.decoder import from_config
from longspan.training.module import checkpoint_activations, compile_blocks

from .arguments import read_arguments, refuse, whole
from .environment import append, describe, output_directory, quantiles
from .runs import told
from .timing import DeviceClock

WARMUP, ROUNDS = 5, 3
KEYS = ("model", "length", "batch", "recompute", "contenders", "steps", "output")
CUDNN, THEIRS = "sdpa-cudnn", "transformers"


@dataclass
class Contender:
    """One implementation of the step, and what was measured of it. `allowed` narrows torch's own choice of kernels."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    milliseconds: list[float]
    allowed: Callable[[], AbstractContextManager[object]] = nullcontext
    first_loss: float = float("nan")
    peak_bytes: int = 0

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with self.allowed(), torch.autocast("cuda", torch.bfloat16):
            loss = self.loss(tokens_BT, targets_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def ours(config: DecoderConfig, backend: str, *, recompute: bool) -> Contender:
    model = from_config(config, seed=0).cuda()
    model.set_backends(train="sdpa" if backend == CUDNN else backend)
    compile_blocks(model)
    if recompute:
        checkpoint_activations(model)

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden_ND = model.hidden(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, model.head_weight, targets_BT.flatten()) / targets_BT.numel()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    allowed = (lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)) if backend == CUDNN else nullcontext
    return Contender(f"longspan {backend}", loss, optimizer, [], allowed)


def hugging_face(config: DecoderConfig) -> Contender:
    """GPT2LMHeadModel with the same weights, SDPA attention, compiled as a whole with its loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        n_positions=config.max_positions,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # SDPA is its default
    with torch.device("cuda"):
        peer = GPT2LMHeadModel(theirs)
    peer.load_state_dict(_as_gpt2(from_config(config, seed=0).state_dict(), config.n_layers), strict=False)

    @torch.compile
    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = peer(tokens_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    return Contender(THEIRS, loss, torch.optim.AdamW(peer.parameters(), lr=1e-4, fused=True), [])


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


def measure(contenders: Sequence[Contender], vocab_size: int, length: int, batch: int, steps: int) -> None:
    """Fill in each contender's step times. Raises RuntimeError when their first losses differ."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random_tokens() -> Tensor:
        return torch.randint(vocab_size, (batch, length), device="cuda", generator=generator)

    tokens_BT, targets_BT = random_tokens(), random_tokens()
    for contender in contenders:
        torch.cuda.reset_peak_memory_stats()
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
            # Weights and optimizer states of the others lie there too.
            others = torch.cuda.memory_allocated() - _state_bytes(contender)
            for _ in range(steps):
                _, took = clock.time(lambda contender=contender: contender.step(tokens_BT, targets_BT))
                clock.synchronize()
                contender.milliseconds.append(took())
            contender.peak_bytes = max(contender.peak_bytes, torch.cuda.max_memory_allocated() - others)


def _state_bytes(contender: Contender) -> int:
    """Of weights, and of what the optimizer keeps for each."""
    weights = [x for group in contender.optimizer.param_groups for x in group["params"]]
    kept = [x for state in contender.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in (*weights, *kept))


def main(arguments: Sequence[str]) -> None:
    given = read_arguments(arguments, KEYS)
    name, recompute = given.get("model", "gpt2-small"), given.get("recompute", "false")
    if name not in zoo.DECODERS:
        refuse(f"model={name}: expected one of {', '.join(zoo.DECODERS)}")
    if recompute not in ("true", "false"):
        refuse(f"recompute={recompute}: expected true or false")
    length, batch = whole(given, "length", 1024, least=2), whole(given, "batch", 32, least=1)
    steps = whole(given, "steps", 20, least=1)
    wanted = given.get("contenders", f"auto,{THEIRS}" if name.startswith("gpt2") else f"auto,{CUDNN}").split(",")
    known = ("auto", *available(), CUDNN, *((THEIRS,) if name.startswith("gpt2") else ()))
    for each in wanted:
        if each not in known:
            refuse(f"contenders={each}: with model={name} they are {', '.join(known)}")
    if not torch.cuda.is_available():
        refuse("no GPU: a training step is timed on one")

    torch.set_float32_matmul_precision("high")
    config = replace(zoo.DECODERS[name], max_positions=length)
    contenders = [
        hugging_face(config) if each == THEIRS else ours(config, each, recompute=recompute == "true") for each in wanted
    ]
    measure(contenders, config.vocab_size, length, batch, steps)

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
                "command": told("training", arguments),
                "provider": one.name,
                "model": name,
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
    for row in rows[1:]:
        ratio = rows[0]["tokens_per_second"] / row["tokens_per_second"]
        print(f"{rows[0]['provider']} / {row['provider']}: {ratio:.3f}")
    print(f"appended to {append('training_step.csv', rows, output_directory(given.get('output'), smoke=False))}")


if __name__ == "__main__":
    main(sys.argv[1:])
