"""One directory a run: who may write it, what is in it, and where a run came from.

config.yaml  lineage.json  accounting.json     written at the start
metrics.csv  train.log  checkpoints/           grow with the run
evaluation.json  sample.txt  summary.json  report.html     written at the end
.lock                                          held by the process that writes
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import UserError

LOCK = ".lock"
CONFIG = "config.yaml"
LINEAGE = "lineage.json"
ACCOUNTING = "accounting.json"
METRICS = "metrics.csv"
LOG = "train.log"
CHECKPOINTS = "checkpoints"
EVALUATION = "evaluation.json"
SAMPLE = "sample.txt"
SUMMARY = "summary.json"
REPORT = "report.html"
_OURS = {
    CONFIG,
    LINEAGE,
    ACCOUNTING,
    METRICS,
    LOG,
    CHECKPOINTS,
    EVALUATION,
    SAMPLE,
    SUMMARY,
    REPORT,
    "wandb",
    "wandb_id",
}
_VERSIONED = ("longspan", "torch", "triton", "lightning", "tokenizers", "datasets", "safetensors", "numpy")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds `directory` (made if missing) against every other process.

    A POSIX record lock: it dies with its process, and forked loader workers that outlive a killed run by some seconds
    do not keep it (as they would an flock). A directory that ends up empty is removed.
    Raises UserError naming the process that writes there now.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"output={directory}: cannot be written: {error.strerror}; choose another output") from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"output={directory}: process {owner} is writing this run; wait for it, stop it, or choose another "
                "output"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            # In a run the file stays: a process could hold a removed one while another makes a new one. What is no run
            # was refused or never begun, and is left as it was found.
            if not is_run(directory):
                (directory / LOCK).unlink()
                if not any(directory.iterdir()):
                    directory.rmdir()
    finally:
        os.close(handle)


def is_run(directory: Path) -> bool:
    """Whether a training run wrote (or began to write) this directory."""
    return (directory / CONFIG).is_file() or (directory / CHECKPOINTS).is_dir()


def is_empty(directory: Path) -> bool:
    """Nothing there but, perhaps, a lock."""
    return not directory.exists() or all(entry.name == LOCK for entry in directory.iterdir())


def check_output(directory: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses an output that a new run may not write into. Raises UserError."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output={directory}: is a file; a run needs a directory")
    if is_empty(directory):
        return
    if not is_run(directory):
        hint = "; overwrite=true only replaces runs" if overwrite else ""
        raise UserError(f"output={directory}: not empty, and not a run; choose another output{hint}")
    if not (resume or overwrite):
        raise UserError(
            f"output={directory}: holds a run already; continue it with resume=auto, replace it with overwrite=true, "
            "or choose another output"
        )


def clear(directory: Path) -> None:
    """Removes what a run wrote (and nothing else), so that a new one can start there."""
    for name in _OURS:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes beside the target and renames: readers never see half a file."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w") as file:
            json.dump(value, file, indent=2, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# -- lineage ----------------------------------------------------------------------------------------------------------


def lineage(*, seed: int, data: Mapping[str, object], parent: str | None, device: torch.device) -> dict[str, object]:
    """How a run comes to be: code, command, data, parent weights, seed, machine."""
    return {
        "created": now(),
        "command": command(),
        "commit": source_commit(),
        "versions": versions(),
        "seed": seed,
        "data": dict(data),
        "parent": parent,
        "hardware": hardware(device),
        "sessions": [],
    }


def command() -> str:
    return shlex.join(sys.argv)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree, or not on this platform
            continue
    return found


def source_commit() -> str | None:
    """The git commit of this source tree, with `+changes` where it is not clean; None for an installed package.
    `LONGSPAN_COMMIT`, where set, is taken for it, as in `longspan bench`: for trees without git."""
    root = Path(__file__).resolve().parent.parent
    if named := os.environ.get("LONGSPAN_COMMIT"):
        return named
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or not readable by this user
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603 (fixed words)


def hardware(device: torch.device) -> dict[str, object]:
    facts: dict[str, object] = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpus"] = torch.cuda.device_count()
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
