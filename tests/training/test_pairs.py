"""Encoder–decoders through the same runs as the others: their loss, and denoising from a config to a checkpoint."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan.data.batch import IGNORE
from longspan.data.example_build import PreparedExamples
from longspan.data.lengths import PADDING
from longspan.data.seq2seq import PairFrame, PairItems, Seq2SeqBatch
from longspan.data.tokenizer import byte_level
from longspan.data.writer import SPLITS
from longspan.model import zoo
from longspan.model.accounting import parameters
from longspan.model.accounting_seq2seq import seq2seq_training_flops
from longspan.model.build import build_from
from longspan.model.checkpoint import load_model
from longspan.model.config import Seq2SeqConfig, StackConfig
from longspan.model.generation import generate
from longspan.model.seq2seq import Seq2Seq
from longspan.training import run
from longspan.training.costs import sequence_costs
from longspan.training.datamodule import BatchPlan
from longspan.training.errors import UserError
from longspan.training.labelled import described
from longspan.training.metrics import read_rows
from longspan.training.module import blocks_of, checkpoint_activations
from longspan.training.objectives import TargetLoss, objective_for
from longspan.training.plan import plan
from longspan.training.schema import ConfigError, as_request, validate
from longspan.training.streams import prepared_data, training_data

FRAME = PairFrame(
    before=(250,),
    after=(251,),
    begin=(),
    end=251,
    start=251,
    is_global=True,
    source_context=60,
    target_context=60,
)


def pairs(*, is_global: bool = True) -> Seq2SeqBatch:
    generator = np.random.default_rng(0)
    lengths = [(40, 12), (17, 30), (3, 1)]
    texts = [(generator.integers(0, 250, source), generator.integers(0, 250, target)) for source, target in lengths]
    return replace(FRAME, is_global=is_global).batch(texts, [4, 5, 6])


def led(name: str = "led-tiny") -> Seq2Seq:
    model = zoo.build(name, seed=0)
    assert isinstance(model, Seq2Seq)
    model.head.bias.normal_(generator=torch.Generator().manual_seed(1))  # an imported BART's need not be 0
    return model.double()


@pytest.mark.parametrize("name", ["led-tiny", "bart-tiny"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_of_each_pair_alone(name: str, smoothing: float) -> None:
    model, batch = led(name), pairs(is_global=name == "led-tiny")
    objective = objective_for(model, label_smoothing=smoothing)
    assert isinstance(objective, TargetLoss)
    loss = objective(batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):  # without padding
        n_source, n_target = int(batch.source_lengths_B[row]), int((batch.targets_BT[row] != IGNORE).sum())
        is_global = None if batch.is_global_BS is None else batch.is_global_BS[row : row + 1, :n_source]
        logits = model(
            batch.source_BS[row : row + 1, :n_source],
            batch.decoder_input_BT[row : row + 1, :n_target],
            is_global_BS=is_global,
        )
        target = batch.targets_BT[row, :n_target]
        total = total + F.cross_entropy(logits[0], target, reduction="sum", label_smoothing=smoothing)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert all(gradient is not None for gradient in found.values())


def test_validation_counts_the_target_alone() -> None:
    model, batch = led(), pairs()
    smoothed = objective_for(model, label_smoothing=0.2)
    assert isinstance(smoothed, TargetLoss)
    plain = objective_for(model)(batch).item()
    assert smoothed(batch).item() != pytest.approx(plain, rel=1e-3)
    assert smoothed.eval()(batch).item() == pytest.approx(plain, rel=1e-12)


def test_every_stack_has_its_blocks() -> None:
    model = led()
    assert blocks_of(model) == [*model.encoder.blocks, *model.blocks]
    assert len(blocks_of(model)) == 4


# -- runs -------------------------------------------------------------------------------------------------------------

SENTENCE = "The cat sat on mat {n}. Then the dog ran. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.mkdir()
    for number in range(12):
        (path / f"{number}.txt").write_text(SENTENCE.format(n=number) * 20)
    return path


def raw(text: Path, **changes: object) -> dict:
    config: dict = {
        "model": {
            "name": "led-tiny",
            "vocab_size": 258,
            "decoder_start_token": 256,
            "encoder": {"n_layers": 1},
            "decoder": {"n_layers": 1},
        },
        "data": {
            "path": str(text),
            "cache": str(text.parent / "cache"),
            "tokenizer": {"kind": "bytes"},
            "context": 48,
            "validation_fraction": 0.3,
            "denoising": {"probability": 0.3},
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": "fp32",
            "steps": 30,
            "global_batch": 8,
            "micro_batch": 4,
            "val_every": 10,
            "save_every": 10,
        },
        "optimizer": {"lr": 3e-3},
        "sample": {"max_new_tokens": 16},
        "callbacks": {"progress": "off"},
        "logger": {"wandb": "off"},
        "output": str(text.parent / "run"),
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def test_a_denoising_run_learns_and_shows_what_it_writes(text: Path) -> None:
    config = validate(raw(text))
    assert isinstance(config.model, Seq2SeqConfig)
    result = run.train(config)
    assert result.validation_loss is not None
    assert result.validation_loss < 0.75 * math.log(256)
    assert result.bits_per_byte is None
    model = load_model(result.directory / "checkpoints/step-00000030")
    fresh = build_from(config.model, seed=config.seed).state_dict()
    moved = {name: not torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items()}
    still = [name for name, changed in moved.items() if not changed and "k_proj.bias" not in name]
    assert still == ["head.bias"]  # nobody trains it; every other weight, those of global tokens among them, is
    sample = (result.directory / "sample.txt").read_text()
    assert re.fullmatch(r"== read ==\n.*<\|mask\|>.*\n\n== written ==\n.*\n\n== to be written ==\n.*\n", sample, re.S)
    report = (result.directory / "report.html").read_text()
    assert "n-gram" not in report
    assert "Perplexity<" not in report
    assert "nats per target token" in report
    assert not (result.directory / "evaluation.json").exists()


def test_micro_batches_do_not_change_the_step(text: Path) -> None:
    weights = []
    for micro in (8, 2):
        config = raw(text, trainer={"steps": 2, "micro_batch": micro}, output=str(text.parent / f"m{micro}"))
        result = run.train(validate(config))
        weights.append(load_model(result.directory / "checkpoints/step-00000002").state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=0)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    grads = []
    for change in (None, checkpoint_activations):
        model = led()
        if change is not None:
            change(model)
        objective_for(model)(pairs()).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*grads):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_a_tiny_batch_is_learnt_by_heart_and_written_greedily() -> None:
    model = zoo.build("led-tiny", {"decoder_start_token": 251}, seed=0)
    assert isinstance(model, Seq2Seq)
    objective, batch = objective_for(model), pairs()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (objective(batch) / batch.n_loss_tokens).backward()
        optimizer.step()
    assert (objective(batch) / batch.n_loss_tokens).item() < 0.02
    for row in range(3):
        n_source = int(batch.source_lengths_B[row])
        target = batch.targets_BT[row][batch.targets_BT[row] != IGNORE].tolist()
        assert batch.is_global_BS is not None
        written = generate(
            model,
            batch.source_BS[row : row + 1, :n_source],
            is_global_BT=batch.is_global_BS[row : row + 1, :n_source],
            max_new_tokens=len(target),
            temperature=0,
            stop_tokens={251},
            pad_token=251,
        )
        assert written[0].tolist() == [251, *target]


# -- pairs of texts ---------------------------------------------------------------------------------------------------

WORDS = ["north", "south", "east", "west", "up", "down"]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Two words to their initials, and one pair that is too long."""
    rows = [{"read": f"{one} {two}", "write": one[0] + two[0]} for one in WORDS for two in WORDS]
    rows.append({"read": "up " * 30, "write": "u" * 30})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def raw_pairs(records: Path, **changes: object) -> dict:
    examples = {"kind": "seq2seq", "path": str(records), "source_field": "read", "target_field": "write"}
    data = {
        "cache": str(records.parent / "cache"),
        "tokenizer": {"kind": "bytes"},
        "context": 21,  # no multiple of what batches are padded to
        "validation_fraction": 0.1,
        "examples": {**examples, "target_context": 7},
    }
    config = raw(records, **changes)
    return {**config, "data": {**data, **changes.get("data", {})}}  # type: ignore[dict-item]


