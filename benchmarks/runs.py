"""Experiments that train before they measure: runs as their users start them, and the command that rows carry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import refuse

ASKED = "asked.json"  # in the directory of a finished run: the keys that it was trained with


def is_finished(directory: Path) -> bool:
    return (directory / "summary.json").is_file()


def check_keys(experiment: str, keys: Sequence[str]) -> None:
    """Ends the program (exit code 2, a line for each mistake) where `longspan train` would refuse the keys."""
    command = [sys.executable, "-m", "longspan.scripts.cli", "train", f"experiment={experiment}", *keys, "dry_run=true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603  our own command line
    if done.returncode:
        refuse(done.stderr.rstrip("\n"))


def train_once(directory: Path, experiment: str, keys: Sequence[str]) -> None:
    """`longspan train experiment=…` in a process of its own, or what is left of it; a finished run stays as it is. One
    that starts from weights (`checkpoint=` among the keys) begins again where it was not finished.

    Ends the program with one line when it fails (its own last words are on the terminal), and where a finished run was
    trained with other keys.
    """
    asked = [f"experiment={experiment}", *keys]
    if is_finished(directory):
        before = json.loads((directory / ASKED).read_text()) if (directory / ASKED).is_file() else asked
        if sorted(before) != sorted(asked):
            was, now = (
                " ".join(key for key in one if key not in other) for one, other in ((before, asked), (asked, before))
            )
            raise SystemExit(
                f"{directory}: was trained with other keys ({was or 'none'} → {now or 'none'}); give those again, or "
                "choose another runs=DIR"
            )
        print(f"{directory}: trained already")
        return
    command = [sys.executable, "-m", "longspan.scripts.cli", "train", f"experiment={experiment}", *keys]
    again = "overwrite=true" if any(key.startswith("checkpoint=") for key in keys) else "resume=auto"
    done = subprocess.run([*command, f"output={directory}", again], check=False)  # noqa: S603  our own command line
    if done.returncode:
        raise SystemExit(f"{directory}: the run ended with exit code {done.returncode}")
    (directory / ASKED).write_text(json.dumps(asked, indent=1) + "\n")


def told(module: str, arguments: Sequence[str], *, without: Sequence[str] = ()) -> str:
    """The command line for a row: without where things lie on this machine."""
    local = ("runs=", "output=", "checkpoint=", "data.", *(f"{name}=" for name in without))
    kept = [each for each in arguments if not each.startswith(local)]
    return " ".join([f"python -m longspan.benchmarks.{module}", *kept])
