"""Full training state on disk: a model checkpoint directory that also holds `trainer.ckpt`.

    checkpoints/step-00000100/    config.json model.safetensors tokenizer.json lineage.json trainer.ckpt manifest.json
    checkpoints/best.json         {"step": 100, "validation_loss": 2.31}

`model.checkpoint` writes a directory beside its name, seals it with a manifest, flushes and renames it: a name `step-…`
is a whole checkpoint, or something that `verify` refuses, whenever the process was killed.
"""

from __future__ import annotations

import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.model import checkpoint as model_checkpoint
from longspan.model.build import Model
from longspan.model.checkpoint import CheckpointError, SavesItself

from .errors import RunFailed
from .run_directory import CHECKPOINTS, write_json

STATE = "trainer.ckpt"
BEST = "best.json"
FORMAT = 1

logger = logging.getLogger("longspan.training")

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint with the lowest validation loss so far (nats per loss token)."""

    step: int
    validation_loss: float


class Checkpoints:
    """The checkpoints of one run; only the process that holds the run's lock may write."""

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        tokenizer: SavesItself | None = None,
        lineage: Mapping[str, object] | None = None,
    ) -> None:
        self.directory = run / CHECKPOINTS
        self._run = run
        self._keep = keep
        self._tokenizer = tokenizer
        self._lineage = dict(lineage or {})

    def steps(self) -> list[int]:
        """Steps that have a directory, oldest first."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return model_checkpoint.step_directory(self._run, step)

    def save(
        self,
        model: Model,
        step: int,
        state: Mapping[str, object],
        *,
        weights: Mapping[str, Tensor] | None = None,
        best: Best | None = None,
    ) -> Path:
        """Writes one checkpoint, then forgets old ones. `weights` where the module does not hold them whole.

        Raises RunFailed when the disk refuses (full, gone); nothing half-written is left then.
        """
        target = self.path(step)

        def training_state(staging: Path) -> None:
            torch.save({"format": FORMAT, "step": step, **state}, staging / STATE)

        try:
            model_checkpoint.save_model(
                model,
                target,
                self._tokenizer,
                lineage={**self._lineage, "step": step},
                state=weights,
                also=training_state,
                overwrite=True,  # a checkpoint of this step that did not verify
            )
            self._mark(best)
        except OSError as error:
            raise RunFailed(f"{target}: cannot be written: {error.strerror or error}; {self.last_good()}") from error
        self._forget(best)
        return target

    def last_good(self) -> str:
        """For messages of failed runs."""
        steps = self.steps()
        return f"the last good checkpoint is {self.path(steps[-1])}" if steps else "there is no checkpoint yet"

    def sweep(self, *, after: int, best: Best | None) -> None:
        """Removes what a killed process left half-written or half-deleted, and checkpoints past step `after`, where the
        run continues (newer ones did not verify); best.json says again what the state of that step does."""
        if not self.directory.is_dir():
            return
        model_checkpoint.remove_unfinished(self.directory)
        for step in self.steps():
            if step > after:
                self._remove(self.path(step))
        self._mark(best)
        self._forget(best)

    def _mark(self, best: Best | None) -> None:
        if best is not None and self.path(best.step).exists():
            write_json(self.directory / BEST, {"step": best.step, "validation_loss": best.validation_loss})
        else:
            (self.directory / BEST).unlink(missing_ok=True)

    def _forget(self, best: Best | None) -> None:
        """Keeps the newest `keep` and the best."""
        for step in self.steps()[: -self._keep]:
            if best is None or step != best.step:
                self._remove(self.path(step))

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a good name. `remove_unfinished`
        # finds this one too.
        grave = path.with_name(f".{path.name}.replaced-forgotten")
        path.rename(grave)
        shutil.rmtree(grave)


def best_of(state: Mapping[str, Any]) -> Best | None:
    """What a saved training state says about the best checkpoint so far."""
    return Best(**state["best"]) if state["best"] is not None else None


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies and holds training state; None where it has written none yet.

    The log names newer ones that are damaged. Raises CheckpointError where all of them are.
    """
    checkpoints = Checkpoints(run, keep=1)
    damages: list[CheckpointError] = []
    for step in reversed(checkpoints.steps()):
        path = checkpoints.path(step)
        try:
            _verify(path)
        except CheckpointError as error:
            damages.append(error)
            continue
        for error in damages:
            logger.warning("falling back to an older checkpoint: %s", error)
        return path
    if damages:
        more = f" (so are {len(damages) - 1} older ones)" if len(damages) > 1 else ""
        raise CheckpointError(f"{run}: no checkpoint of the run is whole: {damages[0]}{more}")
    return None


def _verify(checkpoint: Path) -> None:
    model_checkpoint.verify(checkpoint)
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint}: has no {STATE}")


def load_state(checkpoint: Path) -> dict:
    """The training state of a verified checkpoint directory. Raises CheckpointError for a file that is not one."""
    path = checkpoint / STATE
    _check_archive(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: format {found}, but this version reads format {FORMAT}")
    return state


def _check_archive(path: Path) -> None:
    """torch.save stores entries uncompressed; a compressed one could expand without limit while loading."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: not a training state ({error})") from error
    if compressed:
        raise CheckpointError(f"{path}: holds compressed entries ({compressed[0]}), which torch.save never writes")
