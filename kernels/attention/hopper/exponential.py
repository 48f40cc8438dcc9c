"""Powers of two, some of them on the units that multiply and add: the text of the instructions.

A processor of an H100 computes 16 powers a clock on its special-function units, and at head dim 64 as many clocks of
these as of its tensor cores. Of every GROUP powers a few may instead be a polynomial, on 128 lanes that have time left.

Source: Zadouri et al. 2026 (FlashAttention-4: Algorithm and Kernel Pipelining Co-Design for Asymmetric Hardware
Scaling; there for Blackwell), after Cody and Waite 1980 (Software Manual for the Elementary Functions, range
reduction).
"""

from __future__ import annotations

import struct

GROUP = 8  # neighbours in a thread's registers: four of each of its two rows
# Which of a group come from the polynomial, by how many: of both rows as many as can be, and spread.
_EMULATED = {0: (), 1: (6,), 2: (1, 6), 3: (1, 4, 6), 4: (1, 3, 4, 6)}
MOST = max(_EMULATED)

# 2^f for |f| <= 1/2 is 1 + f (c1 + f (c2 + f c3)) with a relative error of at most 1.02e-4, the least that is possible
# where 2^0 is exactly 1 (bf16 rounds by up to 3.9e-3, fp16 by 4.9e-4).
COEFFICIENTS = (0.6932829022407532, 0.2422109693288803, 0.055009059607982635)
LEAST = -127.0  # and below: exactly 0, as 1.0's bits less 127 exponents are those of 0
_ROUND = 1.5 * 2.0**23  # x + this - this is x to the nearest integer, which stands in the lowest bits of x + this


def _literal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex().upper()


def power_ptx(emulated: int) -> str:
    """PTX for GROUP results ($0 …) of 2 to the power of GROUP arguments, which follow them; arguments are at most about
    0. -inf gives 0; NaN gives no finite number."""
    lines = ["{", ".reg .f32 x, t, f, p;", ".reg .b32 n, b;"]
    for result in range(GROUP):
        argument = result + GROUP
        if result in _EMULATED[emulated]:
            lines += _polynomial(f"${result}", f"${argument}")
        else:
            lines.append(f"ex2.approx.ftz.f32 ${result}, ${argument};")
    return "\n".join([*lines, "}"])


def _polynomial(result: str, argument: str) -> list[str]:
    c1, c2, c3 = map(_literal, COEFFICIENTS)
    return [
        f"max.NaN.f32 x, {argument}, {_literal(LEAST)};",
        f"add.rn.f32 t, x, {_literal(_ROUND)};",
        f"sub.rn.f32 f, t, {_literal(_ROUND)};",
        "sub.rn.f32 f, x, f;",
        f"fma.rn.f32 p, f, {c3}, {c2};",
        f"fma.rn.f32 p, p, f, {c1};",
        f"fma.rn.f32 p, p, f, {_literal(1.0)};",
        "mov.b32 n, t;",
        "shl.b32 n, n, 23;",
        "mov.b32 b, p;",
        "add.s32 b, b, n;",
        f"mov.b32 {result}, b;",
    ]


CONSTRAINTS = ",".join(["=f"] * GROUP + ["f"] * GROUP)
