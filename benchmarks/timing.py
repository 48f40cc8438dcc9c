"""Clocks, the interleaved measurement, and what the machine does at best: a matrix product and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Reading = Callable[[], float]  # milliseconds, once the device has caught up

_FLUSH_BYTES = 256 * 2**20  # five times an H100's L2
_FLUSHES = 8  # about 0.7 ms of writing: the host queues the kernels behind it, so launches cost no device time
_WARM_UP_RUNS, _WARM_UP_SECONDS = 25, 0.5


class Clock(Protocol):
    def time(self, work: Callable[[], T]) -> tuple[T, Reading]:
        """Run `work` with cold caches; its result, and what to ask after `synchronize` for how long it took."""
        ...

    def synchronize(self) -> None: ...


class DeviceClock:
    """CUDA events around the work, the L2 cache overwritten before it (unless flush=False)."""

    def __init__(self, *, flush: bool = True) -> None:
        self._buffer = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.int8, device="cuda")

    def time(self, work: Callable[[], T]) -> tuple[T, Reading]:
        if self._buffer.numel():
            for _ in range(_FLUSHES):
                self._buffer.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = work()
        end.record()
        return result, lambda: start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """Wall-clock time: for smoke runs on a CPU."""

    def time(self, work: Callable[[], T]) -> tuple[T, Reading]:
        start = time.perf_counter()
        result = work()
        milliseconds = (time.perf_counter() - start) * 1e3
        return result, lambda: milliseconds

    def synchronize(self) -> None:
        pass


def make_clock(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True)
class Step:
    """Forward and backward of one contender. The backward pass is timed after a forward pass of its own."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], tuple[Tensor | None, ...]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Milliseconds of each repetition."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def both(self) -> list[float]:
        return [first + second for first, second in zip(self.forward, self.backward, strict=True)]


def warm_up(step: Step, clock: Clock) -> None:
    """Twenty-five runs, or three and half a second of them where one takes long."""
    began = time.perf_counter()
    for run in range(_WARM_UP_RUNS):
        step.backward(step.forward())
        clock.synchronize()
        if run >= 2 and time.perf_counter() - began > _WARM_UP_SECONDS:
            return


def interleaved(steps: Mapping[str, Step], clock: Clock, repetitions: int) -> dict[str, Samples]:
    """Each repetition runs every contender once, a different one first, so that clocks and heat favour nobody."""
    samples = {name: Samples() for name in steps}
    names = list(steps)
    for repetition in range(repetitions):
        turn = repetition % len(names)
        readings = []
        for name in names[turn:] + names[:turn]:
            out, forward = clock.time(steps[name].forward)
            _, backward = clock.time(lambda step=steps[name], out=out: step.backward(out))
            readings.append((name, forward, backward))
            del out
        clock.synchronize()
        for name, forward, backward in readings:
            samples[name].forward.append(forward())
            samples[name].backward.append(backward())
    return samples


def interleaved_calls(
    calls: Mapping[str, Callable[[], object]], clock: Clock, repetitions: int
) -> dict[str, list[float]]:
    """Milliseconds of each call of each contender, in turn as in `interleaved`; for what has no backward pass."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for repetition in range(repetitions if names else 0):
        turn = repetition % len(names)
        readings = [(name, clock.time(calls[name])[1]) for name in names[turn:] + names[:turn]]
        clock.synchronize()
        for name, reading in readings:
            samples[name].append(reading())
    return samples


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. peak: the most allocated beyond the inputs; scratch: the same without output and gradients."""

    peak: int
    scratch: int


def peak_memory(step: Step) -> Memory:
    """Of one forward and backward pass on the current CUDA device."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = step.forward()
    gradients = step.backward(out)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = [out, *(gradient for gradient in gradients if gradient is not None)]
    return Memory(peak, peak - sum(tensor.untyped_storage().nbytes() for tensor in results))


@dataclass(frozen=True, slots=True)
class Machine:
    """What the run's own GPU reached: an 8192³ bf16 product in TFLOP/s, a copy in TB/s read and written."""

    gemm_tflops: float
    copy_tb_per_s: float


def measure_machine(clock: Clock, *, repetitions: int = 30) -> Machine:
    size, count = 8192, 2**29
    factors = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    gemm = _median(clock, lambda: torch.mm(factors[0], factors[1], out=factors[2]), repetitions)
    buffers = [torch.ones(count, device="cuda", dtype=torch.int16) for _ in range(2)]
    copy = _median(clock, lambda: buffers[1].copy_(buffers[0]), repetitions)
    return Machine(2 * size**3 / gemm * 1e-9, 2 * 2 * count / copy * 1e-9)


def _median(clock: Clock, work: Callable[[], object], repetitions: int) -> float:
    for _ in range(5):
        work()
    readings = [clock.time(work)[1] for _ in range(repetitions)]
    clock.synchronize()
    return sorted(reading() for reading in readings)[repetitions // 2]
