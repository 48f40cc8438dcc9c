"""Whether something said once is found again: a key of random tokens early in a text, its beginning again at the end.

The last tokens of the key can be known from its first occurrence alone, because they were drawn at random; how often
they are guessed without it is measured too, on the same texts with the first occurrence left out. No tokenizer and no
instruction is involved, so any decoder can be asked (induction: Olsson et al. 2022, arXiv 2209.11895).

Legend: B texts, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..passes import LanguageModel, Precision, autocast

KEY = 16  # tokens of a key
ASKED = 8  # the last ones, which are asked for
_BATCH = 8  # texts in a forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """length   tokens of each text
    trials      texts
    found       share of the asked tokens that the model holds likeliest, the key being in the text
    guessed     the same where it is not: what can be had without looking back
    """

    length: int
    trials: int
    found: float
    guessed: float


@torch.no_grad()
def measure_recall(
    model: LanguageModel,
    text: np.ndarray,
    *,
    lengths: Sequence[int],
    trials: int,
    device: torch.device | str,
    precision: Precision = "fp32",
    seed: int = 0,
) -> tuple[Recall, ...]:
    """One result for each length.

    text   token ids of held-out documents: what stands around the key, and what its tokens are drawn from
    seed   of places and keys; the same for every model that is compared

    Raises ValueError for lengths that leave no room for a key twice, and for an empty text.
    """
    if not len(text):
        raise ValueError("no held-out text to hide a key in")
    shortest = 2 * KEY
    if min(lengths) < shortest:
        raise ValueError(f"length={min(lengths)}: a text needs room for the key twice; give at least {shortest} tokens")
    was_training = model.training
    model.train(False)
    try:
        return tuple(
            _of_length(model, text, length, trials, torch.device(device), precision, seed) for length in lengths
        )
    finally:
        model.train(was_training)


def fitting_lengths(context: int) -> tuple[int, ...]:
    """An eighth, a quarter, a half and all of a context, as far as a key fits."""
    return tuple(length for length in (context // 8, context // 4, context // 2, context) if length >= 2 * KEY)


def _of_length(
    model: LanguageModel,
    text: np.ndarray,
    length: int,
    trials: int,
    device: torch.device,
    precision: Precision,
    seed: int,
) -> Recall:
    rng = np.random.default_rng([seed, length])
    planted, absent, asked = zip(*(_trial(text, length, rng) for _ in range(trials)))
    hits = {
        name: _hits(model, np.stack(texts), np.stack(asked), device, precision)
        for name, texts in (("planted", planted), ("absent", absent))
    }
    count = trials * ASKED
    return Recall(length=length, trials=trials, found=hits["planted"] / count, guessed=hits["absent"] / count)


def _trial(text: np.ndarray, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The text with the key, the same without, and the tokens that are asked for."""
    n_read = length - 1  # the last token asked for is never read
    start = int(rng.integers(len(text)))
    around = np.take(text, range(start, start + n_read), mode="wrap").astype(np.int64)
    key = text[rng.integers(len(text), size=KEY)].astype(np.int64)
    around[n_read - (KEY - 1) :] = key[:-1]
    planted = around.copy()
    last_place = max(1, (n_read - 2 * KEY + 1) // 2)  # in the first half, and apart from its repetition
    place = int(rng.integers(last_place))
    planted[place : place + KEY] = key
    return planted, around, key[-ASKED:]


def _hits(
    model: LanguageModel, texts_BT: np.ndarray, asked_BA: np.ndarray, device: torch.device, precision: Precision
) -> int:
    hits = 0
    for first in range(0, len(texts_BT), _BATCH):
        tokens_BT = torch.from_numpy(texts_BT[first : first + _BATCH]).to(device)
        asked = torch.from_numpy(asked_BA[first : first + _BATCH]).to(device)
        with autocast(device, precision):
            logits = model.hidden(tokens_BT)[:, -ASKED:] @ model.head_weight.T
        hits += int((logits.argmax(dim=-1) == asked).sum())
    return hits
