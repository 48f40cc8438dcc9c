"""`longspan evaluate` as a user runs it: tasks, several checkpoints, going on after an interruption, wrong requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from longspan.data.tokenizer import byte_level
from longspan.evaluation.names import LongTexts, ProtocolName, TaskName
from longspan.evaluation.processed import BY_STRATEGY
from longspan.evaluation.protocol_definitions import protocol_names
from longspan.evaluation.tasks.registry import GROUPS, TASKS
from longspan.evaluation.tasks.task import Truncation
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main
from longspan.training import evaluating

Refused = Callable[..., list[str]]
CHEAP = ("samples=1", "lengths=[320,384]", "depths=[0,1]", "evaluation.max_tokens=600", "data.path=text.txt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that reads bytes and has learned nothing."""
    return saved(tmp_path / "model", max_positions=512)


def saved(directory: Path, *, max_positions: int, seed: int = 0) -> Path:
    tokenizer = byte_level()
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": max_positions}, seed=seed)
    save_model(model, directory, tokenizer)
    Path("text.txt").write_text("A text. " * 100)
    return directory


def test_the_schema_knows_what_there_is() -> None:
    assert set(get_args(TaskName)) == {*TASKS, *GROUPS, "perplexity", "effective_context"}
    assert get_args(ProtocolName) == protocol_names()
    assert set(get_args(LongTexts)) == {*get_args(Truncation), *BY_STRATEGY}
    assert all(name in TASKS for names in GROUPS.values() for name in names)
    for name, task in TASKS.items():
        assert task.name == name
        assert task.version >= 1
        assert task.summary


def test_tasks_and_perplexity_with_what_they_were_measured_by(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "evaluate",
        f"checkpoint={checkpoint}",
        "tasks=[perplexity,passkey,copying]",
        "evaluation.protocols=[disjoint,lm_eval_rolling]",
        "output=out",
        *CHEAP,
    ]
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert "longspan evaluate: passkey 4 of 4" in captured.err
    found = json.loads(Path("out/results.json").read_text())
    (of_model,) = found["checkpoints"]
    assert set(of_model["tasks"]) == {"passkey", "copying"}
    passkey = of_model["tasks"]["passkey"]
    assert passkey["questions"] == 4
    assert passkey["protocol"]["lengths"] == [320, 384]
    assert passkey["protocol"]["depths"] == [0, 1]
    assert passkey["protocol"]["tokenizer_sha256"] == of_model["tokenizer_sha256"]
    assert [cell["groups"] for cell in passkey["cells"]][-1] == {"length": 384, "depth": 1}
    protocols = of_model["perplexity"]["protocols"]
    assert [each["name"] for each in protocols] == ["disjoint", "lm_eval_rolling"]
    assert of_model["perplexity"]["perplexity"] == json.loads(Path("out/evaluation.json").read_text())["perplexity"]
    assert {"python", "torch"} <= set(found["versions"])
    lines = [json.loads(line) for line in Path("out/samples/passkey.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 4
    assert all(250 < line["prompt_tokens"] <= 384 - 16 for line in lines[1:])
    assert "| passkey | accuracy |" in Path("out/results.md").read_text()
    page = Path("out/results.html").read_text()
    assert "Retrieval by length and depth" in page
    assert "<script" not in page


def test_what_was_interrupted_is_gone_on_with(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[passkey,copying]", "output=out", *CHEAP]
    run_task = evaluating.run_task

    def stopping(task: object, *arguments: object, **named: object):
        if getattr(task, "name", "") == "copying":
            raise KeyboardInterrupt
        return run_task(task, *arguments, **named)  # pyright: ignore[reportArgumentType]: passed through

    monkeypatch.setattr(evaluating, "run_task", stopping)
    assert main(asked) == 130
    assert not Path("out/results.json").exists()
    before = Path("out/samples/passkey.jsonl").read_bytes()
    monkeypatch.setattr(evaluating, "run_task", run_task)
    capsys.readouterr()
    (line,) = refused(*asked, "seed=1")
    assert line.startswith("output=out: holds an unfinished evaluation that asked for something else (seed=0, now 1)")
    assert main(asked) == 0
    assert "going on with out/" in capsys.readouterr().err
    assert Path("out/samples/passkey.jsonl").read_bytes() == before
    assert set(json.loads(Path("out/results.json").read_text())["checkpoints"][0]["tasks"]) == {"passkey", "copying"}
    (line,) = refused(*asked)
    assert line.startswith("output=out: holds this evaluation already, finished: read results.md")


def test_checkpoints_beside_each_other(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = saved(Path("other"), max_positions=512, seed=1)
    pair = f"checkpoints=[{checkpoint},{other}]"
    assert main(["evaluate", pair, "tasks=[perplexity,induction]", "output=out", *CHEAP]) == 0
    found = json.loads(Path("out/results.json").read_text())
    assert [each["name"] for each in found["checkpoints"]] == ["model", "other"]
    by_measure = {each["measure"]: each for each in found["comparisons"]}
    assert set(by_measure) == {"loss (nats per token)", "induction, token_accuracy"}
    loss = by_measure["loss (nats per token)"]
    first, second = (each["perplexity"]["perplexity"]["loss"] for each in found["checkpoints"])
    assert loss["difference"] == pytest.approx(first - second, abs=1e-9)
    assert loss["adjusted_p_value"] >= loss["p_value"]
    assert "## Comparison" in capsys.readouterr().out
    assert Path("out/other/samples/induction.jsonl").is_file()


def test_numbers_of_different_protocols_are_not_compared_unless_forced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = saved(Path("shorter"), max_positions=256)
    asked = ["evaluate", f"checkpoints=[{checkpoint},{shorter}]", "tasks=[induction]", "samples=2", "lengths=[48]"]
    assert main([*asked, "output=out"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "were measured by different protocols: max_tokens is 512 and 256" in line
    assert "force=true" in line
    assert json.loads(Path("out/results.json").read_text())["comparisons"] == []
    before = Path("out/model/samples/induction.jsonl").read_bytes()
    assert main([*asked, "output=out", "force=true"]) == 0  # what was measured is kept
    assert Path("out/model/samples/induction.jsonl").read_bytes() == before
    (comparison,) = json.loads(Path("out/results.json").read_text())["comparisons"]
    assert "max_tokens" in comparison["differing"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tasks=[pasky]"], "; did you mean passkey?"),
        (["tasks=[quality]"], "quality"),
        (["tasks=[passkey]", "lengths=[20]"], "length=20: passkey takes at least"),
        (
            ["tasks=[passkey]", "lengths=[9000]"],
            "and the model reads 512; ask for shorter ones (lengths)",
        ),
        (["tasks=[]"], "tasks=[]: measures nothing"),
        (["tasks=[passkey,passkey]"], "names a task twice"),
        (["tasks=[passkey]", "depths=[2]"], "a depth is a share of the text"),
        (["harness_files=."], "is for harness=[task,…]"),
        (["tasks=[qmsum]", "files=nowhere"], "files=nowhere: does not exist"),
    ],
)
def test_wrong_requests_cost_a_line(checkpoint: Path, refused: Refused, arguments: list[str], said: str) -> None:
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", *arguments)
    assert said in line


def test_an_answer_needs_a_model_that_can_give_it(
    checkpoint: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("evaluate", "tasks=[passkey]")[0].startswith("checkpoint: is required")
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", "tasks=[passkey]", "long_texts=fused")
    assert "this model is a decoder" in line
