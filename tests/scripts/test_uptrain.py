"""`longspan uptrain` from its command line: what is refused, what a plan says, what exit codes mean."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.checkpoint import save_model
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.zoo import build
from longspan.scripts.cli import main
from longspan.training import uptrain as grids
from longspan.training.errors import RunFailed, Terminated
from longspan.training.metrics import MetricsFile, Row
from longspan.training.schema import validate_uptrain
from longspan.training.uptrain_recipe import settle_uptraining
from longspan.training.uptrain_view import GridView

Refused = Callable[..., list[str]]
SMALL = {"vocab_size": 260, "n_layers": 1, "d_model": 32, "n_heads": 4, "d_ff": 48, "max_positions": 64}
HERE = ("uptrain", "checkpoint=gpt", "output=grid")


@pytest.fixture(autouse=True)
def gpt() -> None:
    save_model(build("gpt-tiny", SMALL), "gpt")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["kv_heads=[2,x]"], "kv_heads=x: expected a non-empty list of whole numbers (set on the command line)"),
        (["kv_heads=[]"], "kv_heads=[]: expected a non-empty list of whole numbers (set on the command line)"),
        (["kv_heads=[2,0]"], "kv_heads=0: expected a whole number, at least 1 (set on the command line)"),
        (["kv_heads=2", "alpha=-0.05"], "alpha=-0.05: expected a share of the parent's steps, from 0 to 1 (set on"),
        (["kv_heads=2", "alpha=[0,nonsense]"], "alpha=nonsense: expected a non-empty list of numbers"),
        (["kv_heads=2", "init=[mean,median]"], "init=median: expected a non-empty list, each item one of mean, first,"),
        (["kv_heads=2", "seeds=[0,-1]"], "seeds=-1: expected a whole number, at least 0"),
        (["kv_heads=2", "fo=t5"], "fo=t5: unknown key"),
        (["kv_heads=2", "trainer.steps=9"], "trainer.steps=9: leave it out; alpha says how many steps there are"),
        (["kv_heads=2", "trainer.keep=3"], "trainer.keep=3: leave it out; a cell keeps its last checkpoint alone"),
        (["kv_heads=2", "trainer.label_smoothing=0.1"], "trainer.label_smoothing=0.1: leave it out; it is for enc"),
        (["kv_heads=2", "data.masking={probability: 0.3}"], 'data.masking={"probability": 0.3}: leave it out; cells'),
        (["kv_heads=2", "data.denoising.mean_span=x"], 'data.denoising={"mean_span": "x"}: leave it out; cells read'),
        (["kv_heads=2", "data.examples.path=x"], 'data.examples={"path": "x"}: leave it out; cells read plain text'),
        ([], "kv_heads: is required: key/value heads that are left"),
        (["kv_heads=2"], "parent_steps and recipe: are required, because gpt lies in no run"),
        (["kv_heads=2", "recipe=tiny"], "parent_steps: is required"),
        (["kv_heads=2", "parent_steps=100"], "recipe: is required"),
        (["kv_heads=2", "parent_steps=100", "recipe=abd"], "recipe=abd: is neither a run directory nor an experiment"),
        (["kv_heads=2", "parent_steps=100", "recipe=gpt"], "recipe=gpt: is a directory without a config.yaml"),
        (["kv_heads=3", "parent_steps=100", "recipe=tiny"], "kv_heads=3: the parent's 4 key/value heads are shared"),
        (["kv_heads=4", "parent_steps=100", "recipe=tiny"], "kv_heads=[4]: 4 is what the parent has"),
        (["kv_heads=2", "alpha=0.001", "parent_steps=100", "recipe=tiny"], "alpha=0.001: is less than one"),
        (["kv_heads=2", "data.path=nowhere"], "data.path=nowhere: does not exist"),
    ],
)  # fmt: skip
def test_one_line_a_mistake(arguments: list[str], line: str, refused: Refused) -> None:
    (found, *more) = refused(*HERE, *arguments)
    assert found.startswith(line), found
    assert not more


def test_only_numbers_of_heads_that_would_be_taken_are_offered(refused: Refused) -> None:
    arguments = ("output=grid", "parent_steps=100", "recipe=tiny")
    save_model(build("gpt-tiny", {**SMALL, "n_kv_heads": 1}), "one")
    assert refused("uptrain", "checkpoint=one", "kv_heads=2", *arguments) == [
        "kv_heads=2: the parent has one key/value head, and heads can only be made fewer"
    ]
    # One key/value head for all would be split between the two groups of query heads.
    spec = AttentionSpec(causal=True)
    dilated = AttentionSpec(causal=True, window=Window(left=4, dilation=2))
    heads = (HeadGroup(spec=spec, heads=2), HeadGroup(spec=dilated, heads=2))
    mixed = {**SMALL, "attention": AttentionPlan(patterns={"mixed": heads}, layers=("mixed",))}
    save_model(build("gpt-tiny", mixed), "mixed")
    assert refused("uptrain", "checkpoint=mixed", "kv_heads=3", *arguments) == [
        "kv_heads=3: the parent's 4 key/value heads are shared out evenly; choose one of 2"
    ]


def test_only_decoders_and_encoders(refused: Refused) -> None:
    save_model(build("bart-tiny"), "bart")
    (line,) = refused("uptrain", "checkpoint=bart", "kv_heads=2", "output=grid", "parent_steps=9", "recipe=tiny")
    assert line.startswith("checkpoint=bart: holds an encoder–decoder, and uptrain takes decoders and encoders")
    (line,) = refused("uptrain", "checkpoint=nothing", "kv_heads=2", "output=grid")
    assert line.startswith("checkpoint=nothing: no such directory")


PLANNED = ("kv_heads=[2,1]", "alpha=[0,0.02,0.05]", "parent_steps=1000", "recipe=tiny", "seeds=[0,1]")


def test_a_plan_tells_steps_tokens_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*HERE, *PLANNED, "trainer.accelerator=cpu", "data.context=32", "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("kv", "control-"))}
    # 0.05 of 1,000 steps of 8 sequences of 32 tokens; 2 · 1 layer · 1 head · 8 · 2 bytes
    assert rows["kv1-mean-seed1"][1:5] == ["0.02,", "0.05", "50", "12,800"]
    assert rows["kv1-mean-seed1"][6] == "32"
    assert rows["control-seed0"][6] == "128"
    assert len([name for name in rows if name.endswith("-a0")]) == 3
    assert "cells       15, 6 trainings" in out
    assert "training    300 steps, 77k tokens (256 a step)" in out
    assert "data:\n  context: 32" in out  # what was typed, to be typed again
    assert not Path("grid").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(Terminated(signal.SIGTERM, "stopped"), 143), (Terminated(signal.SIGINT, "stopped"), 130), (RunFailed("no"), 1)],
)
def test_exit_codes(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(*_: object) -> None:
        raise error

    monkeypatch.setattr(grids, "uptrain", ending)
    assert main([*HERE, *PLANNED]) == code


def test_the_table_shows_what_is_done_and_what_goes_on() -> None:
    request = {"checkpoint": "gpt", "output": "grid", "kv_heads": 2, "parent_steps": 100, "seeds": [0, 1]}
    recipe = {
        "model": {"name": "gpt-tiny"},
        "data": {"tokenizer": {"kind": "bytes"}, "context": 32},
        "trainer": {"accelerator": "cpu"},
    }
    grid = settle_uptraining(validate_uptrain(request), recipe)
    console = Console(width=120, record=True, file=io.StringIO())
    view = GridView(grid, "lines", console, done={"control-a0": 3.25})
    trained = next(cell for cell in grid.cells if cell.name == "kv2-mean-a0.05-seed1")
    view.tell("begun", trained, {})
    run = Path("grid/runs/kv2-mean-seed1")
    run.mkdir(parents=True)
    metrics = MetricsFile(run / "metrics.csv")
    metrics.append(Row(step=3, tokens=96))
    metrics.close()
    assert view.seconds_left() is None
    console.print(view.table())
    text = console.export_text()
    assert "1 of 6 cells" in text
    assert "3.2500" in text
    assert "step 3/5" in text
    view.tell("done", trained, {"loss": 2.125})
    assert view.seconds_left() is not None  # from here on it is known what a step takes
    console.print(view.table())
    text = console.export_text()
    assert "2.1250" in text
    assert "2/6 kv2-mean-a0.05-seed1: loss 2.1250, about" in text


def test_a_grid_from_the_command_line(workshop: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The parent's own run and store; lines off a terminal."""
    arguments = [
        "uptrain", f"checkpoint={workshop}/runs/tiny", "kv_heads=1", "alpha=0.05", "output=grid", "speed.batches=1",
        "speed.contexts=8", "retrieval.trials=1", "evaluation.max_tokens=400",
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "4/4 kv1-mean-a0.05-seed0: loss" in out
    assert "Rule: the fewest heads whose loss at alpha=0.05" in out
    speeds = json.loads(Path("grid/speed.json").read_text())
    assert [(row["batch"], row["context"], row["kv_heads"]) for row in speeds] == [(1, 8, 4), (1, 8, 1)]
    model = "grid/cells/kv1-mean-a0.05-seed0/model"
    assert main(["evaluate", f"checkpoint={model}", "evaluation.max_tokens=400", f"data.path={__file__}"]) == 0
    assert main([*arguments]) == 2
    assert "output=grid: holds a grid already" in capfd.readouterr().err
