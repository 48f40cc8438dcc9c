"""As much of Gluon as the Hopper kernels use, in NumPy: so that the kernels' own text runs, and is checked, on a CPU.

Partitions are threads. What is asynchronous happens either at once or as late as it may: a copy when its barrier is
waited for, a product when it is. A slot of shared memory that is given away or read too early therefore holds the wrong
tile, a count of arrivals that does not come out is a deadlock, and both fail. Layouts mean nothing here; registers,
fences and the memory model are the compile gate's and the GPU tests' business.
"""

from __future__ import annotations

import math
import random
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.kernels.attention import AttentionContext, AttentionSpec, hopper

SOURCE = Path(hopper.__file__).with_name("forward.py")
BACKWARD = tuple(
    SOURCE.with_name(name) for name in ("backward.py", "backward_squares.py", "backward_dkdv.py", "backward_dq.py")
)
PATIENCE = 20.0  # seconds without anybody's progress: a deadlock


class Int(int):
    """A scalar of the kernel."""

    def to(self, dtype: object) -> Int:
        return self


def _scalar(name: str) -> Callable[[Int, Any], Any]:
    operation = getattr(int, name)

    def method(self: Int, other: Any) -> Any:
        found = operation(self, other)
        return Int(found) if type(found) is int else found

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift"):
    setattr(Int, f"__{_name}__", _scalar(f"__{_name}__"))
    setattr(Int, f"__r{_name}__", _scalar(f"__r{_name}__"))


class Block(np.ndarray):
    """In fp32, rounded to fp16 where a kernel converts to that."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: object) -> Block:
        if dtype != "fp16":
            return self
        with np.errstate(over="ignore"):  # what is too large becomes infinite, as on a GPU
            return block(self.astype(np.float16).astype(np.float32))

    def broadcast_to(self, shape: Sequence[int]) -> Block:
        return block(np.broadcast_to(self, shape))


def block(x: Any) -> Block:
    return np.asarray(x).view(Block)


class Pointer:
    def __init__(self, data: np.ndarray, at: Any = 0) -> None:
        self.data, self.at = data, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)


class Barrier:
    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0


class Shared:
    """A view of shared memory, or of barriers in it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def index(self, at: int) -> Any:
        found = self.data[at]
        return found[0] if isinstance(found[0], Barrier) else Shared(found)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.reshape(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, axes: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(axes))

    def store(self, x: Block) -> None:
        self.data[...] = x

    def load(self, layout: object) -> Block:
        return block(self.data.copy())


class Descriptor:
    """Of a tensor [B, T, H, D], read and written in blocks [1, rows, 1, width]."""

    layout = None

    def __init__(self, data: np.ndarray, rows: int, width: int) -> None:
        self.dtype = "fp16" if data.dtype == np.float16 else "fp32"
        self.data, self.block = data, (rows, width)
        self.block_type = types.SimpleNamespace(nbytes=rows * width * 2)

    def part(self, coordinates: Sequence[int]) -> np.ndarray:
        """What of the block lies in the tensor, at most [rows, width]."""
        (rows, width), (b, t, h, e) = self.block, coordinates
        return self.data[b, t : t + rows, h, e : e + width]


class Lines:
    """Of a tensor [lines, numbers], in blocks of whole lines."""

    dtype, layout = "fp32", None

    def __init__(self, data: np.ndarray, lines: int) -> None:
        self.data, self.block = data, (lines, data.shape[1])

    def part(self, coordinates: Sequence[int]) -> np.ndarray:
        line, column = coordinates
        assert column == 0
        return self.data[line : line + self.block[0]]


class Vector:
    """A descriptor of numbers in a row, read in pieces."""

    dtype, layout = "fp32", None

    def __init__(self, data: np.ndarray, length: int) -> None:
        self.data, self.block = data, (length,)
        self.block_type = types.SimpleNamespace(nbytes=length * 4)

    def part(self, coordinates: Sequence[int]) -> np.ndarray:
        return self.data[coordinates[0] : coordinates[0] + self.block[0]]


class Product:
    def __init__(self, compute: Callable[[], Block]) -> None:
        self.compute, self.value = compute, None

    def finish(self) -> None:
        if self.value is None:
            self.value = self.compute()


