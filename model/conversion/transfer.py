"""Hugging Face directory <-> checkpoint directory, whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longspan.model.build import build_from
from longspan.model.checkpoint import (
    CONFIG,
    WEIGHTS,
    resolve_checkpoint,
    verify,
    write_directory,
)
from longspan.model.checkpoint_files import LINEAGE, load_config
from longspan.model.config import to_dict
from longspan.model.lazy import stored_weights
from longspan.model.lazy import write_weights as write_tensors

from .hf import (
    DTYPE_NAMES,
    GENERATION,
    SHARD_BYTES,
    ConversionError,
    carry,
    digests,
    open_weights,
    read_config,
    read_json,
    weight_files,
    write_json,
    write_weights,
)
from .registry import config_from, config_to, family_of
from .repeat import repeated_config, repeated_weights
from .translate import export_tensors, import_tensors

logger = logging.getLogger("longspan.model")


@dataclass(frozen=True, slots=True)
class Translation:
    """What a directory would become: for a look before anything is written.

    model_type  as Hugging Face spells it
    config      of the result, as plain data: ours of an import, config.json of an export
    """

    model_type: str
    config: Mapping[str, Any]


def import_model(
    source: Path | str,
    output: Path | str,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Makes a checkpoint directory from a Hugging Face directory and returns it.

    dtype      what weights are stored as; None: as they are
    overwrite  replace what is in a non-empty `output`
    progress   is told after each tensor how many bytes are written, and of how many

    Tensors of safetensors files pass one at a time. The tokenizer's files and generation_config.json are copied.
    lineage.json names the source, its model type and the sha256 of its weights. No code of the directory is run.
    Raises ConversionError, a line for each problem; CheckpointError when `output` is not empty.
    """
    source = Path(source)
    raw = _read(source)
    family, config = family_of(raw), config_from(raw)
    if "auto_map" in raw:
        logger.warning("%s brings code of its own (auto_map); it is not run", source)
    files = weight_files(source)
    found = open_weights(files)
    config = family.settle(config, found)
    shapes = {name: tensor.shape for name, tensor in build_from(config, device="meta").state_dict().items()}
    weights = import_tensors(family, config, found, shapes)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    lineage = {
        "imported": {
            "source": source.resolve().name,
            "model_type": raw["model_type"],
            "transformers_version": raw.get("transformers_version"),
            "weights_sha256": digests(files),
        }
    }

    def fill(staging: Path) -> None:
        (staging / CONFIG).write_text(json.dumps(to_dict(config), indent=2) + "\n")
        (staging / LINEAGE).write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")
        write_tensors(staging / WEIGHTS, weights, progress)
        carry(source, staging)
        if not (staging / GENERATION).is_file():
            tokens = {name: raw[name] for name in _TOKENS if raw.get(name) is not None}
            write_json(staging / GENERATION, tokens)

    return write_directory(Path(output), fill, overwrite=overwrite)


def _read(source: Path) -> dict[str, Any]:
    """config.json, with what generation_config.json says instead of it."""
    raw, path = read_config(source), source / GENERATION
    names = family_of(raw).generation
    said = read_json(path) if path.is_file() else {}
    heard = {name: said[name] for name in names if name in said}
    return {**_without(raw, names), **heard} if heard else raw


def _without(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_model(
    checkpoint: Path | str,
    output: Path | str,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    eos_token_id: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    repeat_kv: bool = False,
    overwrite: bool = False,
) -> Path:
    """Makes a Hugging Face directory from a checkpoint directory or a run, and returns it.

    model_type    which family says it; None: the first that can
    dtype         what weights are stored as; None: as they are
    eos_token_id  for generation_config.json where the checkpoint brings none
    repeat_kv     write shared key/value heads as often as they are read: for families that know none

    config.json spells what transformers 4 and 5 and vLLM look for; lineage.json goes along. Tensors pass one at a time.
    Raises ConversionError for a model that no family can say, with the fields that are in the way; CheckpointError for
    a damaged checkpoint and for an `output` that is not empty.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    stored_config = load_config(checkpoint)
    config = repeated_config(stored_config) if repeat_kv else stored_config
    family, fields = config_to(config, model_type)
    verify(checkpoint)
    weights = stored_weights(checkpoint / WEIGHTS)
    if repeat_kv:
        weights = repeated_weights(stored_config, weights)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    tensors = export_tensors(family, config, weights)
    stored = DTYPE_NAMES.get(next(iter(weights.values())).dtype)
    if stored is None:
        raise ConversionError(
            f"{checkpoint} holds {next(iter(weights.values())).dtype}; export it as fp32, bf16 or fp16"
        )

    def fill(staging: Path) -> None:
        carry(checkpoint, staging)
        settings = _without(_generation(staging, eos_token_id), family.generation)
        settings |= {name: fields[name] for name in family.generation if fields[name] is not None}
        write_json(staging / GENERATION, settings)
        tokens = {name: settings.get(name, family.tokens.get(name)) for name in _TOKENS}
        content = {**tokens, **fields, "model_type": family.model_type, "dtype": stored, "torch_dtype": stored}
        write_json(staging / CONFIG, content)
        write_weights(staging, tensors, shard_bytes=shard_bytes)
        write_json(staging / LINEAGE, json.loads((checkpoint / LINEAGE).read_text(encoding="utf-8")))

    return write_directory(Path(output), fill, overwrite=overwrite)


def _generation(directory: Path, eos_token_id: int | None) -> dict[str, Any]:
    """generation_config.json: the checkpoint's own, else what is known."""
    path = directory / GENERATION
    settings = read_json(path) if path.is_file() else {}
    if eos_token_id is not None:
        settings = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, **settings}
    return settings


def plan_import(source: Path | str) -> Translation:
    """The config that `import_model` would store; weights are not read. Raises like it."""
    raw = _read(Path(source))
    return Translation(raw["model_type"], to_dict(config_from(raw)))


def plan_export(checkpoint: Path | str, *, model_type: str | None = None, repeat_kv: bool = False) -> Translation:
    """The config.json that `export_model` would write; weights are not read. Raises like it."""
    config = load_config(resolve_checkpoint(checkpoint))
    family, fields = config_to(repeated_config(config) if repeat_kv else config, model_type)
    return Translation(family.model_type, fields)
