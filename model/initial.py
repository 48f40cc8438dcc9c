"""Initial weights as a function of (seed, tensor name): equal on every machine and for every layout of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def draw_weights(model: nn.Module, seed: int, std_of: Callable[[str], float]) -> None:
    """Fills every tensor of the model's state: biases and sink_logits with 0, norm weights with 1, the others from
    normal(0, std_of(the name of the tensor's module)), each by a generator of its own."""
    state: Mapping[str, Tensor] = model.state_dict()  # logical tensors: fused projections appear as three views
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if kind in ("bias", "sink_logits"):
            tensor.zero_()
        elif owner.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.copy_(drawn(name, tensor.shape, seed) * std_of(owner))


def drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers of a tensor's own generator: fp32 on the CPU whatever the model is, so that the same seed
    means the same model."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
