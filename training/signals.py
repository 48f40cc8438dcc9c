"""Signals only set a flag; the training loop reads it between steps, on all ranks together.

Doing more inside a handler is how runs hang: a collective in a handler (Lightning's own does one) waits for ranks that
are themselves inside a collective of the step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CAUGHT = (signal.SIGTERM, signal.SIGINT)


class SignalFlag:
    """Which of SIGTERM and SIGINT arrived first; 0 for neither. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum

    @contextmanager
    def installed(self) -> Iterator[SignalFlag]:
        """Handlers in place inside the block, the former ones after it. Only the main thread may enter."""
        former = {signum: signal.getsignal(signum) for signum in _CAUGHT}
        self.install()
        try:
            yield self
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        """Takes the handlers (again): Lightning puts its own in front when `fit` starts."""
        for signum in _CAUGHT:
            signal.signal(signum, self._handle)
