"""What is on disk as a checkpoint or a run, and whether it is whole. (No torch here: requests are checked with it.)

`model.checkpoint` describes the directories, writes them, and reads their weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from .config import ARCHITECTURES, DecoderConfig, EncoderConfig, ModelConfig, ModelConfigError, from_dict, near

CONFIG, WEIGHTS, TOKENIZER, LINEAGE, MANIFEST = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "lineage.json",
    "manifest.json",
)

logger = logging.getLogger("longspan.model")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign, or not this model's; one line says which."""


def verify(directory: Path | str) -> None:
    """Checks that a checkpoint directory is complete and unaltered. Raises CheckpointError naming what is wrong."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} holds no {CONFIG}: it is not a checkpoint directory")
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} holds no {MANIFEST}: not a checkpoint of Longspan, or one cut short")
    files = _json(directory / MANIFEST).get("files")
    if not isinstance(files, dict) or not {CONFIG, WEIGHTS} <= set(files):
        raise CheckpointError(f"{directory / MANIFEST} does not list {CONFIG} and {WEIGHTS}: it is damaged")
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != entry["size"]:
            what = "cut short" if size < entry["size"] else "altered"
            raise CheckpointError(f"{path} is {size} bytes, the manifest says {entry['size']}: it was {what}")
    for name, entry in files.items():
        if sha256_of(directory / name) != entry["sha256"]:
            raise CheckpointError(f"{directory / name} does not match its sha256 in the manifest: it was altered")


def load_config(directory: Path | str) -> ModelConfig:
    """The config of a checkpoint directory. Raises CheckpointError for a missing, damaged or foreign one."""
    directory = Path(directory)
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no {CONFIG}: it is not a checkpoint directory")
    raw = _json(path)
    architecture = raw.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        found = f"architecture {architecture!r}" if architecture is not None else "no architecture"
        if "model_type" in raw:
            raise CheckpointError(
                f"{path} describes a Hugging Face model of type {raw['model_type']!r}; make a checkpoint of it first: "
                f"longspan import source={directory} output=DIR"
            )
        raise CheckpointError(f"{path} describes {found}; this version reads: {', '.join(ARCHITECTURES)}")
    try:
        return from_dict(raw)
    except ModelConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_decoder_config(directory: Path | str) -> DecoderConfig:
    """As `load_config`, where only a decoder will do: to generate, to continue a language model's training.

    Raises CheckpointError for another architecture as well.
    """
    config = load_config(directory)
    if not isinstance(config, DecoderConfig):
        what = "an encoder" if isinstance(config, EncoderConfig) else "an encoder–decoder"
        raise CheckpointError(f"{directory} holds {what}; this needs a decoder, which predicts tokens")
    return config


def fingerprint(directory: Path | str) -> str:
    """What tells a checkpoint from others: a digest of everything that its manifest lists but how it came to be.

    Raises CheckpointError where there is no manifest.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} holds no {MANIFEST}: not a checkpoint of Longspan, or one cut short")
    files = _json(directory / MANIFEST).get("files", {})
    entries = sorted((name, entry["sha256"]) for name, entry in files.items() if name != LINEAGE)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): it is damaged") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object: it is damaged")
    return raw


# -- runs -------------------------------------------------------------------------------------------------------------


def why_no_checkpoint(path: Path | str) -> str | None:
    """Why `path` is neither a checkpoint directory nor a run, as the rest of a sentence; None where it looks like one.
    What is inside is not read."""
    path = Path(path)
    if not path.exists():
        close = near(path.name, sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else ""
        return "no such directory" + (close if "did you mean" in close else "")
    if (path / CONFIG).is_file() or (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
        return None
    return f"is neither a checkpoint directory (no {CONFIG}) nor a run (no checkpoints/)"


def resolve_checkpoint(path: Path | str) -> Path:
    """The checkpoint directory that `path` means: itself, or of a run its best, else its newest that verifies.

    A best one that does not verify costs a warning. Raises CheckpointError when there is none, naming the file that is
    damaged.
    """
    path = Path(path)
    if (reason := why_no_checkpoint(path)) is not None:
        raise CheckpointError(f"{path}: {reason}")
    if (path / CONFIG).is_file() or (path / MANIFEST).is_file():
        return path
    steps = step_directories(path)
    if not steps:
        raise CheckpointError(f"{path}: the run has no checkpoint yet (looked in {path / 'checkpoints'})")
    best = path / "checkpoints" / "best.json"
    if best.is_file():
        try:
            return _best(path, best)
        except CheckpointError as error:
            logger.warning("the best checkpoint of %s cannot be used, its newest is taken: %s", path, error)
    damages: list[str] = []
    for directory in steps:
        try:
            verify(directory)
        except CheckpointError as error:
            damages.append(str(error))
        else:
            return directory
    more = f" (so are {len(damages) - 1} older ones)" if len(damages) > 1 else ""
    raise CheckpointError(f"{path}: no checkpoint of the run is whole: {damages[0]}{more}")


def _best(run: Path, record: Path) -> Path:
    step = _json(record).get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{record} names no step: it is damaged")
    chosen = step_directory(run, step)
    verify(chosen)
    return chosen


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def step_directories(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda entry: entry.name, reverse=True)
