"""Figures of a kernel that was compiled for a GPU which need not be there: registers, spills, shared memory, and
tensor-core instructions. ptxas and cuobjdump come with triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .gate_variants import Request


@dataclass(frozen=True, slots=True)
class Figures:
    """registers     of a thread
    spilled       bytes of a thread that stores to local memory move, anywhere
    loop_stores   of these, bytes inside loops (once round each loop)
    loop_loads    bytes of a thread reloaded from local memory inside loops
    shared        bytes of a program
    wgmma, mma    tensor-core instructions in the text of the program: of a warp group (sm_90), of a warp
    unasked       asynchronous copies that no condition holds back: every one of a tile depends on whether there is a
                  tile, so one without a condition reads memory that may not be ours
    """

    registers: int
    spilled: int
    loop_stores: int
    loop_loads: int
    shared: int
    wgmma: int
    mma: int
    unasked: int = 0


def compile_for(request: Request, arch: int) -> tuple[Figures, str]:
    """(figures, machine code as cuobjdump writes it: of Gluon kernels and of what spills, else empty)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    gluon = request.function.is_gluon()
    source = (GluonASTSource if gluon else ASTSource)(
        request.function, request.signature, request.constants, request.attributes
    )
    options: dict[str, object] = {"num_warps": request.warps, "num_stages": request.stages}
    if request.maxnreg is not None:
        options["maxnreg"] = request.maxnreg
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack = _resources(kernel.asm["cubin"])
    # Whatever was spilled lies on the stack; disassembling takes a second, so only then.
    sass = _sass(kernel.asm["cubin"]) if stack or gluon else ""
    spills = spills_of(sass)
    figures = Figures(
        registers,
        spills.stored,
        spills.stored_in_loops,
        spills.loaded_in_loops,
        kernel.metadata.shared,
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
        mma=kernel.asm["ptx"].count("mma.sync."),
        unasked=unasked_copies(kernel.asm["llir"]),
    )
    return figures, sass


#   call void asm sideeffect "cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", "r,l,r"(…, …, i32 16)
_UNASKED = re.compile(r'asm sideeffect "cp\.async\.c[^"]*", "r,l,r"\(.*, i32 (?:4|8|16)\)[^()]*$', re.MULTILINE)


def unasked_copies(llir: str) -> int:
    """Copies without a predicate whose size, which is 0 for a masked one, is a constant."""
    return len(_UNASKED.findall(llir))


@lru_cache(maxsize=1)
def versions() -> tuple[str, str]:
    """Of triton and of the ptxas that it uses."""
    import triton

    return triton.__version__, triton.knobs.nvidia.ptxas.version


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run(  # noqa: S603  # triton's own tool on our own file
            [triton.knobs.nvidia.cuobjdump.path, option, path], check=True, capture_output=True, text=True
        ).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(cubin, "--dump-resource-usage"))
    if found is None:
        raise RuntimeError("cuobjdump --dump-resource-usage did not tell REG and STACK")
    return int(found[1]), int(found[2])


def _sass(cubin: bytes) -> str:
    return _cuobjdump(cubin, "--dump-sass")


# -- machine code ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spills:
    """Bytes of a thread."""

    stored: int
    stored_in_loops: int
    loaded_in_loops: int


#        /*52b0*/    @P1 BRA.U 0x53a0 ;
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9]+)((?:\.\w+)*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def spills_of(sass: str) -> Spills:
    """Traffic with local memory in the text of one kernel, as cuobjdump writes it.

    An instruction is in a loop when it lies on a path from the target of a backward branch to that branch: paths, not
    addresses, because ptxas moves unlikely code to the end, from where it jumps back.
    """
    instructions = [
        (int(at, 16), bool(guard), name, modifiers, operands.strip())
        for at, guard, name, modifiers, operands in _INSTRUCTION.findall(sass)
    ]
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    backward: list[tuple[int, int]] = []
    for (at, guarded, name, _, operands), following in zip(instructions, [*instructions[1:], None]):
        successors = []
        if name == "BRA" and (target := _TARGET.search(operands)):
            successors.append(int(target[1], 16))
            if successors[0] <= at:
                backward.append((at, successors[0]))
            # `BRA P0, 0x10` and `BRA.DIV UR4, 0x10` carry their condition as an operand
            guarded = guarded or "," in operands
        ends = name in ("BRA", "EXIT", "RET") and not guarded
        if following is not None and not ends:
            successors.append(following[0])
        for successor in successors:
            after[at].append(successor)
            before[successor].append(at)

    in_loops: set[int] = set()
    for branch, target in backward:
        body = _reached(after, target)
        if branch in body:
            in_loops |= body & _reached(before, branch)

    def moved(mnemonic: str, where: Iterable[int] | None) -> int:
        return sum(
            _bytes(modifiers)
            for at, _, name, modifiers, _ in instructions
            if name == mnemonic and (where is None or at in where)
        )

    return Spills(moved("STL", None), moved("STL", in_loops), moved("LDL", in_loops))


def _bytes(modifiers: str) -> int:
    for width, size in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if modifiers.endswith(width) or f"{width}." in modifiers:
            return size
    return 4


def _reached(edges: dict[int, list[int]], start: int) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for other in edges.get(waiting.pop(), ()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found
