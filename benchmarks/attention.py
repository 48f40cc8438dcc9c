"""Attention kernels against their peers: every contender is checked against fp64, then all are timed in turn.

`run` takes a suite of `shapes` case by case. A contender of ours whose error exceeds twice that of the case's yardstick
(SDPA's flash kernel; FlexAttention for masks that it cannot do; a plain low-precision softmax where neither can) is
void and not timed; a peer's is timed and marked. Whatever a contender raises becomes a row, and the suite goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .attempts import caught, free
from .contenders import OURS, Contender, contenders
from .entrants import Entrant, rows_of, summary
from .environment import facts_of_run
from .plan import Plan
from .plots import draw
from .rows import Row, markdown, save
from .shapes import FLASH, FLEX, Case
from .tensors import Inputs, Sample, Values, by_rows, errors, exact_values, excess, low_precision, make_inputs, sample
from .timing import Clock, interleaved, make_clock, measure_machine, peak_memory, warm_up

_GROSS = 0.1  # a relative error beyond rounding in any dtype: that peer computes something else
_TWIN = "plain low-precision softmax"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """rows: of the run; left_out: cases not begun; stopped: why, in words; page: the Markdown that was written."""

    rows: list[Row]
    left_out: list[str]
    stopped: str
    page: str

    @property
    def measured(self) -> bool:
        """Was anything of ours timed?"""
        return any(row.contender.startswith(OURS) and row.status == "ok" for row in self.rows)

    @property
    def sound(self) -> bool:
        """Nothing of ours was void or failed, and the GPU is still there."""
        ours = (row for row in self.rows if row.contender.startswith(OURS))
        return not any(row.status in ("void", "failed") for row in ours) and "GPU" not in self.stopped


def run(plan: Plan, tell: Tell = print) -> Outcome:
    """Measure a suite, appending rows to `plan.output` after each case; then its page and its figure."""
    began = time.monotonic()
    facts = facts_of_run()
    clock = make_clock(plan.device)
    machine = None if plan.smoke else measure_machine(clock)
    if machine is not None:
        tell(f"8192³ bf16 product {machine.gemm_tflops:.0f} TFLOP/s, copy {machine.copy_tb_per_s:.2f} TB/s")
    rows: list[Row] = []
    done, stopped, longest = 0, "", 0.0
    for case in plan.cases:
        elapsed = time.monotonic() - began
        if plan.time_limit is not None and elapsed + longest > plan.time_limit:
            stopped = f"time_limit={plan.time_limit:g}: {elapsed:.0f} s are gone and a case took up to {longest:.0f} s"
            break
        entrants = _measure(case, plan, clock)
        fresh = rows_of(case, entrants, plan, machine, rows)
        save(fresh, facts, plan.suite, plan.output)
        rows += fresh
        done += 1
        longest = max(longest, time.monotonic() - began - elapsed)
        for line in summary(case, entrants, fresh):
            tell(line)
        lost = caught(clock.synchronize)
        if lost is not None:  # after an illegal access every later call fails
            stopped = f"the GPU no longer answers ({lost[1]})"
            break
    left_out = [case.name for case in plan.cases[done:]]
    if stopped:
        tell(f"stopped: {stopped}; left out: {', '.join(left_out) or 'nothing'}")
    page = markdown(rows, title=f"longspan bench suite={plan.suite}", facts=facts, stopped=stopped, left_out=left_out)
    plan.output.mkdir(parents=True, exist_ok=True)
    (plan.output / f"{plan.suite}.md").write_text(page, encoding="utf-8")
    draw(rows, plan.cases, plan.output / f"{plan.suite}.png")
    return Outcome(rows, left_out, stopped, page)


# -- one case ----------------------------------------------------------------------------------------------------------


def _measure(case: Case, plan: Plan, clock: Clock) -> list[Entrant]:
    """Every contender that was asked for, ours first."""
    everybody = contenders(plan.backend)
    ours = next(iter(everybody))
    asked = [ours, *(name for name in plan.peers if name in case.peers and name != ours)]
    entrants = {name: Entrant(name) for name in asked}
    yardstick = FLASH if case.dense else FLEX
    if yardstick in case.peers and yardstick not in entrants:
        entrants[yardstick] = Entrant(yardstick, timed=False)

    def measure() -> None:
        torch.compiler.reset()  # torch.compile gives up on a function after eight shapes
        _judge(entrants, everybody, case, plan, yardstick)
        free(plan.device)
        _race([entrant for entrant in entrants.values() if entrant.timed], clock, plan)

    problem = caught(measure)
    for entrant in entrants.values():
        if problem is not None:
            entrant.drop("failed", f"the case failed: {problem[1]}")
        entrant.prepared = None
    caught(lambda: free(plan.device))  # a lost GPU is told by `run`
    return [entrants[name] for name in asked]


def _judge(
    entrants: Mapping[str, Entrant], everybody: Mapping[str, Contender], case: Case, plan: Plan, yardstick: str
) -> None:
    """Prepare everybody and note their errors; who errs too much is dropped or marked."""
    ours = next(iter(everybody))
    inputs = make_inputs(case, plan.device, plan.dtype)
    chosen = sample(case, plan.device)
    exact = exact_values(case, inputs, chosen)
    for entrant in entrants.values():
        contender = everybody[entrant.name]
        _attempt(entrant, lambda entrant=entrant, by=contender: _check(entrant, by, case, inputs, chosen, exact))
        free(plan.device)
    budget = entrants[yardstick].errors if yardstick in entrants else {}
    if not budget:
        yardstick = _TWIN
        budget = errors(by_rows(case, inputs, chosen, attention=low_precision, dtype=plan.dtype), exact)
    for entrant in entrants.values():
        entrant.yardstick = yardstick
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


def _race(entrants: Sequence[Entrant], clock: Clock, plan: Plan) -> None:
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

    problem = caught(race)
    if problem is not None:
        for entrant in running.values():
            entrant.drop("failed", f"while all were timed: {problem[1]}")


def _check(entrant: Entrant, contender: Contender, case: Case, inputs: Inputs, chosen: Sample, exact: Values) -> None:
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
        of_its_own = exact_values(case, prepared.inputs, some)
        entrant.errors = errors(Values(values.out[:, some.rows]), Values(of_its_own.out))
    entrant.prepared = prepared


def _warm(entrant: Entrant, clock: Clock, device: torch.device) -> None:
    if entrant.prepared is None:
        return
    warm_up(entrant.prepared.step, clock)
    if device.type == "cuda":
        entrant.memory = peak_memory(entrant.prepared.step)


def _attempt(entrant: Entrant, work: Callable[[], None]) -> None:
    problem = caught(work)
    if problem is not None:
        entrant.drop(*problem)
