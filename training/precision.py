"""Which device and which arithmetic a run uses, and how fast that arithmetic is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from .errors import UserError

Precision = Literal["fp32", "bf16-mixed", "bf16-true"]
AskedPrecision = Literal["auto", Precision]

# What weights are written as; None: as they are.
STORED: Mapping[str, torch.dtype | None] = MappingProxyType(
    {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What the run computes with.

    precision  the resolved precision
    reason     why, in words for the log
    """

    precision: Precision
    reason: str

    @property
    def autocast(self) -> torch.dtype | None:
        """What forward passes are cast to; None: no autocast."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else None

    @property
    def parameters(self) -> torch.dtype:
        """What weights (and optimizer state) are kept in."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    @property
    def compute(self) -> torch.dtype:
        """What attention and matrix products see."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def scoring(self) -> Literal["fp32", "bf16"]:
        """How a saved model is evaluated: under autocast like its training, else in the type of its weights."""
        return "bf16" if self.autocast is not None else "fp32"


def choose_device(
    accelerator: Literal["auto", "cpu", "gpu"], devices: int = 1, *, key: str = "trainer.accelerator"
) -> torch.device:
    """`key` is what the user sets the accelerator with. Raises UserError when the GPUs asked for are not there."""
    found = torch.cuda.device_count() if accelerator != "cpu" else 0
    if accelerator == "gpu" and found == 0:
        raise UserError(f"{key}=gpu: no CUDA device is visible; use {key}=cpu or auto")
    if found and devices > found:
        raise UserError(f"trainer.devices={devices}: {found} CUDA device(s) are visible")
    return torch.device("cuda" if found else "cpu")


def choose_arithmetic(precision: AskedPrecision, device: torch.device) -> Arithmetic:
    if precision != "auto":
        return Arithmetic(precision, "as configured")
    if device.type == "cuda":
        return Arithmetic("bf16-mixed", "auto: the GPU multiplies bf16 on its tensor cores")
    if multiplies_bf16_fast():
        return Arithmetic(
            "bf16-mixed", "auto: this processor multiplies bf16 in hardware (AMX), several times fp32's rate"
        )
    return Arithmetic("fp32", "auto: this processor has no fast bf16 (no AMX)")


def inference_precision(
    asked: Literal["auto", "fp32", "bf16"],
    device: torch.device,
    *,
    trained_in: AskedPrecision = "auto",
) -> Literal["fp32", "bf16"]:
    """`auto` is how a run with that `trainer.precision` evaluates its own model on this device."""
    return choose_arithmetic(trained_in, device).scoring if asked == "auto" else asked


def multiplies_bf16_fast(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has AMX tiles for bf16. AVX512-BF16 alone gains little once fp32 weights must be cast."""
    try:
        flags = cpuinfo.read_text()
    except OSError:  # not Linux, or hidden
        return False
    return "amx_bf16" in flags


def measured_matmul_flops(dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product on this CPU, the median of repeats over about `seconds`."""
    generator = torch.Generator().manual_seed(0)  # the global one belongs to the run
    a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    torch.mm(a, b)  # the first product warms up
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    while not rates or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return sorted(rates)[len(rates) // 2]
