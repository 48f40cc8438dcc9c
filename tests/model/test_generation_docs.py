"""docs/generation.md: what it shows is what its commands print; its settings and fields are those there are."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from longspan.data.tokenizer import byte_level
from longspan.model.checkpoint import save_model
from longspan.model.requests import TextRequest, read_requests
from longspan.model.sampling import Sampling
from longspan.model.zoo import build
from longspan.scripts.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/generation.md").read_text(encoding="utf-8")
((CODE, SHOWN),) = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL)
CONSOLE: list[tuple[str, str]] = [
    found
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for found in re.findall(r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", block, re.DOTALL | re.MULTILINE)
]


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(build("gpt-tiny", {"vocab_size": 257, "init_std": 0.2}, seed=0), "runs/library", byte_level())
    exec(CODE, {})  # our own page
    printed = capsys.readouterr().out.splitlines()
    assert list(map(_form, printed)) == list(map(_form, SHOWN.splitlines()))


def _form(line: str) -> str:
    """A line without what depends on the model's weights."""
    line = re.sub(r"'.*'|\".*\"", "TEXT", line)
    return re.sub(r"-?\d+\.\d+", "NUMBER", re.sub(r"length|stop_string|stop_token", "REASON", line))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_shown_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the examples is trained as the page says, then every command of it is run, in order."""
    monkeypatch.chdir(tmp_path)
    (training,) = re.findall(r"```bash\nlongspan (train .*?)```", PAGE, re.DOTALL)
    assert main([*shlex.split(training.replace("\\\n", " ")), "callbacks=quiet"]) == 0
    capsys.readouterr()
    mended = False
    for command, shown in CONSOLE:
        words = shlex.split(command)
        if words[0] == "cat" and words[1] == "questions.jsonl":
            Path("questions.jsonl").write_text(shown)
        elif words[0] == "jq":  # whose compact lines have no blanks, and ours have
            answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
            assert [{key: x for key, x in each.items() if key != "digest"} for each in answers] == [
                json.loads(line) for line in shown.splitlines()
            ]
            listing = Path("questions.jsonl").read_text()
            Path("questions.jsonl").write_text(listing.replace("temprature", "temperature"))
            mended = True
        else:
            main(words[1:])
            out, err = capsys.readouterr()
            assert out + err == shown, command
    assert mended
    exec(CODE, {})  # our own page
    assert capsys.readouterr().out == SHOWN


def test_settings_are_named_as_they_are() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ", PAGE.partition("## How tokens")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 9
    assert named <= {field.name for field in fields(Sampling)}


def test_the_requests_that_are_shown_are_understood() -> None:
    (listing,) = re.findall(r"\$ cat questions.jsonl\n(.*?)\n\$ ", PAGE, re.DOTALL)
    found = list(read_requests(listing.encode().splitlines(), Sampling(max_new_tokens=9)))
    assert [isinstance(each, TextRequest) for each in found].count(False) == 1  # the one that is answered by an error
