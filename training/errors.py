"""How a training run can end other than by finishing."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """The request was wrong (exit code 2). The message is one line: what it was, what is allowed, what to do."""


class RunFailed(RuntimeError):  # noqa: N818 (it names an outcome, like Terminated)
    """The run started and could not go on (exit code 1)."""


class Terminated(Exception):  # noqa: N818 (it is not an error: the state is saved)
    """A signal stopped the run after its state was saved (exit code 128 + signal)."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT."""
        return 128 + signal.Signals(self.signum).value
