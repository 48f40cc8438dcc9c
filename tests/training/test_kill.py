"""Really killed processes: the same command with resume=auto continues to the bit-identical loss sequence."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.training.checkpointing import Checkpoints
from longspan.training.metrics import read_rows


def curve(run: Path) -> list[tuple]:
    """What must be equal bit by bit: everything but times."""
    return [
        (row.step, row.tokens, row.loss, row.validation_loss, row.lr, row.grad_norm, row.skipped)
        for row in read_rows(run / "metrics.csv")
    ]


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[tuple]]:
    return {}


@pytest.fixture
def expected(uninterrupted: dict, runner, request_of, tmp_path: Path) -> Callable[..., list[tuple]]:
    """The curve of the run that nobody interrupts."""

    def get(ranks: int = 1, **changes: object) -> list[tuple]:
        key = f"{ranks} {changes}"
        if key not in uninterrupted:
            whole = tmp_path / f"whole-{len(uninterrupted)}"
            assert runner.run(request_of(output=str(whole), **changes), ranks=ranks) == 0, runner.log.read_text()
            uninterrupted[key] = curve(whole)
            assert len(uninterrupted[key]) == 10
        return uninterrupted[key]

    return get


# A run of another kind: an encoder–decoder on denoised texts.
STACK = {"n_layers": 1, "n_heads": 2, "d_ff": 64}
PAIRS: dict[str, object] = {
    "model": {
        "name": "led-tiny",
        "vocab_size": 260,
        "decoder_start_token": 256,
        "d_model": 32,
        "encoder": STACK,
        "decoder": STACK,
        "dropout": 0.1,
    },
    "data__denoising": {"probability": 0.3},
}
MOMENTS = ["row:1", "row:5", "half:6", "before:6", "after:8", "forget:9", "row:10", "before:10", "after:10"]


def check_best(run: Path) -> None:
    """best.json names the lowest validation loss of the curve."""
    rows = read_rows(run / "metrics.csv")
    loss, step = min((row.validation_loss, row.step) for row in rows if row.validation_loss is not None)
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best == {"step": step, "validation_loss": loss}


@pytest.mark.parametrize(
    ("moment", "kind"), [*((moment, {}) for moment in MOMENTS), ("row:5", PAIRS), ("half:6", PAIRS)]
)
def test_kill_9_then_the_same_command(moment: str, kind: dict, runner, request_of, expected, tmp_path: Path) -> None:
    config = request_of(resume="auto", **kind)
    assert runner.run(config, kill=moment) == -signal.SIGKILL, runner.log.read_text()
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected(**kind)
    assert not [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir() if entry.name.startswith(".")]
    assert Checkpoints(tmp_path / "run", keep=2).steps() == [9, 10]
    check_best(tmp_path / "run")


def test_a_signal_in_the_last_step(runner, request_of, expected, tmp_path: Path) -> None:
    """Its validation and its row are made up for, once, whatever happens meanwhile."""
    config = request_of(resume="auto")
    assert runner.run(config, kill="SIGTERM:9") == 143, runner.log.read_text()
    assert [row.step for row in read_rows(tmp_path / "run" / "metrics.csv")] == list(range(1, 10))
    assert runner.run(config, kill="row:10") == -signal.SIGKILL, runner.log.read_text()
    for _ in range(2):
        assert runner.run(config) == 0, runner.log.read_text()
        assert curve(tmp_path / "run") == expected()
        check_best(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] == expected()[-1][3]


@pytest.mark.parametrize(("name", "code", "kind"), [("SIGTERM", 143, {}), ("SIGINT", 130, {}), ("SIGTERM", 143, PAIRS)])
def test_a_signal_saves_the_step_it_came_in(
    name: str, code: int, kind: dict, runner, request_of, expected, tmp_path: Path
) -> None:
    config = request_of(resume="auto", **kind)
    # Step 4 is due for validation; the run stops without it and makes up for it when it continues.
    assert runner.run(config, kill=f"{name}:3") == code, runner.log.read_text()
    assert Checkpoints(tmp_path / "run", keep=2).steps() == [3, 4]
    assert runner.log.read_text().splitlines()[-1] == (
        f"{name}: saved {tmp_path}/run/checkpoints/step-00000004; the same command with resume=auto continues"
    )
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected(**kind)


@pytest.mark.parametrize("moment", ["SIGTERM:3", "row:2"])
def test_a_run_that_started_from_weights(moment: str, runner, request_of, tmp_path: Path) -> None:
    """Continued as its last words say; killed before its first checkpoint, it starts from the weights again."""
    base = request_of(output=str(tmp_path / "base"), trainer__steps=2)
    assert runner.run(base) == 0, runner.log.read_text()
    # The model and the context of this command line are not the run's.
    tuned = request_of(model={"name": "llama-tiny", "vocab_size": 300}, trainer__steps=6)
    tuned["data"].pop("context")
    start = {**tuned, "checkpoint": base["output"]}
    assert runner.run({**start, "output": str(tmp_path / "whole")}) == 0, runner.log.read_text()

    code = runner.run(start, kill=moment)
    if moment == "row:2":
        assert code == -signal.SIGKILL
    else:
        assert code == 143, runner.log.read_text()
        assert (
            runner.log.read_text()
            .splitlines()[-1]
            .endswith("step-00000004; the same command with resume=auto instead of checkpoint= continues")
        )
    assert runner.run({**start, "resume": "auto"}) == 2
    assert runner.run({**tuned, "resume": "auto"}) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    lineages = [json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("run", "whole")]
    assert lineages[0]["parent"] == lineages[1]["parent"] is not None


def test_loader_processes_change_nothing(runner, request_of, expected, tmp_path: Path) -> None:
    config = request_of(resume="auto", data__workers=2)
    assert runner.run(config, kill="row:5") == -signal.SIGKILL, runner.log.read_text()
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected()


def test_two_processes_stop_together_and_continue(runner, request_of, expected, tmp_path: Path) -> None:
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    config = request_of(resume="auto", **changes)
    runner.start(config, kill="groupSIGTERM:4", ranks=2)
    assert runner.finish() == [143, 0], runner.log.read_text()
    assert Checkpoints(tmp_path / "run", keep=2).steps() == [4, 5]
    runner.start(config, ranks=2)
    assert runner.finish() == [0, 0], runner.log.read_text()
    assert curve(tmp_path / "run") == expected(ranks=2, **changes)


@pytest.mark.parametrize("kind", [{}, PAIRS], ids=["decoder", "pairs"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(strategy: str, kind: dict, runner, request_of, expected) -> None:
    kind = {**kind, "model__dropout": 0.0}
    alone = expected(**kind)
    # (The schema lets nobody ask for FSDP on a CPU by name; gloo can do it, so that it is tested everywhere.)
    shape = {"trainer__devices": 2, "trainer__strategy": strategy, "trainer__accelerator": "auto"}
    together = expected(ranks=2, **kind, **shape)
    for one, two in zip(alone, together, strict=True):
        assert one[:2] == two[:2]
        assert two[2] == pytest.approx(one[2], abs=2e-6)  # loss
        assert two[3] == pytest.approx(one[3], abs=2e-6)  # validation loss
        assert two[5] == pytest.approx(one[5], rel=1e-4)  # gradient norm


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_state_continues_anywhere(ranks: int, runner, request_of, expected, tmp_path: Path) -> None:
    shape = {"trainer__devices": 2, "trainer__strategy": "fsdp", "trainer__accelerator": "auto"}
    config = request_of(resume="auto", model__dropout=0.0, **shape)
    runner.start(config, kill="groupSIGTERM:4", ranks=2)
    assert runner.finish() == [143, 0], runner.log.read_text()
    if ranks == 1:
        config = request_of(resume="auto", model__dropout=0.0)
    assert runner.run(config, ranks=ranks) == 0, runner.log.read_text()
    continued, alone = curve(tmp_path / "run"), expected(model__dropout=0.0)
    assert [row[:2] for row in continued] == [row[:2] for row in alone]
    assert [row[2] for row in continued] == pytest.approx([row[2] for row in alone], abs=2e-6)
    assert [row[3] for row in continued if row[3]] == pytest.approx([row[3] for row in alone if row[3]], abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_kill_9_at_any_moment(seed: int, runner, request_of, expected, tmp_path: Path) -> None:
    """Killed from outside, again and again, after times that nobody chose."""
    config = request_of(resume="auto")
    rng = random.Random(seed)
    code = -signal.SIGKILL
    for _ in range(20):
        (pid,) = runner.start(config)
        time.sleep(rng.uniform(0.05, 1.5))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        (code,) = runner.finish()
        if code == 0:
            break
        assert code == -signal.SIGKILL, runner.log.read_text()
    if code:
        assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected()


@pytest.mark.slow
def test_processes_that_lightning_starts(request_of, expected, tmp_path: Path) -> None:
    """The launcher of `longspan train trainer.devices=2`: SIGTERM to the whole group, then the same command again."""
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(request_of(resume="auto", **changes)))
    command = [sys.executable, str(Path(__file__).with_name("runner.py")), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run([*command, "groupSIGTERM:4"], env=environment, start_new_session=True, timeout=240)
    assert first.returncode == 143
    assert subprocess.run(command, env=environment, start_new_session=True, timeout=240).returncode == 0
    assert curve(tmp_path / "run") == expected(ranks=2, **changes)
