"""Encoder–decoders through the same runs as the others: their loss, and denoising from a config to a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longspan.data.batch import IGNORE
from longspan.data.seq2seq import PairFrame, Seq2SeqBatch
from longspan.model import zoo
from longspan.model.seq2seq import Seq2Seq
from longspan.training.module import blocks_of
from longspan.training.objectives import TargetLoss, objective_for

FRAME = PairFrame(before=(250,), after=(251,), begin=(), end=251, start=251, is_global=True)


def pairs(*, is_global: bool = True) -> Seq2SeqBatch:
    generator = np.random.default_rng(0)
    lengths = [(40, 12), (17, 30), (3, 1)]
    texts = [(generator.integers(0, 250, source), generator.integers(0, 250, target)) for source, target in lengths]
    frame = (
        FRAME if is_global else PairFrame(before=(250,), after=(251,), begin=(), end=251, start=251, is_global=False)
    )
    return frame.batch(texts, [4, 5, 6])


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
