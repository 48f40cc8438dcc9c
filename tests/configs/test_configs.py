"""Every YAML composes, validates, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.model.zoo import CONFIGS as SIZES
from longspan.model.zoo import ENCODERS, SEQ2SEQS
from longspan.scripts.cli import VERBS, main
from longspan.scripts.compose import CONFIGS, compose, group_options
from longspan.training import schema

OPTIONS = [(group, option) for group, options in group_options("train").items() for option in options]
FILES = sorted(CONFIGS.rglob("*.yaml"))
# What an option needs from the user before it makes a whole.
COMPLETED = {("data", "files"): ["data.path=x"], ("data", "hub"): ["data.path=hub:x"]}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_config(verb: str) -> None:
    needed = {
        "bench": ["suite=attention"],
        "conformance": ["backend=sdpa"],
        "evaluate": ["checkpoint=x"],
        "generate": ["checkpoint=x", "prompt=y"],
        "import": ["source=x", "output=y"],
        "export": ["checkpoint=x", "output=y"],
        "convert": ["checkpoint=x", "surgery=gqa", "kv_heads=2", "output=y"],
        "uptrain": ["checkpoint=x", "kv_heads=2", "output=y"],
    }.get(verb, [])
    composed = compose(verb, needed, schema=getattr(schema, VERBS[verb].request))
    getattr(schema, VERBS[verb].validate)(composed.raw, where=composed.where)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_validates(group: str, option: str) -> None:
    composed = compose("train", [f"{group}={option}", *COMPLETED.get((group, option), [])], schema=schema.RunRequest)
    if group == "model" and (SIZES[option].vocab_size < 8192):  # smaller than the default tokenizer
        composed.raw["data"]["tokenizer"] = {"kind": "bytes"}
    if group == "model" and option in ENCODERS:
        composed.raw["data"]["masking"] = {}
    if group == "model" and option in SEQ2SEQS:
        composed.raw["data"]["denoising"] = {}
    schema.validate(composed.raw, where=composed.where)


@pytest.mark.parametrize("experiment", group_options("train")["experiment"])
@pytest.mark.parametrize("debug", ["null", *group_options("train")["debug"]])
def test_every_experiment_runs_dry(experiment: str, debug: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"experiment={experiment}", f"debug={debug}", "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "# parameters" in out


@pytest.mark.parametrize("experiment", group_options("train")["experiment"])
def test_prepare_makes_what_train_will_read(experiment: str) -> None:
    train = compose("train", [f"experiment={experiment}"], schema=schema.RunRequest)
    prepare = compose("prepare", [f"experiment={experiment}"], schema=schema.PrepareConfig)
    run = schema.validate(train.raw).data
    alone = schema.validate_prepare(prepare.raw, where=prepare.where).data
    for name in ("name", "sources", "tokenizer", "cache", "validation_fraction", "prompt_field", "response_field"):
        assert getattr(alone, name) == getattr(run, name)


def test_every_named_size_is_an_option_and_every_option_a_named_size() -> None:
    assert set(group_options("train")["model"]) == set(SIZES)
    for option in SIZES:
        assert f"\nname: {option}\n" in (CONFIGS / f"model/{option}.yaml").read_text()


def test_the_parameter_counts_in_the_comments_are_true() -> None:
    from longspan.model.accounting import parameters

    published = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
    for name in (*published, *(name for name in (*ENCODERS, *SEQ2SEQS) if not name.endswith("-tiny"))):
        assert f"{parameters(SIZES[name]).total:,} parameters" in (CONFIGS / f"model/{name}.yaml").read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_file_begins_by_saying_what_it_is(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
    sentence = next(line for line in lines if line not in ("#", ""))
    assert sentence.startswith("# ")
    assert len(sentence) > 10


@pytest.mark.parametrize("experiment", group_options("train")["experiment"])
def test_an_experiment_states_command_hardware_time_and_result(experiment: str) -> None:
    text = (CONFIGS / f"experiment/{experiment}.yaml").read_text()
    assert f"longspan train experiment={experiment}" in text
    for word in ("Command", "Hardware", "Time", "Result"):
        assert f"\n# {word} " in text


def test_only_known_sections_and_no_targets() -> None:
    for file in FILES:
        assert "_target_" not in file.read_text(), f"{file}: things are chosen by name, never instantiated from a path"
