"""Our backends through the conformance suite, and the suite's own promises: claims, reports, replay."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from longspan.kernels.attention import (
    AttentionBackend,
    AttentionCall,
    AttentionSpec,
    BlockLayout,
    Capabilities,
    Feature,
    Reason,
    Window,
    available,
)
from longspan.kernels.attention.backend import check
from longspan.kernels.attention.reference import Reference
from longspan.kernels.conformance import suite
from longspan.kernels.conformance.plan import OF_A_CASE, by_construction, limits
from longspan.kernels.testing import Case, ConformanceError, conformance, judge, replay

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
SOME_OF_TRITON = "causal,window,global_tokens,documents,learned_sink,gqa,cross_length,kv_lengths"
EXAMPLES = {"reference": 25, "sdpa": 25, "flex": 10}


@pytest.mark.parametrize("name", EXAMPLES)
def test_ours_conform(name: str) -> None:
    report = conformance(name, examples=EXAMPLES[name], max_length=65)
    report.raise_if_failed()
    claimed = available()[name].features - {Feature.LSE, Feature.BACKWARD}
    assert claimed <= {feature for _, feature in report.tallies}, "a claimed feature was not exercised"
    assert {"forward", "determinism", "unseen keys", "causality", "score shift"} <= {c for c, _ in report.tallies}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_triton_conforms_when_interpreted(thorough: bool) -> None:
    """In a process of its own: Triton reads the switch when a kernel's module is imported."""
    arguments = ["max_length=33", "examples=0"]
    if not thorough:  # about a second for each run: some features alone, then everything at once
        arguments = ["max_length=17", "examples=0", "thorough=false", "dtypes=[fp32]", f"features=[{SOME_OF_TRITON}]"]
    done = subprocess.run(
        [sys.executable, "-m", "longspan.scripts.cli", "conformance", "backend=triton", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default:::torch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sdpa", "flex", "triton"])
def test_ours_conform_on_cuda(name: str, dtype: torch.dtype) -> None:
    # flex compiles for each kind of call and length: seconds each.
    thorough = name != "flex"
    examples = 50 if thorough else 3
    report = conformance(
        name, device="cuda", dtypes=[dtype], examples=examples, max_length=513 if thorough else 129, thorough=thorough
    )
    report.raise_if_failed()


# -- claims ------------------------------------------------------------------------------------------------------------


class Claiming(Reference):
    """The reference with other capabilities or another answer."""

    name = "claiming"

    def __init__(self, features: frozenset[Feature], *, accepts: frozenset[Feature] | None = None) -> None:
        self.capabilities = dataclasses.replace(Reference.capabilities, features=features, dtypes={"cpu": (FP32,)})
        self.accepts = features if accepts is None else accepts

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        return check(dataclasses.replace(self.capabilities, features=self.accepts), spec, call)


FP32 = torch.float32
SOME = frozenset({Feature.CAUSAL, Feature.WINDOW})


def claims(backend: AttentionBackend) -> str:
    report = conformance(backend, examples=0, max_length=17)
    assert not report.ok
    return "\n".join(report.claims)


def test_what_is_not_claimed_must_be_refused() -> None:
    assert conformance(Claiming(SOME), examples=0, max_length=17).ok
    said = claims(Claiming(SOME, accepts=SOME | {Feature.DROPOUT}))
    assert said.startswith("does not claim dropout, but does not refuse it: AttentionSpec(causal=False")


def test_what_is_claimed_must_run() -> None:
    said = claims(Claiming(SOME | {Feature.ALIBI}, accepts=SOME))
    assert said == "claims alibi, but refuses it on cpu, which no note says: alibi=True (not implemented)".replace(
        "=True", ""
    )


def test_a_refusal_names_what_it_refuses() -> None:
    class Vague(Claiming):
        def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
            return (Reason("sorry"),) if super().unsupported(spec, call) else ()

    assert "does not claim softcap, and refuses it without naming it: sorry" in claims(Vague(SOME))


def test_an_answer_that_raises_is_a_finding() -> None:
    class Raising(Claiming):
        def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
            if spec.softcap is not None:
                raise KeyError("softcap")
            return super().unsupported(spec, call)

    assert "unsupported() raised KeyError: 'softcap'" in claims(Raising(SOME))


def test_dtypes_head_dims_and_devices_are_claims_too() -> None:
    class Anything(Claiming):
        def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
            easy = dataclasses.replace(call, dtype=FP32, device="cpu", head_dim=16, value_dim=None)
            return super().unsupported(spec, easy)

    backend = Anything(SOME)
    backend.capabilities = dataclasses.replace(backend.capabilities, max_head_dim=64, head_dim_multiple=8)
    said = claims(backend)
    for word in ("float16", "bfloat16", "float64", "head_dim", "device"):
        assert f"does not claim {word}, but does not refuse it" in said


def test_a_backend_that_runs_nowhere_here_says_why() -> None:
    class Elsewhere(Claiming):
        def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
            return (Reason("device=cpu", "set SOME_SWITCH=1"),)

    assert "refuses plain attention in it: device=cpu (set SOME_SWITCH=1)" in claims(Elsewhere(SOME))
    absent = Claiming(SOME)
    absent.capabilities = Capabilities(features=frozenset(), dtypes={})
    assert "nothing to check on cpu: it runs on no device" in claims(absent)


# -- cases and reports -------------------------------------------------------------------------------------------------


def test_every_feature_and_every_pair_has_a_case() -> None:
    everything = limits(Reference.capabilities, frozenset(Feature), (FP32,), 129, (16, 32))
    cases = [*suite.basics(everything, 0), *by_construction(everything, 0)]
    sets = {case.features & OF_A_CASE for case in cases}
    for first in OF_A_CASE:
        for second in OF_A_CASE:
            assert {first, second} in sets, f"{first} with {second}"
    shapes = {(case.n_queries, case.n_keys) for case in cases}
    assert {(1, 1), (1, 129), (129, 1), (17, 33), (33, 17)} <= shapes
    for tile in (16, 32, 64, 128):
        assert {tile - 1, tile, tile + 1} <= {n_keys for _, n_keys in shapes}


def test_a_case_reads_as_the_python_that_makes_it() -> None:
    spec = AttentionSpec(
        causal=True, window=Window(3, None, 2), block_sparse=BlockLayout.from_rows([[1, 0]], q_block=8, kv_block=4)
    )
    case = Case(spec=spec, n_queries=3, n_keys=8, dtype=torch.float16, positions="ring", seed=7)
    names = {"Case": Case, "AttentionSpec": AttentionSpec, "Window": Window, "BlockLayout": BlockLayout, "torch": torch}
    assert eval(repr(case), names) == case
    assert repr(Case(spec=AttentionSpec(causal=False), n_queries=1, n_keys=2)) == (
        "Case(spec=AttentionSpec(causal=False), n_queries=1, n_keys=2)"
    )
    with pytest.raises(ValueError, match="positions='rnig': one of none, offset"):
        Case(spec=spec, n_queries=1, n_keys=1, positions="rnig")  # pyright: ignore[reportArgumentType]  # a user's typo


class OneTooWide(Reference):
    name = "one too wide"

    def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):
        if spec.window.left is not None:
            spec = dataclasses.replace(spec, window=dataclasses.replace(spec.window, left=spec.window.left + 1))
        return super().__call__(q, k, v, spec=spec, context=context, params=params, return_lse=return_lse)


def test_the_smallest_failure_can_be_replayed() -> None:
    report = conformance(OneTooWide(), dtypes=[FP32], features=[Feature.WINDOW], examples=10, max_length=20)
    with pytest.raises(ConformanceError) as caught:
        report.raise_if_failed()
    text = str(caught.value)
    assert text.startswith("one too wide on cpu (float32): DOES NOT CONFORM.")
    row = next(line for line in text.splitlines() if line.startswith("window"))
    assert re.search(r"FAIL \d+/\d+", row)
    for check_name in ("forward", "lse", "dq", "dk", "dv"):
        smallest = report.failures[check_name].case
        assert smallest.features & OF_A_CASE == {Feature.WINDOW}
        assert f"replay('one too wide', {smallest!r})" in text
        assert check_name in replay(OneTooWide(), smallest).failures
        assert replay("reference", smallest).ok


def test_hypothesis_shrinks_what_it_finds() -> None:
    class NoShortOnes(Reference):
        name = "no short ones"

        def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):
            if 4 <= q.shape[1] <= 12:
                raise RuntimeError("short")
            return super().__call__(q, k, v, spec=spec, context=context, params=params, return_lse=return_lse)

    report = conformance(
        NoShortOnes(), dtypes=[FP32], features=[Feature.CAUSAL], examples=60, max_length=14, thorough=False
    )
    assert report.failures["call"].problem == "raised RuntimeError: short"
    case = report.failures["call"].case
    assert (case.n_queries, case.batch, case.kv_heads, case.memory) == (4, 1, 1, "contiguous")
    assert not case.spec.causal


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (conformance("sdpa", dtypes=[FP32], examples=5, max_length=17, thorough=False) for _ in range(2))
    assert {key: dataclasses.astuple(tally) for key, tally in first.tallies.items()} == {
        key: dataclasses.astuple(tally) for key, tally in second.tallies.items()
    }


