"""ROUGE by tokens read, with a model of some thousand parameters and with readers whose scores are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from longspan.benchmarks.summary_lengths import first_words, main, scores, summaries
from longspan.data.example_build import ExampleSettings, prepare_examples
from longspan.data.example_records import ExampleColumns
from longspan.data.prepare import TokenizerSettings
from longspan.data.stdlib_examples import HELD_OUT
from longspan.data.synthetic.main_points import main_points, points_of
from longspan.data.tokenizer import Tokenizer
from longspan.model.build import build_from
from longspan.model.checkpoint import save_model
from longspan.model.config import DecoderConfig, Seq2SeqConfig, StackConfig
from longspan.model.seq2seq import Seq2Seq

pytest.importorskip("rouge_score")

TINY = Seq2SeqConfig(
    vocab_size=96,
    d_model=16,
    encoder=StackConfig(n_layers=1, n_heads=2, d_ff=16, max_positions=1024),
    decoder=StackConfig(n_layers=1, n_heads=2, d_ff=16, max_positions=24),
    decoder_start_token=86,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    settings = ExampleSettings(
        source=HELD_OUT["main_points"],
        columns=ExampleColumns(texts=(("source", "source"), ("target", "target"))),
        tokenizer=TokenizerSettings(kind="words"),
        cache=tmp_path_factory.mktemp("cache"),
    )
    return prepare_examples(settings).tokenizer()


@pytest.fixture
def tiny(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save_model(build_from(TINY, seed=0), tmp_path / "tiny", tokenizer)


def test_a_row_for_each_length(tiny: Path, tmp_path: Path) -> None:
    typed = [f"checkpoint={tiny}", "lengths=128,1024", "samples=12", "batch=5", f"output={tmp_path}"]
    assert main(typed) == 0
    rows = list(csv.DictReader((tmp_path / "summary_lengths.csv").read_text().splitlines()))
    assert [(row["tokens_read"], row["samples"]) for row in rows] == [("128", "12"), ("1024", "12")]
    for row in rows:
        assert 0 <= float(row["rouge2_low"]) <= float(row["rouge2"]) <= float(row["rouge2_high"]) < 50
    # Of 1,000 words a perfect reader has read all; of the first 126 one point in eight: an F1 of 2 · 1/8 / (1 + 1/8).
    assert [float(row["rouge1_perfect"]) for row in rows] == [pytest.approx(200 / 9, abs=1), 100]
    assert float(rows[0]["rouge2_perfect"]) < float(rows[0]["rouge1_perfect"])


def test_what_is_read_ends_where_it_should(tokenizer: Tokenizer) -> None:
    text = main_points("validation", 0).source
    framed = len(tokenizer.frame.before) + len(tokenizer.frame.after)
    assert first_words(tokenizer, text, 100 + framed).split() == text.split()[:100]
    model = build_from(TINY, seed=0).eval()
    assert isinstance(model, Seq2Seq)
    seen: list[int] = []
    encode = model.encode

    def noted(tokens_BT: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        seen.append(tokens_BT.shape[1])
        return encode(tokens_BT, *rest, **named)  # pyright: ignore[reportArgumentType]: passed on as it came

    model.encode = noted  # pyright: ignore[reportAttributeAccessIssue]: a listener
    found = summaries(model, tokenizer, [text, text], length=256, batch=1)
    assert seen == [256, 256]
    assert len(found) == 2


def test_scores_are_means_in_percent_with_intervals() -> None:
    targets = [main_points("validation", index).target for index in range(12)]
    first_half = [" ".join(target.split()[:20]) for target in targets]
    mean, low, high = scores([*targets[:6], *first_half[6:]], targets)["rouge1"]
    assert mean == pytest.approx((100 + 200 / 3) / 2)
    assert low < mean < high
    assert scores(targets, targets)["rougeL"] == (100, 100, 100)
    assert points_of(main_points("validation", 0).source) == targets[0]


def test_another_architecture_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DecoderConfig(vocab_size=96, n_layers=1, d_model=16, n_heads=2, d_ff=16, max_positions=16)
    save_model(build_from(config, seed=0), tmp_path / "gpt", tokenizer)
    with pytest.raises(ValueError, match="holds no encoder–decoder"):
        main([f"checkpoint={tmp_path / 'gpt'}"])
