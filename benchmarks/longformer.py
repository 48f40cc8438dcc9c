"""A whole Longformer encoder against Hugging Face's, with the same weights: time and memory over length.

    python -m longspan.benchmarks.longformer [lengths=4096,8192,16384,32768,65536] [layers=12] [repetitions=10]
        [device=cuda] [output=DIR]

A `LongformerModel` of random weights (base size, `attention_window` 512, token 0 global, batch 1) is saved, imported by
our own importer, and both read the same tokens: without gradients, and forward and backward. Theirs runs as it comes,
in bf16 weights like ours. Timings are void unless, in fp32 at the shortest length, the hidden states of both agree to
1e-4. Memory is the peak beyond weights and gradients.

Legend: B = 1, T tokens, D width.
"""

from __future__ import annotations

import copy
import datetime
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.model.checkpoint import load_model
from longspan.model.conversion import import_model
from longspan.model.encoder import Encoder

from .arguments import read_arguments
from .environment import append, facts_of_run, output_directory, quantiles
from .timing import Clock, interleaved_calls, make_clock

TOLERANCE = 1e-4
OURS, COMPILED, THEIRS = "longspan", "longspan compiled", "transformers"
Forward = Callable[[Tensor], Tensor]  # tokens [1, T] -> hidden states [1, T, D]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the encoder; the defaults are Longformer-base."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    window: int = 512
    vocabulary: int = 50265


@dataclass(frozen=True, slots=True)
class Measured:
    """milliseconds: of each repetition; mib: peak memory beyond weights and gradients, NaN on a CPU; failure: a line"""

    milliseconds: tuple[float, ...] = ()
    mib: float = math.nan
    failure: str = ""


