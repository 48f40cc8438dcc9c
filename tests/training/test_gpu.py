"""Training on CUDA: precision, continuing, FSDP and compiled blocks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from longspan.training.metrics import read_rows
from longspan.training.run import train
from longspan.training.schema import validate

pytestmark = [
    pytest.mark.gpu,
    # Inductor, imported by the first compilation, uses what torch itself deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    # Dynamo looks at .grad of the activations that enter flex attention, to see what they are.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]

SHAPE = {"n_layers": 2, "d_model": 128, "n_heads": 2, "d_ff": 256}


@pytest.fixture
def gpu_request(request_of):
    def build(**changes: object) -> dict:
        raw = request_of(trainer__accelerator="gpu", data__context=64, **changes)
        raw["model"] = {**raw["model"], **SHAPE}
        return raw

    return build


def losses(run: Path) -> list[float | None]:
    return [row.loss for row in read_rows(run / "metrics.csv")]


def test_auto_is_bf16_mixed_with_a_known_mfu(gpu_request, tmp_path: Path) -> None:
    train(validate(gpu_request(trainer__precision="auto")))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "bf16-mixed on cuda; auto: the GPU multiplies bf16 on its tensor cores" in log
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    state = torch.load(tmp_path / "run/checkpoints/step-00000010/trainer.ckpt", weights_only=True)
    assert {tensor.dtype for entry in state["optimizer"]["state"].values() for tensor in entry.values()} == {
        torch.float32
    }
    assert "cuda" in state["rng"][0]


def test_a_killed_run_continues_bit_by_bit(gpu_request, runner, tmp_path: Path) -> None:
    assert runner.run(gpu_request(output=str(tmp_path / "whole"))) == 0, runner.log.read_text()
    config = gpu_request(resume="auto")
    assert runner.run(config, kill="row:5") == -signal.SIGKILL, runner.log.read_text()
    assert runner.run(config) == 0, runner.log.read_text()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategies_compute_the_same(strategy: str, gpu_request, runner, tmp_path: Path) -> None:
    ranks = min(2, torch.cuda.device_count())
    assert runner.run(gpu_request(output=str(tmp_path / "alone"), model__dropout=0.0)) == 0, runner.log.read_text()
    config = gpu_request(model__dropout=0.0, trainer__strategy=strategy, trainer__devices=ranks)
    assert runner.run(config, ranks=ranks) == 0, runner.log.read_text()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


def test_compiled_blocks_and_recomputation(gpu_request, tmp_path: Path) -> None:
    plain = gpu_request(output=str(tmp_path / "plain"), model__dropout=0.0)
    clever = gpu_request(model__dropout=0.0, trainer__compile=True, trainer__activation_checkpointing=True)
    train(validate(plain))
    train(validate(clever))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)


def test_loss_curves_of_backends_agree(gpu_request, tmp_path: Path) -> None:
    """200 fp32 steps with a windowed pattern: sdpa, flex and the reference within 1e-4."""
    curves = {}
    for backend in ("reference", "sdpa", "flex"):
        raw = gpu_request(
            output=str(tmp_path / backend), model__dropout=0.0, trainer__steps=200, trainer__precision="fp32"
        )
        raw["attention"] = {
            "patterns": {"local": {"causal": True, "window": {"left": 15}}},
            "layers": ["local"],
            "backend": {"train": backend},
        }
        train(validate(raw))
        curves[backend] = losses(tmp_path / backend)
    assert curves["sdpa"] == pytest.approx(curves["reference"], abs=1e-4)
    assert curves["flex"] == pytest.approx(curves["reference"], abs=1e-4)
