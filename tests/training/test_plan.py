"""FLOPs and MFU under a document mask, against a count of the pairs that the masks of the run's own batches allow."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.data.loader import PackedDataset
from longspan.data.prepare import prepare
from longspan.data.sources import SourceSpec
from longspan.data.store import TokenStore, build_store
from longspan.data.tokenizer import byte_level
from longspan.kernels.attention import AttentionContext
from longspan.model import accounting
from longspan.model.checkpoint import load_config
from longspan.model.config import DecoderConfig
from longspan.training import run as run_module
from longspan.training import run_directory
from longspan.training.checkpointing import Checkpoints
from longspan.training.data_settings import prepare_settings
from longspan.training.metrics import read_rows
from longspan.training.plan import Peak, plan
from longspan.training.run import train
from longspan.training.schema import validate

Request = Callable[..., dict]
CONTEXT = 16
ATTENTION = {
    "patterns": {
        "near": {"causal": True, "window": {"left": 4}, "sink_tokens": 1},
        "far": {"causal": True},
    },
    "layers": ["near", "far"],
}


@pytest.fixture
def short_texts(tmp_path: Path) -> Path:
    """Documents shorter and longer than a sequence."""
    directory = tmp_path / "short"
    directory.mkdir()
    rng = random.Random(0)
    for number in range(60):
        (directory / f"{number}.txt").write_text("x" * rng.randint(1, 40))
    return directory


def counted(config: DecoderConfig, dataset: PackedDataset) -> float:
    """Forward and backward FLOPs per token: products with weights, and each pair that `allowed` allows."""
    batch = dataset.batch(range(dataset.n_sequences))
    assert batch.documents_BT is not None
    context = AttentionContext(q_documents=batch.documents_BT)
    everything = slice(0, CONTEXT)
    pairs = 0
    for layer in range(config.n_layers):
        for group in config.head_groups(layer):
            allowed = context.allowed(group.spec, everything, everything)
            pairs += group.heads * int(allowed.expand(dataset.n_sequences, CONTEXT, CONTEXT).sum())
    matrices = sum(getattr(accounting.parameters(config), part) for part in ("attention", "mlp"))
    matrices += config.d_model * config.vocab_size
    return 3 * (2 * matrices + 4 * config.dim_per_head * pairs / (dataset.n_sequences * CONTEXT))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_flops_and_mfu_count_what_the_masks_allow(
    packing: str, request_of: Request, short_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "find_peak", lambda *_, **__: Peak(1e12, "a round number"))
    raw = request_of(
        trainer__steps=2,
        data__path=str(short_texts),
        data__document_mask=True,
        data__packing=packing,
        attention=ATTENTION,
    )
    raw["model"] |= {"n_layers": 2, "bias": False}
    run = tmp_path / "run"
    train(validate(raw))

    config = load_config(Checkpoints(run, keep=1).path(2))
    store = prepare(prepare_settings(validate(raw).data)).store
    expected = counted(
        config, PackedDataset(store, "train", context=CONTEXT, packing=packing, shuffle=False, document_mask=True)
    )
    bound = accounting.training_flops_per_token(config, length=CONTEXT)
    record = run_directory.read_json(run / "accounting.json")
    assert record["training_flops_per_token"] == pytest.approx(expected, rel=1e-9)
    assert record["training_flops"] == pytest.approx(expected * 2 * 8 * CONTEXT, rel=1e-9)
    assert expected < bound
    for row in read_rows(run / "metrics.csv"):
        assert row.mfu is not None
        assert row.tokens_per_second is not None
        assert row.mfu == pytest.approx(row.tokens_per_second * expected / 1e12)
    log = (run / "train.log").read_text()
    assert "mfu is the share of 1 TFLOP/s, a round number; the mean over the packed sequences" in log

    # Before there is data, the lengths of its documents are not known.
    (line,) = [line for line in plan(validate(raw)).lines() if line.startswith("FLOPs")]
    assert f"{bound:.3g} per token" in line
    assert "an upper bound" in line
    raw["data"]["document_mask"] = False
    assert not any("upper bound" in line for line in plan(validate(raw)).lines())


def test_sources_count_by_their_share_of_the_stream(tmp_path: Path) -> None:
    specs = []
    for name, text in (("long", "y" * 207), ("short", "z" * 3)):
        directory = tmp_path / name
        directory.mkdir()
        for number in range(8):
            (directory / f"{number}.txt").write_text(text)
        specs.append(SourceSpec(kind="files", path=str(directory), name=name))
    store: TokenStore = build_store(tmp_path / "store", specs, byte_level(), validation_fraction=0)
    weights = {"long": 3.0, "short": 1.0}
    dataset = PackedDataset(store, "train", context=CONTEXT, weights=weights, document_mask=True)
    # With the token that ends them, documents of 4 fill every fourth sequence, and of 208 the others.
    assert dataset.documents_per_sequence() == {4: 1.0, 16: 0.75}


def test_the_cache_is_weighed_as_generation_keeps_it(request_of: Request) -> None:
    """Layers with a window keep what they see; 5 + 1 slots of 16 here, the sink among them."""
    raw = request_of(attention=ATTENTION)
    raw["model"] |= {"n_layers": 2}
    planned = plan(validate(raw))
    config = planned.model
    assert isinstance(config, DecoderConfig)
    assert planned.kv_cache_bytes == 8 + 2 * config.kv_heads * config.dim_per_head * 2 * ((1 + 4 + 1) + CONTEXT)
    assert planned.to_dict()["kv_cache_bytes"] == planned.kv_cache_bytes
    assert any(line.startswith("kv cache") and "data.context" in line for line in planned.lines())
