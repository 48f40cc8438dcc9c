"""Two runs of some steps on one mixture, each at its context, and what the made documents ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longspan.benchmarks.context_lengths import made_documents, main
from longspan.data.synthetic import recall_text


def test_documents_have_each_number_of_facts_with_each_number_of_words_around_them() -> None:
    documents = made_documents(60, (0, 40), 2, seed=3)
    assert made_documents(60, (0, 40), 2, seed=3) == documents
    assert made_documents(60, (0, 40), 2, seed=4) != documents
    values = [re.findall(r"\b\d{7}\b|(?<=The pass key is )\d+(?=\.)", each) for each in documents]
    assert [len(set(each)) for each in values] == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 8] * 4
    for index, facts, words in ((13, 4, 0), (14, 8, 0), (28, 4, 160), (59, 8, 320)):
        assert documents[index] == recall_text(words, facts, again=2, seed=1_000_003, index=index)


def test_each_context_is_a_run_on_the_same_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(600 + i)))
    typed = [
        f"data.path={texts}", "contexts=32,64", "documents=10", "tokens=128", "words=0,4", "again=1",
        "share=0.5", f"runs={tmp_path}/runs",
        f"data.cache={tmp_path}/cache", "model.vocab_size=258", "model.n_layers=1", "model.d_model=32",
        "model.n_heads=2", "model.n_kv_heads=2", "model.d_ff=64", "data.tokenizer.kind=bytes",
        "data.tokenizer.digits=merged", "trainer.steps=2",
        "trainer.accelerator=cpu", "trainer.precision=fp32", "trainer.compile=false", "schedule.warmup=0",
        "trainer.val_every=2", "trainer.save_every=2", "callbacks=quiet", "logger.wandb=off",
    ]  # fmt: skip
    assert main(typed) == 0
    for context in (32, 64):
        config = json.loads((tmp_path / f"runs/context-{context}-0.5-0_4-1-10-0/config.yaml").read_text())
        assert config["data"]["context"] == config["model"]["max_positions"] == context
        assert config["trainer"]["global_batch"] * context == 128
        assert [(each["name"], each["weight"]) for each in config["data"]["sources"]] == [("text", 0.5), ("made", 0.5)]
    again = (tmp_path / "runs/context-32-0.5-0_4-1-10-0/summary.json").stat().st_mtime_ns
    assert main(typed) == 0
    assert (tmp_path / "runs/context-32-0.5-0_4-1-10-0/summary.json").stat().st_mtime_ns == again  # not trained again
    assert main([*typed, "contexts=32", "seed=1"]) == 0  # that is another run, on other documents
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "context-32-0.5-0_4-1-10-0", "context-32-0.5-0_4-1-10-1", "context-64-0.5-0_4-1-10-0",
        "documents-0_4-1-10-0.jsonl", "documents-0_4-1-10-1.jsonl",
    ]  # fmt: skip
    assert main(["contexts=32"]) == 2
    assert "data.path" in capsys.readouterr().err
