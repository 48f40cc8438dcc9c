"""Rows that cannot be used: counted, the first of them named, and too many of them refused."""

from __future__ import annotations

from .files import SourceError

SHOWN = 5  # refused rows that are named


class Refused:
    """A `files.Refuse` that remembers: how many rows could not be used, and what was said of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def __call__(self, error: SourceError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def objection(self, n_used: int, tolerance: float, *, what: str, key: str) -> str | None:
        """One line where more than `tolerance` (a share) of all rows were refused; None: there were few enough.

        n_used     rows that could be used
        what, key  what rows are called there, and the setting that the tolerance is of
        """
        seen = n_used + self.count
        if self.count <= tolerance * seen:
            return None
        return f"{self.count} of {seen} {what} cannot be used, more than {key}={tolerance:g} allows: {self.words()}"

    def words(self) -> str:
        """What was said of the first, and how many more there are."""
        more = f"; and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return "; ".join(self.first) + more
