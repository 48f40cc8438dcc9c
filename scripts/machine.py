"""Where a verb other than training computes, and in which arithmetic."""

from __future__ import annotations

import torch

from longspan.training.errors import UserError
from longspan.training.precision import choose_arithmetic
from longspan.training.schema import Accelerator, InferencePrecision


def choose_device(accelerator: Accelerator) -> torch.device:
    """Raises UserError when a GPU is asked for and there is none."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: no CUDA device is visible; use accelerator=cpu or auto")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def computes_in_bf16(precision: InferencePrecision, device: torch.device) -> bool:
    """`auto` is what training's `auto` is on this device."""
    if precision == "auto":
        return choose_arithmetic("auto", device).autocast is not None
    return precision == "bf16"
