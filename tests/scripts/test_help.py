"""`--help` is the reference: every key of the schema, every option of every group."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from longspan.scripts.cli import VERBS, main
from longspan.scripts.compose import CONFIGS, group_options
from longspan.training import schema
from longspan.training.config_keys import Inherited, keys


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_is_listed_with_type_and_meaning(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for key in keys(getattr(schema, VERBS[verb].request)):
        if "<i>.spec." in key.path:
            continue
        value = (
            rf"  \({re.escape(key.default.source)}\)$" if isinstance(key.default, Inherited) else r"  \(required\)$|$"
        )
        assert re.search(rf"^  {re.escape(key.path)}(=|{value})", out, re.MULTILINE), key.path
        assert f"[{key.allowed}]" in words
        assert " ".join(key.meaning.split())[1:] in words
    for group, options in group_options(verb).items():
        assert re.search(rf"{group} +{re.escape(', '.join(options))}", words), group


def test_the_values_are_those_of_the_config_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    plain = capsys.readouterr().out
    assert "\n  trainer.steps=1000\n" in plain
    assert "\n  checkpoint=null\n" in plain
    assert "\n  data.context=1024\n" in plain
    assert main(["train", "experiment=gpt2_small", "--help"]) == 0
    out = capsys.readouterr().out
    steps = yaml.safe_load((CONFIGS / "experiment/gpt2_small.yaml").read_text())["trainer"]["steps"]
    assert steps != 1000
    assert f"\n  trainer.steps={steps}\n" in out
    assert main(["generate", "--help"]) == 0
    assert "\n  checkpoint  (required)\n" in capsys.readouterr().out


def test_uptrain_lists_what_it_takes_with_the_values_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["uptrain", "trainer.clip=0.5", "--help"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "  trainer.clip=0.5" in listed
    assert "  trainer.global_batch  (the recipe's)" in listed
    assert "  data.context  (the recipe's)" in listed
    assert "  data.tokenizer.kind  (the parent's; the recipe's where that brings none)" in listed
    assert "  schedule=constant" in listed  # uptrain's own
    refused = [path for path in schema.UptrainRequest.decided if any(line.startswith(f"  {path}") for line in listed)]
    assert not refused


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from longspan.scripts.cli import main; main(['train', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
