"""What a surgery raises."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A surgery that this model cannot have; `.problems` has a line for each reason."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))
