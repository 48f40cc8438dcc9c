"""A contender in one case: what is found out about it, and the rows that this becomes."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .contenders import Prepared
from .environment import quantiles
from .plan import Plan
from .rows import Row, Status
from .shapes import QUANTITIES, Case, Quantity, Target
from .tensors import Error
from .timing import Machine, Memory, Samples


@dataclass(slots=True)
class Entrant:
    """A contender in one case: what has been found out about it."""

    name: str
    timed: bool = True  # or there for its errors only
    status: Status = "ok"
    reason: str = ""
    prepared: Prepared | None = None
    yardstick: str = ""
    errors: dict[str, Error] = field(default_factory=dict)
    memory: Memory | None = None
    samples: Samples | None = None

    def drop(self, status: Status, reason: str) -> None:
        """Out of this case; its errors stay."""
        self.status, self.reason = status, reason
        self.prepared = self.memory = self.samples = None


def rows_of(
    case: Case, entrants: Sequence[Entrant], plan: Plan, machine: Machine | None, earlier: Sequence[Row]
) -> list[Row]:
    """A row for each quantity of each entrant, the first of which is ours; one row for who was not measured.

    `earlier` rows of the run hold the baselines that targets refer to.
    """
    ours = entrants[0]
    rows: list[Row] = []
    for entrant in entrants:
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
            yardstick=entrant.yardstick,
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


def _value(entrant: Entrant, quantity: Quantity) -> float | None:
    """Median milliseconds, or MiB."""
    if quantity == "memory":
        return None if entrant.memory is None else entrant.memory.peak / 2**20
    return None if entrant.samples is None else quantiles(getattr(entrant.samples, quantity))[1]


def _measured(row: Row, quantity: Quantity, case: Case, entrant: Entrant) -> Row:
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


def _answered(row: Row, case: Case, ours: Entrant, earlier: Sequence[Row]) -> Row:
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
            figure = _over_baseline(row, target, earlier)
        met = "" if figure is None else "yes" if target.met(figure) else "no"
        return replace(row, target=target.text, figure=figure, target_met=met)
    return row


def _over_baseline(row: Row, target: Target, earlier: Sequence[Row]) -> float | None:
    for other in earlier:
        same = (other.case, other.contender, other.quantity) == (target.baseline, row.contender, row.quantity)
        if same and other.value and row.value is not None:
            return row.value / other.value / target.expected
    return None


def summary(case: Case, entrants: Sequence[Entrant], rows: Sequence[Row]) -> list[str]:
    """What a person who watches wants to see of a case."""
    lines = [case.name]
    width = max(len(entrant.name) for entrant in entrants)
    for entrant in entrants:
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
