"""Measurements that were stopped and go on: the same numbers, nothing computed twice, nothing of another protocol."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longspan.evaluation.context.effective import ContextCurve, measure_context_curve
from longspan.evaluation.journal import keep, kept_records
from longspan.evaluation.perplexity.documents import EvalDocument

PROTOCOL = {"length": 8, "lengths": (1, 2)}


class Counted(nn.Module):
    """The nll of a token depends on all before it; stopped before its forward pass number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(11, 6, generator=generator) * 2
        self.head_weight = torch.randn(11, 6, generator=generator)
        self.stop = stop
        self.read: list[tuple[int, int]] = []  # rows and tokens of each pass

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        if len(self.read) == self.stop:
            raise KeyboardInterrupt
        self.read.append((tokens_BT.shape[0], tokens_BT.shape[1]))
        embedded_BTD = self.embedding[tokens_BT]
        return embedded_BTD.cumsum(1) / torch.arange(1, tokens_BT.shape[1] + 1)[:, None] + embedded_BTD


def documents(*lengths: int, seed: int = 0) -> list[EvalDocument]:
    rng = np.random.default_rng(seed)
    return [EvalDocument(tokens=rng.integers(0, 11, n), n_bytes=n, id=str(i)) for i, n in enumerate(lengths)]


def measure(model: Counted, of: list[EvalDocument], kept: Path | None, **more) -> ContextCurve:
    asked = {"lengths": [6, 12], "batch": 3, "device": "cpu", "targets": 3, "blocks": 3}
    return measure_context_curve(model, of, kept=kept, **(asked | more))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_effective_context_goes_on_where_it_was_stopped(tmp_path: Path, stop: int) -> None:
    """Six blocks at two lengths are four passes of three: what is done is not done again, and the curve is the same."""
    texts = documents(30, 17, 13)
    whole = Counted()
    expected = measure(whole, texts, None)
    assert whole.read == [(3, 12), (3, 12), (3, 6), (3, 6)]
    kept = tmp_path / "kept.jsonl"
    stopped = Counted(stop)
    with pytest.raises(KeyboardInterrupt):
        measure(stopped, texts, kept)
    with kept.open("ab") as file:
        file.write(b'{"length": 6, "blo')  # killed while it wrote
    again, seen = Counted(), []
    found = measure(again, texts, kept, progress=lambda done, total: seen.append((done, total)))
    assert stopped.read + again.read == whole.read
    np.testing.assert_array_equal(found.nll_dL, expected.nll_dL)
    assert (found.units, found.tokens_sha256) == (expected.units, expected.tokens_sha256)
    tokens = [rows * length for rows, length in whole.read]
    assert seen == [(sum(tokens[:n]), sum(tokens)) for n in range(stop, 5)]
    nothing_left = Counted(0)
    np.testing.assert_array_equal(measure(nothing_left, texts, kept).nll_dL, expected.nll_dL)


def test_effective_context_does_not_go_on_with_other_text_or_lengths(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    measure(Counted(), documents(30, 17), kept)
    with pytest.raises(ValueError, match=r"holds results by another protocol \(tokens_sha256='"):
        measure(Counted(), documents(30, 17, seed=1), kept)
    with pytest.raises(ValueError, match=r"\(lengths=\[6, 12\], now \[6, 10\]\); give another output"):
        measure(Counted(), documents(30, 17), kept, lengths=[6, 10])
    with pytest.raises(ValueError, match=r"\(tokenizer_sha256=None, now 'a'\)"):
        measure(Counted(), documents(30, 17), kept, tokenizer_sha256="a")


def test_a_journal_keeps_what_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.jsonl"
    assert kept_records(path, PROTOCOL) == []
    for number in (1, 2):
        keep(path, PROTOCOL, {"number": number, "text": "naïve\u2028\n"})
    expected = [{"number": number, "text": "naïve\u2028\n"} for number in (1, 2)]
    assert kept_records(path, PROTOCOL) == expected
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        path.write_bytes(whole[: -cut - 1])
        assert kept_records(path, PROTOCOL) == expected[:1]
    keep(path, PROTOCOL, expected[1])
    assert path.read_bytes() == whole
    path.write_text(json.dumps({"protocol": PROTOCOL}) + "\n")
    assert kept_records(path, PROTOCOL) == []
    assert not path.exists(), "a header alone keeps nothing"
