"""Recall of a key: a model that copies has all of it, one without memory what can be guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longspan.evaluation.context.recall import ASKED, KEY, fitting_lengths, measure_recall

VOCABULARY = 50


class Copier(nn.Module):
    """Predicts what followed the last earlier occurrence of the longest matching end, as induction heads would; with
    `memory=False` always token 0."""

    def __init__(self, *, memory: bool) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("head_weight", torch.eye(VOCABULARY))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        hidden = torch.zeros(*tokens_BT.shape, VOCABULARY)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for t in range(len(tokens)):
                guess = 0
                if self.memory:
                    best = 0
                    for s in range(t):
                        n = 0
                        while n <= s and tokens[s - n] == tokens[t - n]:
                            n += 1
                        if n > best:
                            best, guess = n, tokens[s + 1]
                hidden[row, t, guess] = 1.0
        return hidden


def test_recall_tells_memory_from_guessing() -> None:
    text = np.random.default_rng(1).integers(VOCABULARY, size=4000)
    (with_memory,) = measure_recall(Copier(memory=True), text, lengths=(64,), trials=6, device="cpu")
    (without,) = measure_recall(Copier(memory=False), text, lengths=(64,), trials=6, device="cpu")
    assert with_memory.found == 1.0
    assert with_memory.guessed < 0.3
    assert without.found == without.guessed < 0.2
    assert (with_memory.trials, with_memory.length) == (6, 64)


def test_recall_at_the_shortest_length_and_below() -> None:
    text = np.random.default_rng(1).integers(VOCABULARY, size=400)
    (found,) = measure_recall(Copier(memory=True), text, lengths=(2 * KEY,), trials=4, device="cpu")
    assert found.found == 1.0
    with pytest.raises(ValueError, match="length=31: a text needs room for the key twice"):
        measure_recall(Copier(memory=True), text, lengths=(31,), trials=1, device="cpu")
    assert ASKED == KEY // 2
    assert fitting_lengths(256) == (32, 64, 128, 256)
    assert fitting_lengths(64) == (32, 64)
