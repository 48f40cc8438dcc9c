"""A wheel built from the tree holds everything a run needs, configs included."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_trains_away_from_the_tree(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # our own file
    # -S: without the .pth files of this environment, whose editable install would put the tree back on the path.
    command = [sys.executable, "-S", "-m", "longspan.scripts.cli", "train", "experiment=tiny", "output=run"]
    paths = os.pathsep.join([str(site), sysconfig.get_paths()["purelib"]])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "run/checkpoints/step-00000020/model.safetensors").is_file()
