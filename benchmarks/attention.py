"""Attention kernels against their peers: every contender is checked against fp64, then all are timed in turn.

`run` takes a suite of `shapes` case by case. A contender of ours whose error exceeds twice that of the case's yardstick
(SDPA's flash kernel; FlexAttention for masks that it cannot do; a plain low-precision softmax where neither can) is
void and not timed; a peer's is timed and marked. Whatever a contender raises becomes a row, and the suite goes on.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from longspan.kernels.attention import UnsupportedAttention

from .contenders import Contender, Prepared, contenders, installed
from .environment import assembler, describe, quantiles
from .plots import draw
from .rows import Row, Status, markdown, save
from .shapes import FLASH, FLEX, QUANTITIES, Case, Quantity, SuiteName
from .tensors import Error, Inputs, Sample, Values, by_rows, errors, excess, low_precision, make_inputs, sample
from .timing import Clock, Machine, Memory, Samples, interleaved, make_clock, measure_machine, peak_memory, warm_up

_GROSS = 0.1  # a relative error beyond rounding in any dtype: that peer computes something else
_TWIN = "plain low-precision softmax"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    peers        names of `shapes.PEERS`
    time_limit   seconds; a case is not begun when the longest so far would not fit in what is left
    """

    suite: SuiteName
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    backend: str
    device: torch.device
    repetitions: int
    output: Path
    command: str
    time_limit: float | None = None

    @property
    def smoke(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16


@dataclass(frozen=True, slots=True)
class Outcome:
    """rows of the run, cases that the time limit left out, and the page that was written."""

    rows: list[Row]
    left_out: list[str]
    page: str

    @property
    def sound(self) -> bool:
        """Nothing of ours was void or failed."""
        return not any(row.contender.startswith("longspan-") and row.status in ("void", "failed") for row in self.rows)


@dataclass(slots=True)
class _Entrant:
    """A contender in one case: what has been found out about it."""

    name: str
    timed: bool = True  # or there for its errors only
    status: Status = "ok"
    reason: str = ""
    prepared: Prepared | None = None
    errors: dict[str, Error] = field(default_factory=dict)
    memory: Memory | None = None
    samples: Samples | None = None

    def drop(self, status: Status, reason: str) -> None:
        self.status, self.reason, self.prepared = status, reason, None


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


def run(plan: Plan, tell: Tell = print) -> Outcome:
    """Measure a suite, appending rows to `plan.output` after each case; then its page and its figure.

    Raises RuntimeError when the GPU is lost (what was measured before is on disk).
    """
    began = time.monotonic()
    facts = facts_of_run()
    clock = make_clock(plan.device)
    machine = None if plan.smoke else measure_machine(clock)
    if machine is not None:
        tell(f"8192³ bf16 product {machine.gemm_tflops:.0f} TFLOP/s, copy {machine.copy_tb_per_s:.2f} TB/s")
    rows: list[Row] = []
    left_out: list[str] = []
    longest = 0.0
    for case in plan.cases:
        elapsed = time.monotonic() - began
        if plan.time_limit is not None and elapsed + longest > plan.time_limit:
            left_out.append(case.name)
            continue
        found = _measure(case, plan, clock)
        fresh = _rows(case, found, plan, machine, rows)
        save(fresh, facts, plan.suite, plan.output)
        rows += fresh
        longest = max(longest, time.monotonic() - began - elapsed)
        for line in _summary(case, found, fresh):
            tell(line)
        _device_still_works(plan.device)
    if left_out:
        tell(f"time_limit={plan.time_limit:g}: left out {', '.join(left_out)}")
    page = markdown(rows, title=f"longspan bench suite={plan.suite}", facts=facts, left_out=left_out)
    plan.output.mkdir(parents=True, exist_ok=True)
    (plan.output / f"{plan.suite}.md").write_text(page, encoding="utf-8")
    if rows:
        draw(rows, plan.cases, plan.output / f"{plan.suite}.png")
    return Outcome(rows, left_out, page)


# -- one case ----------------------------------------------------------------------------------------------------------


def _measure(case: Case, plan: Plan, clock: Clock) -> list[tuple[_Entrant, str]]:
    """Every contender of a case with the name of the yardstick; ours first."""
    torch.compiler.reset()  # torch.compile gives up on a function after eight shapes
    everybody = contenders(plan.backend)
    ours = next(iter(everybody))
    asked = [ours, *(name for name in plan.peers if name in case.peers)]
    entrants = {name: _Entrant(name) for name in asked}
    yardstick = FLASH if case.dense else FLEX
    if yardstick in case.peers and yardstick not in entrants:
        entrants[yardstick] = _Entrant(yardstick, timed=False)
    yardstick = _judge(entrants, everybody, case, plan, yardstick)
    _free(plan.device)
    _race([entrant for entrant in entrants.values() if entrant.timed], clock, plan)
    for entrant in entrants.values():
        entrant.prepared = None
    _free(plan.device)
    return [(entrants[name], yardstick) for name in asked]


def _judge(
    entrants: Mapping[str, _Entrant], everybody: Mapping[str, Contender], case: Case, plan: Plan, yardstick: str
) -> str:
    """Prepare everybody and note their errors; who errs too much is dropped or marked. The yardstick that was used."""
    ours = next(iter(everybody))
    inputs = make_inputs(case, plan.device, plan.dtype)
    chosen = sample(case, plan.device)
    exact = by_rows(case, inputs, chosen)
    for entrant in entrants.values():
        contender = everybody[entrant.name]
        _attempt(entrant, lambda entrant=entrant, by=contender: _check(entrant, by, case, inputs, chosen, exact))
        _free(plan.device)
    budget = entrants[yardstick].errors if yardstick in entrants else {}
    if not budget:
        yardstick = _TWIN
        budget = errors(by_rows(case, inputs, chosen, attention=low_precision, dtype=plan.dtype), exact)
    for entrant in entrants.values():
        if entrant.prepared is None:
            continue
        worst = max(error.relative for error in entrant.errors.values())
        problem = excess(entrant.errors, budget, exact, plan.dtype)
        if not worst < _GROSS:
            entrant.drop("void" if entrant.name == ours else "failed", f"relative error {worst:.3g} against fp64")
        elif problem is not None and entrant.name == ours:
            entrant.drop("void", problem)
        elif problem is not None:
            entrant.status, entrant.reason = "inaccurate", problem
    return yardstick


def _race(entrants: Sequence[_Entrant], clock: Clock, plan: Plan) -> None:
    """Memory of each, then all of them in turn against the clock."""
    for entrant in entrants:
        _attempt(entrant, lambda entrant=entrant: _warm(entrant, clock, plan.device))
    running = {entrant.name: entrant for entrant in entrants if entrant.prepared is not None}
    steps = {name: entrant.prepared.step for name, entrant in running.items() if entrant.prepared is not None}
    if not steps:
        return

    def race() -> None:
        for name, samples in interleaved(steps, clock, plan.repetitions).items():
            running[name].samples = samples

    problem = _caught(race)
    if problem is not None:
        for entrant in running.values():
            entrant.drop("failed", f"while all were timed: {problem[1]}")


def _check(entrant: _Entrant, contender: Contender, case: Case, inputs: Inputs, chosen: Sample, exact: Values) -> None:
    """Prepare it, run it once, and note its errors."""
    reason = contender.refuses(case, inputs.q.device)
    if reason is not None:
        entrant.drop("skipped", reason)
        return
    prepared = contender.prepare(case, inputs)
    out = prepared.step.forward()
    values = prepared.values(out, prepared.step.backward(out))
    if prepared.inputs is None:
        entrant.errors = errors(values.at(chosen), exact)
    else:  # it computed attention of tensors of its own: some rows of its output tell
        some = Sample(chosen.rows[:: max(1, len(chosen.rows) // 256)], chosen.keys[:0])
        of_its_own = by_rows(case, prepared.inputs, some)
        entrant.errors = errors(Values(values.out[:, some.rows]), Values(of_its_own.out))
    entrant.prepared = prepared


def _warm(entrant: _Entrant, clock: Clock, device: torch.device) -> None:
    if entrant.prepared is None:
        return
    warm_up(entrant.prepared.step, clock)
    if device.type == "cuda":
        entrant.memory = peak_memory(entrant.prepared.step)


def _attempt(entrant: _Entrant, work: Callable[[], None]) -> None:
    problem = _caught(work)
    if problem is not None:
        entrant.drop(*problem)


def _caught(work: Callable[[], None]) -> tuple[Status, str] | None:
    """What `work` raised, as a status and one line."""
    try:
        work()
    except UnsupportedAttention as error:
        return "skipped", _one_line(error)
    except Exception as error:  # noqa: BLE001 (whatever a peer or a compiler raises is a result, and the suite goes on)
        return "failed", _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_still_works(device: torch.device) -> None:
    """An illegal access leaves every later call failing: better to stop."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(
    case: Case, found: Sequence[tuple[_Entrant, str]], plan: Plan, machine: Machine | None, earlier: Sequence[Row]
) -> list[Row]:
    ours = found[0][0]
    rows: list[Row] = []
    for entrant, yardstick in found:
        worst = {name: error.worst for name, error in entrant.errors.items()}
        relative = {name: error.relative for name, error in entrant.errors.items()}
        row = Row(
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=plan.command,
            suite=plan.suite,
            case=case.name,
            contender=entrant.name,
            quantity="",
            status=entrant.status,
            reason=entrant.reason,
            out_worst=worst.get("out"),
            out_relative=relative.get("out"),
            dq_worst=worst.get("dq"),
            dq_relative=relative.get("dq"),
            dk_worst=worst.get("dk"),
            dk_relative=relative.get("dk"),
            dv_worst=worst.get("dv"),
            dv_relative=relative.get("dv"),
            yardstick=yardstick,
            batch=case.batch,
            heads=case.heads,
            kv_heads=case.kv_heads,
            length=case.length,
            head_dim=case.head_dim,
            dtype=str(plan.dtype).removeprefix("torch."),
            pairs=case.pairs,
            gemm_tflops=None if machine is None else round(machine.gemm_tflops, 1),
            copy_tb_per_s=None if machine is None else round(machine.copy_tb_per_s, 3),
            smoke=plan.smoke,
        )
        measured = [
            _answered(_measured(row, quantity, case, entrant), case, ours, earlier)
            for quantity in QUANTITIES
            if _value(entrant, quantity) is not None
        ]
        rows += measured or [row]
    return rows


def _value(entrant: _Entrant, quantity: Quantity) -> float | None:
    """Median milliseconds, or MiB."""
    if quantity == "memory":
        return None if entrant.memory is None else entrant.memory.peak / 2**20
    return None if entrant.samples is None else quantiles(getattr(entrant.samples, quantity))[1]


def _measured(row: Row, quantity: Quantity, case: Case, entrant: _Entrant) -> Row:
    """`row` with one quantity of the entrant."""
    if quantity == "memory":
        scratch = None if entrant.memory is None else round(entrant.memory.scratch / 2**20, 3)
        return replace(row, quantity=quantity, unit="MiB", value=_value(entrant, quantity), scratch_mib=scratch)
    milliseconds = [] if entrant.samples is None else getattr(entrant.samples, quantity)
    p20, p50, p80 = quantiles(milliseconds)
    return replace(
        row,
        quantity=quantity,
        unit="ms",
        n=len(milliseconds),
        p20=p20,
        value=p50,
        p80=p80,
        tflops=case.flops(quantity) / p50 * 1e-9,
    )


def _answered(row: Row, case: Case, ours: _Entrant, earlier: Sequence[Row]) -> Row:
    """`row` with its ratio to ours and the target that it answers."""
    our_value = None if not row.quantity else _value(ours, row.quantity)
    is_ours = row.contender == ours.name
    if not is_ours and our_value and row.value is not None:
        row = replace(row, ratio=row.value / our_value)
    for target in case.targets:
        if (
            target.quantity != row.quantity
            or is_ours != (target.peer is None)
            or target.peer not in (None, row.contender)
        ):
            continue
        figure = row.ratio
        if target.baseline is not None:
            figure = _over_baseline(row, target.baseline, earlier)
        met = "" if figure is None else "yes" if target.met(figure) else "no"
        return replace(row, target=target.text, figure=figure, target_met=met)
    return row


def _over_baseline(row: Row, baseline: str, earlier: Sequence[Row]) -> float | None:
    for other in earlier:
        same = (other.case, other.contender, other.quantity) == (baseline, row.contender, row.quantity)
        if same and other.value and row.value is not None:
            return row.value / other.value
    return None


def _summary(case: Case, found: Sequence[tuple[_Entrant, str]], rows: Sequence[Row]) -> list[str]:
    """What a person who watches wants to see of a case."""
    lines = [case.name]
    width = max(len(entrant.name) for entrant, _ in found)
    for entrant, _ in found:
        mine = {row.quantity: row for row in rows if row.contender == entrant.name}
        parts = []
        for quantity in ("forward", "backward"):
            row = mine.get(quantity)
            if row is not None and row.value is not None:
                ratio = "" if row.ratio is None else f" = {row.ratio:.2f}× ours"
                parts.append(f"{quantity} {row.value:.3f} ms, {row.tflops:.0f} TFLOP/s{ratio}")
        if entrant.memory is not None:
            parts.append(f"{entrant.memory.peak / 2**20:,.0f} MiB")
        if entrant.status != "ok":
            parts.append(f"{entrant.status}: {entrant.reason}")
        lines.append(f"  {entrant.name:<{width}}  {'; '.join(parts)}")
    lines += [
        f"  target {'met' if row.target_met == 'yes' else 'missed' if row.target_met else 'unanswered'}: {row.target} "
        f"({row.quantity} {'–' if row.figure is None else f'{row.figure:.3g}'})"
        for row in rows
        if row.target
    ]
    return lines
