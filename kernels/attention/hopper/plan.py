"""What is found out about a launch once and kept for calls that look alike: the compiled kernel, its grid, and every
argument except for where the tensors lie.

For each launch Triton binds some forty arguments, looks the kernel up and encodes a descriptor for every tensor that
TMA reads, all of it in Python, at several times the cost of the driver's part. A `Launch` gives Triton's launcher in C
what Triton would give it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from functools import cache
from inspect import getclosurevars, isfunction
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

log = logging.getLogger(__name__)
P = TypeVar("P")
R = TypeVar("R")
PLANS = 512  # of a pass; the oldest is forgotten first
_MAPS = 64  # descriptors of a tensor: one for each place where the allocator puts it


class _Rows:
    """A descriptor without the checks of Triton's own, which cost several times what encoding it does."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.base = base
        self.shape = shape
        self.strides = strides


class _Slot:
    """Where among the launcher's arguments a tensor is expressed, and how: by its address or, where TMA reads it, by a
    descriptor, of which some are kept by address."""

    __slots__ = ("known", "layout", "place")

    def __init__(self, place: int, layout: tuple[Sequence[int], Sequence[int], object] | None = None) -> None:
        self.place = place
        self.layout = layout  # shape, strides, and what the compiled kernel says of the rest; None: an address
        self.known: dict[int, object] = {}

    def encode(self, x: Tensor) -> object:
        at = x.data_ptr()
        if self.layout is None:
            return at
        shape, strides, meta = self.layout
        if len(self.known) >= _MAPS:
            self.known.clear()
        found = self.known[at] = _in_context(lambda: nvidia.make_tensordesc_arg(_Rows(x, shape, strides), meta)[0])
        return found


class Launch:
    """A kernel that has been launched, as a function of where its tensors lie.

    The kernel's parameters begin with descriptors and pointers; these are what a call passes tensors for, in order.
    Everything else about the tensors must be as it was (`alike`), and the device the same.
    """

    __slots__ = ("_current_stream", "_device", "_flat", "_given", "_run", "_slots", "_stream_at")

    def __init__(self, compiled: Any, grid: int, arguments: Sequence[object]) -> None:
        """`arguments`: all that the compiled kernel was launched with. Raises ValueError where this version of Triton
        launches in a way that is not known here."""
        launcher = compiled.run
        # Around the launcher in C lies a function that encodes descriptors, where a kernel has any.
        inner = getclosurevars(launcher.launch).nonlocals if isfunction(launcher.launch) else {}
        self._run = inner.get("launcher", launcher.launch)
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise ValueError("a kernel with scratch memory, which each launch allocates anew")

        # What Triton would give it, with a stand-in for whatever changes.
        stream, pointers = object(), [object() if isinstance(x, Tensor) else x for x in arguments]
        found: list[tuple[Any, ...]] = []
        recorder = copy(launcher)
        recorder.launch = nvidia.wrap_handle_tensordesc(
            lambda *given: found.append(given), compiled.src.signature, compiled.metadata.tensordesc_meta
        )
        recorder(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers)
        self._given = list(found[0])
        self._flat = not isinstance(self._given[-1], (list, tuple))
        self._stream_at = next(i for i, x in enumerate(self._given) if x is stream)
        rest = self._given if self._flat else list(self._given[-1])
        maps = (i for i, x in enumerate(rest) if isinstance(x, nvidia.PyCUtensorMap))
        metas = iter(compiled.metadata.tensordesc_meta or ())
        self._slots = tuple(_slots(arguments, pointers, rest, maps, metas))
        if next(maps, None) is not None or next(metas, None) is not None:
            raise ValueError("a kernel whose descriptors are not among its first arguments")
        for slot in filter(None, self._slots):
            rest[slot.place] = None
        self._given[self._stream_at] = None
        if not self._flat:
            self._given[-1] = rest
        active: Any = driver.active
        self._current_stream = active.get_current_stream
        self._device = active.get_current_device()

    def __call__(self, *tensors: Tensor | None) -> int:
        """Launches on the current stream, which is returned."""
        given = self._given.copy()
        stream = given[self._stream_at] = self._current_stream(self._device)
        rest = given
        if not self._flat:
            rest = given[-1] = given[-1].copy()
        for slot, x in zip(self._slots, tensors, strict=True):
            if slot is not None and x is not None:
                at = x.data_ptr()
                rest[slot.place] = at if slot.layout is None else slot.known.get(at) or slot.encode(x)
        self._run(*given)
        return stream


def _slots(
    arguments: Sequence[object], pointers: Sequence[object], rest: Sequence[object],
    maps: Iterator[int], metas: Iterator[object],
) -> Iterator[_Slot | None]:  # fmt: skip
    """Of each leading descriptor and pointer; None for None."""
    for argument, stand_in in zip(arguments, pointers, strict=True):
        if isinstance(argument, Tensor):
            yield _Slot(next(i for i, x in enumerate(rest) if x is stand_in))
        elif argument is None:
            yield None
        elif isinstance(argument, TensorDescriptor):
            yield _Slot(next(maps), (tuple(argument.shape), tuple(argument.strides), next(metas)))
        else:
            return


def first(kernel: Any, programs: int, arguments: Sequence[object], options: dict[str, int]) -> Launch | None:
    """Launches a kernel by Triton. None where nothing was launched (somebody only wanted to see what is compiled), and
    where this Triton launches in a way that is not known here: then every call is launched by it."""
    compiled = _in_context(lambda: kernel[(programs,)](*arguments, **options))
    if compiled is None:
        return None
    try:
        return Launch(compiled, programs, arguments)
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        _say_once(f"{type(error).__name__}: {error}")
        return None


@cache
def _say_once(problem: str) -> None:
    """Triton's launches are its own affair: what `Launch` knows of them may be out of date, and costs speed alone."""
    log.warning("hopper: launches go through Triton's Python, at some 50 µs each: %s", problem)


def _in_context(run: Callable[[], R]) -> R:
    """Encoding a descriptor, unlike a launch, fails in a thread in which nothing has used CUDA yet. (Such a thread
    captures no graph, so that its stream may be asked something.)"""
    try:
        return run()
    except RuntimeError as error:
        if "invalid device context" not in str(error):
            raise
        torch.cuda.current_stream().query()  # the runtime makes the device's context current
        return run()


def layout(x: Tensor | None) -> Hashable:
    """Equal for tensors that one `Launch` serves: what Triton compiles for, and what its arguments follow from."""
    if x is None:
        return None
    return x.shape, x.is_contiguous() or x.stride(), x.dtype, x.data_ptr() % 16


def alike(x: Tensor, *rest: Tensor | None) -> Hashable:
    """`layout` of each, and the device of the first: that of all."""
    return x.get_device(), layout(x), *map(layout, rest)


class Plans(Generic[P]):
    """The plans of one pass, by everything that they follow from."""

    def __init__(self) -> None:
        self._known: dict[Hashable, P] = {}

    def get(self, key: Hashable) -> P | None:
        """None, too, while somebody (a profiler) hooks into Triton's launches: a `Launch` would not be seen."""
        runtime = knobs.runtime
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            return None
        return self._known.get(key)

    def put(self, key: Hashable, plan: P) -> None:
        while len(self._known) >= PLANS:
            self._known.pop(next(iter(self._known)), None)  # another thread may have been here
        self._known[key] = plan

    def clear(self) -> None:
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)
