"""Reading beyond the training length without training."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longspan.benchmarks import extension
from longspan.benchmarks.extension import METHODS, applicable, losses, main, measure
from longspan.data.tokenizer import byte_level
from longspan.model.checkpoint import save_model
from longspan.model.config import DecoderConfig
from longspan.model.decoder import Decoder, from_config

CONFIG = DecoderConfig(
    vocab_size=260, n_layers=2, d_model=32, n_heads=2, d_ff=64, max_positions=16, positions="rope", init_std=0.5
)


@pytest.fixture
def model() -> Decoder:
    return from_config(CONFIG, seed=0).eval()


def texts(count: int, length: int) -> torch.Tensor:
    return torch.randint(260, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [5, 7, 64])
def test_the_same_tokens_are_scored_at_every_length(
    model: Decoder, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "CHUNK", chunk)
    tokens_BT = texts(2, 41)
    for length in (8, 24, 40):
        logits_BTV = model(tokens_BT[:, -length - 1 : -1])[:, -8:]
        expected = torch.nn.functional.cross_entropy(
            logits_BTV.double().transpose(1, 2), tokens_BT[:, -8:], reduction="none"
        )
        found = losses(model, tokens_BT, length=length, scored=8)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_every_method_is_measured_with_one_factor_for_all_lengths(model: Decoder) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens_BT = texts(3, 65)
    found = list(measure(model, tokens_BT, lengths=[16, 64], methods=list(METHODS), window=8, scored=4))
    assert [(reading.method, reading.length) for reading in found] == [
        (method, length) for method in METHODS for length in (16, 64)
    ]
    at = {(reading.method, reading.length): reading for reading in found}
    # linear, at length 16 as at 64, is the model that reads every position divided by 64 / 16
    scaled = from_config(CONFIG, seed=0).eval().requires_grad_(False)
    positions = torch.arange(16)[None] / 4
    assert scaled.rotary is not None
    rates = CONFIG.rope_theta ** (-torch.arange(0, 16, 2).double() / 16)
    angles = positions[..., None].double() * rates
    cos, sin = angles.cos().float()[:, :, None], angles.sin().float()[:, :, None]
    scaled.rotary.forward = lambda *_: (cos, sin)  # type: ignore[method-assign]
    nll = torch.nn.functional.cross_entropy(
        scaled(tokens_BT[:, -17:-1])[:, -4:].transpose(1, 2), tokens_BT[:, -4:], reduction="none"
    )
    assert at["linear", 16].loss == pytest.approx(float(nll.mean()), abs=1e-5)
    assert at["linear", 16].error == pytest.approx(float(nll.mean(dim=1).std() / 3**0.5), abs=1e-5)
    # Dynamic scaling is none within the trained length, and something else beyond it.
    assert at["dynamic", 16].loss == at["none", 16].loss
    assert at["dynamic", 64].loss != at["none", 64].loss
    assert at["none", 16].perplexity == pytest.approx(math.exp(at["none", 16].loss))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_window_forgets_what_lies_behind_it(model: Decoder) -> None:
    tokens_BT = texts(1, 65)
    other_BT = tokens_BT.clone()
    other_BT[:, :4] = (other_BT[:, :4] + 1) % 260  # the first tokens: sinks see them, a window of 8 keys does not

    def loss(tokens: torch.Tensor, method: str) -> float:
        (reading,) = measure(model, tokens, lengths=[64], methods=[method], window=8, scored=4)
        return reading.loss

    assert loss(tokens_BT, "window") == loss(other_BT, "window")
    assert loss(tokens_BT, "window+sinks") != loss(other_BT, "window+sinks")


def test_streaming_counts_positions_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer, what a token reads is what stands in the cache: a model without windows, given the sinks and the
    last of the text alone, predicts the same. In a model with sinks at their true positions it does not."""
    monkeypatch.setattr(extension, "CHUNK", 1)
    model = from_config(replace(CONFIG, n_layers=1), seed=0).eval()
    tokens_BT, window = texts(2, 61), 8
    held_BT = torch.cat([tokens_BT[:, : extension.SINKS], tokens_BT[:, -window - 1 : -1]], dim=1)
    expected = float(torch.nn.functional.cross_entropy(model(held_BT)[:, -1], tokens_BT[:, -1]).detach())
    found = {
        method: next(measure(model, tokens_BT, lengths=[60], methods=[method], window=window, scored=1)).loss
        for method in ("streaming", "window+sinks")
    }
    assert found["streaming"] == pytest.approx(expected, abs=1e-5)
    assert found["window+sinks"] != pytest.approx(expected, abs=1e-3)
    # Where everything lies within the window, nothing moves.
    for length in (window, window + extension.SINKS):
        short = [
            next(measure(model, tokens_BT, lengths=[length], methods=[method], window=window, scored=2)).loss
            for method in ("streaming", "window+sinks")
        ]
        assert short[0] == short[1]


def test_only_plain_rotary_positions_are_scaled() -> None:
    assert applicable(CONFIG) == tuple(METHODS)
    for positions in ("alibi", "none", "sinusoidal"):
        assert applicable(replace(CONFIG, positions=positions)) == ("none", "window", "window+sinks")


def test_the_command(model: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(model, tmp_path / "model", byte_level())
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/short.txt").write_text("too short")
    (tmp_path / "texts/long.txt").write_text("abcdefgh" * 20)
    typed = [f"checkpoint={tmp_path}/model", f"data={tmp_path}/texts", f"output={tmp_path}"]
    assert main([*typed, "lengths=16,64", "methods=none,ntk", "scored=8", "device=cpu"]) == 0
    rows = list(csv.DictReader((tmp_path / "extension.csv").read_text().splitlines()))
    assert [(row["method"], row["length"], row["texts"]) for row in rows] == [
        ("none", "16", "1"), ("none", "64", "1"), ("ntk", "16", "1"), ("ntk", "64", "1")
    ]  # fmt: skip
    assert str(tmp_path) not in rows[0]["command"]
    assert main([*typed, "lengths=16", "methods=nkt"]) == 2
    assert "methods=nkt: this model has none, linear, ntk" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["checkpoint=x"])
    assert "missing: data, lengths" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no document has 501 tokens"):
        main([*typed, "lengths=500"])
