"""A grid on several devices: a process each, which gets one chain after the other.

A worker reads chains' names, a line each, and prints events, a JSON object a line. It needs nothing but the grid's
directory, so what it makes does not depend on who started it. When its input ends before it was told to stop, whoever
started it is gone, and it stops as after a signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from .errors import RunFailed, Terminated
from .signals import SignalFlag
from .uptrain_cells import Tell
from .uptrain_plan import Chain
from .uptrain_recipe import Uptraining

_PATIENCE = 120.0  # seconds that a worker gets to save


def environments(workers: int, visible: Sequence[str]) -> list[dict[str, str]]:
    """Of each worker: one GPU of those that are visible; none to choose on a CPU."""
    if not visible:
        return [{} for _ in range(workers)]
    return [{"CUDA_VISIBLE_DEVICES": visible[i % len(visible)]} for i in range(workers)]


def visible_gpus(count: int) -> list[str]:
    """How CUDA_VISIBLE_DEVICES names the GPUs that this process sees."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] or [str(i) for i in range(count)]


class Pool:
    """Worker processes that make chains. Raises RunFailed where one fails, Terminated after a signal."""

    def __init__(self, grid: Uptraining, own: Sequence[Mapping[str, str]], signals: SignalFlag) -> None:
        self._grid = grid
        self._signals = signals
        self._events: Queue[tuple[_Worker, dict[str, object]]] = Queue()
        self._workers = [_Worker(grid.directory, {**os.environ, **each}, self._put) for each in own]

    def _put(self, worker: _Worker, event: dict[str, object]) -> None:
        self._events.put((worker, event))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        deadline = time.monotonic() + _PATIENCE
        for worker in self._workers:
            worker.wait(max(1.0, deadline - time.monotonic()))

    def make(self, chains: Sequence[Chain], tell: Tell) -> None:
        """All of them; returns when they are done."""
        waiting = deque(chains)
        cells = {cell.name: cell for chain in chains for cell in chain.cells}
        busy: set[_Worker] = set()
        for worker in self._workers:
            if waiting:
                worker.give(waiting.popleft())
                busy.add(worker)
        while busy:
            if self._signals.received:
                raise Terminated(self._signals.received, f"stopped; what is done of {self._grid.directory} is kept")
            try:
                worker, event = self._events.get(timeout=0.2)
            except Empty:
                continue
            if "failed" in event:
                raise RunFailed(f"a worker failed: {event['failed']}")
            if event.get("event") in ("begun", "done"):
                record = event["record"]
                tell(
                    "begun" if event["event"] == "begun" else "done",
                    cells[str(event["cell"])],
                    record if isinstance(record, dict) else {},
                )
            elif waiting:
                worker.give(waiting.popleft())
            else:
                busy.discard(worker)


class _Worker:
    """One process and the thread that reads what it prints."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], put: Callable[[_Worker, dict[str, object]], None]
    ) -> None:
        # A session of its own: a Ctrl-C is this process's to pass on.
        self._process = subprocess.Popen(  # noqa: S603 (fixed words)
            [sys.executable, "-m", "longspan.training.uptrain_worker", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        self._put = put
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def give(self, chain: Chain) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has failed; its reader says so
                self._process.stdin.write(chain.name + "\n")
                self._process.stdin.flush()

    def stop(self) -> None:
        """At the next step, after saving; at once where it waits for work."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(5)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a library that prints
            if isinstance(event, dict):
                self._put(self, event)
        code = self._process.wait()
        if code not in (0, 143, -signal.SIGTERM):
            self._put(self, {"failed": f"process {self._process.pid} ended with code {code}; see uptrain.log"})
