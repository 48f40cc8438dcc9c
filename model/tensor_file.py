"""Tensors written as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """With the permissions that any other new file gets: the library's own are for its owner alone, and a checkpoint
    is for whoever may read the directory."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(mode)
