"""The README and the recipes: links resolve, commands are accepted by the schema, code does what stands beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longspan.scripts.cli import VERBS
from longspan.scripts.compose import compose
from longspan.training import schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for block in re.findall(r"```(?:bash|console|)\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                command = line.removeprefix("$ ").strip()
                is_output = re.match(r"longspan \w+: ", command)
                if command.startswith("longspan ") and not is_output and "stps" not in command and "--" not in command:
                    found.append((page.name, command))
    return found


COMMANDS = _commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_commands_are_accepted(page: str, command: str) -> None:
    _, verb, *arguments = shlex.split(command.partition(" #")[0])
    facts = VERBS[verb]
    composed = compose(verb, arguments, schema=getattr(schema, facts.request))
    getattr(schema, facts.validate)(composed.raw, where=composed.where)


def test_the_python_of_the_readme_runs_and_refuses_as_printed() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    refusal = re.search(r">>> (.*)\n([\w.]+): (.*)\n", README)
    assert code is not None
    assert refusal is not None
    names: dict[str, object] = {}
    exec(code[1], names)  # our own page
    assert names["out"].shape == (1, 6, 2, 8)
    with pytest.raises(NotImplementedError) as caught:
        eval(refusal[1], names)
    assert f"{type(caught.value).__module__}.{type(caught.value).__qualname__}" == refusal[2]
    assert str(caught.value) == refusal[3]
