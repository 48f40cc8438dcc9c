"""The compile gate: what it compiles, how it reads machine code, and what it lets pass."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longspan.kernels.attention.hopper import tiles as hopper_tiles
from longspan.kernels.attention.hopper.tiles import Tiles
from longspan.kernels.attention.triton import gate
from longspan.kernels.attention.triton.gate import Row, Table, compare, over_budget, read_table, write_table
from longspan.kernels.attention.triton.gate_figures import Figures, Spills, spills_of, unasked_copies
from longspan.kernels.attention.triton.gate_hopper import problems
from longspan.kernels.attention.triton.gate_variants import CASES, HOPPER, SHIPPED, Request, full_product, requests

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Figures(registers=128, spilled=0, loop_stores=0, loop_loads=0, shared=65_536, wgmma=16, mma=0)
ROW = Row("d64 causal forward", 90, "128x64 w8 s3", FIGURES)
VERSIONS = ("3.7.1", "12.8")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which nobody has told to interpret kernels."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "longspan.kernels.attention.triton.gate", *arguments],
        capture_output=True,
        text=True,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
    )


@needs_triton
@pytest.mark.timeout(900)
def test_the_quick_part_of_the_list_compiles_within_budgets_and_no_worse_than_the_table() -> None:
    done = run_gate("--quick")
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(done.stdout.splitlines()) == sum(len(case.archs) * len(case.kernels) for case in CASES if case.quick) + 1


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_list_compiles_within_budgets_and_no_worse_than_the_table() -> None:
    done = run_gate()
    assert done.returncode == 0, done.stderr + done.stdout


@needs_triton
def test_a_process_that_would_interpret_compiles_nothing() -> None:
    done = run_gate(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


# -- the list and the table --------------------------------------------------------------------------------------------


def variants() -> list[str]:
    return [case.variant(kernel) for case in CASES for kernel in case.kernels]


def test_the_list_is_short_and_its_names_differ() -> None:
    assert len(set(variants())) == len(variants()) <= 120
    products = [case.name for case in full_product()]
    assert len(set(products)) == len(products)


def test_the_table_holds_the_list_and_nothing_else() -> None:
    table = read_table()
    assert table is not None
    assert [(row.variant, row.arch) for row in table.rows] == [
        (case.variant(kernel), arch) for case in CASES for arch in case.archs for kernel in case.kernels
    ]


def test_the_table_is_within_the_budgets_and_the_budgets_are_no_wider_than_the_table() -> None:
    table = read_table()
    assert table is not None
    spilled = {(row.variant, row.arch): row.figures.spilled for row in table.rows}
    for row in table.rows:
        assert over_budget(row, tensor_cores=None, spills=gate.spill_budget(row.variant, row.arch)) == []
    for variant, budgets in gate.SPILL_BUDGETS.items():
        for arch, budget in budgets.items():
            assert 0 < spilled[variant, arch] <= budget < 2 * spilled[variant, arch] + 16, (variant, arch)


def test_what_ships_stores_at_most_an_address_inside_loops_on_the_gpu_that_its_tiles_were_chosen_for() -> None:
    table = read_table()
    assert table is not None
    shipped = {case.variant(kernel) for case in SHIPPED for kernel in case.kernels}
    stores = {row.variant: row.figures.loop_stores for row in table.rows if row.variant in shipped and row.arch == 90}
    assert {variant: stored for variant, stored in stores.items() if stored > 8} == {}


def test_half_precision_products_run_on_tensor_cores_and_fp32_ones_do_not() -> None:
    table = read_table()
    assert table is not None
    dtypes = {case.variant(kernel): case.dtype for case in CASES for kernel in case.kernels if kernel not in gate.JOINS}
    for row in table.rows:
        if row.variant in dtypes:
            used = row.figures.wgmma + row.figures.mma
            assert (used > 0) == (dtypes[row.variant] != torch.float32), row
    main = [row for row in table.rows if row.arch == 90 and row.variant == "d128 causal forward"]
    assert main[0].figures.wgmma > 0


def test_a_table_that_was_written_reads_the_same(tmp_path: Path) -> None:
    table = Table(*VERSIONS, (ROW, replace(ROW, arch=80)))
    write_table(table, tmp_path / "table.csv")
    assert read_table(tmp_path / "table.csv") == table
    assert read_table(tmp_path / "none.csv") is None


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"registers": 129}, "registers was 128, is 129"),
        ({"spilled": 4}, "spilled was 0, is 4"),
        ({"loop_stores": 4}, "loop_stores was 0, is 4"),
        ({"loop_loads": 8}, "loop_loads was 0, is 8"),
        ({"shared": 65_537}, "shared was 65,536, is 65,537"),
        ({"wgmma": 15}, "wgmma was 16, is 15"),
        ({"unasked": 1}, "unasked was 0, is 1"),
    ],
)
def test_a_worse_figure_is_named_with_what_updates_the_table(changed: dict[str, int], line: str) -> None:
    now = replace(ROW, figures=replace(FIGURES, **changed))
    (failure,), _ = compare((now,), Table(*VERSIONS, (ROW,)), VERSIONS)
    assert failure.startswith("d64 causal forward on sm_90 (128x64 w8 s3): " + line)
    assert failure.endswith("python -m longspan.kernels.attention.triton.gate --update")


def test_better_figures_pass_and_a_new_tile_is_shown_beside_a_worse_one() -> None:
    better = replace(ROW, figures=replace(FIGURES, registers=100, shared=1, wgmma=20, mma=4))
    assert compare((better,), Table(*VERSIONS, (ROW,)), VERSIONS)[0] == []
    moved = replace(ROW, tile="64x64 w4 s3", figures=replace(FIGURES, registers=140))
    (failure,), _ = compare((moved,), Table(*VERSIONS, (ROW,)), VERSIONS)
    assert "(128x64 w8 s3 → 64x64 w4 s3)" in failure


def test_a_variant_that_the_table_lacks_fails_and_fewer_mma_fail_where_nothing_replaces_them() -> None:
    (failure,), _ = compare((replace(ROW, variant="new"),), Table(*VERSIONS, (ROW,)), VERSIONS)
    assert failure.startswith("new on sm_90: not in the table.")
    warps = replace(ROW, arch=80, figures=replace(FIGURES, wgmma=0, mma=128))
    fewer = replace(warps, figures=replace(warps.figures, mma=127))
    (failure,), _ = compare((fewer,), Table(*VERSIONS, (warps,)), VERSIONS)
    assert "mma was 128, is 127" in failure


@pytest.mark.parametrize("versions", [("3.8.0", "12.8"), ("3.7.1", "12.9")])
def test_other_compilers_are_held_to_the_budgets_alone(versions: tuple[str, str]) -> None:
    worse = replace(ROW, figures=replace(FIGURES, registers=200))
    failures, against = compare((worse,), Table(*VERSIONS, (ROW,)), versions)
    assert failures == []
    assert against.endswith("budgets only")
    assert compare((worse,), None, versions)[0] == []


@pytest.mark.parametrize(
    ("arch", "changed", "line"),
    [
        (90, {"registers": 256}, "registers is 256, at most 255 is allowed"),
        (90, {"shared": 232_449}, "shared is 232,449, at most 232,448 is allowed"),
        (80, {"shared": 166_913, "wgmma": 1}, "shared is 166,913, at most 166,912 is allowed"),
        (90, {"spilled": 4}, "spilled is 4, at most 0 is allowed"),
        (90, {"wgmma": 0, "mma": 64}, "no wgmma instruction"),
        (90, {"unasked": 8}, "unasked is 8, at most 0 is allowed"),
    ],
)
def test_budgets(arch: int, changed: dict[str, int], line: str) -> None:
    row = replace(ROW, arch=arch, figures=replace(FIGURES, **changed))
    (failure,) = over_budget(row, tensor_cores="wgmma", spills=0)
    assert failure.startswith(f"d64 causal forward on sm_{arch} (128x64 w8 s3): {line}")
    assert over_budget(replace(ROW, arch=arch), tensor_cores="wgmma", spills=0) == []


def test_spills_of_the_full_product_are_reported_and_not_judged() -> None:
    assert over_budget(replace(ROW, figures=replace(FIGURES, spilled=999)), tensor_cores=None, spills=None) == []


def test_copies_are_unasked_without_a_predicate_and_with_a_size_that_is_never_zero() -> None:
    copy = 'tail call void asm sideeffect "{0}cp.async.cg.shared.global [ $0 + 0 ], [ $1 + 0 ], 0x10, $2;", "r,l,r{1}"'
    where = "(ptr addrspace(3) getelementptr (i8, ptr addrspace(3) @smem, i32 4096), ptr addrspace(1) %7, {0}) #3"
    unasked = copy.format("", "") + where.format("i32 16")
    masked = copy.format("", "") + where.format("i32 %12")
    predicated = copy.format("@$3 ", ",b") + where.format("i32 16, i1 %9")
    assert unasked_copies("\n".join([masked, unasked, predicated, unasked])) == 2


# -- machine code ------------------------------------------------------------------------------------------------------


def sass(*lines: str) -> str:
    """As cuobjdump writes it: an address, the instruction, its encoding; the second half of it on a line of its own."""
    encoding = "/* 0x0000000000007947 */"
    return "\n".join(
        f"        /*{at * 16:04x}*/   {line} ;   {encoding}\n   {encoding}" for at, line in enumerate(lines)
    )


def test_spills_before_a_loop_inside_it_and_after_it_are_told_apart() -> None:
    text = sass(
        "STL [R1], R2",  # 0x00
        "STL.64 [R1+0x8], R4",  # 0x10
        "@!P2 BRA 0x70",  # 0x20: skips the loop
        "LDL R2, [R1]",  # 0x30: the loop
        "STL.128 [R1+0x10], R8",  # 0x40
        "HMMA.16816.F32 R4, R8, R12, R4",  # 0x50
        "@P0 BRA 0x30",  # 0x60
        "LDL.LU.64 R4, [R1+0x8]",  # 0x70
        "EXIT",  # 0x80
        "BRA 0x90",  # 0x90: what follows every kernel
    )
    assert spills_of(text) == Spills(stored=4 + 8 + 16, stored_in_loops=16, loaded_in_loops=4)


def test_unlikely_code_that_was_moved_to_the_end_and_jumps_back_is_no_loop() -> None:
    text = sass(
        "@P0 BRA 0x40",  # 0x00
        "STL [R1], R2",  # 0x10
        "LDL R2, [R1]",  # 0x20
        "EXIT",  # 0x30
        "MOV R2, RZ",  # 0x40: moved
        "BRA 0x10",  # 0x50
    )
    assert spills_of(text) == Spills(stored=4, stored_in_loops=0, loaded_in_loops=0)


def test_code_that_was_moved_out_of_a_loop_is_in_the_loop() -> None:
    text = sass(
        "@P1 BRA 0x30",  # 0x00: the loop
        "@P0 BRA 0x00",  # 0x10
        "EXIT",  # 0x20
        "@!P3 STL.64 [R1], R2",  # 0x30: moved
        "BRA.U 0x10",  # 0x40
    )
    assert spills_of(text) == Spills(stored=8, stored_in_loops=8, loaded_in_loops=0)


def test_a_branch_with_its_condition_among_its_operands_may_be_passed() -> None:
    text = sass(
        "LDL.U16 R3, [R1]",  # 0x00: the loop
        "BRA.DIV UR4, 0x00",  # 0x10
        "STL.S8 [R1], R2",  # 0x20
        "EXIT",  # 0x30
    )
    assert spills_of(text) == Spills(stored=1, stored_in_loops=0, loaded_in_loops=2)


def test_unreadable_arguments_are_refused_with_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gate.main(["--arch", "70"])
    assert "--arch 70: there are budgets for 80, 90" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gate.main(["--update", "--arch", "90"])
    assert "leave --arch out" in capsys.readouterr().err


# -- the Hopper kernel's machine code ----------------------------------------------------------------------------------

LOAD = "UTMALDG.4D [UR8], [UR6] ;"
SCORES = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;"
SUMS = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0 ;"
ONE_LEFT, ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
EXPONENTIALS = ["MUFU.EX2 R24, R24 ;"] * 66


def code(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/                   {line}" for i, line in enumerate(instructions))


def test_exponentials_that_run_beside_a_product_are_what_the_gate_wants() -> None:
    loop = [LOAD, *[SCORES] * 8, *[SUMS] * 8, ONE_LEFT, *EXPONENTIALS, ALL]
    assert problems(code(*loop)) == []
    assert problems(code(*loop, SUMS, ONE_LEFT, ALL)) == []  # and an item's end, which has none
    late = [LOAD, *[SCORES] * 8, *[SUMS] * 8, ONE_LEFT, ALL, *EXPONENTIALS]
    assert [line.split(":")[0] for line in problems(code(*late))] == ["exponentials beside products"]


def test_every_consumer_of_the_backward_pass_has_exponentials_beside_a_product_of_its_own() -> None:
    both = [LOAD, *[SCORES] * 16, ONE_LEFT, *EXPONENTIALS[:32], ALL, *[SUMS] * 8, ONE_LEFT, *EXPONENTIALS[:32], ALL]
    assert problems(code(*both), 64, forward=False) == []
    assert (
        problems(code(*both, *[SUMS] * 8, ONE_LEFT, ALL), 64, forward=False) == []
    )  # and a round's end, which has none
    one = [LOAD, *[SCORES] * 16, ONE_LEFT, *EXPONENTIALS[:32], ONE_LEFT, *[SUMS] * 8, ALL, *EXPONENTIALS[:32]]
    (problem,) = problems(code(*one), 64, forward=False)
    assert problem == "exponentials beside products: [32, 0], at least 16 beside 2 of them are expected"
    assert "at least 64 beside" in problems(code(*both), 256, forward=False)[0]  # a wider tile has more


def test_hopper_kernels_are_named_by_tiles_of_queries_and_keys() -> None:
    names = ("M", "N", "C", "OWNERS", "STAGES")
    signature = {"desc_q": "tensordesc"} | dict.fromkeys(names, "constexpr")

    def request(names: dict[str, str], **constants: int) -> Request:
        return Request(None, names, {(list(names).index(name),): n for name, n in constants.items()}, {}, 4, 3)

    assert request(signature, C=3, N=128, STAGES=2).tile == "192x128 w4 s2"  # forward: consumers of 64 queries
    assert request(signature, M=64, STAGES=4).tile == "64x128 w4 s4"  # dk and dv own 128 keys
    assert request(signature, M=64, STAGES=2, OWNERS=2).tile == "64x128 w4 s2"
    assert request(signature, M=64, STAGES=2, OWNERS=1).tile == "64x64 w4 s2"  # both consumers have the same keys
    assert request(signature, N=32, STAGES=4).tile == "128x32 w4 s4"  # dq owns 128 queries
    assert request({"OUT": "*bf16"}).tile == "w4 s3"


@needs_triton
def test_a_call_of_the_hopper_backend_compiles_its_whole_training_step() -> None:
    case = next(case for case in HOPPER if case.name == "hopper d128 documents")
    found = requests(case, 90)
    assert set(found) == {"forward", "stats", "dkdv", "dq"}
    assert [gate.tensor_cores(case, kernel, 90) for kernel in ("dkdv", "dq", "stats")] == ["wgmma", "wgmma", None]
    assert found["dq"].tile == "128x64 w4 s3"
    assert found["dkdv"].maxnreg == 168


WAYS = {
    "three consumers": (64, Tiles(3, 128, 4, 160)),
    "three consumers in halves": (64, Tiles(3, 128, 4, 160, halves=True)),
    "halves": (64, Tiles(2, 128, 4, 240, halves=True)),
    "halves at d128": (128, Tiles(2, 128, 2, 240, halves=True)),
}


@needs_triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", [next(iter(WAYS)), *(pytest.param(x, marks=pytest.mark.slow) for x in [*WAYS][1:])])
def test_every_way_that_tiles_can_ask_for_compiles_without_spills(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    head_dim, tiles = WAYS[way]
    case = next(case for case in HOPPER if case.name == f"hopper d{head_dim} causal")
    monkeypatch.setitem(hopper_tiles._TILES, head_dim, tiles)
    requests.cache_clear()
    try:
        result = gate.run(gate.Job(case, "forward", 90, False))
    finally:
        requests.cache_clear()
    assert result.failures == []
    assert result.row is not None
    assert result.row.figures.spilled == 0
    assert result.row.tile == f"{tiles.rows}x128 w4 s{tiles.stages}"


def test_registers_that_wgmma_reads_are_left_alone_until_it_is_done() -> None:
    begin = [LOAD, *[SCORES] * 8, *[SUMS] * 8, ONE_LEFT, *EXPONENTIALS, ALL, *[SUMS] * 8]
    for write, found in (
        ("F2FP.BF16.F32.PACK_AB R152, R25, R24 ;", 1),
        ("IMAD.WIDE.64 R154, R25, R24, RZ ;", 1),
        ("F2FP.BF16.F32.PACK_AB R156, R25, R24 ;", 0),  # beyond the four registers of an operand
        ("STS.64 [R152], R24 ;", 0),  # reads its first register
    ):
        before, after = problems(code(*begin, write, ALL)), problems(code(*begin, ALL, write))
        assert len([line for line in before if "while wgmma may still read" in line]) == found, write
        assert after == []


def test_serialised_products_and_loads_without_tma_are_told() -> None:
    serialised = [LOAD, *[SCORES, ALL] * 8, ONE_LEFT, *EXPONENTIALS, ALL]
    assert any("serialised" in line for line in problems(code(*serialised)))
    assert problems(code(*[SCORES] * 16, ONE_LEFT, *EXPONENTIALS, ALL)) == ["no UTMALDG: nothing is loaded by TMA"]


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_full_product_asks_hopper_for_kernels_that_it_has(head_dim: int) -> None:
    for name in ("causal", "causal window", "documents"):
        case = next(case for case in full_product() if case.name == f"hopper d{head_dim} bf16 {name}")
        assert set(case.kernels) <= set(requests(case, 90)), case.name
