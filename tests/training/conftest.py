from __future__ import annotations

import copy
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "the",
    "dog",
    "ran",
    "over",
    "big",
    "hills",
    "while",
    "birds",
    "sang",
    "in",
    "trees",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of short texts, and beside it the cache that all runs of the session share."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for number in range(40):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(60, 300)))
        (directory / f"{number}.txt").write_text(text)
    return directory


@pytest.fixture
def request_of(corpus: Path, tmp_path: Path) -> Callable[..., dict]:
    """A run of seconds as a user writes it; keyword arguments replace single keys (`trainer__steps=3`)."""

    def build(**changes: object) -> dict:
        raw: dict = {
            "model": {
                "name": "gpt-tiny",
                "vocab_size": 260,
                "n_layers": 1,
                "d_model": 32,
                "n_heads": 2,
                "d_ff": 64,
                "dropout": 0.1,
            },
            "data": {
                "path": str(corpus),
                "cache": str(corpus.parent / "cache"),
                "tokenizer": {"kind": "bytes"},
                "context": 16,
                "validation_fraction": 0.2,
            },
            "schedule": {"warmup": 0.3},
            "trainer": {
                "steps": 10,
                "global_batch": 8,
                "micro_batch": 2,
                "precision": "fp32",
                "accelerator": "cpu",
                "log_every": 1,
                "val_every": 4,
                "val_batches": 2,
                "save_every": 3,
            },
            "evaluation": {"enabled": False},
            "sample": {"prompt": ""},
            "callbacks": {"progress": "off", "report": False},
            "logger": {"wandb": "off"},
            "output": str(tmp_path / "run"),
        }
        raw = copy.deepcopy(raw)
        for path, value in changes.items():
            *sections, key = path.split("__")
            section = raw
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        return raw

    return build


class Runner:
    """Talks to `runner.py`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self.log = log
        self.pids: list[int] = []

    def start(self, config: dict, *, kill: str | None = None, ranks: int = 1) -> list[int]:
        """Process ids of a run that goes on; `finish` waits for it."""
        environments = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environments = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                for rank in range(ranks)
            ]
        self.log.write_text("")
        request = {"config": config, "kill": kill, "environments": environments, "log": str(self.log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.pids = self._answer()["pids"]
        return self.pids

    def finish(self) -> list[int]:
        codes = self._answer()["codes"]
        self.pids = []
        return codes

    def run(self, config: dict, *, kill: str | None = None, ranks: int = 1) -> int:
        """The exit code of a run's main process."""
        self.start(config, kill=kill, ranks=ranks)
        return self.finish()[0]

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 120)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            for pid in self.pids:  # ranks that wait for one that is gone
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"no answer: {self.log.read_text()}")
        return json.loads(line)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("runner.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    yield Runner(process, tmp_path_factory.mktemp("runner") / "log.txt")
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    return wait
