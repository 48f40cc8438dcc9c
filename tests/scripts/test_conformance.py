"""`longspan conformance`: exit codes, a user's own class from the working directory, one line for a wrong request."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from longspan.scripts import verb_conformance
from longspan.scripts.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
QUICK = ("examples=2", "max_length=17", "dtypes=[fp32]", "features=[causal,window]")


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory with the page's backend, and a broken heir."""
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    code = example[1] + (
        "\n\nclass TopLeft(MyBackend):\n"
        "    def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):\n"
        "        given = dict(spec=spec, context=context, params=params, return_lse=return_lse)\n"
        "        return super().__call__(q.flip(1), k, v, **given)\n"
        "\n\nnot_one = 3\n"
    )
    (tmp_path / "own_kernels.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_kernels", raising=False)
    return "own_kernels"


def test_a_users_class(own_module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", f"backend={own_module}:MyBackend", *QUICK]) == 0
    assert capsys.readouterr().out.startswith("mine on cpu (float32): conforms.")
    assert main(["conformance", f"backend={own_module}:TopLeft", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("mine on cpu (float32): DOES NOT CONFORM.")
    assert "replay('mine', Case(spec=" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("backend=spda", "registered are decode, flex, hopper, reference, sdpa"),
        ("backend=own_kernels.MyBackend", "a class of your own is package.module:Class"),
        ("backend=no_such_module:X", "importing no_such_module failed: ModuleNotFoundError"),
        ("backend=own_kernels:Nope", "own_kernels has no 'Nope'"),
        ("backend=own_kernels:not_one", "no attention backend, because it has no name, capabilities, unsupported"),
        ("backend=sdpa features=[windw]", "no feature is called windw; there are alibi, backward"),
        ("backend=sdpa features=[softcap]", "features: sdpa does not claim softcap; it claims alibi"),
        ("backend=sdpa dtypes=[fp8]", "dtypes=fp8: expected a list, each item one of fp32, bf16, fp16, fp64, or null"),
        ("backend=sdpa features=[]", "features=[]: nothing would be checked"),
        ("backend=triton", "backend=triton device=cpu: device=cpu (only interpreted: set TRITON_INTERPRET=1"),
        ("backend=flex dtypes=[bf16]", "does not claim bfloat16 on cpu; it has float32, float64"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: str, line: str, own_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("longspan conformance: ")
    assert err.count("\n") == 1
    assert line in err


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verb_conformance, "find_spec", lambda name: None)
    assert main(["conformance", "backend=sdpa"]) == 2
    assert "pip install 'longspan[conformance]', or examples=0" in capsys.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "backend=sdpa", "examples=7", "dry_run=true"]) == 0
    assert "examples: 7" in capsys.readouterr().out
