"""Checkpoint directories: a model as config.json + model.safetensors, sealed by a manifest.

    config.json         the model's config as plain JSON
    model.safetensors   weights under their unfused names (q_proj, k_proj, v_proj); no pickle anywhere
    tokenizer.json      if there is one
    lineage.json        how the model was made: run, parent, data, commit
    manifest.json       size and sha256 of every other file; written last, checked on loading

A directory is written beside its target, flushed to disk and renamed, so that a checkpoint exists whole or not at all.
A run keeps its checkpoints as `<run>/checkpoints/step-00000100`, and names the best in `<run>/checkpoints/best.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .build import Model, build_from
from .checkpoint_files import (
    CONFIG,
    LINEAGE,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    CheckpointError,
    load_config,
    load_decoder_config,
    resolve_checkpoint,
    sha256_of,
    step_directory,
    verify,
)
from .config import to_dict
from .decoder import Decoder, from_config
from .tensor_file import write_tensors

__all__ = [
    "CONFIG",
    "LINEAGE",
    "MANIFEST",
    "TOKENIZER",
    "WEIGHTS",
    "CheckpointError",
    "SavesItself",
    "check_weights",
    "load_config",
    "load_decoder",
    "load_decoder_config",
    "load_model",
    "load_weights",
    "remove_unfinished",
    "resolve_checkpoint",
    "save_model",
    "step_directory",
    "verify",
    "write_directory",
]


class SavesItself(Protocol):
    """A tokenizer, as far as a checkpoint cares: it writes its tokenizer.json into a directory."""

    def save(self, directory: Path, /) -> object: ...


# -- writing ----------------------------------------------------------------------------------------------------------


def save_model(
    model: Model,
    directory: Path | str,
    tokenizer: SavesItself | None = None,
    *,
    lineage: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    also: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint directory and returns it.

    state   the weights, where the module does not hold them whole (sharded training); None: the module's
    also    writes further files into the directory before it is sealed (training state); they are in the manifest too

    Raises CheckpointError when the directory exists and is not empty, unless `overwrite`; OSError from the disk.
    """

    def fill(staging: Path) -> None:
        (staging / CONFIG).write_text(json.dumps(to_dict(model.config), indent=2) + "\n")
        (staging / LINEAGE).write_text(json.dumps(dict(lineage or {}), indent=2, sort_keys=True) + "\n")
        weights = model.state_dict() if state is None else state
        write_tensors({name: _whole(tensor) for name, tensor in weights.items()}, staging / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save(staging)
        if also is not None:
            also(staging)

    return write_directory(Path(directory), fill, overwrite=overwrite)


def write_directory(target: Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Makes `target` from what `fill` writes into an empty directory: sealed by a manifest, all of it or nothing.

    Raises CheckpointError when `target` exists and is not empty, unless `overwrite`; whatever `fill` raises, after
    removing what it wrote.
    """
    if _occupied(target) and not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; remove it, choose another directory, or overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes private directories
        fill(staging)
        _seal(staging)
        _move(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def remove_unfinished(parent: Path) -> None:
    """Deletes what killed writers left in `parent`, and puts back a directory that was being replaced when its
    replacement had not taken its place yet. Only for the sole writer of `parent`."""
    for replaced in parent.glob(".*.replaced-*"):
        target = parent / replaced.name[1:].rpartition(".replaced-")[0]
        if (replaced / "old").is_dir() and not _occupied(target):
            (replaced / "old").rename(target)
    for leftover in (*parent.glob(".*.partial-*"), *parent.glob(".*.replaced-*")):
        shutil.rmtree(leftover)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor alone: a view into a larger one (a part of a fused projection) would drag all of it along."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _seal(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)


def _move(staging: Path, target: Path) -> None:
    if _occupied(target):
        # Two renames: a reader finds the old checkpoint, for an instant none, then the new one; never a mixture.
        replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
        target.rename(replaced / "old")
        staging.rename(target)
        shutil.rmtree(replaced)
    else:
        staging.rename(target)  # onto nothing or onto an empty directory
    _flush(target.parent)


def _flush(path: Path) -> None:
    """fsync of a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _occupied(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- reading ----------------------------------------------------------------------------------------------------------


def load_model(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fused_qkv: bool = False,
) -> Model:
    """The model of a checkpoint directory, in evaluation mode; `dtype=None` keeps the stored one.

    Raises CheckpointError, in one line, for anything that is missing, damaged, foreign or of another shape.
    """
    model = build_from(load_config(directory), fused_qkv=fused_qkv, device="meta")
    return _filled(model, Path(directory), device=device, dtype=dtype)


def load_decoder(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fused_qkv: bool = False,
) -> Decoder:
    """As `load_model`, where only a decoder will do; CheckpointError for another architecture as well."""
    model = from_config(load_decoder_config(directory), fused_qkv=fused_qkv, device="meta")
    return _filled(model, Path(directory), device=device, dtype=dtype)


M = TypeVar("M", bound=Model)


def _filled(model: M, directory: Path, *, device: torch.device | str, dtype: torch.dtype | None) -> M:
    """The bare `model` with a checkpoint's weights."""
    verify(directory)
    weights = load_weights(directory)
    check_weights(model, weights, asked_by=str(directory / WEIGHTS))
    model.load_state_dict(weights, assign=True)
    return model.to(device=device, dtype=dtype).eval()


def load_weights(directory: Path | str) -> dict[str, Tensor]:
    """The tensors of a checkpoint directory by name, on the CPU. Raises CheckpointError for an unreadable file."""
    path = Path(directory) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            # Copied out of the mapped file: tensors that alias it would change, or crash, with the file.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def check_weights(model: Model, weights: Mapping[str, Tensor], *, asked_by: str) -> None:
    """Raises CheckpointError unless `weights` are exactly the model's tensors; names the first that differ."""
    expected = model.state_dict()
    if missing := [name for name in expected if name not in weights]:
        raise CheckpointError(f"{asked_by} lacks {_some(missing)}")
    if unexpected := [name for name in weights if name not in expected]:
        raise CheckpointError(f"{asked_by} holds {_some(unexpected)}, which this model does not have")
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{asked_by}: {name} has shape {list(weights[name].shape)}, this model's has {list(tensor.shape)}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
