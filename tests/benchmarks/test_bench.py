"""`longspan bench` from the command line, on a CPU: what it writes, what it refuses, what it makes of failures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.benchmarks import attention, contenders
from longspan.benchmarks.entrants import Entrant, rows_of
from longspan.benchmarks.plan import Plan
from longspan.benchmarks.rows import Row
from longspan.benchmarks.shapes import FLASH, FLEX, Case, SuiteName, suite
from longspan.benchmarks.timing import HostClock, Memory, Samples, Step, interleaved
from longspan.kernels.attention import registry
from longspan.kernels.attention.reference import Reference
from longspan.scripts.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[dict[str, str]]]]:
    """Exit code, what was printed, rows of the CSV."""

    def run(name: str, *more: str) -> tuple[int, str, list[dict[str, str]]]:
        code = main(["bench", f"suite={name}", "device=cpu", "repetitions=2", *more])
        captured = capsys.readouterr()
        path = tmp_path / "bench" / f"{name}.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        return code, captured.out + captured.err, rows

    return run


@pytest.mark.parametrize(
    ("name", "backend"),
    [("attention", "sdpa"), ("window", "reference"), ("documents", "sdpa"), ("sparse", "sdpa"), ("dilation", "sdpa")],
)
def test_every_suite_runs(bench, name: SuiteName, backend: str, tmp_path: Path) -> None:
    code, out, rows = bench(name, f"backend={backend}")
    assert code == 0, out
    ours = [row for row in rows if row["contender"] == f"longspan-{backend}"]
    for case in suite(name, "tiny"):
        mine = [row for row in ours if row["case"] == case.name]
        assert [row["quantity"] for row in mine] == ["forward", "backward", "both"]
        for row in mine:
            assert row["status"] == "ok"
            assert row["smoke"] == "True"
            assert row["n"] == "2"
            assert 0 < float(row["p20"]) <= float(row["value"]) <= float(row["p80"])
            assert float(row["out_relative"]) < 1e-5
            assert float(row["dv_relative"]) < 1e-5
            assert row["command"].startswith(f"longspan bench suite={name} shapes=tiny backend={backend}")
            assert row["torch"] == torch.__version__
    assert {row["reason"] for row in rows if row["contender"] == "flex"} <= {
        "FlexAttention has a backward pass on CUDA only"
    }
    lines = (tmp_path / "bench" / f"{name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == [row["case"] for row in rows]
    assert (tmp_path / "bench" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "bench" / f"{name}.md").read_text()
    assert "Smoke run on a CPU" in page
    assert page in out


def test_rows_are_appended_and_peers_chosen(bench) -> None:
    first = bench("attention", "backend=sdpa", "peers=[]", "only=full")[2]
    both = bench("attention", "backend=sdpa", "peers=[sdpa-flash]", "only=full")[2]
    assert both[: len(first)] == first
    assert {row["contender"] for row in first} == {"longspan-sdpa"}
    assert {row["yardstick"] for row in both} == {"sdpa-flash"}
    peer = [row for row in both if row["contender"] == "sdpa-flash"]
    ours = [row for row in both[len(first) :] if row["contender"] == "longspan-sdpa"]
    for mine, theirs in zip(ours, peer, strict=True):
        assert float(theirs["ratio"]) == pytest.approx(float(theirs["value"]) / float(mine["value"]))


class Wrong(Reference):
    """Off by one: the window is one key too wide on the left."""

    name = "lab.wrong"

    def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):
        from dataclasses import replace

        if spec.window.left is not None:
            spec = replace(spec, window=replace(spec.window, left=spec.window.left + 1))
        return super().__call__(q, k, v, spec=spec, context=context, params=params, return_lse=return_lse)


class Broken(Reference):
    name = "lab.broken"

    def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):
        raise RuntimeError("CUDA error: an illegal\nmemory access")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Wrong, Broken):
        monkeypatch.setitem(registry._factories, kind.name, kind)
    yield
    for kind in (Wrong, Broken):
        registry._loaded.pop(kind.name, None)
    registry._chosen.clear()


@pytest.mark.usefixtures("lab")
def test_a_wrong_kernel_is_void_and_not_timed(bench) -> None:
    code, out, rows = bench("dilation", "backend=lab.wrong")
    assert code == 1
    ours = [row for row in rows if row["contender"] == "longspan-lab.wrong"]
    assert [row["status"] for row in ours] == ["void"] * len(suite("dilation", "tiny"))
    assert all(row["value"] == "" and "relative error" in row["reason"] for row in ours)
    assert float(ours[0]["out_relative"]) > 0.1
    assert "something of ours was void or failed" in out


@pytest.mark.usefixtures("lab")
def test_what_raises_becomes_a_row_and_the_suite_goes_on(bench) -> None:
    code, _, rows = bench("attention", "backend=lab.broken", "peers=[sdpa-flash]")
    assert code == 1
    ours = [row for row in rows if row["contender"] == "longspan-lab.broken"]
    assert [row["reason"] for row in ours] == ["RuntimeError: CUDA error: an illegal memory access"] * 2
    assert {row["case"] for row in rows if row["contender"] == "sdpa-flash" and row["value"]} == {
        case.name for case in suite("attention", "tiny")
    }


def test_what_a_backend_refuses_is_skipped_with_its_reasons(bench) -> None:
    code, out, rows = bench("attention", "backend=flex", "peers=[]")
    assert code == 1
    assert "backend=flex measured nothing here" in out
    assert {row["status"] for row in rows} == {"skipped"}
    assert "backward on cpu" in rows[0]["reason"]


def test_a_time_limit_leaves_the_rest_out(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100000, 10))  # each look at the clock takes ten seconds
    monkeypatch.setattr(attention.time, "monotonic", lambda: next(clock))
    code, out, rows = bench("window", "backend=reference", "peers=[]", "time_limit=25")
    assert code == 0
    names = [case.name for case in suite("window", "tiny")]
    assert list(dict.fromkeys(row["case"] for row in rows)) == names[:1]
    assert "time_limit=25" in out
    assert all(f"- {name}" in out for name in names[1:])


def test_an_unusable_case_is_a_failure_of_that_case(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "make_inputs", no_room)
    code, _, rows = bench("attention", "backend=sdpa", "peers=[]")
    assert code == 1
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert rows[0]["reason"] == "the case failed: OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["suite=attention", "shapes=quick", "device=cpu"], "shapes=quick: these sizes need a GPU"),
        (["suite=attention", "device=cpu", "backend=sdpa", "only=nothing"], "only=nothing: in the name of no case"),
        (["suite=attention", "device=cpu", "backend=lab.none"], "backend=lab.none: registered are"),
        (["suite=attention", "peers=[flexx]"], "flex"),
        (["suite=attentio"], "attention"),
        ([], "suite"),
    ],
)
def test_wrong_requests_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert complaint in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite=attention", "device=cuda", "backend=sdpa"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_a_dry_run_lists_the_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "suite=window", "device=cpu", "backend=sdpa", "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert all(case.name in out for case in suite("window", "tiny"))
    assert not list(tmp_path.iterdir())


# -- rows, targets, order ----------------------------------------------------------------------------------------------


def entrant(name: str, forward: float, backward: float, mib: int) -> Entrant:
    return Entrant(name, samples=Samples([forward] * 3, [backward] * 3), memory=Memory(mib * 2**20, (mib - 1) * 2**20))


def rows(case: Case, *entrants: Entrant, earlier: list[Row] | None = None) -> dict[tuple[str, str], Row]:
    plan = Plan(
        suite="window", cases=(case,), peers=(), backend="x", device=CPU, repetitions=3, output=Path(), command=""
    )
    return {(row.contender, row.quantity): row for row in rows_of(case, entrants, plan, None, earlier or [])}


def test_ratios_and_targets_of_peers() -> None:
    case = next(c for c in suite("window", "full") if c.name == "window 256+256 + 1 global h12 s16384 d64")
    found = rows(
        case,
        entrant("longspan-x", 1.0, 3.0, 100),
        entrant("flex", 2.0, 3.0, 90),
        entrant("longformer-hf", 40.0, 41.0, 999),
    )
    flex = found["flex", "both"]
    assert (flex.ratio, flex.figure, flex.target_met) == (1.25, 1.25, "no")
    assert flex.target == "window + global ≥ 1.5× FlexAttention's"
    assert found["flex", "forward"].target_met == "yes"
    assert found["longformer-hf", "both"].target_met == "yes"
    assert found["longformer-hf", "memory"].ratio == pytest.approx(9.99)
    assert found["longformer-hf", "memory"].target_met == "no"
    assert found["longformer-hf", "memory"].scratch_mib == 998
    assert found["longspan-x", "forward"].target == ""
    assert found["longspan-x", "forward"].tflops == pytest.approx(case.flops("forward") / 1e-3 / 1e12)


def test_targets_over_a_baseline_look_back() -> None:
    first, second, *_ = [case for case in suite("window", "full") if case.series]
    before = rows(first, entrant("longspan-x", 1.0, 3.0, 100))
    after = rows(second, entrant("longspan-x", 2.2, 6.0, 200), earlier=list(before.values()))
    assert after["longspan-x", "forward"].figure == pytest.approx(1.1)
    assert after["longspan-x", "forward"].target_met == "no"
    assert after["longspan-x", "backward"].target_met == "yes"
    assert after["longspan-x", "memory"].target_met == "yes"
    alone = rows(second, entrant("longspan-x", 2.2, 6.0, 200))
    assert (alone["longspan-x", "forward"].figure, alone["longspan-x", "forward"].target_met) == (None, "")


def test_repetitions_are_interleaved_and_each_contender_begins_in_turn() -> None:
    order: list[str] = []

    def step(name: str) -> Step:
        def forward() -> torch.Tensor:
            order.append(name)
            return torch.zeros(())

        def backward(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            order.append(name.upper())
            return (out,)

        return Step(forward, backward)

    samples = interleaved({"a": step("a"), "b": step("b")}, HostClock(), 3)
    assert "".join(order) == "aAbBbBaAaAbB"
    assert {name: len(each.both) for name, each in samples.items()} == {"a": 3, "b": 3}


def test_the_names_of_the_yardsticks_are_contenders() -> None:
    assert {FLASH, FLEX} <= set(contenders.contenders("sdpa"))
