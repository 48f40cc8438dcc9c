"""Fine-tuning on labelled examples: losses, runs from a config to scores, fresh heads, resumption, wrong requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.data.labelled import LabelledBatch, Row, batch_of
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.readers.predictions import logits_of, predict_answers, predict_classes
from longspan.model.checkpoint import load_model, load_weights
from longspan.model.encoder import Encoder
from longspan.model.zoo import build
from longspan.training import run
from longspan.training.errors import UserError
from longspan.training.objectives import objective_for
from longspan.training.schema import ConfigError, as_request, validate

CLASSES = {"head": "classification", "labels": ["no", "yes"], "pooler": True}
QA = {"head": "qa", "labels": [], "pooler": False}


def merged(base: dict, changes: Mapping[str, object]) -> dict:
    for key, value in changes.items():
        inner = base.get(key)
        base[key] = merged(dict(inner), value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return base


def raw(folder: Path, **changes: object) -> dict:
    config: dict = {
        "model": {"name": "bert-tiny", "vocab_size": 260, "n_layers": 1, "max_positions": 64, **CLASSES},
        "data": {
            "cache": str(folder / "cache"),
            "tokenizer": {"kind": "bytes"},
            "context": 32,
            "validation_fraction": 0.25,
            "examples": {"kind": "classification", "path": str(folder / "classes.jsonl")},
        },
        "trainer": {
            "accelerator": "cpu",
            "precision": "fp32",
            "steps": 30,
            "global_batch": 8,
            "micro_batch": 4,
            "val_every": 10,
            "val_batches": 100,
            "save_every": 10,
        },
        "optimizer": {"lr": 3e-3},
        "callbacks": {"progress": "off", "report": False},
        "logger": {"wandb": "off"},
        "output": str(folder / "run"),
    }
    return merged(config, changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts whose first letter is their class, and key-value texts with questions."""
    rng = np.random.default_rng(0)
    with (tmp_path / "classes.jsonl").open("w") as file:
        for i in range(48):
            text = "ab"[i % 2] + "xyz"[i % 3] * int(rng.integers(1, 40)) + str(i)
            file.write(json.dumps({"text": text, "label": ["no", "yes"][i % 2]}) + "\n")
    with (tmp_path / "answers.jsonl").open("w") as file:
        for i in range(12):
            row = {"question": "kl"[i % 2], "context": f"{'.' * i}k=A{'-' * (i % 3)} l=B", "answers": "AB"[i % 2]}
            file.write(json.dumps(row) + "\n")
    return tmp_path


class TestLosses:
    def batch(self, targets: list[list[int]]) -> LabelledBatch:
        rows = [Row(tokens=list(range(n)), n_task=3, begin=4, first=0, size=n - 5, is_pair=True) for n in (9, 20, 12)]
        return batch_of(rows, pad=0, limit=64, records=[0, 1, 2], indices=[0, 1, 2], targets=targets)

    def test_answers_against_a_plain_computation(self):
        model = build("bert-tiny", {"head": "qa"}, seed=0)
        assert isinstance(model, Encoder)
        batch = self.batch([[5, 7], [0, 0], [4, 4]])
        nll = objective_for(model)(batch)
        logits_BT2 = logits_of(model, batch).detach().double().numpy()
        plain = 0.0
        for row, length in enumerate(batch.lengths_B.tolist()):
            for end in (0, 1):
                scores = logits_BT2[row, :length, end]
                plain += (math.log(np.exp(scores).sum()) - scores[int(batch.targets_BN[row, end])]) / 2
        assert float(nll.detach()) == pytest.approx(plain, rel=1e-5)
        assert int(batch.n_loss_tokens) == 3

    def test_classes_against_a_plain_computation(self):
        model = build("longformer-tiny", CLASSES, seed=0)
        assert isinstance(model, Encoder)
        batch = self.batch([[1], [0], [1]])
        nll = objective_for(model)(batch)
        logits_BC = logits_of(model, batch).detach().double().numpy()
        shares_BC = np.exp(logits_BC) / np.exp(logits_BC).sum(1, keepdims=True)
        assert float(nll.detach()) == pytest.approx(-np.log(shares_BC[[0, 1, 2], [1, 0, 1]]).sum(), rel=1e-5)

    def test_every_weight_learns(self):
        """Nothing hangs in the gradient reduction without a gradient."""
        for overrides, targets in (
            (CLASSES, [[1], [0], [1]]),
            ({"head": "qa", "pooler": True}, [[5, 7], [0, 0], [4, 4]]),
        ):
            objective = objective_for(build("longformer-tiny", overrides, seed=0))
            objective(self.batch(targets)).backward()
            assert isinstance(objective, torch.nn.Module)
            learning = {name for name, weight in objective.named_parameters() if weight.requires_grad}
            assert {name for name, weight in objective.named_parameters() if weight.grad is not None} == learning
            assert any("global_attention" in name for name in learning)


