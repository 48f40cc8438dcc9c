"""The same training run under several attention backends: do the losses agree, and what does each cost in memory?

    python -m longspan.benchmarks.loss_curves backends=triton,sdpa,flex [output=DIR] [any key of `longspan train`]

Each backend trains in a process of its own: `longspan train experiment=gpt2_small`, 300 steps, the same seed, weights
and order of data, every step logged. All are compared with sdpa (the last one named, where sdpa is not among them).
The runs' directories are temporary: what stays is the losses.

Two bf16 runs that round differently cannot stay together step by step: a rounding moves a weight, every later gradient
differs, and the distance grows. That noise changes sign from step to step; a wrong kernel's error does not. So |Δloss|
is given as it is, and of the mean over the last ten steps, which the target of 5e-3 is asked of. A third backend shows
how far two correct kernels get apart anyway, and `backends=sdpa,sdpa` how far one gets from itself: the second run is
called `sdpa#2`, and torch's FlashAttention adds dQ up with atomics, so it is not the first.
"""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .environment import append, facts_of_run, output_directory
from .runs import told

TARGET = 5e-3
_WINDOW = 10
_RUN = """
import sys
from longspan.scripts.cli import main
code = main(sys.argv[1:])
import torch
if torch.cuda.is_available():
    print(f"peak_bytes={torch.cuda.max_memory_allocated()}")
sys.exit(code)
"""
_KEYS = (  # what a comparison needs; what is typed comes after and wins
    "trainer.steps=300",
    "trainer.log_every=1",
    "trainer.val_batches=1",
    "model.dropout=0.0",
    "evaluation.enabled=false",
    "sample.prompt=",
    "callbacks.report=false",
    "callbacks.progress=lines",
    "logger.wandb=off",
    "overwrite=true",
)


@dataclass(frozen=True, slots=True)
class Curve:
    """loss: of every step; peak_bytes: of GPU memory, None on a CPU."""

    backend: str
    loss: np.ndarray
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Distance:
    """Largest |Δloss|: of single steps, and of means over ten steps."""

    raw: float
    smoothed: float

    @property
    def met(self) -> bool:
        return self.smoothed <= TARGET


def train(backend: str, arguments: Sequence[str], directory: Path) -> Curve:
    """Run it. Raises RuntimeError when the run fails (its last words are on the terminal)."""
    experiment = () if any(each.startswith("experiment=") for each in arguments) else ("experiment=gpt2_small",)
    keys = [*experiment, *_KEYS, f"attention.backend.train={backend}", f"output={directory}", *arguments]
    done = subprocess.run([sys.executable, "-c", _RUN, "train", *keys], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603  our own command line
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"attention.backend.train={backend}: the run ended with exit code {done.returncode}")
    with (directory / "metrics.csv").open(newline="") as handle:
        loss = np.array([float(row["loss"]) for row in csv.DictReader(handle) if row["loss"]])
    told = [line for line in done.stdout.splitlines() if line.startswith("peak_bytes=")]
    return Curve(backend, loss, int(told[-1].partition("=")[2]) if told else None)


def distinct(backends: Sequence[str]) -> list[str]:
    """Names for the runs: a backend's second run is `sdpa#2`.

    >>> distinct(["sdpa", "triton", "sdpa"])
    ['sdpa', 'triton', 'sdpa#2']
    """
    seen: list[str] = []
    for backend in backends:
        again = sum(each.partition("#")[0] == backend for each in seen)
        seen.append(f"{backend}#{again + 1}" if again else backend)
    return seen


def distance(one: np.ndarray, other: np.ndarray) -> Distance:
    """Of two curves of the same steps. Raises ValueError when one is shorter or holds a NaN."""
    if one.shape != other.shape or not np.isfinite([one, other]).all():
        raise ValueError(
            f"curves of {len(one)} and {len(other)} steps, or a loss that is not finite: nothing to compare"
        )
    apart = one - other
    width = min(_WINDOW, len(apart))
    means = np.convolve(apart, np.full(width, 1 / width), mode="valid")
    return Distance(float(np.abs(apart).max()), float(np.abs(means).max()))


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when every backend keeps to the target."""
    own = dict(each.split("=", 1) for each in arguments if each.startswith(("backends=", "output=")))
    passed = [each for each in arguments if not each.startswith(("backends=", "output="))]
    backends = own.get("backends", "triton,sdpa,flex").split(",")
    output = output_directory(own.get("output"), smoke=False)
    with tempfile.TemporaryDirectory() as runs:
        curves = {
            name: train(backend, passed, Path(runs) / name)
            for name, backend in zip(distinct(backends), backends, strict=True)
        }
    reference = curves["sdpa" if "sdpa" in curves else backends[-1]]

    rows: list[dict[str, object]] = []
    for name, curve in curves.items():
        if curve is reference:
            continue
        apart = distance(curve.loss, reference.loss)
        rows.append(
            {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "command": told("loss_curves", arguments),
                "backend": name,
                "against": reference.backend,
                "steps": len(curve.loss),
                "largest_difference": round(apart.raw, 6),
                "largest_difference_mean10": round(apart.smoothed, 6),
                "target": TARGET,
                "met": apart.met,
                "final_loss": round(float(curve.loss[-_WINDOW:].mean()), 5),
                "final_loss_against": round(float(reference.loss[-_WINDOW:].mean()), 5),
                "peak_gib": _gib(curve),
                "peak_gib_against": _gib(reference),
                **facts_of_run(),
            }
        )
        print(", ".join(f"{name}={value}" for name, value in rows[-1].items()))
    if not rows:
        raise ValueError(f"backends={','.join(backends)}: name at least two")
    print(f"appended to {append('loss_curves.csv', rows, output)}")
    steps = {name: [round(float(loss), 6) for loss in curve.loss] for name, curve in curves.items()}
    with (output / "loss_curves.jsonl").open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"date": rows[0]["date"], "command": rows[0]["command"], "loss": steps}) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


def _gib(curve: Curve) -> float | str:
    return "" if curve.peak_bytes is None else round(curve.peak_bytes / 2**30, 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