class Machine:
    """One program at a time, its partitions as threads that hold a lock while they run."""

    def __init__(self, programs: int, seed: int) -> None:
        self.programs, self.random = programs, random.Random(seed)
        self.program = 0
        self.turn = threading.Condition()
        self.copies: list[tuple[Barrier, Callable[[], None]]] = []  # and what each signals
        self.mine = threading.local()
        self.problems: list[BaseException] = []

    # mbarrier

    def wait(self, barrier: Barrier, parity: int) -> None:
        while (barrier.phase & 1) == parity:
            late = [copy for signals, copy in self.copies if signals is barrier]
            if late:
                self.copies = [pending for pending in self.copies if pending[0] is not barrier]
                for copy in late:
                    copy()
            elif not self.turn.wait(PATIENCE) or self.problems:
                raise RuntimeError("deadlock")
        self.let_others_go_first()

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        if pred:
            barrier.missing -= count
            self.completed(barrier)
            self.let_others_go_first()

    def let_others_go_first(self) -> None:
        if self.random.random() < 0.2:
            self.turn.wait(0.0005)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        barrier.bytes += nbytes
        self.arrive(barrier)

    def completed(self, barrier: Barrier) -> None:
        assert barrier.missing >= 0, "more arrivals than a barrier counts"
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.missing = barrier.count
            self.turn.notify_all()

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    # TMA

    def load(self, descriptor: Descriptor | Vector, coordinates: Sequence[int], barrier: Barrier, to: Shared) -> None:
        coordinates = [int(x) for x in coordinates]

        def copy() -> None:
            part = descriptor.part(coordinates)
            tile = to.data.reshape(descriptor.block)
            tile[...] = 0
            tile[tuple(map(slice, part.shape))] = part
            barrier.bytes -= descriptor.block_type.nbytes
            self.completed(barrier)

        if self.random.random() < 0.5:
            copy()
        else:
            self.copies.append((barrier, copy))
            self.turn.notify_all()

    def store(self, descriptor: Descriptor, coordinates: Sequence[int], source: Shared) -> None:
        coordinates = [int(x) for x in coordinates]

        def copy() -> None:
            part = descriptor.part(coordinates)
            part[...] = source.data.reshape(descriptor.block)[: part.shape[0], : part.shape[1]]

        self.mine.stores.append(copy)

    def add(self, descriptor: Lines, coordinates: Sequence[int], source: Shared) -> None:
        coordinates = [int(x) for x in coordinates]

        def copy() -> None:
            part = descriptor.part(coordinates)
            part += source.data.reshape(descriptor.block)[: part.shape[0], : part.shape[1]]

        self.mine.stores.append(copy)

    def store_wait(self, pendings: int) -> None:
        while len(self.mine.stores) > pendings:
            self.mine.stores.pop(0)()

    # wgmma

    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
        def compute() -> Block:
            left = a.data if isinstance(a, Shared) else a
            found = np.asarray(left, np.float32) @ b.data
            if not use_acc:
                return block(found)
            if isinstance(acc, Product):  # products are done in the order in which they were begun
                acc.finish()
                acc_value = acc.value
                assert acc_value is not None
                return block(found + acc_value)
            return block(found + acc)

        product = Product(compute)
        self.mine.products.append(product)
        if self.random.random() < 0.5:
            product.finish()
        return product

    def multiplied(self, pendings: int, deps: Sequence[Any]) -> Any:
        while len(self.mine.products) > pendings:
            self.mine.products.pop(0).finish()
        values = []
        for dep in deps:
            assert not isinstance(dep, Product) or dep.value is not None, "a product was used before it was waited for"
            values.append(dep.value if isinstance(dep, Product) else dep)
        return values[0] if len(values) == 1 else tuple(values)

    # the kernel

    def specialize(self, partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            self.mine.stores, self.mine.products = [], []
            with self.turn:
                try:
                    function(*arguments)
                    assert not self.mine.stores, "the program ends before its rows are written"
                    assert not self.mine.products, "the program ends while it multiplies"
                except BaseException as problem:  # noqa: BLE001  # told by the thread that waits for all
                    self.problems.append(problem)
                self.turn.notify_all()

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.problems:
            raise self.problems[0]
        assert not self.copies, "a copy that nobody waited for"


def language(machine: Machine) -> types.SimpleNamespace:
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        if isinstance(pointer.at, np.ndarray):
            at = np.where(mask, pointer.at, 0) if mask is not None else pointer.at
            found = pointer.data[at]
            return block(found if mask is None else np.where(mask, found, other))
        found = pointer.data[pointer.at]
        return Int(found) if pointer.data.dtype.kind == "i" else block(found)

    def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
        chosen = np.broadcast_to(mask, np.shape(pointer.at))
        pointer.data[np.asarray(pointer.at)[chosen]] = np.asarray(value)[chosen]

    def either(scalar: Callable[[Any, Any], Any], array: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def function(x: Any, y: Any) -> Any:
            if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
                return block(array(x, y))
            return Int(scalar(x, y))

        return function

    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, np.ndarray):
            return block(np.where(condition, x, y))
        return x if condition else y

    def assembly(text: str, constraints: str, given: Sequence[Block], *, dtype: str, is_pure: bool, pack: int) -> Block:
        # Pairs of 16 bits into a register and back: here every number has a place of its own.
        assert all(line.split()[0] == "mov.b32" for line in text.strip(";").split(";"))
        return given[0]

    def allocate(dtype: object, shape: Sequence[int], layout: object) -> Shared:
        if layout == "barriers":
            barriers = np.array([Barrier() for _ in range(math.prod(shape))], dtype=object)
            return Shared(barriers.reshape(shape))
        return Shared(np.full(shape, np.nan, np.float32))

    return types.SimpleNamespace(
        constexpr=lambda x: x,
        float32="fp32",
        float16="fp16",
        bfloat16="bf16",
        int32="i32",
        int64="i64",
        NVMMADistributedLayout=lambda **_: None,
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_: None),
        DotOperandLayout=lambda **_: None,
        SliceLayout=lambda *_: None,
        BlockedLayout=lambda *_: None,
        static_range=range,
        arange=lambda begin, end, layout: block(np.arange(begin, end)),
        zeros=lambda shape, dtype, layout: block(np.zeros(shape, np.float32)),
        full=lambda shape, value, dtype, layout: block(np.full(shape, value, np.float32)),
        zeros_like=lambda x: block(np.zeros_like(x)),
        maximum=either(max, np.maximum),
        minimum=either(min, np.minimum),
        where=where,
        max=lambda x, axis: block(x.max(axis)),
        sum=lambda x, axis: block(x.sum(axis)),
        exp2=lambda x: block(np.exp2(x)),
        log=lambda x: block(np.log(x)),
        abs=lambda x: block(np.abs(x)),
        convert_layout=lambda x, layout: x,
        permute=lambda x, axes: block(np.transpose(x, axes)),
        split=lambda x: (block(x[..., 0]), block(x[..., 1])),
        join=lambda x, y: block(np.stack([x, y], axis=-1)),
        inline_asm_elementwise=assembly,
        load=load,
        store=store,
        program_id=lambda axis: Int(machine.program),
        num_programs=lambda axis: Int(machine.programs),
        allocate_shared_memory=allocate,
        warp_specialize=machine.specialize,
    )


