"""`longspan evaluate` with limits on what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.data.tokenizer import byte_level
from longspan.model import prompts
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main

Refused = Callable[..., list[str]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model that reads bytes and has learned nothing."""
    tokenizer = byte_level()
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 576}, seed=0)
    save_model(model, tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.fixture
def meetings(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    meeting = {
        "id": "1",
        "document": "A: The remote control is yellow. B: Then we agree. " * 12,
        "queries": [{"query": "What colour?", "answer": "Yellow.", "kind": "specific"}],
    }
    (folder / "qmsum_test.jsonl").write_text(json.dumps(meeting) + "\n")
    return folder


def found(output: str) -> tuple[dict, dict]:
    """The protocol of qmsum, and its only answer."""
    protocol = json.loads(Path(output, "results.json").read_text())["checkpoints"][0]["tasks"]["qmsum"]["protocol"]
    _, answer = map(json.loads, Path(output, "samples/qmsum.jsonl").read_text().splitlines())
    return protocol, answer


def test_the_answer_is_as_long_as_one_says_and_the_text_has_the_rest(
    checkpoint: Path, meetings: Path, refused: Refused
) -> None:
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[qmsum]", f"files={meetings}"]
    (line,) = refused(*asked, "output=none")
    assert "; limit the answer (answer_tokens), or ask a model that reads more" in line  # 512 of 576 are the answer's
    answers = {}
    for limit in (16, 40):
        assert main([*asked, f"output=out-{limit}", f"answer_tokens={limit}"]) == 0
        protocol, answers[limit] = found(f"out-{limit}")
        assert protocol["max_new_tokens"] == limit
        assert f"answers of at most {limit} tokens" in protocol["words"]
        assert 0 < len(answers[limit]["answer"]) <= limit
        assert answers[limit]["prompt_tokens"] == 576 - limit
    assert answers[40]["dropped"] - answers[16]["dropped"] == 24
    assert len(answers[40]["answer"]) > len(answers[16]["answer"])


def test_a_task_that_writes_less_stays_as_it_is(checkpoint: Path) -> None:
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[passkey]", "samples=1", "lengths=[320]", "depths=[0]"]
    assert main([*asked, "output=out", "answer_tokens=400"]) == 0
    (of_model,) = json.loads(Path("out/results.json").read_text())["checkpoints"]
    assert of_model["tasks"]["passkey"]["protocol"]["max_new_tokens"] == 16


def test_no_answer_at_all_is_refused(checkpoint: Path, refused: Refused) -> None:
    (line,) = refused("evaluate", f"checkpoint={checkpoint}", "tasks=[passkey]", "answer_tokens=0")
    assert line.startswith("answer_tokens=0")


def test_a_text_that_was_cut_to_leave_room_grows_beyond_nothing(
    checkpoint: Path, meetings: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning about positions is true where a window is asked for that has more of them than the model."""
    asked = ["evaluate", f"checkpoint={checkpoint}", "tasks=[qmsum]", f"files={meetings}", "answer_tokens=32"]
    for more, warned in (([], False), (["evaluation.window=1024"], True)):
        prompts._warn_beyond.cache_clear()
        assert main([*asked, *more, "long_texts=cut_middle", f"output=out-{warned}"]) == 0
        (record,) = json.loads(Path(f"out-{warned}/results.json").read_text())["checkpoints"]
        assert record["tasks"]["qmsum"]["truncated"] == int(not warned)  # the wider window holds it whole
        assert any("beyond the 576 positions" in line for line in caplog.messages) is warned
