"""Composition: groups, experiments, a user's own directory, what was typed, and where each key came from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from longspan.scripts.compose import CONFIGS, compose, group_options
from longspan.training.config_errors import COMMAND_LINE, ConfigError
from longspan.training.schema import GenerateConfig, RunRequest, validate


def test_what_is_typed_wins_over_experiments_over_groups() -> None:
    composed = compose("train", ["experiment=gpt2_small"], schema=RunRequest)
    assert composed.raw["model"]["name"] == "gpt2-small"  # the experiment chose the group's option
    assert composed.raw["optimizer"]["lr"] == 6e-4
    assert composed.raw["optimizer"]["weight_decay"] == 0.1
    assert composed.where["optimizer.lr"] == "in configs/experiment/gpt2_small.yaml"
    assert composed.where["optimizer.weight_decay"] == "in configs/optimizer/adamw.yaml"

    composed = compose("train", ["experiment=gpt2_small", "optimizer.lr=1", "model=llama-20m"], schema=RunRequest)
    assert composed.raw["optimizer"]["lr"] == 1
    assert composed.raw["model"]["name"] == "llama-20m"
    assert composed.where["optimizer.lr"] == COMMAND_LINE

    composed = compose("train", ["experiment=quickstart", "debug=fast"], schema=RunRequest)
    assert composed.raw["trainer"]["steps"] == 2
    assert composed.raw["name"] == "quickstart"


def test_the_last_choice_of_a_group_counts_and_null_is_none() -> None:
    composed = compose("train", ["experiment=gpt2_small", "experiment=null", "debug=null"], schema=RunRequest)
    assert composed.raw["model"]["name"] == "quickstart"
    composed = compose("train", ["logger=csv", "logger=wandb"], schema=RunRequest)
    assert composed.raw["logger"]["wandb"] == "online"
    composed = compose("train", ["logger=null"], schema=RunRequest)
    assert "logger" not in composed.raw


def test_an_attention_pattern_changes_in_yaml_and_nothing_else() -> None:
    full = validate(compose("train", ["attention=full"], schema=RunRequest).raw)
    local = validate(compose("train", ["attention=local"], schema=RunRequest).raw)
    assert full.model.attention != local.model.attention
    assert full.model.attention.specs()["full"][0].window.unlimited
    assert local.model.attention.specs()["local"][0].window.left == 255
    narrow = compose("train", ["attention=local", "attention.patterns.local.window.left=7"], schema=RunRequest)
    assert validate(narrow.raw).model.attention.specs()["local"][0].window.left == 7


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("prompt=def f(a, b): return {a: [b]}", "def f(a, b): return {a: [b]}"),
        ("prompt=", ""),
        ("prompt= x ", " x "),
        ("prompt='x'", "'x'"),  # quotes may be what it is about
        ("prompt=null", None),
        ("prompt=${seed} $(x) \\n", "${seed} $(x) \\n"),
        ("prompt=1e-3", "1e-3"),
        ("prompt=true", "true"),
        ("prompt=a=b,c", "a=b,c"),
        ("checkpoint=/a b/c=d,e", "/a b/c=d,e"),
        ("checkpoint=2024", "2024"),
        ("checkpoint=runs/${seed}", "runs/3"),
    ],
)
def test_text_is_taken_as_it_was_typed(typed: str, read: object) -> None:
    composed = compose("generate", ["seed=3", typed], schema=GenerateConfig)
    assert composed.raw[typed.partition("=")[0]] == read


def test_other_values_are_read_as_yaml() -> None:
    arguments = [
        "trainer.steps=1e3",
        "logger.tags=[a,'b c']",
        "data.sources=[{kind: files, path: x}]",
        "trainer.clip=null",
    ]
    raw = compose("train", [*arguments, "data.sources[0].limit=5", "~data.tokenizer.kind"], schema=RunRequest).raw
    assert raw["trainer"]["steps"] == 1000
    assert raw["trainer"]["clip"] is None
    assert raw["logger"]["tags"] == ["a", "b c"]
    assert raw["data"]["sources"] == [{"kind": "files", "path": "x", "limit": 5}]
    assert "kind" not in raw["data"]["tokenizer"]


def test_a_directory_of_ones_own_adds_options(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment/mine.yaml"
    mine.write_text("# @package _global_\ndefaults:\n  - override /model: llama-20m\ntrainer:\n  stps: 3\n")
    composed = compose("train", ["experiment=mine"], schema=RunRequest, config_dir=tmp_path)
    assert composed.raw["model"]["name"] == "llama-20m"
    with pytest.raises(ConfigError) as caught:
        validate(composed.raw, where=composed.where)
    assert caught.value.problems == (f"trainer.stps=3: unknown key; did you mean trainer.steps? (set in {mine})",)


@pytest.mark.parametrize(
    "content",
    ["a: [", "- 1\n- 2\n", "# @package _global_\ndefaults:\n  - override /model: no\n", "x: ${nope}\n", "x: ???\n"],
)  # fmt: skip
def test_broken_yaml_costs_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(content)

    def run() -> None:
        composed = compose("train", ["experiment=mine"], schema=RunRequest, config_dir=tmp_path)
        validate(composed.raw, where=composed.where)

    with pytest.raises(ConfigError) as caught:
        run()
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_composing_changes_nothing_around_it(tmp_path: Path) -> None:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    compose("train", ["experiment=tiny"], schema=RunRequest)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    assert list(Path.cwd().iterdir()) == []  # no outputs/, no .hydra


def test_groups_are_the_folders() -> None:
    options = group_options("train")
    assert set(options) == {path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert group_options("generate") == {}
    assert set(group_options("attention")) == {"model", "attention"}
    assert group_options("prepare") == options


def test_a_list_takes_the_place_of_a_section_and_a_section_of_a_list() -> None:
    listed = compose("train", ["experiment=longformer_bytes", "stages=[{steps: 3}, {steps: 2}]"], schema=RunRequest)
    assert listed.raw["stages"] == [{"steps": 3}, {"steps": 2}]
    series = compose("train", ["stages=[{steps: 3}]", "stages={steps: [3, 2]}"], schema=RunRequest)
    assert series.raw["stages"] == {"steps": [3, 2]}
    changed = compose("train", ["experiment=longformer_bytes", "stages.lr_ratio=1"], schema=RunRequest)
    assert changed.raw["stages"]["lr_ratio"] == 1
    assert changed.raw["stages"]["steps"] == [240, 80, 40]
    merged = compose("train", ["experiment=longformer_bytes", "stages={lr_ratio: 1}"], schema=RunRequest)
    assert merged.raw["stages"] == changed.raw["stages"]
    assert compose("train", ["experiment=longformer_bytes", "stages=null"], schema=RunRequest).raw["stages"] is None
