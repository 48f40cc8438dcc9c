"""`longspan bench suite=decode` and `suite=generation` on a CPU: what they compute, write and refuse."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import Tensor

from longspan.benchmarks import decode, generation, plan
from longspan.benchmarks.decode import OURS, DecodeCase, cases, exact, make_inputs
from longspan.benchmarks.environment import RESULTS
from longspan.benchmarks.generation import ModelCase, limit_bytes
from longspan.benchmarks.shapes import PEERS
from longspan.kernels.attention import (
    AttentionContext,
    AttentionOutput,
    AttentionParams,
    AttentionSpec,
    Window,
    attend,
)
from longspan.model import accounting
from longspan.model.config import DecoderConfig
from longspan.scripts.cli import main
from longspan.training.config_keys import keys
from longspan.training.schema import BenchConfig

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


def test_the_suite_runs_and_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite=decode", "device=cpu", "repetitions=3"]) == 0
    assert "smoke run on a CPU: it shows that everything works, and no speed" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "bench/decode.csv").read_text().splitlines()))
    assert [row["case"] for row in rows if row["contender"] == OURS] == [case.name for case in cases("tiny")]
    for row in rows:
        if row["contender"] in ("flashinfer", "xformers"):
            package = {"flashinfer": "flashinfer-python"}.get(row["contender"], row["contender"])
            assert row["status"] == f"skipped: {package} is not installed"
            assert (row["us"], row["version"]) == ("", "")
            continue
        assert row["status"] == "ok"
        assert row["n"] == "3"
        assert 0 < float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        rate = float(row["kv_mib"]) * 2**20 / float(row["us"]) * 1e-3
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=0.1)  # kv_mib is rounded


def test_peers_that_are_installed_are_called_as_they_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the peers' signatures, computed by the reference: pages, groups and windows reach them right."""

    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str, *, use_tensor_cores: bool) -> None:
            assert layout == "NHD"

        def plan(
            self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int, head_dim: int, page: int,
            *, window_left: int, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        ) -> None:  # fmt: skip
            pages = indices.view(len(last), -1)
            assert torch.equal(indptr, torch.arange(len(last) + 1, dtype=torch.int32) * pages.shape[1])
            lengths = (pages.shape[1] - 1) * page + last
            self.window = None if window_left < 0 else window_left
            self.context = AttentionContext(
                page_table=pages, kv_lengths=lengths.long(), q_positions=lengths[:, None].long() - 1
            )

        def run(self, q_BHD: Tensor, pools: tuple[Tensor, Tensor]) -> Tensor:
            spec = AttentionSpec(causal=True, window=Window(left=self.window))
            out = attend(q_BHD[:, None], *pools, spec=spec, context=self.context, backend="reference").out
            return out[:, 0]

    def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        return attend(q, k, v, spec=AttentionSpec(causal=False), backend="reference").out.unflatten(2, (2, -1))

    flashinfer, xformers, ops = ModuleType("flashinfer"), ModuleType("xformers"), ModuleType("xformers.ops")
    monkeypatch.setattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper", Wrapper, raising=False)
    monkeypatch.setattr(ops, "memory_efficient_attention_forward", efficient, raising=False)
    for module in (flashinfer, xformers, ops):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for case in cases("tiny"):
        inputs = make_inputs(case, CPU)
        _, plain = exact(case, inputs)
        for name in ("flashinfer", "xformers"):
            found = decode.contenders(case, inputs)[name].prepare()()
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_ours_beyond_the_budget_is_void(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def off(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        spec: AttentionSpec,
        backend: str,
        context: AttentionContext | None = None,
        params: AttentionParams | None = None,
    ) -> AttentionOutput:
        right = attend(q, k, v, spec=spec, context=context, params=params, backend=backend)
        return right if backend != "decode" else AttentionOutput(right.out * 1.01, None)

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
    for typed, said in {
        "suite=decode peers=[flex]": "peers: suite=decode measures all that are there; leave it out",
        "suite=generation peers=[flex]": "peers=flex: no peer of suite=generation; its peers are transformers-dynamic",
        "suite=attention peers=[transformers-static]": "peers=transformers-static: no peer of suite=attention",
        "suite=attention peers=[transformers-static] dry_run=true": "peers=transformers-static: no peer of suite",
        "suite=decode backend=flex": "backend=flex: suite=decode measures decoding as it runs; leave it out",
        "suite=generation time_limit=9": "time_limit=9: suite=generation has none",
    }.items():
        assert main(["bench", "device=cpu", *typed.split()]) == 2
        assert said in capsys.readouterr().err


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
    """As often as the rows say, in turn, with a spread."""
    assert generation.run("tiny", CPU, tmp_path, command="test", repetitions=2)
    rows = list(csv.DictReader((tmp_path / "generation.csv").read_text().splitlines()))
    assert "longspan" in [row["contender"] for row in rows]
    left_out = {row["contender"] for row in rows if row["status"].startswith("skipped: is compiled")}
    assert left_out == {generation.COMPILED, generation.STATIC}
    for row in rows:
        if row["contender"] in left_out:
            assert (row["n"], row["ms_per_step"]) == ("0", "")
            continue
        assert (row["status"], row["n"]) == ("ok", "2")
        assert 0 < float(row["ms_p20"]) <= float(row["ms_per_step"]) <= float(row["ms_p80"]) < 1e4
        assert math.isclose(float(row["tokens_per_s"]), 2e3 / float(row["ms_per_step"]), rel_tol=0.01)


def test_repetitions_take_turns_and_a_failure_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def entrant(name: str, fails_at: int | None = None) -> Callable[[], float]:
        def measure() -> float:
            calls.append(name)
            if calls.count(name) == fails_at:
                raise RuntimeError("out of order")
            return float(len(calls))

        return measure

    monkeypatch.setattr(generation, "ours", lambda case, model, compiled: entrant("ours"))
    monkeypatch.setattr(generation, "hugging_face", lambda case, device, static: entrant("theirs", fails_at=3))
    (case,) = generation.cases("tiny")
    found = generation._raced(case, generation.build(case.config, CPU), CPU, 3)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours", "ours"]  # the first of each is a rehearsal
    assert found["longspan"].samples == [3.0, 6.0, 7.0]
    assert found["transformers dynamic cache"].status == "failed: RuntimeError: out of order"
    assert found["transformers dynamic cache"].samples == []


def test_only_the_peers_that_are_asked_for_race(tmp_path: Path) -> None:
    assert generation.run("tiny", CPU, tmp_path, command="test", repetitions=2, peers=())
    rows = list(csv.DictReader((tmp_path / "generation.csv").read_text().splitlines()))
    assert [row["contender"] for row in rows] == ["longspan", "longspan compiled"]


def test_a_peer_that_a_cpu_leaves_out_has_a_row_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["bench", "suite=generation", "device=cpu", "peers=[transformers-static]", "repetitions=2"]
    assert main([*typed, f"output={tmp_path}"]) == 0
    rows = {row["contender"]: row for row in csv.DictReader((tmp_path / "generation.csv").read_text().splitlines())}
    assert list(rows) == ["longspan", "longspan compiled", "transformers static cache"]
    assert rows["transformers static cache"]["status"] == (
        "skipped: is compiled, which a smoke test on a CPU does not wait for"
    )
    assert "contender=transformers static cache  status=skipped: is compiled" in capsys.readouterr().out


def test_repetitions_are_what_help_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = next(key.meaning for key in keys(BenchConfig) if key.path == "repetitions")
    assert f"null: {plan.REPETITIONS}, suite=generation {generation.REPETITIONS}" in said
    found: list[int] = []

    def run(
        shapes: str, device: torch.device, output: Path, *, command: str, only: str | None, repetitions: int,
        peers: tuple[str, ...] = (),
    ) -> bool:  # fmt: skip
        found.append(repetitions)
        return True

    for suite in (decode, generation):
        monkeypatch.setattr(suite, "run", run)
    for suite in ("decode", "generation"):
        for typed in ([], ["repetitions=50"]):
            assert main(["bench", f"suite={suite}", "device=cpu", *typed]) == 0
    assert found == [plan.REPETITIONS, 50, generation.REPETITIONS, 50]


@pytest.mark.parametrize(
    ("suite", "unread"), [("generation", ["backend", "time_limit"]), ("decode", ["peers"]), ("window", [])]
)
def test_a_dry_run_says_what_would_run(suite: str, unread: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    typed = [] if suite != "window" else ["backend=sdpa"]
    assert main(["bench", f"suite={suite}", "device=cpu", "dry_run=true", *typed]) == 0
    out = capsys.readouterr().out
    asked = yaml.safe_load(out)  # the cases are comments
    assert (asked["shapes"], asked["device"], asked["output"]) == ("tiny", "cpu", "bench")
    assert asked["repetitions"] == (generation.REPETITIONS if suite == "generation" else plan.REPETITIONS)
    assert not asked.keys() & set(unread)
    assert asked.get("peers") == {"decode": None, "generation": list(generation.PEERS), "window": list(PEERS)}[suite]
    assert "# " in out


@pytest.mark.parametrize("suite", ["decode", "generation"])
def test_results_that_are_there_have_the_columns_of_today(
    suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or the next run could not be appended."""
    monkeypatch.setattr(generation, "hugging_face", lambda case, device, static: lambda: 1.0)
    run = decode.run if suite == "decode" else generation.run
    run("tiny", CPU, tmp_path, command="test", repetitions=1 if suite == "generation" else 2)
    fresh = (tmp_path / f"{suite}.csv").read_text().splitlines()[0]
    assert fresh == (RESULTS / f"{suite}.csv").read_text().splitlines()[0]
