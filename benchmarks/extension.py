"""How far beyond its training length a decoder reads, as it is and with what is said to help, without any training.

    python -m longspan.benchmarks.extension checkpoint=DIR data=PATH lengths=2048,8192,16384
        [methods=none,ntk,yarn,…] [window=4096] [texts=4] [scored=256] [device=cpu|cuda] [output=DIR]

The last `scored` tokens of each text are predicted with more and more of the text before them: the same tokens at every
length, so that a loss that grows is the fault of the length and not of the text. Methods change the configuration and
no weight; one factor, the longest length over the trained one, serves all lengths.

`window+sinks` counts positions from the beginning of the text: sinks drift away from the window, past what was trained.
`streaming` counts them in the cache, as StreamingLLM does (Xiao et al. 2024, arXiv 2309.17453, §3.2): sinks stand right
before the window, here of the first token of each piece of text that is read at a time.

Legend: B texts, T tokens, N scored tokens.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longspan.data.sources import from_path, read
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.passes import autocast
from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.kernels.cross_entropy import token_nll
from longspan.model.cache import ContiguousCache
from longspan.model.checkpoint import load_decoder, resolve_checkpoint
from longspan.model.config import AttentionPlan, DecoderConfig, RopeScaling
from longspan.model.decoder import Decoder, from_config
from longspan.model.positions import rotate

from .arguments import read_arguments, started, whole, wholes
from .environment import append, facts_of_run, output_directory

SINKS = 4  # first tokens that stay visible (Xiao et al. 2024, arXiv 2309.17453)
CHUNK = 2048  # tokens that are read at a time: windowed layers then need no mask of length times length

Change = Callable[[DecoderConfig, float, int], DecoderConfig]  # (config, factor, window in keys)


def _scaling(kind: str) -> Change:
    def change(config: DecoderConfig, factor: float, window: int) -> DecoderConfig:
        trained = config.max_positions if kind in ("dynamic", "yarn", "llama3") else None
        # Dynamic scaling computes its own factor from the length.
        scaling = RopeScaling(kind=kind, factor=1.0 if kind == "dynamic" else factor, original_positions=trained)  # pyright: ignore[reportArgumentType]: one of RopeKind's words
        return replace(config, rope_scaling=scaling)

    return change


def _windowed(sinks: int) -> Change:
    def change(config: DecoderConfig, factor: float, window: int) -> DecoderConfig:
        spec = AttentionSpec(causal=True, window=Window.causal_keys(window), sink_tokens=sinks)
        return replace(config, attention=AttentionPlan(patterns={"window": spec}, layers=("window",)))

    return change


METHODS: Mapping[str, Change] = {
    "none": lambda config, factor, window: config,
    "linear": _scaling("linear"),
    "ntk": _scaling("ntk"),
    "dynamic": _scaling("dynamic"),
    "yarn": _scaling("yarn"),
    "window": _windowed(0),
    "window+sinks": _windowed(SINKS),
    "streaming": _windowed(SINKS),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one method at one length: nats per scored token, its standard error over texts, and how many of each."""

    method: str
    length: int
    loss: float
    error: float
    texts: int
    scored: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def applicable(config: DecoderConfig) -> tuple[str, ...]:
    """The methods that change this model: rotary scaling and moving sinks need rotary positions that are not scaled
    yet."""
    rotary = config.positions == "rope" and config.rope_scaling is None
    return tuple(name for name in METHODS if rotary or name in ("none", "window", "window+sinks"))


def texts_of(path: str, tokenizer: Tokenizer, *, length: int, count: int, start: int | None) -> Tensor:
    """The first `length` tokens of the first `count` documents that are long enough, [B, length], each behind the
    token that begins a text. Raises ValueError where there is none."""
    rows: list[list[int]] = []
    for document in read(from_path(path)):
        ids = tokenizer.encode_batch([document.text])[0]
        ids = ids if start is None else [start, *ids]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"data={path}: no document has {length:,} tokens; give longer ones, or smaller lengths")
    return torch.tensor(rows)


