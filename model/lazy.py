"""Tensors that are not there yet: how a checkpoint of any size passes through an import, a surgery or an export.

A file of weights is opened as names, shapes and types; each `read` brings one tensor into memory. Conversions wrap
these readers, and the writer calls them one after the other, so that no more is ever held than one tensor of the result
and what it is made from.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint_files import CheckpointError

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")  # what weights may be stored as: numbers that are themselves
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 8  # of the first tensor in the file, as the safetensors library has it


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """One tensor that `read` makes, anew at each call.

    shape, dtype  of what `read` will give; known beforehand, so that a file's header can be written first
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """Its type as safetensors spells it."""
        return _NAMES.get(self.dtype, str(self.dtype))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same numbers in another type."""
        return replace(self, dtype=dtype, read=partial(_changed, self, partial(_converted, dtype=dtype)))

    def then(self, change: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None) -> LazyTensor:
        """What `change` makes of it; of the same type, and of the same shape unless another is given."""
        return replace(self, shape=self.shape if shape is None else shape, read=partial(_changed, self, change))


def _changed(source: LazyTensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(source.read())


def _converted(tensor: Tensor, *, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


Weights = Mapping[str, LazyTensor]


def stored_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, none of them read yet. Raises FileNotFoundError, and SafetensorError
    for a file that is none or is cut short."""
    with safe_open(path, framework="pt") as file:
        found: dict[str, LazyTensor] = {}
        for name in file.keys():  # noqa: SIM118  # not a dict
            part = file.get_slice(name)
            dtype = _TYPES.get(part.get_dtype()) or file.get_tensor(name).dtype
            found[name] = LazyTensor(tuple(part.get_shape()), dtype, partial(_read, path, name))
        return found


def stored_weights(path: Path) -> dict[str, LazyTensor]:
    """`stored_tensors` of a checkpoint. Raises CheckpointError for a file that is missing or none, and for a type of
    numbers that nothing here computes with."""
    try:
        found = stored_tensors(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    for name, lazy in found.items():
        if lazy.stored_as not in WEIGHT_TYPES:
            raise CheckpointError(f"{path}: {name} is stored as {lazy.stored_as}; known: {', '.join(WEIGHT_TYPES)}")
    return found


def _read(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: pages of a mapping that stays open would count as memory in use until the end.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


def write_weights(path: Path, weights: Weights, progress: Callable[[int, int], object] | None = None) -> None:
    """Writes a safetensors file of what the readers give, one tensor after the other. `progress` is told the bytes of
    tensors that are written, and of all.

    Raises ValueError where a reader gives another shape or type than it promised.
    """
    # Wide types first, each group in the order given: every tensor is then aligned to its own size.
    names = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        lazy = weights[name]
        start, end = end, end + lazy.nbytes
        header[name] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    done = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            _write(file.write, name, weights[name])
            done += weights[name].nbytes
            if progress is not None:
                progress(done, end)


def _write(write: Callable[[memoryview], object], name: str, lazy: LazyTensor) -> None:
    tensor = lazy.read().contiguous()
    if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
        raise ValueError(
            f"{name}: became {list(tensor.shape)} of {tensor.dtype}, {list(lazy.shape)} of {lazy.dtype} was announced"
        )
    if tensor.numel():
        write(tensor.view(-1).view(torch.uint8).numpy().data)


def renamed_copies(weights: Weights, pairs: Iterable[tuple[str, str]]) -> dict[str, LazyTensor]:
    """`weights`, and for each (source, copy) the source's tensor under the copy's name too."""
    return {**weights, **{copy: weights[source] for source, copy in pairs}}