def test_pairs_are_framed_cut_and_counted(records: Path) -> None:
    config = validate(raw_pairs(records))
    prepared = prepared_data(config.data, tokenizer=None, progress=None)
    data = training_data(config, prepared, BatchPlan(global_batch=8, micro_batch=4))
    assert isinstance(prepared, PreparedExamples)
    lines = list(described(prepared.store, data))
    cut = [line for line in lines if "longer than" in line]
    frame = replace(FRAME, source_context=21, target_context=7)
    counts = [PairItems(prepared.store, split=split, frame=frame).n_cut for split in SPLITS]
    assert sum(count["source"] for count in counts) == sum(count["target"] for count in counts) == 1
    assert len(cut) == 2 * counts[0]["source"]
    seen = set()
    for step in islice(data.train_dataloader(), 10):
        for batch in step:
            assert batch.source_BS.shape[1] <= 21
            assert batch.targets_BT.shape[1] <= 7
            for row, k in enumerate(batch.indices_B.tolist()):
                asked = batch.targets_BT[row][batch.targets_BT[row] != IGNORE].tolist()
                source = batch.source_BS[row, : int(batch.source_lengths_B[row])].tolist()
                assert (source[0], source[-1], asked[-1]) == (256, 256, 256)
                one, _, two = bytes(source[1:-1]).decode().partition(" ")
                written = bytes(asked[:-1]).decode()
                assert written in (one[0] + two[0], "u" * 6)
                seen.add((one, two, k % 33))
    assert len({pair[:2] for pair in seen}) == data.train.n_sequences  # more than a pass: each is there


