"""One process of a grid: `python -m longspan.training.uptrain_worker DIRECTORY`; `uptrain_pool` talks to it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import Queue

from .errors import RunFailed, Terminated
from .progress import logging_to
from .signals import SignalFlag
from .uptrain import LOG, reopen
from .uptrain_cells import Event, Workshop
from .uptrain_plan import Cell

logger = logging.getLogger("longspan.training")


def main(directory: Path) -> int:
    """The exit code: 0, 143 after a signal, 1 after a failure that was reported."""
    names: Queue[str] = Queue()
    threading.Thread(target=_listen, args=(names,), daemon=True).start()
    with SignalFlag().installed() as signals, logging_to(directory / LOG, None):
        workshop = Workshop(reopen(directory), signals)
        chains = {chain.name: chain for chain in workshop.grid.chains}
        try:
            while True:
                name = names.get()
                if signals.received or not name:
                    return 143
                workshop.make(chains[name], _tell)
                _print({"event": "ready"})
        except Terminated as stopped:
            return stopped.exit_code
        except (RunFailed, ValueError, OSError, RuntimeError, NotImplementedError) as error:
            logger.exception("failed")
            _print({"failed": " ".join(str(error).split()) or type(error).__name__})
            return 1


def _listen(names: Queue[str]) -> None:
    for line in sys.stdin:
        names.put(line.strip())
    names.put("")
    os.kill(os.getpid(), signal.SIGTERM)  # whoever started this is gone: save and stop


def _tell(event: Event, cell: Cell, record: Mapping[str, object]) -> None:
    _print({"event": event, "cell": cell.name, "record": {"loss": record.get("loss")}})


def _print(event: Mapping[str, object]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
