"""What the compile gate looks for in the machine code of the Hopper kernels, beside registers, spills and memory."""

from __future__ import annotations

import re

#        /*52b0*/    @P1 HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR16].tnspB, R88 ;
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9]+)((?:\.\w+)*)\s*([^;]*);")
_REGISTER = re.compile(r"^(?:U?P\w+, )?R(\d+)")
_FROM_REGISTERS = re.compile(r"^R\d+, R(\d+), gdesc")
_READERS = ("ST", "RED", "ATOM", "BRA", "BAR", "SYNCS", "CALL", "UT")  # their first register is not written


def problems(sass: str, columns: int = 128, *, forward: bool = True, beside: int = 2) -> list[str]:
    """One line each: no copies by TMA, an operand overwritten while wgmma reads it, products that ptxas serialised,
    exponentials that wait for the product that they should run beside. `columns`: of a tile that passes a consumer;
    `beside`: consumers of the backward pass that have a product to run them beside."""
    code = _INSTRUCTION.findall(sass)
    found = []
    if not any(name == "UTMALDG" for name, _, _ in code):
        found.append("no UTMALDG: nothing is loaded by TMA")
    hazards = _overwritten(code)
    if hazards:
        found.append(f"{len(hazards)} registers are written while wgmma may still read them, the first by {hazards[0]}")
    products = sum(name == "HGMMA" for name, _, _ in code)
    waits = sum(_is_wait(name, modifiers) for name, modifiers, _ in code)
    if waits * 4 > products:
        found.append(f"{waits} waits for {products} wgmma: ptxas has serialised them")
    # 128 threads share 64 × `columns` scores of a consumer's round: half of their exponentials are enough.
    least = columns // 4
    running = _beside_a_product(code)
    # Each consumer leaves a product running in its loop and, in the forward pass, while it writes an item's rows; in
    # the backward pass it also does between the exponentials and the end of a round.
    expected = max(1, -(-len(running) // 2)) if forward else beside
    if sum(n >= least for n in running) < expected:
        found.append(
            f"exponentials beside products: {running}, at least {least} beside {expected} of them are expected"
        )
    return found


def _is_wait(name: str, modifiers: str) -> bool:
    return name == "WARPGROUP" and modifiers.startswith(".DEPBAR")


def _overwritten(code: list[tuple[str, str, str]]) -> list[str]:
    """Instructions that write a register from which a wgmma, not yet waited for, takes its left operand; in the order
    of the text, so an approximation. (ptxas up to 13.2 is known to produce such code; 13.3 mends it.)"""
    pending: set[int] = set()
    found = []
    for name, modifiers, operands in code:
        if name == "HGMMA":
            source = _FROM_REGISTERS.search(operands)
            if source:
                pending |= set(range(int(source[1]), int(source[1]) + 4))
        elif _is_wait(name, modifiers):
            pending.clear()
        elif not name.startswith(_READERS) and (target := _REGISTER.search(operands)):
            first = int(target[1])
            written = {first, first + 1} if ".64" in modifiers else {first}
            if written & pending:
                found.append(f"{name}{modifiers} {operands.strip()}")
    return found


def _beside_a_product(code: list[tuple[str, str, str]]) -> list[int]:
    """For every wait that leaves one product running: exponentials between it and the next wait."""
    found, running = [], None
    for name, modifiers, operands in code:
        if _is_wait(name, modifiers):
            if running is not None:
                found.append(running)
            running = 0 if operands.strip().endswith("0x1") else None
        elif running is not None and name == "MUFU" and modifiers.startswith(".EX2"):
            running += 1
    return found
