"""docs/generation.md: its Python runs, and its settings and fields are those there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from longspan.data.tokenizer import byte_level
from longspan.model.checkpoint import save_model
from longspan.model.requests import TextRequest, read_requests
from longspan.model.sampling import Sampling
from longspan.model.zoo import build

PAGE = (Path(__file__).resolve().parents[2] / "docs/generation.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(build("gpt-tiny", {"vocab_size": 257, "init_std": 0.2}, seed=0), "runs/library", byte_level())
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})  # our own page
    shown = capsys.readouterr().out.splitlines()
    (printed,) = re.findall(r"```python\n.*?```\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert len(shown) == len(printed.splitlines()) == 7
    assert [line.split()[0] for line in shown[2:]] == [line.split()[0] for line in printed.splitlines()[2:]]


def test_settings_are_named_as_they_are() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", PAGE.partition("## How tokens")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 9
    assert named <= {field.name for field in fields(Sampling)}


def test_the_requests_that_are_shown_are_understood() -> None:
    (listing,) = re.findall(r"\$ cat questions.jsonl\n(.*?)\n\$ ", PAGE, re.DOTALL)
    found = list(read_requests(listing.encode().splitlines(), Sampling(max_new_tokens=9)))
    assert [isinstance(each, TextRequest) for each in found].count(False) == 1  # the one that is answered by an error
