"""Windows of text, and what attentions read on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.data.tokenizer import byte_level
from longspan.evaluation.surgery.calibration import input_moments, text_windows
from longspan.model.zoo import build


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("".join(chr(ord("b") + i % 20) for i in range(100)))
    (tmp_path / "short.txt").write_text("short")
    return str(tmp_path / "*.txt")


def test_windows_are_spread_over_documents(texts: str) -> None:
    tokenizer = byte_level()
    windows_BT = text_windows(texts, tokenizer, length=31, count=4, framed=False)
    assert windows_BT.shape == (4, 31)
    assert (windows_BT[:, 0] == tokenizer.eos_id).all()
    assert [tokenizer.decode(row[1:].tolist())[:1] for row in windows_BT] == [
        "a",
        chr(ord("b") + 17),
        "a",
        chr(ord("b") + 12),
    ]
    framed_BT = text_windows(texts, tokenizer, length=31, count=3, framed=True)
    assert framed_BT.shape == (3, 31)
    assert (framed_BT[:, -1] == tokenizer.frame.after[-1]).all()
    with pytest.raises(ValueError, match="no document has 500 tokens"):
        text_windows(texts, tokenizer, length=500, count=1, framed=False)


@pytest.mark.parametrize("name", ["gpt-tiny", "longformer-tiny", "led-tiny"])
def test_every_attention_is_measured(name: str, texts: str) -> None:
    sides = {side: {"max_positions": 50} for side in ("encoder", "decoder")}
    model = build(name, {"vocab_size": 257, **(sides if name == "led-tiny" else {"max_positions": 50})}, seed=0).eval()
    moments = input_moments(model, byte_level(), texts, windows=3)
    modules = [module for module, _ in model.named_modules()]
    expected = {f"{module}.keys" for module in modules if module.endswith(".attention")}
    crossing = [module for module in modules if module.endswith(".cross_attention")]
    assert set(moments) == expected | {f"{module}.{what}" for module in crossing for what in ("keys", "queries")}
    for moment in moments.values():
        assert moment[-1, -1] == pytest.approx(1.0)
        assert torch.linalg.eigvalsh(moment.double()).min() > -1e-4