def test_a_run_on_pairs_learns_them_and_answers_one(records: Path) -> None:
    trainer = {"steps": 200, "global_batch": 12, "micro_batch": 12, "val_every": 50, "save_every": 50}
    config = raw_pairs(records, trainer={**trainer, "label_smoothing": 0.1}, sample={"temperature": 0})
    config["data"]["examples"] |= {"limit": 12, "validation_path": str(records), "validation_limit": 12}
    result = run.train(validate(config))
    assert result.validation_loss is not None
    assert result.validation_loss < 0.3  # smoothing keeps it above 0.1; a guess of six initials would be 1.2
    read, written, wanted = re.findall(r"^== .* ==\n(.*)$", (result.directory / "sample.txt").read_text(), re.M)
    assert written == wanted
    assert read.startswith("<|endoftext|>")
    rows = read_rows(result.directory / "metrics.csv")
    assert rows[-1].loss is not None
    assert rows[-1].loss > result.validation_loss  # the smoothed loss has a floor, the validation's has none


def test_pairs_resume_to_the_same_weights(records: Path) -> None:
    weights = []
    for parts in ((20,), (10, 20)):
        output = str(records.parent / f"in-{len(parts)}")
        for steps in parts:
            config = raw_pairs(records, trainer={"steps": steps}, schedule={"name": "constant"}, output=output)
            run.train(validate({**config, "resume": "auto"}))
        weights.append((Path(output) / "checkpoints/step-00000020/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_stream_of_rows_that_were_padded_otherwise_is_not_resumed(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = raw_pairs(records, trainer={"steps": 2}, schedule={"name": "constant"}, output=str(records.parent / "old"))
    with monkeypatch.context() as before:
        before.setitem(PADDING, "shortest", 8)
        run.train(validate(config))
    config["trainer"]["steps"] = 3
    with pytest.raises(UserError, match=r"training data is not what the run was trained on .padding: .*8.* → .*16"):
        run.train(validate({**config, "resume": "auto"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"name": "longformer-tiny"}}, "data.examples.kind=seq2seq: fine-tunes an encoder–decoder; name an"),
        ({"data": {"examples": {"kind": "qa", "path": "x"}}}, "data.examples.kind=qa: fine-tunes an encoder; name an"),
        ({"data": {"context": 300}}, "data.context=300: is longer than model.encoder.max_positions=256"),
        (
            {"data": {"examples": {"kind": "seq2seq", "path": "x", "target_context": 129}}},
            "data.examples.target_context=129: is longer than model.decoder.max_positions=128",
        ),
        (
            {"data": {"examples": {"kind": "seq2seq", "path": "x", "label_field": "y"}}},
            "data.examples.label_field=y: belongs to kind=classification; kind=seq2seq here",
        ),
        ({"data": {"denoising": {}}}, "data.denoising: is for documents, and data.examples are read instead"),
    ],
)
def test_wrong_requests_for_pairs(records: Path, changes: dict, said: str) -> None:
    if "name" in changes.get("model", {}):
        config = {**raw_pairs(records), "model": {**changes["model"], "vocab_size": 512}}
    else:
        config = raw_pairs(records, **changes)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_label_smoothing_is_for_encoder_decoders(text: Path) -> None:
    config = raw(text, trainer={"label_smoothing": 0.1}, data={"denoising": None}) | {"model": {"name": "gpt-tiny"}}
    with pytest.raises(ConfigError, match=r"trainer\.label_smoothing=0\.1: is for encoder–decoders"):
        validate(config)


