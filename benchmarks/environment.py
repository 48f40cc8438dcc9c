"""What a measurement was taken on: hardware, versions, commit. Every row of `results/` carries it."""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

SMOKE = "smoke run on a CPU: it shows that everything works, and no speed"
RESULTS = Path(__file__).resolve().parent / "results"


def describe() -> dict[str, str]:
    """GPU, driver, versions and commit (`-dirty`: tracked files differ from it). `LONGSPAN_COMMIT`, where
    set, is taken for the commit: for trees without git."""
    facts = {"commit": os.environ.get("LONGSPAN_COMMIT") or _checked_out()}
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "none"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # a line a GPU
        facts["driver"] = drivers.splitlines()[0] if drivers else "unknown"
    else:
        facts["device"] = platform.processor() or platform.machine()
        facts["driver"] = "none"
    return facts


def facts_of_run() -> dict[str, str]:
    """Versions of everything that a number depends on."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        **describe(),
        "ptxas": assembler(),
        "cudnn": "none" if cudnn is None else str(cudnn),
        "transformers": installed("transformers"),
        "flash_attn_4": installed("flash-attn-4"),
    }


def _checked_out() -> str:
    """The commit, `-dirty` where tracked files differ from it."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else commit


def installed(package: str) -> str:
    """Its version, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def assembler() -> str:
    """The version of the ptxas that Triton assembles with: its own, or the one of TRITON_PTXAS_PATH."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:
            return "none"
        path = str(Path(found.origin).parent / "backends/nvidia/bin/ptxas")
    release = re.search(r"V(\d[\d.]*)", _output(path, "--version") or "")
    return "unknown" if release is None else release[1]


def output_directory(asked: str | None, *, smoke: bool) -> Path:
    """Where rows go: where asked; else a smoke run's into `bench/` of the working directory, and a measurement's into
    the `results/` of this checkout (into `bench/` too where the package is installed without one)."""
    if asked is not None:
        return Path(asked)
    checkout = (RESULTS.parent.parent / "pyproject.toml").is_file()
    return RESULTS if checkout and not smoke else Path("bench")


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 of at least two samples."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return cuts[0], statistics.median(samples), cuts[3]


def append(file: str, rows: Sequence[Mapping[str, object]], directory: Path = RESULTS) -> Path:
    """Append rows to `results/<file>` or, where it has other columns, to the first of `<file>-2`, `<file>-3`, … that is
    new or has these, and say so: what was measured is not lost for it. Returns where they are."""
    wanted = path = directory / file
    columns = list(rows[0])
    number = 1
    while path.exists() and _header(path) != columns:
        number += 1
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    if path != wanted:
        print(f"{wanted} has other columns than these rows, which go to {path}", file=sys.stderr)
    fresh = not path.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _header(path: Path) -> list[str]:
    with path.open(newline="") as handle:
        return next(csv.reader(handle), [])


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603  fixed commands
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
