"""What a run of `longspan bench` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .shapes import Case, SuiteName

REPETITIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    peers        names of `shapes.PEERS`
    time_limit   seconds; a case is not begun when the longest so far would not fit in what is left
    """

    suite: SuiteName
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    backend: str
    device: torch.device
    repetitions: int
    output: Path
    command: str
    time_limit: float | None = None

    @property
    def smoke(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.smoke else torch.bfloat16