# -- wrong requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"denoising": None}}, "data.denoising=null: an encoder–decoder needs a source and a target"),
        ({"model": {"name": "gpt-tiny"}}, "model.encoder: unknown key"),
        ({"data": {"masking": {}, "denoising": None}}, "data.masking: asks for tokens where they were hidden"),
        ({"data": {"document_mask": True}}, "data.document_mask=true: an encoder–decoder reads a sequence as one text"),
        ({"data": {"context": 200}}, "data.context=200: is longer than model.decoder.max_positions=128"),
        ({"model": {"n_layers": 3}}, "an encoder–decoder has model.encoder.n_layers and model.decoder.n_layers"),
        ({"model": {"encoder": {"n_layer": 3}}}, "did you mean model.encoder.n_layers?"),
        ({"model": {"encoder": {"n_heads": 5}}}, "model.encoder: d_model=64 is not a multiple of n_heads=5"),
        ({"model": {"decoder": {"n_layers": 0}}}, "model.decoder.n_layers=0: it is at least 1"),
        (
            {"attention": {"patterns": {"all": {"causal": True}}}},
            "attention.patterns: an encoder–decoder has two stacks; give model.encoder.attention.patterns",
        ),
        (
            {"model": {"decoder": {"attention": {"patterns": {"all": {"causal": False}}}}}},
            "model.decoder.attention.patterns.all: causal=false",
        ),
    ],
)
def test_wrong_requests_are_told_before_anything_is_read(text: Path, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(raw(text, **changes))
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_denoising_is_not_for_other_models(text: Path) -> None:
    for name in ("gpt-tiny", "longformer-tiny"):
        config = raw(text) | {"model": {"name": name, "vocab_size": 512}}
        with pytest.raises(ConfigError, match=r"data\.denoising: makes a source and a target"):
            validate(config)


def test_tokenizers_that_do_not_fit_are_refused(text: Path) -> None:
    with pytest.raises(UserError, match=r"decoder_start_token=2: is a piece of text .* set .*decoder_start_token=256"):
        run.train(validate(raw(text, model={"name": "led-tiny", "vocab_size": 258, "decoder_start_token": 2})))
    byte_level().save(text.parent / "plain")
    tokenizer = {"kind": "file", "path": str(text.parent / "plain")}
    with pytest.raises(UserError, match=r"data\.denoising: the tokenizer has no mask token"):
        run.train(validate(raw(text, data={"tokenizer": tokenizer})))


def test_the_request_reads_back_the_same(text: Path) -> None:
    window = {"causal": False, "window": {"left": 4, "right": 4}, "global_tokens": True}
    for model in (
        {"name": "led-tiny", "encoder": {"n_layers": 3, "attention": {"patterns": {"near": window}}}},
        {"name": "bart-tiny", "decoder": {"n_kv_heads": 2}, "cross_attention": {"causal": False, "dropout": 0.1}},
        {"name": None, "architecture": "seq2seq", "encoder": {"d_ff": 64}},
    ):
        config = validate(raw(text) | {"model": {"vocab_size": 512, "decoder_start_token": 256, **model}})
        assert isinstance(config.model, Seq2SeqConfig)
        assert validate(json.loads(json.dumps(as_request(config)))) == config
    assert config.model.encoder.d_ff == 64
    assert config.model.decoder.d_ff == StackConfig().d_ff


def test_costs_are_those_of_a_pair(text: Path) -> None:
    config = validate(raw(text, data={"context": 100}))
    costs = sequence_costs(config, "fp32")
    assert isinstance(config.model, Seq2SeqConfig)
    # 30 of 100 tokens hidden in about 10 spans.
    assert costs.flops_per_token == seq2seq_training_flops(config.model, source=80, target=100, n_global=1) / 100
    assert costs.note == "for each target of 100 tokens a source of about 80"
    assert plan(config).to_dict()["parameters"] == {
        **asdict(parameters(config.model)),
        "total": sum(p.numel() for p in build_from(config.model, device="meta").parameters()),
    }
