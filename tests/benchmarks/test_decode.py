"""`longspan bench suite=decode` and `suite=generation` on a CPU: what they compute, write and refuse."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from longspan.benchmarks import decode, generation
from longspan.benchmarks.decode import OURS, DecodeCase, cases, exact, make_inputs
from longspan.benchmarks.generation import ModelCase, limit_bytes
from longspan.kernels.attention import attend
from longspan.model import accounting
from longspan.model.config import DecoderConfig
from longspan.scripts.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_bytes_of_a_case() -> None:
    case = DecodeCase(batch=8, heads=16, kv_heads=4, head_dim=128, length=32768)
    assert case.nbytes == 8 * 32768 * 4 * 128 * 2 * 2  # 537 MB
    windowed = DecodeCase(batch=8, heads=16, kv_heads=4, head_dim=128, length=32768, window=1024)
    assert windowed.nbytes * 32 == case.nbytes
    stored = DecodeCase(batch=8, heads=16, kv_heads=4, head_dim=128, length=32768, storage="int8")
    assert stored.nbytes == 8 * 32768 * 4 * (128 + 4) * 2


@pytest.mark.parametrize("case", cases("tiny"), ids=lambda case: case.name)
def test_pages_and_8_bits_hold_the_same_keys(case: DecodeCase) -> None:
    """Whatever the layout, the reference over what our call reads is attention over the contiguous keys."""
    inputs = make_inputs(case, CPU)
    k, v = inputs.kept
    out = attend(inputs.q, k, v, spec=case.spec, context=inputs.context, params=inputs.params, backend="reference").out
    as_stored, before = exact(case, inputs)
    torch.testing.assert_close(out, as_stored, rtol=1e-5, atol=1e-5)
    apart = float((as_stored - before).norm() / before.norm())
    assert apart == 0 if case.storage == "bfloat16" else 1e-4 < apart < 0.05


def test_the_suite_runs_and_appends(tmp_path: Path) -> None:
    assert main(["bench", "suite=decode", "device=cpu", "repetitions=3"]) == 0
    rows = list(csv.DictReader((tmp_path / "bench/decode.csv").read_text().splitlines()))
    assert [row["case"] for row in rows if row["contender"] == OURS] == [case.name for case in cases("tiny")]
    for row in rows:
        assert row["status"] == "ok"
        assert row["n"] == "3"
        assert 0 < float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        rate = float(row["kv_mib"]) * 2**20 / float(row["us"]) * 1e-3
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=0.1)  # kv_mib is rounded


def test_ours_beyond_the_budget_is_void(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def off(*args: object, **kwargs: object) -> object:
        return attend(*args, **kwargs) if kwargs["backend"] != "decode" else wrong(*args, **kwargs)  # pyright: ignore[reportArgumentType]  # passed on

    def wrong(*args: object, **kwargs: object) -> object:
        out = attend(*args, **kwargs)  # pyright: ignore[reportArgumentType]  # passed on
        return type(out)(out.out * 1.01)

    monkeypatch.setattr(decode, "attend", off)
    assert not decode.run("tiny", CPU, tmp_path, command="test", only="window", repetitions=2)
    (row,) = [
        row for row in csv.DictReader((tmp_path / "decode.csv").read_text().splitlines()) if row["contender"] == OURS
    ]
    assert row["status"].startswith("void: relative error 1.0")
    assert row["us"] == ""


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite=decode", "device=cpu", "only=b3"]) == 2
    assert "only=b3: in the name of no case of suite=decode" in capsys.readouterr().err


def test_limit_counts_what_a_step_reads() -> None:
    config = DecoderConfig(
        vocab_size=100, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=64, max_positions=50, tied_head=False
    )
    case = ModelCase("tiny", config, batch=3, context=960)
    embedding, positions = 100 * 32, 50 * 32
    weights = accounting.parameters(config).total - embedding - positions
    kv = 2 * 2 * 2 * 8 * 2  # k and v, layers, heads, head dim, bytes
    assert limit_bytes(case) == 2 * weights + 3 * (960 + 40) * kv


def test_generation_steps_are_timed(tmp_path: Path) -> None:
    assert generation.run("tiny", CPU, tmp_path, command="test")
    rows = list(csv.DictReader((tmp_path / "generation.csv").read_text().splitlines()))
    assert "longspan" in [row["contender"] for row in rows]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < float(row["ms_per_step"]) < 1e4
        assert math.isclose(float(row["tokens_per_s"]), 2e3 / float(row["ms_per_step"]), rel_tol=0.01)
