"""The experiment of Longformer's Table 5, on an encoder of some thousand parameters."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from longspan.benchmarks.position_copy import main, masked_loss
from longspan.model.checkpoint import load_model, resolve_checkpoint, save_model
from longspan.model.config import DecoderConfig
from longspan.model.decoder import from_config

KEYS = [
    "model.vocab_size=258",
    "model.n_layers=1",
    "model.d_model=32",
    "model.n_heads=2",
    "model.d_ff=64",
    "model.max_positions=32",
    "data.context=32",
    "data.tokenizer.kind=bytes",
    "data.validation_fraction=0.4",
    "trainer.steps=40",
    "trainer.global_batch=4",
    "trainer.micro_batch=4",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "optimizer.lr=0.01",
    "schedule.warmup=0",
    "callbacks=quiet",
    "logger.wandb=off",
]


def test_a_parent_and_its_children(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(300 + i)))
    typed = [
        "seeds=3", "steps=0,2", "length=128", "window=16", "batches=2", f"runs={tmp_path}/runs",
        f"output={tmp_path}", f"data.path={texts}", f"data.cache={tmp_path}/cache", *KEYS,
    ]  # fmt: skip
    assert main(typed) == 0
    rows = list(csv.DictReader((tmp_path / "position_copy.csv").read_text().splitlines()))
    assert [(row["arm"], row["steps"], row["context"]) for row in rows] == [
        ("parent", "0", "32"),
        *[(arm, step, "128") for arm in ("random", "interpolate", "copy") for step in ("0", "2")],
    ]
    assert {row["seed"] for row in rows} == {"3"}
    assert all(
        float(row["bits_per_token"]) == pytest.approx(float(row["loss"]) / math.log(2), abs=1e-4) for row in rows
    )
    losses = {(row["arm"], row["steps"]): float(row["loss"]) for row in rows}
    assert len({losses[arm, "0"] for arm in ("random", "interpolate", "copy")}) == 3  # the tables differ
    assert losses["copy", "0"] != losses["copy", "2"]  # and training changes them

    # The tables are what their names say, each behind the row before position 0 that the model has.
    home = tmp_path / "runs/seed-3"
    parent = resolve_checkpoint(home / "parent")
    assert len({row["hidden_tokens"] for row in rows if row["context"] == "128"}) == 1  # the same tokens for all
    short = load_model(parent).position_embedding
    long = load_model(home / "converted-copy").position_embedding
    assert short is not None
    assert long is not None
    assert torch.equal(long.weight[2:], short.weight[2:].repeat(4, 1))
    # A parent read within its length, by the function that reads the children.
    loss, hidden = masked_loss(parent, context=32, batches=2, device="cpu")
    assert (round(loss, 5), hidden) == (float(rows[0]["loss"]), int(rows[0]["hidden_tokens"]))


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    config = DecoderConfig(vocab_size=64, n_layers=1, d_model=32, n_heads=2, d_ff=64, max_positions=16)
    save_model(from_config(config, seed=0), tmp_path / "model")
    with pytest.raises(ValueError, match="no encoder with a masked-LM head"):
        masked_loss(tmp_path / "model", context=16, batches=1, device="cpu")
