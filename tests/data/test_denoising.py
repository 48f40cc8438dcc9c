"""How texts are damaged, and how sources and targets become batches."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from longspan.data.batch import IGNORE
from longspan.data.denoising import DenoisedDataset, Denoiser, Denoising, SentenceTable
from longspan.data.loader import PackedDataset
from longspan.data.prepare import PrepareSettings, TokenizerSettings, prepare
from longspan.data.seq2seq import PairFrame, pair_frame
from longspan.data.sources import SourceSpec
from longspan.data.tokenizer import Tokenizer, byte_level, train_bpe

BYTES = byte_level(mask=True)
MASK = BYTES.mask_id
WIDE = {"source_context": 64, "target_context": 64}
SPANS = Denoising(permute_sentences=False)
TEXT = 'One. Two is 2.5 (or so?) Three!\n"Four?" Five... six'
SENTENCES = ["One.", " Two is 2.5 (or so?)", " Three!", '\n"Four?"', " Five...", " six"]


def lengths_of_spans(damaged: np.ndarray, n_tokens: int) -> list[int]:
    """Of a damaged 0, 1, 2 … (as -1, -2, …): the lengths of the spans with kept tokens on both sides."""
    kept = [(place, int(-token) - 1) for place, token in enumerate(damaged) if token < 0]
    return [
        right - left - 1
        for (place, left), (then, right) in pairwise(kept)
        if then - place == 2  # exactly one mask token in between
    ]


def damaged_counts(k: int, n_tokens: int, *, denoising: Denoising = SPANS) -> np.ndarray:
    """A damaged text whose tokens are all different and none is a mask: token i is -1 - i."""
    return Denoiser(denoising, BYTES, seed=1)._infill(-1 - np.arange(n_tokens), np.random.default_rng(k))


def test_spans_are_poisson_and_hide_the_share_exactly() -> None:
    n_tokens, n_texts = 2000, 40
    texts = [damaged_counts(k, n_tokens) for k in range(n_texts)]
    for damaged in texts:
        kept = damaged[damaged != MASK]
        assert len(kept) == n_tokens - 600
        assert (np.diff(kept) < 0).all()  # in their order, each once
    masks = np.array([(damaged == MASK).sum() for damaged in texts])
    # Spans to a total of 600 of mean 3: 200, and on average 2/3 more because the last one is cut.
    assert masks.mean() == pytest.approx(200.7, abs=4 * math.sqrt(200 / 3 / n_texts))
    spans = np.concatenate([lengths_of_spans(damaged, n_tokens) for damaged in texts])
    assert len(spans) > 3000
    for length in range(9):
        chance = math.exp(-3) * 3**length / math.factorial(length)
        sigma = math.sqrt(chance * (1 - chance) / len(spans))
        assert (spans == length).mean() == pytest.approx(chance, abs=4.5 * sigma), length
    # Anywhere alike.
    places = np.concatenate([np.flatnonzero(damaged == MASK) / len(damaged) for damaged in texts])
    counts = np.histogram(places, bins=10, range=(0, 1))[0]
    assert counts == pytest.approx(len(places) / 10, abs=4 * math.sqrt(len(places) / 10))


@settings(max_examples=25, deadline=None)
@given(
    n_tokens=st.integers(1, 60),
    probability=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    mean_span=st.sampled_from([1.0, 3.0, 20.0]),
    k=st.integers(0, 1000),
)
def test_any_text_loses_its_share_and_grows_never(n_tokens: int, probability: float, mean_span: float, k: int) -> None:
    denoising = Denoising(probability=probability, mean_span=mean_span, permute_sentences=False)
    damaged = damaged_counts(k, n_tokens, denoising=denoising)
    assert (damaged != MASK).sum() == n_tokens - round(probability * n_tokens)
    assert 1 <= len(damaged) <= n_tokens
    if probability == 0:
        assert (damaged == -1 - np.arange(n_tokens)).all()


def test_damage_is_a_function_of_the_seed_and_the_place_in_the_stream() -> None:
    tokens = np.array(BYTES.encode(TEXT * 20))
    denoiser = Denoiser(Denoising(), BYTES, seed=3)
    assert (denoiser(tokens, 5) == Denoiser(Denoising(), BYTES, seed=3)(tokens, 5)).all()
    others = [denoiser(tokens, 6), Denoiser(Denoising(), BYTES, seed=4)(tokens, 5)]
    assert not any(np.array_equal(denoiser(tokens, 5), other) for other in others)


@pytest.mark.parametrize("tokenizer", [BYTES, train_bpe([TEXT] * 30, 300, True)], ids=["bytes", "bpe"])
def test_sentences_end_where_a_reader_says(tokenizer: Tokenizer) -> None:
    tokens = np.array([*tokenizer.encode(TEXT), tokenizer.eos_id, *tokenizer.encode("a.b Next. ")])
    ends = SentenceTable(tokenizer).ends(tokens).tolist()
    pieces = [tokens[start:end].tolist() for start, end in zip([0, *ends], ends)]
    assert [tokenizer.decode(piece) for piece in pieces] == [*SENTENCES, "a.b Next.", " "]
    assert pieces[5][-1] == tokenizer.eos_id


def test_wordpieces_have_sentences_too() -> None:
    words = ["[UNK]", "[MASK]", "[SEP]", "a", "##b", ".", "c"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.add_special_tokens(["[UNK]", "[MASK]", "[SEP]"])
    tokens = np.array([3, 4, 5, 6, 5, 3, 4])  # ab. c. ab
    assert SentenceTable(Tokenizer(inner.to_str(), "[SEP]")).ends(tokens).tolist() == [3, 5, 7]


def test_every_order_of_sentences_is_as_likely() -> None:
    text = "A. B. C."
    tokens = np.array(BYTES.encode(text))
    denoiser = Denoiser(Denoising(probability=0.0), BYTES, seed=0)
    n = 1200
    orders = [BYTES.decode(denoiser(tokens, k).tolist()) for k in range(n)]
    assert all(sorted(order.replace(".", ". ").split()) == ["A.", "B.", "C."] for order in orders)
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert counts == pytest.approx([n / 6] * 6, abs=4 * math.sqrt(n / 6))


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"probability": 1.0}, {"probability": -0.1}, {"mean_span": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Denoising(**wrong)
    with pytest.raises(ValueError, match="no mask token"):
        Denoiser(Denoising(), byte_level(), seed=0)


def test_the_expected_length_is_that_of_the_damage() -> None:
    lengths = [len(damaged_counts(k, 500)) for k in range(100)]
    assert np.mean(lengths) == pytest.approx(SPANS.expected_length(500), abs=2)


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_a_batch_is_framed_shifted_and_padded() -> None:
    frame = PairFrame(before=(0,), after=(2,), begin=(0,), end=2, start=2, is_global=True, **WIDE)
    short, long = np.array([5, 6]), np.arange(10, 19)
    batch = frame.batch([(short, long), (long, short)], [7, 3])
    assert batch.source_BS.shape == (2, 16)
    assert batch.source_BS[0].tolist() == [0, 5, 6, 2] + [2] * 12
    assert batch.source_lengths_B.tolist() == [4, 11]
    assert batch.decoder_input_BT[1, :4].tolist() == [2, 0, 5, 6]
    assert batch.targets_BT[1].tolist() == [0, 5, 6, 2] + [IGNORE] * 12
    assert batch.decoder_input_BT[0].tolist() == [2, 0, *range(10, 19)] + [2] * 5
    assert batch.targets_BT[0].tolist() == [0, *range(10, 19), 2] + [IGNORE] * 5
    assert int(batch.n_loss_tokens) == 4 + 11
    assert batch.indices_B.tolist() == [7, 3]
    assert batch.is_global_BS is not None
    assert batch.is_global_BS.sum(1).tolist() == [1, 1]
    assert batch.is_global_BS[:, 0].all()
    plain = PairFrame(before=(0,), after=(2,), begin=(0,), end=2, start=2, is_global=False, **WIDE)
    assert plain.batch([(short, long)], [0]).is_global_BS is None


def test_frames_are_the_tokenizers_own() -> None:
    assert pair_frame(BYTES, start=256, is_global=True, **WIDE) == PairFrame(
        before=(256,), after=(256,), begin=(), end=256, start=256, is_global=True, **WIDE
    )
    inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "<pad>", "</s>"])
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    bart = pair_frame(Tokenizer(inner.to_str(), "</s>"), start=2, is_global=False, **WIDE)
    assert bart == PairFrame(before=(0,), after=(2,), begin=(0,), end=2, start=2, is_global=False, **WIDE)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_denoised_stream_asks_for_the_packed_text(packing: str, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a number. It has neighbours! " * (number + 1))
    settings = PrepareSettings(
        sources=(SourceSpec(kind="files", path=str(tmp_path / "*.txt")),),
        tokenizer=TokenizerSettings(kind="bytes", mask=True),
        cache=tmp_path / "cache",
        validation_fraction=0.2,
    )
    prepared = prepare(settings)
    packed = PackedDataset(prepared.store, "train", context=40, packing=packing, seed=2)  # type: ignore[arg-type]
    frame = pair_frame(prepared.tokenizer, start=256, is_global=True, source_context=42, target_context=41)
    data = DenoisedDataset(packed, Denoiser(Denoising(), prepared.tokenizer, seed=2), frame)
    assert data.n_sequences == packed.n_sequences
    for k in range(2 * data.n_sequences):
        whole = packed.tokens(k)
        rows = packed.sequence(k).tokens_BT[0].tolist()
        assert rows[: len(whole)] == whole.tolist()
        assert set(rows[len(whole) :]) <= {prepared.store.eos_id}
        batch = data.batch([k])
        assert batch.targets_BT[0][batch.targets_BT[0] != IGNORE].tolist() == [*whole, 256]
        assert batch.source_BS.shape[1] <= 42
        assert batch.targets_BT.shape[1] <= 41
        source = batch.source_BS[0, 1 : int(batch.source_lengths_B[0]) - 1]
        assert source.tolist() == data.pair(k)[0].tolist()
        assert int((source != MASK).sum()) == len(whole) - round(0.3 * len(whole))
    again = pickle.loads(pickle.dumps(data)).batch([3, 1])
    assert (again.source_BS == data.batch([3, 1]).source_BS).all()