def both(sizes: Sizes, longest: int) -> tuple[Any, Encoder]:
    """Their model and ours, fp32 on the CPU, with equal weights for inputs of up to `longest` tokens."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        attention_window=sizes.window,
        max_position_embeddings=longest + 2,
        pad_token_id=1,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LongformerModel(config, add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(Path(directory) / "theirs")
        ours = load_model(import_model(Path(directory) / "theirs", Path(directory) / "ours"))
    if not isinstance(ours, Encoder):
        raise TypeError(f"a Longformer was imported as {type(ours).__name__}")
    return theirs, ours


def our_forward(model: Encoder) -> Forward:
    def forward(tokens_BT: Tensor) -> Tensor:
        return model(tokens_BT, AttentionContext(is_global=first_token(tokens_BT)))

    return forward


def their_forward(model: Any) -> Forward:
    def forward(tokens_BT: Tensor) -> Tensor:
        every_BT = torch.ones_like(tokens_BT)
        flags_BT = first_token(tokens_BT).long()
        return model(tokens_BT, attention_mask=every_BT, global_attention_mask=flags_BT).last_hidden_state

    return forward


def first_token(tokens_BT: Tensor) -> Tensor:
    """Flags [B, T] of a global token at position 0."""
    flags_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    flags_BT[:, 0] = True
    return flags_BT


@torch.no_grad()
def disagreement(theirs: Any, ours: Encoder, length: int, device: torch.device) -> float:
    """Largest |Δ| of hidden states in fp32."""
    tokens_BT = random_tokens(ours, length, device)
    # On a copy each, so that a compiled or narrower twin made later starts from the same weights.
    wide = [copy.deepcopy(model).to(device) for model in (theirs, ours)]
    return float((their_forward(wide[0])(tokens_BT) - our_forward(wide[1])(tokens_BT)).abs().max())


def random_tokens(model: Encoder, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.config.vocab_size, (1, length), generator=generator).to(device)


def measure(
    forwards: dict[str, Forward], tokens_BT: Tensor, *, training: bool, clock: Clock, repetitions: int
) -> dict[str, Measured]:
    """Each contender's times, in turn, and its peak memory; one that raises is out of the race, with its reason."""

    def call(forward: Forward) -> None:
        if not training:
            with torch.no_grad():
                forward(tokens_BT)
            return
        forward(tokens_BT).float().square().mean().backward()

    found: dict[str, Measured] = {}
    racing: dict[str, Callable[[], object]] = {}
    for name, forward in forwards.items():
        try:
            for _ in range(3):  # compiles, and makes the gradients that stay
                call(forward)
            found[name] = Measured(mib=_peak_mib(lambda forward=forward: call(forward), tokens_BT.device))
            racing[name] = lambda forward=forward: call(forward)
        except Exception as error:  # noqa: BLE001 (whatever a peer or a compiler raises is a result, and the race goes on)
            found[name] = Measured(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        _free(tokens_BT.device)
    for name, samples in interleaved_calls(racing, clock, repetitions).items():
        found[name] = Measured(tuple(samples), found[name].mib)
    return found


def _peak_mib(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when ours was right and ran at every length."""
    known = ("lengths", "layers", "width", "heads", "window", "vocabulary", "repetitions", "device", "output")
    given = read_arguments(arguments, known)
    device = torch.device(given.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    smoke = device.type == "cpu"
    lengths = [int(each) for each in given.get("lengths", "4096,8192,16384,32768,65536").split(",")]
    sizes = Sizes(
        **{name: int(given[name]) for name in ("layers", "width", "heads", "window", "vocabulary") if name in given}
    )
    clock, repetitions = make_clock(device), int(given.get("repetitions", "10"))
    theirs, ours = both(sizes, max(lengths))
    apart = disagreement(theirs, ours, min(lengths), device)
    print(f"hidden states in fp32 differ by at most {apart:.1e}")
    if not apart <= TOLERANCE:
        print("void: the contenders do not compute the same thing")
        return 1
    dtype = torch.float32 if smoke else torch.bfloat16
    theirs, ours = theirs.to(device, dtype), ours.to(device, dtype)
    forwards = {THEIRS: their_forward(theirs), OURS: our_forward(ours)}
    if not smoke:
        compiled = copy.deepcopy(ours)
        for block in compiled.blocks:
            block.compile()
        forwards[COMPILED] = our_forward(compiled)
    output = output_directory(given.get("output"), smoke=smoke)
    command = "python -m longspan.benchmarks.longformer " + " ".join(
        each for each in arguments if not each.startswith("output=")
    )
    sound = True
    for length in lengths:
        tokens_BT = random_tokens(ours, length, device)
        for training in (False, True):
            torch.compiler.reset()
            found = measure(forwards, tokens_BT, training=training, clock=clock, repetitions=repetitions)
            rows = _rows(found, length, training=training, command=command.strip(), sizes=sizes, apart=apart)
            append("longformer.csv", rows, output)
            sound = sound and not found[OURS].failure
            for row in rows:
                print("  ".join(f"{name}={row[name]}" for name in list(row)[2:13] if row[name] != ""), flush=True)
    return 0 if sound else 1


def _rows(
    found: dict[str, Measured], length: int, *, training: bool, command: str, sizes: Sizes, apart: float
) -> list[dict[str, object]]:
    facts = facts_of_run()
    baseline = statistics.median(found[OURS].milliseconds) if found[OURS].milliseconds else math.nan
    rows: list[dict[str, object]] = []
    for name, measured in found.items():
        p20, p50, p80 = quantiles(measured.milliseconds) if len(measured.milliseconds) > 1 else (math.nan,) * 3
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "command": command,
                "contender": name,
                "length": length,
                "pass": "forward and backward" if training else "forward",
                "status": f"failed: {measured.failure}" if measured.failure else "ok",
                "n": len(measured.milliseconds),
                "ms_p20": _short(p20),
                "ms_p50": _short(p50),
                "ms_p80": _short(p80),
                "times_ours": _short(p50 / baseline),
                "peak_mib": _short(measured.mib),
                "mib_per_1k_tokens": _short(measured.mib / length * 1024),
                "layers": sizes.layers,
                "width": sizes.width,
                "heads": sizes.heads,
                "window": sizes.window,
                "fp32_difference": f"{apart:.1e}",
                **facts,
            }
        )
    return rows


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
