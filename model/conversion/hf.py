"""A Hugging Face directory as files: config.json, weights in their three spellings, the tokenizer.

Weights are read from model.safetensors, from shards with an index, or, for old checkpoints, from pytorch_model.bin by
`torch.load(weights_only=True)` after a look into the archive. Nothing here knows a model, and nothing runs code that a
directory brought along.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from longspan.model import lazy
from longspan.model.checkpoint_files import CONFIG, WEIGHTS, sha256_of
from longspan.model.lazy import LazyTensor

GENERATION = "generation_config.json"
# What belongs to the tokenizer, or to nobody in particular, and travels with the weights unread.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)
SHARD_BYTES = 5_000_000_000
_INDEX, _BIN, _BIN_INDEX = f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class ConversionError(ValueError):
    """A directory or a model that cannot be translated; `.problems` has a line for each reason."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


# -- reading ----------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises ConversionError when there is none, or it is no Hugging Face config."""
    if not directory.is_dir():
        raise ConversionError(f"{directory}: no such directory")
    path = directory / CONFIG
    if not path.is_file():
        raise ConversionError(f"{directory} holds no {CONFIG}: it is not a Hugging Face model directory")
    raw = read_json(path)
    if "architecture" in raw and "model_type" not in raw:
        raise ConversionError(f"{directory} is a checkpoint of Longspan already; there is nothing to import")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError for anything else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}): it is damaged") from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{path} is not a JSON object: it is damaged")
    return raw


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The files that hold the weights, safetensors first. Raises ConversionError when there are none, or one that an
    index names is missing."""
    for single, index in ((WEIGHTS, _INDEX), (_BIN, _BIN_INDEX)):
        if (directory / single).is_file():
            return (directory / single,)
        if (directory / index).is_file():
            return _shards(directory / index)
    raise ConversionError(f"{directory} holds no weights: looked for {WEIGHTS}, {_INDEX}, {_BIN}, {_BIN_INDEX}")


def _shards(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ConversionError(f"{index} has no weight_map of tensor names to files: it is damaged")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise ConversionError(f"{index} names the file '{name}' outside of its directory: refused")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ConversionError(f"{index.parent} lacks {first_ten(missing)}, which {index.name} names")
    return tuple(index.parent / name for name in names)


def open_weights(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of `weight_files` by name, in the types they are stored in. Those of safetensors are not read yet;
    pickles are, whole.

    Raises ConversionError for a file that is damaged, that holds code, or that has a tensor another one has too.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        found = _open_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        if twice := [name for name in found if name in tensors]:
            raise ConversionError(f"{file} holds {first_ten(twice)}, which another file holds too")
        tensors |= found
    return tensors


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    try:
        return lazy.stored_tensors(file)
    except SafetensorError as error:
        raise ConversionError(f"{file} is not a readable safetensors file: {error}") from error


def _read_pickle(file: Path) -> dict[str, LazyTensor]:
    _check_archive(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("WeightsUnpickler error:", "").strip().splitlines()
        raise ConversionError(
            f"{file} holds more than tensors and was not loaded ({_sentence(reason)}); where you trust it, save its "
            "tensors as safetensors and import that"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConversionError(f"{file} is not a readable PyTorch file: {_sentence(str(error).splitlines())}") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ConversionError(f"{file} is not a state dict: expected tensors by name and nothing else")
    return {str(name): LazyTensor.of(tensor.detach()) for name, tensor in state.items()}


def _sentence(lines: list[str]) -> str:
    """The first line that says something about the file."""
    told = [line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (told or [line.strip() for line in lines] or ["no reason given"])[0].rstrip(".")


def _check_archive(file: Path) -> None:
    """Looks into the zip that torch.save writes, before anything is unpacked: a compressed entry may unfold to any
    size, and no entry of an honest file is. (Files of torch before 1.6 are no zips, and weights_only has them alone.)
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ConversionError(f"{file} is a damaged archive: {error}") from error
    names = [entry.filename for entry in entries]
    compressed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    outside = [name for name in names if name.startswith("/") or ".." in Path(name).parts]
    if compressed or outside or len(set(names)) < len(names):
        what = f"compressed: {compressed[0]}" if compressed else f"outside: {outside[0]}" if outside else "duplicates"
        raise ConversionError(f"{file} has entries that torch never writes ({what}) and was not loaded")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise ConversionError(f"{file} has entries that claim to be larger than the file, and was not loaded")


def digests(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file by name."""
    return {file.name: sha256_of(file) for file in files}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_weights(directory: Path, tensors: Mapping[str, LazyTensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or shards of at most `shard_bytes` (a larger tensor has one to itself) with an index. One
    tensor is in memory at a time."""
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        lazy.write_weights(directory / WEIGHTS, shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        lazy.write_weights(directory / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def carry(source: Path, target: Path) -> list[str]:
    """Copies the tokenizer's files; their names."""
    found = [name for name in CARRIED if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def first_ten(names: Iterable[str]) -> str:
    """`a, b, c` or the first ten `and 5 more`."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
