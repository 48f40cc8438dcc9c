"""What a conformance run found, as data and as a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..attention.backend import Feature
from .accuracy import Finding
from .cases import Case

PLAIN = "(plain)"  # the row of a case that needs no feature


class ConformanceError(AssertionError):
    """A backend does not compute what the definition says; its text is the report."""


@dataclass(slots=True)
class Tally:
    """One check over all cases that have one feature."""

    passed: int = 0
    failed: int = 0
    worst: float = 0.0  # error over budget among those that passed

    def __str__(self) -> str:
        if self.failed:
            return f"FAIL {self.failed}/{self.failed + self.passed}"
        return f"{self.worst:.2f}" if self.worst else "ok"


@dataclass(slots=True, kw_only=True)
class Report:
    """The outcome of `conformance`. `ok`: nothing failed; `text()`: the page; `raise_if_failed()` for tests.

    tallies   (check, feature) -> Tally
    failures  check -> its smallest failing example
    claims    what the capabilities say and the backend does not keep, in words
    refusals  what it refused though each feature of the case is claimed here: reason -> number of cases
    """

    backend: str
    device: str
    dtypes: tuple[str, ...] = ()
    cases: int = 0
    seconds: float = 0.0
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: dict[str, Finding] = field(default_factory=dict)
    claims: list[str] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failures and not self.claims

    def add(self, findings: Iterable[Finding]) -> bool:
        """Books findings; True when one of them is a failure."""
        failed = False
        for finding in findings:
            features: Sequence[str] = sorted(finding.case.features - {Feature.BACKWARD, Feature.LSE}) or [PLAIN]
            for feature in features:
                tally = self.tallies.setdefault((finding.check, feature), Tally())
                if finding.problem:
                    tally.failed += 1
                else:
                    tally.passed += 1
                    tally.worst = max(tally.worst, finding.ratio)
            if finding.problem:
                failed = True
                smallest = self.failures.get(finding.check)
                if smallest is None or finding.case.size < smallest.case.size:
                    self.failures[finding.check] = finding
        return failed

    def text(self) -> str:
        """For people: a table of check × feature with the worst error as a fraction of its budget, then what failed,
        each with an example that can be pasted."""
        verdict = "conforms" if self.ok else "DOES NOT CONFORM"
        lines = [
            f"{self.backend} on {self.device} ({', '.join(self.dtypes)}): {verdict}. "
            f"{self.cases} cases in {self.seconds:.1f} s"
        ]
        lines += ["", *self._table()] if self.tallies else []
        if self.refusals:
            lines += ["", "refused, as it may:"]
            lines += [f"  {reason}  [{count} cases]" for reason, count in sorted(self.refusals.items())]
        if self.claims:
            lines += ["", "claims that do not hold:", *(f"  {claim}" for claim in self.claims)]
        for check, finding in self.failures.items():
            lines += ["", f"{check}: {finding.problem}", f"  {self._example(finding.case)}"]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raises ConformanceError with the report."""
        if not self.ok:
            raise ConformanceError(self.text())

    def _table(self) -> list[str]:
        checks = list(dict.fromkeys(check for check, _ in self.tallies))
        features = [PLAIN, *map(str, Feature)]
        rows = [["error / budget", *checks]]
        for feature in features:
            cells = [self.tallies.get((check, feature)) for check in checks]
            if any(cells):
                rows.append([feature, *("" if cell is None else str(cell) for cell in cells)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]

    def _example(self, case: Case) -> str:
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"replay({self.backend!r}, {case!r}{device})"
