"""What an attention's inputs are like on a text: their second moments, under which heads are compared by what they
compute.

Legend: D model width, C = D + 1: the inputs and one more that is always 1, which biases are multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longspan.model.attention import Attention
from longspan.model.build import Model
from longspan.model.checkpoint import CheckpointError
from longspan.model.cross_attention import CrossAttention

KEYS, QUERIES = "keys", "queries"


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments E[x x^T] of attentions' inputs, fp64 [C, C], read as they are asked for."""

    path: Path
    names: frozenset[str]

    def of(self, module: str, what: str) -> Tensor:
        """Of an attention's name and `keys` or `queries`; the inputs of both are the same but in cross-attention.

        Raises CheckpointError where the file is of another model.
        """
        name = f"{module}.{what}"
        if name not in self.names:
            name = f"{module.replace('global_attention', 'attention')}.{KEYS}"
        if name not in self.names:
            raise CheckpointError(f"{self.path} has no statistics of {module}: it was made of another model")
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name).double()


def second_moments(model: Model, batches: Iterable[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Of every attention's inputs, fp32 [C, C] by the module's name and `keys` (or, of cross-attention, `queries`).

    batches   what the model is called with, each: (tokens_BT,), of an encoder–decoder (source_BS, decoder_input_BT);
              every token counts, so none is padding

    Raises ValueError where there are no batches.
    """
    sums: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    with _watched(model, sums, count), torch.inference_mode():
        for batch in batches:
            model(*batch)
    if not sums:
        raise ValueError("no text to gather statistics on: it has to fill at least one batch")
    return {name: moment / count[name] for name, moment in sums.items()}


@contextmanager
def _watched(model: nn.Module, sums: dict[str, Tensor], count: dict[str, int]) -> Iterator[None]:
    """Adds up what enters the projections while it lasts."""

    def add(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_ND = inputs[0].detach().flatten(0, -2).float()
        x_NC = torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)
        sums[name] = sums.get(name, 0.0) + (x_NC.T @ x_NC).cpu()
        count[name] = count.get(name, 0) + len(x_NC)

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Attention | CrossAttention):
            keys = module.qkv_proj if isinstance(module, Attention) and module.fused_qkv else module.k_proj
            hooks.append(keys.register_forward_pre_hook(partial(add, f"{name}.{KEYS}")))
        if isinstance(module, CrossAttention):
            hooks.append(module.q_proj.register_forward_pre_hook(partial(add, f"{name}.{QUERIES}")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_moments(moments: Mapping[str, Tensor], path: Path | str) -> Path:
    """As a safetensors file, which `GroupedQuery.statistics` names."""
    save_file({name: moment.contiguous() for name, moment in moments.items()}, path)
    return Path(path)


def read_moments(path: Path | str) -> Moments:
    """Of a file of `save_moments`. Raises CheckpointError for one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return Moments(Path(path), frozenset(file.keys()))
    except FileNotFoundError:
        raise CheckpointError(f"statistics={path}: no such file") from None
    except SafetensorError as error:
        raise CheckpointError(f"statistics={path} is not a readable safetensors file: {error}") from error
