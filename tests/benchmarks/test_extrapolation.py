"""Training short and reading long, on a model of some thousand parameters."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from longspan.benchmarks.extrapolation import held_out, main
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.perplexity.documents import EvalDocument
from longspan.evaluation.perplexity.sliding_window import score
from longspan.model.checkpoint import load_decoder, resolve_checkpoint

KEYS = [
    "model.vocab_size=258",
    "model.n_layers=1",
    "model.d_model=32",
    "model.n_heads=2",
    "model.n_kv_heads=2",
    "model.d_ff=64",
    "model.max_positions=32",
    "data.context=32",
    "data.tokenizer.kind=bytes",
    "data.validation_fraction=0.4",
    "trainer.steps=40",
    "optimizer.lr=0.01",
    "trainer.global_batch=2",
    "trainer.micro_batch=2",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "schedule.warmup=0",
    "callbacks=quiet",
    "logger.wandb=off",
]


def test_each_scheme_is_trained_once_and_read_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(200 + i)))
    typed = [
        "positions=rope,alibi", "seeds=0", "lengths=32,128", "texts=2", "scored=8", f"runs={tmp_path}/runs",
        f"output={tmp_path}", f"data.path={texts}", f"data.cache={tmp_path}/cache", *KEYS,
    ]  # fmt: skip
    assert main(typed) == 0
    rows = list(csv.DictReader((tmp_path / "extrapolation.csv").read_text().splitlines()))
    found = {(row["checkpoint"], row["method"], row["length"]): float(row["loss"]) for row in rows}
    rotary = ("none", "linear", "ntk", "dynamic", "yarn", "window")
    assert set(found) == {
        (f"{positions} seed 0", method, length)
        for positions, methods in (("rope", rotary), ("alibi", ("none", "window")))
        for method in methods
        for length in ("32", "128")
    }
    assert {row["trained_length"] for row in rows} == {"32"}

    # The figure at the longest length is that of the evaluation with one window over the whole text.
    checkpoint = resolve_checkpoint(tmp_path / "runs/alibi-0")
    model = load_decoder(checkpoint)
    tokens_BT = held_out(checkpoint, length=129, count=2)
    eos = Tokenizer.load(checkpoint).eos_id
    assert tokens_BT.shape == (2, 129)
    assert (tokens_BT[:, 0] == eos).all()
    documents = [
        EvalDocument(tokens=tokens_T[1:].numpy(), n_bytes=128, source="x", id=str(i))
        for i, tokens_T in enumerate(tokens_BT)
    ]
    scores = score(model, documents, window=128, stride=128, bos=eos, batch=1, device="cpu")
    last = scores.nll[scores.position >= 120]
    assert found["alibi seed 0", "none", "128"] == pytest.approx(float(last.mean()), abs=2e-5)

    # What is finished is not trained again.
    summaries = [tmp_path / f"runs/{name}-0/summary.json" for name in ("rope", "alibi")]
    before = [path.stat().st_mtime_ns for path in summaries]
    assert main([*typed, "lengths=64"]) == 0
    assert [path.stat().st_mtime_ns for path in summaries] == before
    with pytest.raises(ValueError, match="no held-out document has 500 tokens"):
        held_out(checkpoint, length=501, count=1)
