"""Forward passes over text, whatever they are for: what they need of a model, their precision, which rows go together.

Legend: B rows, T tokens in the longest of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from longspan.model.decoder import Decoder

Precision = Literal["fp32", "bf16"]


class LanguageModel(Protocol):
    """What scoring needs of a model: a `model.decoder.Decoder` has it."""

    training: bool

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: logits are hidden @ head_weight.T"""
        ...

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D]; a position sees itself and the ones before it, and each row is a document."""
        ...

    def train(self, mode: bool = True) -> nn.Module: ...


def dtype_name(dtype: torch.dtype) -> str:
    """As protocols state it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """For a forward pass: products are rounded to bf16, or computed as the weights are stored."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def widen_for_autocast(model: nn.Module, precision: Precision) -> None:
    """Makes fp16 weights fp32 where autocast rounds products to bf16: norms do not take fp16 weights beside bf16. The
    numbers are those of the stored weights."""
    if precision == "bf16" and next(model.parameters()).dtype == torch.float16:
        model.float()


def rotates_by_length(model: object) -> bool:
    """Whether a row's numbers depend on the length that it is padded to: dynamic RoPE scaling past its length."""
    if not isinstance(model, Decoder):
        return False
    scaling = model.config.rope_scaling
    return scaling is not None and scaling.kind == "dynamic"


def batches(lengths: Sequence[int], batch: int, *, alike: bool) -> Iterator[list[int]]:
    """Indices of rows that go through the model together, the longest first; `alike`: of one length only."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # the sort is stable
    begin = 0
    while begin < len(lengths):
        chosen = longest_first[begin : begin + batch]
        if alike:
            chosen = [i for i in chosen if lengths[i] == lengths[chosen[0]]]
        yield chosen
        begin += len(chosen)
