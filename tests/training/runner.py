"""A process that has imported everything and forks a child a run: real processes to kill, without imports for each.

Reads requests as JSON lines {"config": …, "kill": moment or null, "environments": [{…}, …]} and answers, a line each,
{"pids": […]} when the children run and {"codes": […]} when they have ended (negative: killed by that signal).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch

from longspan.model import checkpoint
from longspan.training import callbacks, metrics, run, schema
from longspan.training.errors import RunFailed, Terminated, UserError


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Makes this process kill itself at a moment: `row:5`, or a stage of writing the checkpoint of a step, `half:6`;
    or has it send a signal to itself (`SIGTERM:5`) or to all processes of the run (`groupSIGTERM:5`) after a row."""
    kind, _, number = moment.partition(":")
    step = int(number)
    if kind == "row":  # the row is written, nothing after it
        append = metrics.MetricsFile.append

        def row(self: metrics.MetricsFile, row: metrics.Row) -> None:
            append(self, row)
            if row.step == step:
                die()

        metrics.MetricsFile.append = row
    elif kind == "half":  # half of trainer.ckpt is on disk
        save = torch.save

        def half(value: dict, path: Path) -> None:
            save(value, path)
            if value["step"] == step:
                os.truncate(path, path.stat().st_size // 2)
                die()

        torch.save = half
    elif kind in ("before", "after"):  # the rename that makes the checkpoint real
        move = checkpoint._move

        def moved(staging: Path, target: Path) -> None:
            if kind == "after" or not target.name.endswith(f"{step:08d}"):
                move(staging, target)
            if target.name.endswith(f"{step:08d}"):
                die()

        checkpoint._move = moved
    elif kind == "forget":  # an old checkpoint is being deleted
        save_checkpoint = callbacks.Checkpoints.save

        def forgetting(self: callbacks.Checkpoints, model: object, at: int, *rest: object, **named: object) -> Path:
            if at == step:
                shutil_rmtree = checkpoint.shutil.rmtree
                checkpoint.shutil.rmtree = lambda path, **_: (shutil_rmtree(next(Path(path).iterdir()), True), die())
            return save_checkpoint(self, model, at, *rest, **named)

        callbacks.Checkpoints.save = forgetting
    else:
        append_row = metrics.MetricsFile.append
        signum = signal.Signals[kind.removeprefix("group")]

        def signalled(self: metrics.MetricsFile, row: metrics.Row) -> None:
            append_row(self, row)
            if row.step == step:
                if kind.startswith("group"):
                    os.killpg(os.getpgid(0), signum)
                else:
                    os.kill(os.getpid(), signum)

        metrics.MetricsFile.append = signalled


def child(request: dict, environment: dict[str, str]) -> int:
    os.environ.update(environment)
    with Path(request["log"]).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*torch.jit.*is deprecated", DeprecationWarning)  # inductor's own, on a GPU
    return exit_code(request["config"], request.get("kill"))


def exit_code(config: dict, kill: str | None) -> int:
    """What the command line makes of a run."""
    if kill is not None:
        arm(kill)
    try:
        run.train(schema.validate(config))
    except UserError as error:
        print(error, flush=True)
        return 2
    except RunFailed as error:
        print(error, flush=True)
        return 1
    except Terminated as error:
        print(error, flush=True)
        return error.exit_code
    return 0


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for environment in request.get("environments") or [{}]:
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    os.setpgid(0, pids[0] if pids else 0)
                    code = child(request, environment)
                except SystemExit as error:
                    code = int(error.code or 0)
                except BaseException:  # noqa: BLE001 (whatever it is, the answer names it)
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            os.setpgid(pid, pids[0] if pids else pid)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:  # one run, in this process: FILE [moment]
        sys.exit(exit_code(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2] if len(sys.argv) > 2 else None))
    main()
