"""The compile gate: our kernels compiled ahead for GPUs that need not be there, held to budgets and to a table.

    python -m longspan.kernels.attention.triton.gate              the committed list, every architecture
    python -m longspan.kernels.attention.triton.gate --update     the same, and writes the table
    python -m longspan.kernels.attention.triton.gate --full       every spec × head dim × dtype; budgets only

Neither a GPU nor a CUDA toolkit is needed: ptxas comes with triton. The table (`compiled.csv`) keeps what each variant
takes; a figure that gets worse is an error until the table says so too.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..flash import interpreted
from .gate_decode import DecodeCase
from .gate_figures import Figures, compile_for, versions
from .gate_hopper import problems
from .gate_variants import CASES, FUSED, JOINS, Case, full_product, requests

TABLE = Path(__file__).with_name("compiled.csv")
UPDATE = "python -m longspan.kernels.attention.triton.gate --update"
REGISTERS = 255  # of a thread: as many as an instruction can name
SHARED = {80: 166_912, 90: 232_448}  # bytes of a program: A100, H100
OWNED_BY_WGMMA = 64  # rows of the smallest tile that a warp group can multiply

# Bytes of a thread that a variant may spill, by architecture; all others none. A quarter above the table or a few bytes
# more, so that ptxas of another version has room. dk and dv keep two accumulators in registers at once, and their tiles
# were chosen by speed on an H100: there, what ships spills addresses before its loops and reloads them inside.
SPILL_BUDGETS: dict[str, dict[int, int]] = {
    "d128 causal dq": {80: 96},
    "d128 causal dkdv": {80: 496, 90: 80},
    "d128 full dkdv": {80: 512, 90: 48},
    "d128 causal window 4:1 dkdv": {90: 32},
    "d128 two-sided window dkdv": {90: 32},
    "d128 documents 4:1 dkdv": {90: 32},
    "d128 globals dkdv": {80: 16, 90: 32},
    "d128 globals always_keys_dkdv": {80: 112},
    "d128 8:1 decode": {90: 8},  # once for a program, outside its loops
    "d96 causal dkdv": {80: 752, 90: 256},
    "d256 causal forward": {80: 160},
    "d256 causal dq": {80: 48, 90: 160},
    "d128 softcap alibi sink dkdv": {80: 1296, 90: 128},
    "d64 dropout dq": {80: 64, 90: 16},
    "d64 dropout dkdv": {80: 176, 90: 480},
    "d128 everything dkdv": {80: 608, 90: 1168},
    # On Hopper once a program, around the loop over tiles (what counts as a loop here is the wait for a warp's part of
    # the kernel); with a window in dq in the mask's branch, which whole tiles skip.
    "hopper d64 causal dkdv": {90: 20},
    # With dq on the way addresses in shared memory are reloaded in every round: beside dk, dv and what the round's
    # products start from hardly a register is left.
    "hopper d64 causal fused": {90: 160},
    "hopper d64 full fused": {90: 52},
    "hopper d64 causal window fused": {90: 176},
    "hopper d128 wide window fused": {90: 80},
    "hopper d128 causal fused": {90: 68},
    "hopper d128 full fused": {90: 32},
    "hopper d128 fp16 fused": {90: 68},
    "hopper d128 causal dkdv": {90: 16},
    "hopper d128 fp16 dkdv": {90: 16},
    "hopper d64 two-sided window dkdv": {90: 28},
    "hopper d128 causal window 4:1 dkdv": {90: 20},
    "hopper d64 documents dkdv": {90: 28},
    "hopper d128 documents dkdv": {90: 20},
    "hopper d128 globals dq": {90: 8},
    "hopper d64 globals dkdv": {90: 28},
    "hopper d128 globals dkdv": {90: 28},
    "hopper d64 softcap alibi sink dkdv": {90: 8},
    # The producer's, whose 24 registers are few for two tiles' places at once.
    "hopper d128 documents forward": {90: 8},
    "hopper d128 globals forward": {90: 16},
    "hopper d128 sinks 4:1 forward": {90: 16},
    "hopper d256 documents forward": {90: 16},  # once an item; 12 by triton 3.6
    "hopper d256 softcap alibi sink dq": {90: 112},  # the first consumer reloads them in every round
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `tile`: queries × keys, warps, stages; it is there to be read and not compared."""

    variant: str
    arch: int
    tile: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class Table:
    triton: str
    ptxas: str
    rows: tuple[Row, ...]


