"""`longspan evaluate` stopped in the midst of effective context, given again, and the results of one go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.data.tokenizer import byte_level
from longspan.evaluation.context import effective as effective_context
from longspan.model.checkpoint import save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main


def test_effective_context_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level()
    model = build("llama-tiny", {"vocab_size": tokenizer.vocab_size, "max_positions": 64}, seed=0)
    save_model(model, tmp_path / "model", tokenizer)
    rows = [json.dumps({"text": f"Text {i}. " + "It was so. " * (8 + i)}) for i in range(12)]
    Path("text.jsonl").write_text("\n".join(rows) + "\n")
    asked = ["evaluate", f"checkpoint={tmp_path / 'model'}", "tasks=[effective_context]", "data.path=text.jsonl"]
    asked += ["evaluation.batch=8", "accelerator=cpu"]
    score_rows, passes = effective_context.score_rows, []

    def stopping(*arguments: object, **named: object):
        passes.append(1)
        if len(passes) == stop:
            raise KeyboardInterrupt
        return score_rows(*arguments, **named)  # pyright: ignore[reportArgumentType]: passed through

    monkeypatch.setattr(effective_context, "score_rows", stopping)
    stop = 0
    assert main([*asked, "output=whole"]) == 0
    in_one_go = len(passes)
    assert in_one_go > 6
    passes.clear()
    stop = 5
    assert main([*asked, "output=out"]) == 130
    assert not Path("out/results.json").exists()
    assert len(Path("out/effective_context.jsonl").read_text().splitlines()) == 1 + 4
    capsys.readouterr()
    passes.clear()
    stop = 0
    assert main([*asked, "output=out"]) == 0
    assert "going on with out/" in capsys.readouterr().err
    assert len(passes) == in_one_go - 4
    whole, resumed = (
        json.loads(Path(output, "results.json").read_text())["checkpoints"][0]["effective_context"]["by_loss"]
        for output in ("whole", "out")
    )
    assert whole == resumed
    assert whole["tokenizer_sha256"] == tokenizer.sha256
    assert len(whole["tokens_sha256"]) == 64
    assert main([*asked, "output=out", "overwrite=true"]) == 0
    assert len(passes) == in_one_go - 4 + in_one_go