class TestRuns:
    def test_classes_are_learned_to_the_last(self, folder: Path):
        result = run.train(validate(raw(folder)))
        assert result.scores["accuracy"] == 1
        assert result.scores["macro_f1"] == 1
        n = result.scores["n"]
        assert result.bits_per_byte is None
        lines = (folder / "run" / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
        scored = {int(row["step"]): row["accuracy"] for row in rows if row["accuracy"]}
        assert list(scored) == [10, 20, 30]
        assert float(scored[30]) == 1
        assert all(row["mfu"] == "" for row in rows)
        record = json.loads((folder / "run" / "evaluation.json").read_text())["examples"]
        assert record["n"] == n
        assert record["protocol"]["classes"] == ["no", "yes"]
        assert json.loads((folder / "run" / "summary.json").read_text())["accuracy"] == 1
        best = folder / "run" / "checkpoints" / "step-00000030"
        model = load_model(best)
        assert isinstance(model, Encoder)
        guesses = predict_classes(model, Tokenizer.load(best), ["axx1", "bxx2", "azz"], context=32)
        assert [guess.label for guess in guesses] == ["no", "yes", "no"]

    def test_answers_are_learned_to_the_last(self, folder: Path):
        changes = {
            "model": {"head": "qa", "labels": [], "pooler": False, "n_layers": 2},
            "data": {
                "context": 64,
                "validation_fraction": 0,
                "examples": {
                    "kind": "qa",
                    "path": str(folder / "answers.jsonl"),
                    "validation_path": str(folder / "answers.jsonl"),
                    "max_answer_tokens": 4,
                },
            },
            "trainer": {"steps": 120, "val_every": 60},
        }
        result = run.train(validate(raw(folder, **changes)))
        assert result.scores == {"exact_match": 1, "f1": 1, "n": 12}
        best = folder / "run" / "checkpoints" / "step-00000120"
        model = load_model(best)
        assert isinstance(model, Encoder)
        answers = predict_answers(model, Tokenizer.load(best), [("k", "..k=A-- l=B"), ("l", ".k=A- l=B")])
        assert [(answer.text, answer.start) for answer in answers] == [("A", 4), ("B", 8)]

    def test_a_run_goes_on_bit_for_bit(self, folder: Path):
        changes = {"model": {"dropout": 0.1}, "schedule": {"name": "constant", "warmup": 0}}
        trainer = {"save_every": 4, "micro_batch": 8}
        run.train(validate(raw(folder, **changes, trainer={**trainer, "steps": 12}, output=str(folder / "whole"))))
        parts = {"output": str(folder / "parts"), "resume": "auto"}
        for steps in (4, 12):
            run.train(validate(raw(folder, **changes, **parts, trainer={**trainer, "steps": steps})))
        whole, resumed = (load_weights(folder / name / "checkpoints/step-00000012") for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_other_classes_in_the_data_are_refused(self, folder: Path):
        with pytest.raises(ValueError, match=r"model.labels=\['no', 'maybe'\]: the examples also have yes"):
            run.train(validate(raw(folder, model={"labels": ["no", "maybe"]})))
        assert not (folder / "run" / "checkpoints").exists()


class TestFreshHeads:
    @pytest.fixture
    def trained(self, folder: Path) -> Path:
        """A run that taught a masked-LM head."""
        text = folder / "text"
        text.mkdir()
        for number in range(6):
            (text / f"{number}.txt").write_text(f"document {number}: the cat sat on the mat. " * 20)
        data = {"path": str(text), "examples": None, "masking": {"probability": 0.15}}
        model = {"head": "mlm", "labels": [], "pooler": False}
        changes = {"model": model, "data": data, "trainer": {"steps": 2}, "output": str(folder / "trained")}
        run.train(validate(raw(folder, **changes)))
        return folder / "trained"

    def test_a_head_is_replaced_and_that_is_said(self, folder: Path, trained: Path):
        # As a user types it: what the command line has of a model is a decoder's where none is chosen.
        model = {"name": "gpt-tiny", "vocab_size": 260, "head": "classification", "labels": ["no", "yes"]}
        config = raw(folder, checkpoint=str(trained), optimizer={"lr": 1e-12}, trainer={"steps": 1})
        config["model"] = model
        result = run.train(validate(config))
        made = result.directory / "checkpoints" / "step-00000001"
        before, after = load_weights(trained / "checkpoints" / "step-00000002"), load_weights(made)
        trunk = [name for name in before if not name.startswith("head.")]
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in trunk)
        lineage = json.loads((made / "lineage.json").read_text())
        assert lineage["parent"] == str(trained / "checkpoints" / "step-00000002")
        assert lineage["head"]["before"] == "mlm"
        assert lineage["head"]["after"] == "classification"
        assert set(lineage["head"]["dropped"]) == {name for name in before if name.startswith("head.")}
        fresh = {"head.out_proj.weight", "head.out_proj.bias", "pooler.weight", "pooler.bias"}
        assert set(lineage["head"]["fresh"]) == fresh == set(after) - set(trunk)
        log = (result.directory / "train.log").read_text()
        assert "head=classification replaces head=mlm; dropped head." in log
        assert json.loads((made / "config.json").read_text())["labels"] == ["no", "yes"]
        assert json.loads((result.directory / "config.yaml").read_text())["model"]["head"] == "classification"

    def test_classes_stay_where_nobody_names_others(self, folder: Path):
        run.train(validate(raw(folder, trainer={"steps": 1})))
        config = raw(folder, checkpoint=str(folder / "run"), output=str(folder / "more"), trainer={"steps": 1})
        del config["model"]
        result = run.train(validate(config))
        lineage = json.loads((result.directory / "lineage.json").read_text())
        assert "head" not in lineage
        config["output"] = str(folder / "other")
        config["model"] = {"head": "classification", "labels": ["yes", "no"]}
        lineage = json.loads((run.train(validate(config)).directory / "lineage.json").read_text())
        assert set(lineage["head"]["fresh"]) == {"head.out_proj.weight", "head.out_proj.bias"}
        assert set(lineage["head"]["dropped"]) == set(lineage["head"]["fresh"])

    def test_classes_that_nobody_names(self, folder: Path, trained: Path):
        config = raw(folder, checkpoint=str(trained))
        del config["model"]
        with pytest.raises(UserError, match=r"model.labels=\[\]: .*has no classes; name those of data.examples"):
            run.train(validate(config))


class TestRequests:
    def test_they_come_back(self, folder: Path):
        config = validate(raw(folder))
        assert validate(as_request(config)) == config

    @pytest.mark.parametrize(
        ("changes", "sentences"),
        [
            ({"data": {"examples": {"kind": "qas"}}}, ["did you mean qa?"]),
            ({"data": {"examples": {"lable_field": "x"}}}, ["did you mean data.examples.label_field?"]),
            ({"data": {"examples": {"path": None}}}, ["names no records; give data.examples.path or"]),
            ({"data": {"examples": {"made": "packages"}}}, ["and data.examples.made are two sources"]),
            (
                {"data": {"examples": {"path": None, "made": "parameters"}}},
                ["data.examples.made=parameters: makes examples of kind=qa"],
            ),
            ({"data": {"examples": {"overlap": 3}}}, ["data.examples.overlap=3: belongs to kind=qa"]),
            (
                {"data": {"examples": {"kind": "qa", "overlap": 32}}, "model": QA},
                ["data.examples.overlap=32: windows of data.context=32 tokens would never end"],
            ),
            (
                {"data": {"masking": {"probability": 0.2}}},
                ["data.masking: is for documents"],
            ),
            ({"data": {"path": "x"}}, ["data.path: is for documents"]),
            ({"data": {"document_mask": True}}, ["data.document_mask=true: is for packed documents"]),
            ({"data": {"examples": {"validation_limit": 3}}}, ["belongs to data.examples.validation_path"]),
            (
                {"model": {"head": "mlm", "labels": [], "pooler": False}},
                ["model.head=mlm: data.examples.kind=classification trains another head; set model.head="],
            ),
            ({"model": {"labels": []}}, ["head=classification names at least 1 class"]),
            ({"data": {"examples": None}}, ["documents teach the masked-LM head", "data.masking=null"]),
        ],
    )
    def test_wrong_ones(self, folder: Path, changes: dict, sentences: list[str]):
        with pytest.raises(ConfigError) as refusal:
            validate(raw(folder, **changes))
        for sentence in sentences:
            assert sentence in str(refusal.value)

    def test_a_decoder_is_not_fine_tuned(self, folder: Path):
        config = raw(folder)
        config["model"] = {"name": "gpt-tiny", "vocab_size": 260}
        with pytest.raises(ConfigError, match="kind=classification: fine-tunes an encoder; name an encoder"):
            validate(config)
