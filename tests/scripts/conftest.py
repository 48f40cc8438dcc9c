"""A run that took seconds, for the verbs that need a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.scripts.cli import main


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test in a directory of its own, without what the shell around it may have set."""
    monkeypatch.chdir(tmp_path)
    for name in ("LONGSPAN_TRACEBACK", "WANDB_API_KEY", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Runs a command line that must be refused: exit code 2, nothing on stdout, one line a problem on stderr."""

    def files() -> list[Path]:
        # The cache keeps the lock of a store that was never built, so that a process that waits on it stays right.
        return [path for path in sorted(Path.cwd().rglob("*")) if path.is_file() and "cache" not in path.parts]

    def run(*argv: str) -> list[str]:
        before = files()
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        lines = err.splitlines()
        assert lines
        assert all(line.startswith((f"longspan {argv[0]}: ", "longspan: ")) for line in lines), err
        assert "Traceback" not in err
        assert files() == before, "something was left behind"
        return [line.partition(": ")[2] for line in lines]

    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a token store in cache/, where experiment=tiny ran into runs/tiny."""
    root = tmp_path_factory.mktemp("workshop")
    before = Path.cwd()
    os.chdir(root)
    try:
        assert main(["train", "experiment=tiny", "callbacks=quiet", f"data.cache={root}/cache"]) == 0
    finally:
        os.chdir(before)
    return root
