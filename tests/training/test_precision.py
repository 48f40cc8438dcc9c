from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.training import precision, rng
from longspan.training.precision import choose_arithmetic, measured_matmul_flops, multiplies_bf16_fast

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_fast_bf16_is_amx(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16 amx_bf16 amx_tile\n")
    assert multiplies_bf16_fast(cpuinfo)
    cpuinfo.write_text("flags : fpu avx512_bf16\n")
    assert not multiplies_bf16_fast(cpuinfo)
    assert not multiplies_bf16_fast(tmp_path / "missing")


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16-mixed"), (False, "fp32")])
def test_auto_on_a_cpu_says_why(fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16_fast", lambda: fast)
    arithmetic = choose_arithmetic("auto", CPU)
    assert arithmetic.precision == chosen
    assert "AMX" in arithmetic.reason


def test_what_each_precision_means() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    kinds = {name: choose_arithmetic(name, GPU) for name in ("auto", "fp32", "bf16-mixed", "bf16-true")}
    assert {name: (a.autocast, a.parameters, a.compute) for name, a in kinds.items()} == {
        "auto": (bf16, fp32, bf16),
        "fp32": (None, fp32, fp32),
        "bf16-mixed": (bf16, fp32, bf16),
        "bf16-true": (None, bf16, bf16),
    }


def test_measuring_the_matmul_rate_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert measured_matmul_flops(torch.float32, size=64, seconds=0.0) > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_every_generator_continues_where_it_was(tmp_path: Path) -> None:
    rng.seed_everything(3, rank=0)
    draw()  # an odd number of normals, so that a second one of a pair is pending
    torch.save(rng.capture(CPU), tmp_path / "state")
    expected = draw()
    rng.seed_everything(9, rank=1)
    rng.restore(torch.load(tmp_path / "state", weights_only=True), CPU)
    assert draw() == expected


def test_ranks_draw_differently() -> None:
    drawn = []
    for rank in (0, 1):
        rng.seed_everything(3, rank)
        drawn.append(draw())
    assert not set(drawn[0]) & set(drawn[1])
