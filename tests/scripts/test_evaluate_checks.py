"""`longspan evaluate` refuses what it can before it measures anything; what shows later costs its task only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.data.questions import Question
from longspan.data.synthetic import TooShortError
from longspan.data.tokenizer import byte_level, train_bpe
from longspan.evaluation.tasks import registry
from longspan.evaluation.tasks.registry import TASKS, gather
from longspan.evaluation.tasks.task import Material
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main
from longspan.training import evaluate_checks, evaluating

Refused = Callable[..., list[str]]
CHEAP = ("samples=1", "lengths=[320,384]", "depths=[0,1]", "evaluation.max_tokens=600", "data.path=text.txt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that reads bytes and has learned nothing."""
    tokenizer = byte_level()
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 512}, seed=0)
    save_model(model, tmp_path / "model", tokenizer)
    Path("text.txt").write_text("A text. " * 100)
    return tmp_path / "model"


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would load a model fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluating, "load_model", load)


def test_lengths_without_room_are_all_named_before_anything_is_measured(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[perplexity,passkey,vt,copying,niah_multikey_1]"]
    with monkeypatch.context() as patched:
        unmeasured(patched)
        (line,) = refused(*asked, *CHEAP[4:], "lengths=[512,600,2048]", "output=out")
    assert not Path("out").exists()
    said = re.fullmatch(
        r"lengths=\[512, 600, 2048\]: not every task can be made to each of them, prompt and answer together: "
        r"vt at 512, 600 \(takes at least (\d+) tokens\); niah_multikey_1 at 512, 600 \(takes at least (\d+) tokens\); "
        r"ask for other lengths, or leave these tasks out",
        line,
    )
    assert said is not None, line
    for name, least in zip(("vt", "niah_multikey_1"), map(int, said.groups()), strict=True):
        material = Material(
            lengths=(least,), depths=(), samples=10, seed=0, files=None, count=lambda text: len(text.encode())
        )
        assert len(gather(TASKS[name], material).questions) == 10


def test_every_tokenizer_is_asked_for_its_lengths(checkpoint: Path, refused: Refused) -> None:
    Path("text.txt").write_text("What is the pass key? The pass key is 7. Remember it. " * 50)
    merged = train_bpe([Path("text.txt").read_text()], 300)
    model = build("llama-tiny", {"vocab_size": merged.vocab_size, "max_positions": 512}, seed=0)
    save_model(model, Path("merged"), merged)
    (line,) = refused("evaluate", f"checkpoints=[merged,{checkpoint}]", "tasks=[passkey]", "lengths=[190]")
    assert f"together: {checkpoint}: passkey at 190 (takes at least " in line


def test_what_was_longer_than_the_first_question_costs_its_task_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some questions are longer than the first one, which was tried."""
    make = TASKS["passkey"].questions

    def longer(material: Material) -> Iterable[Question]:
        yield from make(replace(material, samples=1))
        if material.samples == 2:
            raise TooShortError("passkey", 320, 400)

    known = {**TASKS, "passkey": replace(TASKS["passkey"], questions=longer)}
    monkeypatch.setattr(registry, "TASKS", known)
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[passkey,copying]", *CHEAP[1:], "samples=2", "output=out"]
    assert main(asked) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert set(found["tasks"]) == {"copying"}
    assert found["refused"]["passkey"].startswith("length=320: passkey takes at least 400 tokens")


def test_files_that_cannot_be_used_are_found_out_before_anything_is_measured(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmeasured(monkeypatch)
    Path("files").mkdir()
    asked = ["evaluate", f"checkpoint={checkpoint}", "data.path=text.txt", "files=files", "output=out"]
    Path("files/lambada_test_openai.jsonl").write_text('{"txt": 1}\n')
    (line,) = refused(*asked, "tasks=[perplexity,lambada]")
    assert "files/lambada_test_openai.jsonl" in line
    Path("files/squad.json").write_text("[")
    (line,) = refused(*asked, "tasks=[perplexity,qa_1]")
    assert line.startswith("files/squad.json is not JSON")
    (line,) = refused(*asked, "long_texts=fused")
    assert line == "long_texts=fused: fuses what an encoder made of each part, and this model is a decoder"
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", "output=out")
    assert line.startswith("data.path: is needed, because ")
    assert not Path("out").exists()


def test_tasks_that_the_harness_lacks_are_found_out_before_anything_is_measured(
    checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(names: object, include_path: Path | None) -> None:
        raise ValueError(f"none of {names} in include_path={include_path}")

    unmeasured(monkeypatch)
    monkeypatch.setattr(evaluate_checks, "check_names", check)
    asked = ["evaluate", f"checkpoint={checkpoint}", "data.path=text.txt", "harness=[a]", "harness_files=."]
    (line,) = refused(*asked, "output=out")
    assert line == "harness=['a']: none of ('a',) in harness_files=."


def test_windows_beyond_learned_positions_cost_effective_context_only() -> None:
    tokenizer = byte_level()
    model = build("gpt-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 64}, seed=0)
    save_model(model, Path("learned"), tokenizer)
    Path("text.txt").write_text("A text. " * 100)
    asked = ["evaluate", "checkpoint=learned", "tasks=[perplexity,effective_context]", "lengths=[32,128]", "output=out"]
    assert main([*asked, "data.path=text.txt", "evaluation.max_tokens=200"]) == 0
    (found,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert found["perplexity"] is not None
    assert found["refused"] == {
        "effective_context": "effective context by 128 tokens: the model has learned 64 positions"
    }


def test_a_mistake_in_a_generator_is_no_refusal_of_the_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a model cannot be asked costs its task; any other ValueError is a failure, and told as one."""

    def broken(*_: object, **__: object) -> Iterable[Question]:
        raise ValueError("a mistake in a generator")

    monkeypatch.setattr(evaluating, "gather", broken)
    typed = ["evaluate", f"checkpoint={checkpoint}", "tasks=[copying]", "samples=1", "lengths=[384]", "output=out"]
    assert main(typed) == 1
    assert "ValueError: a mistake in a generator" in capsys.readouterr().err
    assert not Path("out/results.json").exists()
