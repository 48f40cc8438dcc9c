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
    with pytest.raises(SystemExit):
        main(["contexts=32"])
    assert "data.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["documents=abc"], "documents=abc: expected a whole number, at least 1"),
        (["documents=0"], "documents=0: expected a whole number, at least 1"),
        (["words=0,x"], "words=0,x: expected whole numbers with commas between them, each at least 0"),
        (["again=1.5"], "again=1.5: expected a whole number, at least 0"),
        (["share=1"], "share=1: expected a number above 0 and below 1"),
        (["share=nan"], "share=nan: expected a number above 0 and below 1"),
        (["contexts=32,256"], "contexts=32,256: a sequence of 256 is longer than tokens=128, a step of them"),
        (["contexts=48"], "contexts=48: tokens=128 are no whole number of sequences of 48, so steps would differ"),
        (["output=here"], "output=here: leave it out; each run has a directory of its own below runs=DIR"),
        (["data.context=64"], "data.context=64: leave it out; contexts= says it"),
        (["experiment=tiny"], "experiment=tiny: leave it out; it is experiment=context_lengths that is run"),
        (["resume=auto"], "resume=auto: leave it out; what is there of a run is gone on with, a finished one kept"),
        (["trainer.stps=2"], "longspan train: trainer.stps=2: unknown key; did you mean trainer.steps? (set on the "),
    ],
)
def test_a_mistake_costs_one_line_and_no_work(
    typed: list[str], line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    arguments = [f"data.path={tmp_path}/a.txt", "contexts=64", "tokens=128", f"runs={tmp_path}/runs", *typed]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith(line), err
    assert not (tmp_path / "runs").exists()


def test_data_that_is_not_there_is_found_before_documents_are_made(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"data.path={tmp_path}/nowhere", "contexts=64", "tokens=128", f"runs={tmp_path}/runs"])
    assert ended.value.code == 2
    assert not (tmp_path / "runs").exists()