@torch.no_grad()
def losses(model: Decoder, tokens_BT: Tensor, *, length: int, scored: int, streaming: int | None = None) -> Tensor:
    """nll of the last `scored` tokens of each text, fp32 [B, scored], with the `length` tokens up to the last but one
    read before and among them.

    streaming  the window in keys, if sinks move along before it
    """
    device = model.head_weight.device
    precision = "bf16" if device.type == "cuda" else "fp32"
    found: list[Tensor] = []
    for tokens_T in tokens_BT.to(device):
        read_T, targets_N = tokens_T[-length - 1 : -1], tokens_T[-scored:]
        cache = ContiguousCache(model.config, 1, length, device=device, rings=True)
        hidden_D: list[Tensor] = []
        moved = 0
        for first in range(0, length, CHUNK):
            before_window = 0 if streaming is None else first - streaming + 1 - SINKS
            if before_window > moved:
                _move_sinks(model, cache, before_window - moved)
                moved = before_window
            with autocast(device, precision):
                hidden_D.append(model.hidden(read_T[None, first : first + CHUNK], cache=cache)[0, -scored:])
        with autocast(device, precision):
            found.append(token_nll(torch.cat(hidden_D)[-scored:], model.head_weight, targets_N).float().cpu())
    return torch.stack(found)


def _move_sinks(model: Decoder, cache: ContiguousCache, by: int) -> None:
    if model.rotary is None:
        raise ValueError("only rotary positions can be changed in a cache")
    rotation = model.rotary(torch.tensor([[by]], device=model.head_weight.device), by + 1)
    cache.turn_first(SINKS, partial(rotate, rotation=rotation))


def measure(
    model: Decoder, tokens_BT: Tensor, *, lengths: Sequence[int], methods: Sequence[str], window: int, scored: int
) -> Iterator[Reading]:
    """A reading for each method and length. The model's weights are read and not changed."""
    weights, config = model.state_dict(), model.config
    factor = max(1.0, max(lengths) / config.max_positions)
    for method in methods:
        changed = METHODS[method](config, factor, window)
        if changed.positions == "learned":
            raise ValueError("a learned table ends at max_positions: there is nothing beyond it to read")
        other = from_config(changed, device="meta")
        other.load_state_dict(weights, assign=True)
        other.to(model.head_weight.device).eval()
        for length in lengths:
            streaming = window if method == "streaming" else None
            nll_BN = losses(other, tokens_BT, length=length, scored=scored, streaming=streaming)
            mean_B = nll_BN.double().mean(dim=1)
            error = float(mean_B.std() / len(mean_B) ** 0.5) if len(mean_B) > 1 else math.nan
            yield Reading(method, length, float(mean_B.mean()), error, len(mean_B), scored)


def row(reading: Reading, *, command: str, checkpoint: str, trained: int, window: int) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "checkpoint": checkpoint,
        "trained_length": trained,
        "method": reading.method,
        "window": window if reading.method.startswith(("window", "streaming")) else "",
        "length": reading.length,
        "texts": reading.texts,
        "scored_tokens": reading.scored,
        "loss": round(reading.loss, 5),
        "standard_error": "" if math.isnan(reading.error) else round(reading.error, 5),
        "perplexity": float(f"{reading.perplexity:.5g}"),
        **facts_of_run(),
    }


def main(arguments: Sequence[str]) -> int:
    known = ("checkpoint", "data", "lengths", "methods", "window", "texts", "scored", "device", "output")
    given = read_arguments(arguments, known, required=("checkpoint", "data", "lengths"))
    lengths, scored = wholes(given, "lengths", (), least=1), whole(given, "scored", 256, least=1)
    count = whole(given, "texts", 4, least=1)
    device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    directory = resolve_checkpoint(given["checkpoint"])
    model = load_decoder(directory, device=device, dtype=torch.float32)
    methods = given["methods"].split(",") if "methods" in given else applicable(model.config)
    unknown = [name for name in methods if name not in applicable(model.config)]
    if unknown:
        allowed = ", ".join(applicable(model.config))
        print(f"methods={','.join(unknown)}: this model has {allowed}", file=sys.stderr)
        return 2
    window = whole(given, "window", model.config.max_positions // 2, least=1)
    tokenizer = Tokenizer.load(directory)
    start = next(iter(reversed(tokenizer.start_ids)), tokenizer.eos_id)
    tokens_BT = texts_of(given["data"], tokenizer, length=max(lengths) + 1, count=count, start=start)
    output = output_directory(given.get("output"), smoke=False)
    label = Path(given["checkpoint"]).name
    command = "python -m longspan.benchmarks.extension " + " ".join(
        f"{name}={Path(value).name if name in ('checkpoint', 'data') else value}"
        for name, value in given.items()
        if name != "output"
    )
    for reading in measure(model, tokens_BT, lengths=lengths, methods=methods, window=window, scored=scored):
        one = row(reading, command=command, checkpoint=label, trained=model.config.max_positions, window=window)
        append("extension.csv", [one], output)
        print(
            f"{reading.method:14s} {reading.length:7,d} tokens: loss {reading.loss:.3f} ± {reading.error:.3f}, "
            f"perplexity {reading.perplexity:.4g}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    started(main)
