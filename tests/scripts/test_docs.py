"""docs/configuration.md: its key tables are the schema's, its commands and YAML are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longspan.scripts.cli import VERBS
from longspan.scripts.compose import compose, group_options
from longspan.scripts.help import REFERENCE_BEGINS, reference
from longspan.training import schema

PAGE = (Path(__file__).resolve().parents[2] / "docs/configuration.md").read_text(encoding="utf-8")
PROSE = PAGE.partition(REFERENCE_BEGINS)[0]


def test_the_tables_are_the_schema() -> None:
    tables = reference({verb: getattr(schema, facts.request) for verb, facts in VERBS.items()})
    assert PROSE + tables == PAGE, "run: python -m longspan.scripts.help docs/configuration.md"


def test_every_group_and_option_is_named() -> None:
    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \| (.*?) \|", PROSE, re.MULTILINE)}
    for group, options in group_options("train").items():
        named = set(re.findall(r"`([\w.-]+)`", rows[group]))
        if group == "model":  # ranges are written as first … last
            assert named <= set(options)
        else:
            assert named == set(options)


YAML = dict(
    re.findall(r"```yaml\n# (?:configs of your own: )?(attention/mine|data/mine)\.yaml\n(.*?)```", PROSE, re.DOTALL)
)
YAML["experiment/mine"] = next(
    block for block in re.findall(r"```yaml\n(.*?)```", PROSE, re.DOTALL) if "_global_" in block
)


@pytest.mark.parametrize("name", ["attention/mine", "data/mine", "experiment/mine"])
def test_the_recipes_are_sound(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(YAML[name])
    group, _, option = name.partition("/")
    arguments = [f"{group}={option}", "model.vocab_size=20000"]
    composed = compose("train", arguments, schema=schema.RunRequest, config_dir=tmp_path)
    schema.validate(composed.raw, where=composed.where)


def test_the_error_that_is_shown_is_the_error_that_comes() -> None:
    shown = re.search(r"\$ longspan train (.*)\n((?:.*\n)*?) *```", PROSE)
    assert shown is not None
    composed = compose("train", shlex.split(shown[1]), schema=schema.RunRequest)
    with pytest.raises(schema.ConfigError) as caught:
        schema.validate(composed.raw, where=composed.where)
    lines = " ".join(f"longspan train: {line}" for line in caught.value.problems)
    assert " ".join(shown[2].split()) == lines