def spill_budget(variant: str, arch: int) -> int:
    return SPILL_BUDGETS.get(variant, {}).get(arch, 0)


# -- budgets -----------------------------------------------------------------------------------------------------------


def over_budget(row: Row, *, tensor_cores: str | None, spills: int | None) -> list[str]:
    """What no table can excuse, one line each. `tensor_cores`: the instructions that must be there, "wgmma" or "mma";
    `spills`: the bytes that may be spilled, None: any number."""
    figures, found = row.figures, []
    limits = (("registers", REGISTERS), ("shared", SHARED[row.arch]), ("spilled", spills), ("unasked", 0))
    for name, limit in limits:
        value = getattr(figures, name)
        if limit is not None and value > limit:
            found.append(
                f"{row.variant} on sm_{row.arch} ({row.tile}): {name} is {value:,}, at most {limit:,} is allowed"
            )
    if tensor_cores is not None and getattr(figures, tensor_cores) == 0:
        found.append(
            f"{row.variant} on sm_{row.arch} ({row.tile}): no {tensor_cores} instruction; tensor cores are idle"
        )
    return found


def tensor_cores(case: Case | DecodeCase, kernel: str, arch: int) -> str | None:
    """Which instructions a kernel must use. fp32 means fp32 here, never tf32."""
    if case.dtype == torch.float32 or kernel in JOINS:
        return None
    request = requests(case, arch)[kernel]
    owned = request.keys if kernel.endswith(("dkdv", FUSED)) else request.queries
    return "wgmma" if arch >= 90 and owned is not None and owned >= OWNED_BY_WGMMA else "mma"


# -- the table ---------------------------------------------------------------------------------------------------------


def read_table(path: Path = TABLE) -> Table | None:
    """None where there is no table: the module may be installed without."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        found = dict(word.split("=", 1) for word in file.readline().removeprefix("#").split())
        rows = tuple(
            Row(
                line["variant"],
                int(line["arch"]),
                line["tile"],
                Figures(**{f.name: int(line[f.name]) for f in fields(Figures)}),
            )
            for line in csv.DictReader(file)
        )
    return Table(found["triton"], found["ptxas"], rows)


def write_table(table: Table, path: Path = TABLE) -> None:
    names = [f.name for f in fields(Figures)]
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# triton={table.triton} ptxas={table.ptxas}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "arch", "tile", *names])
        for row in table.rows:
            writer.writerow([row.variant, row.arch, row.tile, *(getattr(row.figures, name) for name in names)])


def worse(now: Row, was: Row) -> list[str]:
    """Figures that are worse than the table's, one line each."""
    found = []
    for field in fields(Figures):
        is_, was_ = getattr(now.figures, field.name), getattr(was.figures, field.name)
        if field.name == "mma" and now.figures.wgmma:
            continue  # a few products of warps beside those of warp groups are neither better nor worse
        more_is_better = field.name in ("wgmma", "mma")
        if is_ < was_ if more_is_better else is_ > was_:
            tile = now.tile if now.tile == was.tile else f"{was.tile} → {now.tile}"
            found.append(
                f"{now.variant} on sm_{now.arch} ({tile}): {field.name} was {was_:,}, is {is_:,}. "
                f"If that is worth it: {UPDATE}"
            )
    return found


def compare(rows: tuple[Row, ...], table: Table | None, found_versions: tuple[str, str]) -> tuple[list[str], str]:
    """(what is worse than the table or missing from it, a line about what it was compared with)."""
    if table is None:
        return [], f"no {TABLE.name} beside the gate: budgets only"
    if (table.triton, table.ptxas) != found_versions:
        return [], (
            f"the table is of triton {table.triton} and ptxas {table.ptxas}, here are {' and '.join(found_versions)}: "
            "budgets only"
        )
    known = {(row.variant, row.arch): row for row in table.rows}
    failures = []
    for row in rows:
        was = known.get((row.variant, row.arch))
        failures += worse(row, was) if was else [f"{row.variant} on sm_{row.arch}: not in the table. Add it: {UPDATE}"]
    return failures, f"compared with the table of triton {table.triton} and ptxas {table.ptxas}"


