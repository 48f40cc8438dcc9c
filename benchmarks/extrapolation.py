"""Position encodings beyond the length that they were trained at: train short, read long.

    python -m longspan.benchmarks.extrapolation [positions=sinusoidal,rope,alibi,none] [seeds=0,1]
        [lengths=512,1024,2048,4096,8192] [texts=16] [scored=256] [runs=DIR] [output=DIR] [any key of `longspan train`]

Each scheme and seed is a run of its own, `longspan train experiment=extrapolation`, in a process of its own; a run that
is finished already in `runs` is not trained again. What `benchmarks.extension` then measures, on documents that the
runs held out: the same last tokens of each text after more and more of what stands before them. A rotary model is read
under every scaling, and each model through a causal window of its training length as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import load_decoder, resolve_checkpoint
from longspan.training.held_out import training_store

from .arguments import split_arguments, started
from .environment import append, output_directory
from .extension import applicable, measure, row
from .runs import told, train_once

OWN = ("positions", "seeds", "lengths", "texts", "scored", "runs", "output")


def held_out(checkpoint: Path, *, length: int, count: int) -> Tensor:
    """The first `length` tokens of the first `count` held-out documents that are long enough, behind the end-of-text
    token as in training, [B, length]. Raises ValueError where there is none."""
    tokenizer = Tokenizer.load(checkpoint)
    documents = training_store(checkpoint, tokenizer).documents("validation")
    rows = [
        torch.tensor([tokenizer.eos_id, *documents.tokens(index)[: length - 1].tolist()])
        for index in range(len(documents))
        if len(documents.tokens(index)) >= length - 1
    ][:count]
    if not rows:
        raise ValueError(f"no held-out document has {length - 1:,} tokens: give longer documents, or smaller lengths")
    return torch.stack(rows)


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    lengths = [int(each) for each in own.get("lengths", "512,1024,2048,4096,8192").split(",")]
    scored, count = int(own.get("scored", "256")), int(own.get("texts", "16"))
    runs = Path(own.get("runs", "runs/extrapolation"))
    output = output_directory(own.get("output"), smoke=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = told("extrapolation", arguments)
    for seed in own.get("seeds", "0,1").split(","):
        for positions in own.get("positions", "sinusoidal,rope,alibi,none").split(","):
            run = runs / f"{positions}-{seed}"
            train_once(run, "extrapolation", [f"model.positions={positions}", f"seed={seed}", *keys])
            checkpoint = resolve_checkpoint(run)
            model = load_decoder(checkpoint, device=device, dtype=torch.float32)
            trained = model.config.max_positions
            methods = [name for name in applicable(model.config) if name not in ("window+sinks", "streaming")]
            tokens_BT = held_out(checkpoint, length=max(lengths) + 1, count=count)
            for reading in measure(model, tokens_BT, lengths=lengths, methods=methods, window=trained, scored=scored):
                label = f"{positions} seed {seed}"
                one = row(reading, command=command, checkpoint=label, trained=trained, window=trained)
                append("extrapolation.csv", [one], output)
                print(f"{label:18s} {reading.method:8s} {reading.length:6,d}: loss {reading.loss:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    started(main)
