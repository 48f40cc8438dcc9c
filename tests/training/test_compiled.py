"""Compiled blocks over batches of many lengths: how many graphs there are, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longspan.data import labelled, seq2seq
from longspan.data.batch import Batch
from longspan.data.labelled import LabelledBatch
from longspan.data.seq2seq import Seq2SeqBatch
from longspan.model import zoo
from longspan.model.build import Model, build_from
from longspan.training.datamodule import BatchPlan
from longspan.training.module import blocks_of, checkpoint_activations, compile_blocks
from longspan.training.objectives import objective_for
from longspan.training.schema import RunConfig, validate
from longspan.training.streams import prepared_data, training_data

pytestmark = [
    # Dynamo looks at .grad of the activations that enter a block, to see what they are; inductor at what is deprecated.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KINDS = ("pairs", "denoising", "qa", "classification")
MODELS: dict[str, dict] = {
    "seq2seq": {
        "name": "led-tiny",
        "vocab_size": 258,
        "decoder_start_token": 256,
        "dropout": 0.0,
        "encoder": {"n_layers": 2},
        "decoder": {"n_layers": 2},
    },
    "qa": {
        "name": "longformer-tiny",
        "vocab_size": 258,
        "max_positions": 200,
        "n_layers": 2,
        "dropout": 0.0,
        "head": "qa",
    },
    "classification": {
        "name": "longformer-tiny",
        "vocab_size": 258,
        "max_positions": 200,
        "n_layers": 2,
        "dropout": 0.0,
        "head": "classification",
        "pooler": True,
        "labels": ["even", "odd"],
    },
}
# A few dozen lengths of sources, questions and texts; how many graphs they may make of an encoder's and of a decoder's
# block (which is compiled for a source and a target).
MOST_GRAPHS = {"pairs": (5, 9), "denoising": (2, 2), "qa": (5, 0), "classification": (5, 0)}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of any length up to the context, as pairs, documents, questions and classes."""
    folder = tmp_path_factory.mktemp("lengths")
    rng = np.random.default_rng(0)
    lines: dict[str, list[dict]] = {"pairs": [], "qa": [], "classification": []}
    for number in range(100):
        text = "".join(rng.choice(list("abcdefgh. "), int(rng.integers(10, 75))))
        lines["pairs"].append({"source": text, "target": "t" + text[: int(rng.integers(0, 29))]})
        question = "w" * int(rng.integers(1, 14))
        lines["qa"].append({"question": question, "context": f"{text}= {number}", "answers": str(number)})
        lines["classification"].append({"text": text, "label": ["even", "odd"][number % 2]})
        (folder / f"{number}.txt").write_text(text)
    for kind, rows in lines.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settled(kind: str, folder: Path) -> RunConfig:
    read: dict = {"examples": {"kind": "seq2seq" if kind == "pairs" else kind, "path": str(folder / f"{kind}.jsonl")}}
    if kind == "denoising":
        read = {"path": str(folder / "*.txt"), "denoising": {"probability": 0.3}}
    return validate(
        {
            "model": MODELS.get(kind, MODELS["seq2seq"]),
            "data": {
                "cache": str(folder / "cache"),
                "tokenizer": {"kind": "bytes"},
                "context": 80,
                "validation_fraction": 0.1,
                **read,
            },
            "trainer": {"accelerator": "cpu", "precision": "fp32", "global_batch": 4, "micro_batch": 2},
            "output": str(folder / "run"),
        }
    )


def batches(config: RunConfig, n: int) -> list[Batch]:
    prepared = prepared_data(config.data, tokenizer=None, progress=None)
    data = training_data(config, prepared, BatchPlan(global_batch=4, micro_batch=2))
    return [batch for step in islice(data.train_dataloader(), n // 2) for batch in step]


def lengths_of(batch: Batch) -> tuple[int, ...]:
    """Of a batch's longest rows, without padding."""
    if isinstance(batch, Seq2SeqBatch):
        return int(batch.source_lengths_B.max()), int((batch.targets_BT >= 0).sum(1).max())
    assert isinstance(batch, LabelledBatch)
    return int(batch.lengths_B.max()), int(batch.is_global_BT.sum(1).max())


def counted(monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> Any:
    """What every graph of `compile_blocks` is counted by."""
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_many_lengths_make_few_graphs(
    kind: str, recompute: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(kind, folder)
    model = build_from(config.model, seed=0).train()
    counter = counted(monkeypatch)
    compile_blocks(model)
    if recompute:
        checkpoint_activations(model)
    objective = objective_for(model)
    read = batches(config, 24)
    for batch in read:
        objective(batch).backward()
    shapes = {
        tuple(tensor.shape[1] for tensor in (batch.source_BS, batch.targets_BT))
        if isinstance(batch, Seq2SeqBatch)
        else (batch.tokens_BT.shape[1],)  # type: ignore[attr-defined]
        for batch in read
    }
    sources = len({shape[0] for shape in shapes})
    wanted = sources + (len(shapes) if len(blocks_of(model)) == 4 else 0)
    # One of each shape, which layers share; what is recomputed is what was compiled.
    assert counter.frame_count == wanted
    assert wanted <= sum(MOST_GRAPHS[kind])
    assert len({lengths_of(batch) for batch in read}) > 2 * len(shapes)  # padding is what made them few


def gradients(model: Model, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    loss = objective_for(model)(batch)
    loss.backward()
    return float(loss.detach()), [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_loss(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settled(kind, folder)
    model = build_from(config.model, seed=0)
    objective = objective_for(model)
    padded = batches(config, 12)
    for module in (labelled, seq2seq):
        monkeypatch.setattr(module, "padded_length", lambda longest, most: longest)
    bare = batches(config, 12)
    sizes = [[batch.source_BS.numel() if isinstance(batch, Seq2SeqBatch) else batch.tokens_BT.numel()  # type: ignore[attr-defined]
              for batch in made] for made in (padded, bare)]  # fmt: skip
    assert sum(sizes[0]) > sum(sizes[1])
    for one, other in zip(padded, bare, strict=True):
        assert one.indices_B.tolist() == other.indices_B.tolist()
        assert objective(one).item() == pytest.approx(objective(other).item(), rel=1e-6)


@pytest.mark.parametrize(
    "kind", [kind if kind in ("pairs", "qa") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("change", ["compiled", "compiled and recomputed"])
def test_compiled_blocks_have_the_same_gradients(
    kind: str, change: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settled(kind, folder)
    batch = batches(config, 2)[0]
    loss, expected = gradients(build_from(config.model, seed=0).train(), batch)
    model = build_from(config.model, seed=0).train()
    counter = counted(monkeypatch, "aot_eager")
    compile_blocks(model)
    if change != "compiled":
        checkpoint_activations(model)
    found_loss, found = gradients(model, batch)
    assert counter.frame_count == (2 if len(blocks_of(model)) == 4 else 1)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_names_of_weights_stay() -> None:
    model = zoo.build("led-tiny", seed=0)
    names = list(model.state_dict())
    for change in (compile_blocks, checkpoint_activations):
        change(model)
    assert list(model.state_dict()) == names