# -- compiling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    case: Case | DecodeCase
    kernel: str
    arch: int
    any_spills: bool


@dataclass(frozen=True, slots=True)
class Result:
    row: Row | None  # None: it does not compile
    failures: list[str]
    cpu_seconds: float


def run(job: Job) -> Result:
    """Compiles one variant and holds it to the budgets."""
    from triton.errors import TritonError

    before = _cpu_seconds()
    variant, request = job.case.variant(job.kernel), requests(job.case, job.arch)[job.kernel]
    try:
        figures, sass = compile_for(request, job.arch)
    except (TritonError, RuntimeError) as error:  # RuntimeError: a pass of the compiler failed
        last = (str(error).strip() or repr(error)).splitlines()[-1]
        failure = f"{variant} on sm_{job.arch} ({request.tile}): does not compile: {last}"
        return Result(None, [failure], _cpu_seconds() - before)
    row = Row(variant, job.arch, request.tile, figures)
    spills = None if job.any_spills else spill_budget(variant, job.arch)
    failures = over_budget(row, tensor_cores=tensor_cores(job.case, job.kernel, job.arch), spills=spills)
    if isinstance(job.case, Case) and job.case.hopper and job.kernel not in JOINS:
        columns = request.queries if job.kernel in ("dkdv", FUSED) else request.keys
        # With one owner of keys the consumer that sums up dv has no other product while it exponentiates.
        found = problems(
            sass,
            columns,
            forward=job.kernel == "forward",
            beside=1 if request.constant("OWNERS") == 1 else 2,
        )
        failures += [f"{variant} on sm_{job.arch} ({request.tile}): {problem}" for problem in found]
    return Result(row, failures, _cpu_seconds() - before)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended, ptxas among them."""
    return sum(os.times()[:4])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m longspan.kernels.attention.triton.gate", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the part of the list that the tests compile by default")
    which.add_argument("--full", action="store_true", help="every spec, head dim and dtype, held to budgets (an hour)")
    which.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--arch", default=",".join(map(str, SHARED)), help="compute capabilities without the dot")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    found = parser.parse_args(argv)
    known = {str(arch) for arch in SHARED}
    found.arch = found.arch.split(",")
    if not set(found.arch) <= known:
        parser.error(f"--arch {','.join(found.arch)}: there are budgets for {', '.join(sorted(known))}")
    if found.update and set(found.arch) != known:
        parser.error("--update writes the whole table: leave --arch out")
    return found


def main(argv: list[str]) -> int:
    """0: all well; 1: over budget or worse than the table; 2: nothing was compiled."""
    wanted = _arguments(argv)
    if importlib.util.find_spec("triton") is None:
        print("the compile gate needs triton: pip install triton", file=sys.stderr)
        return 2
    if interpreted():
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    cases = full_product() if wanted.full else tuple(case for case in CASES if case.quick or not wanted.quick)
    archs = [int(arch) for arch in wanted.arch]
    jobs = [
        Job(case, kernel, arch, wanted.full)
        for case in cases
        for arch in archs
        if arch in case.archs
        for kernel in case.kernels
    ]
    started, rows, failures, cpu_seconds = time.perf_counter(), [], [], 0.0
    # Spawned, so that no thread of torch or of numpy is forked.
    with ProcessPoolExecutor(wanted.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(run, jobs):
            if result.row is not None:
                rows.append(result.row)
                print(_line(result.row), flush=True)
            failures += result.failures
            cpu_seconds += result.cpu_seconds
    against = "budgets only"
    if wanted.update:
        write_table(Table(*versions(), tuple(rows)))
        against = f"{TABLE.name} is written"
    elif not wanted.full:
        worsened, against = compare(tuple(rows), read_table(), versions())
        failures += worsened
    for failure in failures:
        print(failure, file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{len(jobs)} compiled in {seconds:.0f} s, {cpu_seconds:.0f} s of CPU; {len(failures)} failures; {against}")
    return 1 if failures else 0


def _line(row: Row) -> str:
    figures = "  ".join(f"{f.name} {getattr(row.figures, f.name)}" for f in fields(Figures))
    return f"{row.variant:32} sm_{row.arch}  {row.tile:16} {figures}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