def context_of(
    spec: AttentionSpec, shape: tuple[int, ...], generator: np.random.Generator, *, sorted_ids: bool
) -> AttentionContext:
    """Three documents, in one piece each or scattered; global tokens in all but the last of several sequences."""
    B, T, S = shape[:3]
    ids = is_global = None
    if spec.documents:
        drawn = generator.integers(0, 3, (B, max(T, S)))
        ids = torch.from_numpy(np.sort(drawn) if sorted_ids else drawn)
    if spec.global_tokens:
        share = 0.05 * np.arange(B, 0, -1)[:, None] - 0.05 * (B > 1)
        is_global = torch.from_numpy(generator.random((B, S)) < share)
    return AttentionContext(
        q_documents=None if ids is None else ids[:, ids.shape[1] - T :],
        kv_documents=None if ids is None else ids[:, ids.shape[1] - S :],
        is_global=is_global,
    )


def pointer(x: torch.Tensor | None, B: int) -> Pointer | None:
    return None if x is None else Pointer(x.expand(B, *x.shape[1:]).numpy().reshape(-1))


def text(source: Path = SOURCE) -> str:
    return source.read_text(encoding="utf-8")


def kernel(monkeypatch: pytest.MonkeyPatch, machine: Machine, name: str = "forward_kernel") -> Callable[..., None]:
    """A kernel of SOURCE or BACKWARD as its text stands, over what is here; called, it runs every program of the
    grid."""

    def jit(function: Any = None, **_: object) -> Any:
        return function if function is not None else (lambda decorated: decorated)

    gluon: Any = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = jit, language(machine)
    device: Any = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    device.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=machine.init,
        wait=machine.wait,
        arrive=machine.arrive,
        expect=machine.expect,
    )
    device.tma = types.SimpleNamespace(
        async_copy_global_to_shared=machine.load,
        async_copy_shared_to_global=machine.store,
        store_wait=machine.store_wait,
    )
    device.fence_async_shared = lambda: None
    device.warpgroup_mma, device.warpgroup_mma_wait = machine.multiply, machine.multiplied
    reduce: Any = types.ModuleType(f"{hopper.__name__}.reduce")
    reduce.async_add_shared_to_global = machine.add
    experimental: Any = types.ModuleType("triton.experimental")
    experimental.gluon = gluon
    for path, module in (
        ("triton", types.ModuleType("triton")),
        ("triton.experimental", experimental),
        ("triton.experimental.gluon", gluon),
        ("triton.experimental.gluon.language.nvidia.hopper", device),
        (reduce.__name__, reduce),
    ):
        monkeypatch.setitem(sys.modules, path, module)
    found = types.ModuleType("")
    for source in (SOURCE, *BACKWARD):
        found = types.ModuleType(f"{hopper.__name__}.{source.stem}")
        found.__package__ = hopper.__name__
        monkeypatch.setitem(sys.modules, found.__name__, found)
        exec(compile(text(source), source, "exec", dont_inherit=True), vars(found))
        if name in vars(found):
            break

    def run(*arguments: Any) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            for program in range(machine.programs):
                machine.program = program
                vars(found)[name](*arguments)

    return run
