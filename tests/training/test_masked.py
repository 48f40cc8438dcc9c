"""Encoders through the same runs as decoders: masked language modelling from a config to a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from longspan.data.tokenizer import Tokenizer
from longspan.model.build import build_from
from longspan.model.checkpoint import load_model
from longspan.model.config import EncoderConfig
from longspan.model.encoder import Encoder
from longspan.training import run
from longspan.training.errors import UserError
from longspan.training.schema import ConfigError, as_request, validate


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.mkdir()
    for number in range(12):
        (path / f"{number}.txt").write_text(f"document {number}: the cat sat on the mat and the dog ran. " * 30)
    return path


def raw(text: Path, **changes: object) -> dict:
    config: dict = {
        "model": {"name": "longformer-tiny", "vocab_size": 512},
        "data": {
            "path": str(text),
            "cache": str(text.parent / "cache"),
            "tokenizer": {"kind": "bytes"},
            "context": 64,
            "validation_fraction": 0.3,
            "masking": {"probability": 0.15},
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
        "callbacks": {"progress": "off"},
        "logger": {"wandb": "off"},
        "output": str(text.parent / "run"),
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return config


def test_a_run_learns_and_leaves_what_it_does_not_train(text: Path) -> None:
    config = validate(raw(text))
    assert isinstance(config.model, EncoderConfig)
    result = run.train(config)
    assert result.validation_loss is not None
    assert result.validation_loss < 0.75 * math.log(256)
    assert result.bits_per_byte is None
    model = load_model(result.directory / "checkpoints/step-00000030")
    assert isinstance(model, Encoder)
    tokenizer = Tokenizer.load(result.directory / "checkpoints/step-00000030")
    assert tokenizer.mask_id == 257
    fresh = build_from(config.model, seed=config.seed).state_dict()
    moved = {name: not torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items()}
    # Biases of keys change no softmax; what moves them is the optimizer's noise alone.
    assert all(moved[name] for name in moved if "global_attention" not in name and "k_proj.bias" not in name)
    assert not any(moved[name] for name in moved if "global_attention" in name)
    assert not (result.directory / "evaluation.json").exists()
    assert (result.directory / "report.html").is_file()


def test_a_run_resumes_to_the_same_weights(text: Path) -> None:
    whole = run.train(validate(raw(text, trainer={"steps": 20})))
    weights = (whole.directory / "checkpoints/step-00000020/model.safetensors").read_bytes()
    output = str(text.parent / "second")
    run.train(validate(raw(text, trainer={"steps": 10}, schedule={"name": "constant"}, output=output)))
    first = run.train(
        validate(raw(text, trainer={"steps": 20}, schedule={"name": "constant"}, output=output, resume="auto"))
    )
    straight = str(text.parent / "third")
    third = run.train(validate(raw(text, trainer={"steps": 20}, schedule={"name": "constant"}, output=straight)))
    read = [(r.directory / "checkpoints/step-00000020/model.safetensors").read_bytes() for r in (first, third)]
    assert read[0] == read[1]
    assert read[0] != weights  # another schedule
    with pytest.raises(UserError, match="masking"):
        run.train(
            validate(
                raw(text, trainer={"steps": 30}, output=output, resume="auto", data={"masking": {"probability": 0.3}})
            )
        )


def test_micro_batches_do_not_change_the_step(text: Path) -> None:
    losses = []
    for micro in (8, 2):
        config = raw(text, trainer={"steps": 2, "micro_batch": micro}, output=str(text.parent / f"m{micro}"))
        result = run.train(validate(config))
        losses.append(load_model(result.directory / "checkpoints/step-00000002").state_dict())
    for name, tensor in losses[0].items():
        torch.testing.assert_close(losses[1][name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"masking": None}}, "data.masking=null: an encoder sees the next token"),
        ({"model": {"name": "gpt-tiny"}}, "data.masking: a decoder predicts the next token"),
        ({"model": {"head": "none"}}, "model.head=none: documents teach the masked-LM head"),
        ({"data": {"masking": {"masked": 0.9, "random": 0.3}}}, "data.masking.masked=0.9: and data.masking.random=0.3"),
        ({"model": {"vocab_size": 257}}, "makes 258 tokens, more than model.vocab_size=257"),
        ({"model": {"n_type": 3}}, "model.n_type=3: unknown key; did you mean model.n_types?"),
        ({"model": {"name": "gpt-tiny", "n_types": 3}, "data": {"masking": None}}, "model.n_types: unknown key"),
    ],
)
def test_wrong_requests_are_told_before_anything_is_read(text: Path, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(raw(text, **changes))
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_a_tokenizer_without_mask_token_is_refused(text: Path) -> None:
    from longspan.data.tokenizer import byte_level

    byte_level().save(text.parent / "plain")
    tokenizer = {"kind": "file", "path": str(text.parent / "plain")}
    with pytest.raises(UserError, match=r"data\.masking: the tokenizer has no mask token"):
        run.train(validate(raw(text, data={"tokenizer": tokenizer})))


def test_the_request_reads_back_the_same(text: Path) -> None:
    for model in ({"name": "longformer-tiny", "vocab_size": 512}, {"architecture": "encoder", "vocab_size": 512}):
        config = validate(raw(text, model={"name": None, **model}, data={"context": 32}))
        assert validate(json.loads(json.dumps(as_request(config)))) == config