def test_without_hypothesis_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'longspan\[conformance\]'"):
        conformance("sdpa")
    assert conformance("sdpa", examples=0, dtypes=[FP32], features=[], max_length=3).ok


def test_wrong_requests() -> None:
    with pytest.raises(ValueError, match="unknown attention backend 'nope'"):
        conformance("nope")
    with pytest.raises(ValueError, match="does not claim bfloat16 on cpu; it has float32, float64"):
        conformance("flex", dtypes=[torch.bfloat16])


# -- the measure -------------------------------------------------------------------------------------------------------


def test_the_budget_is_twice_the_twins_error_and_two_roundings() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    twin = (exact + torch.tensor([0.0, 0.01])).float()
    eps = torch.finfo(FP32).eps
    assert judge((exact + 0.0199).float(), exact, twin).problem == ""
    assert "error 0.021" in judge((exact + 0.021).float(), exact, twin).problem
    assert judge((exact + 3 * eps).float(), exact, exact.float()).ratio == pytest.approx(3 / 4, rel=0.5)
    assert "1 values are not finite, the first at [1]" in judge(torch.tensor([1.0, torch.nan]), exact, twin).problem
    assert "no budget" in judge(exact.float(), exact, twin * torch.inf).problem


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_conforms() -> None:
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    names: dict[str, type[AttentionBackend]] = {}
    exec(example[1], names)  # our own page
    report = conformance(names["MyBackend"](), examples=10, max_length=65)
    report.raise_if_failed()
    assert {feature for _, feature in report.tallies} == {"(plain)", "causal", "window", "gqa", "cross_length"}


def test_the_page_names_every_check() -> None:
    text = PAGE.read_text()
    found = {check_name for check_name, _ in replay("reference", Case(spec=EVERYTHING, n_queries=9, n_keys=9)).tallies}
    assert {"forward", "lse", "dslopes", "dsinks", "causality"} <= found
    assert all(f"`{name}`" in text for name in found)


EVERYTHING = AttentionSpec(causal=True, alibi=True, learned_sink=True, window=Window(left=3))
