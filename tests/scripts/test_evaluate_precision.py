"""`longspan evaluate` of weights in half precision, as imported ones are; and what it says on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longspan.data.tokenizer import byte_level
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts import output
from longspan.scripts.cli import main


def saved(directory: Path, dtype: torch.dtype) -> None:
    """The same weights, numbers that both types have, in either; with norms that are not trivial."""
    tokenizer = byte_level()
    model = build("gpt-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 64}, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half())
    save_model(model.to(dtype), directory, tokenizer)


def test_half_precision_under_autocast_is_its_own_weights_widened(tmp_path: Path) -> None:
    Path("text.txt").write_text("A text. " * 100)
    losses = {}
    for name, dtype in (("half", torch.float16), ("full", torch.float32)):
        saved(tmp_path / name, dtype)
        asked = ["evaluate", f"checkpoint={tmp_path / name}", "data.path=text.txt", "precision=bf16", "accelerator=cpu"]
        assert main([*asked, f"output=out-{name}"]) == 0
        (of_model,) = json.loads(Path(f"out-{name}/results.json").read_text())["checkpoints"]
        found = of_model["perplexity"]["perplexity"]
        assert found["protocol"]["precision"] == "bf16 autocast"
        losses[name] = found["loss"]
    assert losses["half"] == losses["full"]


@pytest.mark.filterwarnings("ignore")  # of packages that the harness imports
def test_the_harness_takes_half_precision_too(tmp_path: Path) -> None:
    from longspan.evaluation.harness.model import HarnessModel

    found = []
    for name, dtype in (("half", torch.float16), ("full", torch.float32)):
        saved(tmp_path / name, dtype)
        asked = {"checkpoint": str(tmp_path / name), "precision": "bf16", "device": "cpu"}
        model = HarnessModel.create_from_arg_obj(asked)
        found.append(model._loglikelihood_tokens([(("", ""), [1, 2, 3], [4, 5])], disable_tqdm=True))
    assert found[0] == found[1]


def test_protocols_have_progress_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("A text. " * 100)
    saved(tmp_path / "model", torch.float32)
    asked = ["evaluate", f"checkpoint={tmp_path / 'model'}", "data.path=text.txt", "accelerator=cpu", "output=out"]
    assert main([*asked, "evaluation.protocols=[disjoint]"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line[-1].isdigit()]
    said = [line.rpartition(" of ")[0].rstrip("0123456789,") for line in lines]
    assert said == ["longspan evaluate: perplexity ", "longspan evaluate: perplexity by protocol "]


def test_the_time_left_goes_by_what_was_seen_to_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what came before the first call nor what was found finished then is taken for progress."""
    clock = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    with output.progress("longspan evaluate") as shown, shown.part("passkey") as advance:
        for seconds, done in ((100.0, 40), (120.0, 50), (160.0, 70), (220.0, 100)):
            clock[0] = seconds
            advance(done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "longspan evaluate: passkey 40 of 100",
        "longspan evaluate: passkey 50 of 100, 1:40 left",
        "longspan evaluate: passkey 70 of 100, 1:00 left",
        "longspan evaluate: passkey 100 of 100",
    ]
