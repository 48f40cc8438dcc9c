"""Which tokens are hidden: shares, words, determinism, and what must never be touched."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from longspan.data.batch import IGNORE, TokenBatch
from longspan.data.masking import Masking, TokenMasker, WordTable
from longspan.data.prepare import PrepareSettings, TokenizerSettings, prepare
from longspan.data.sources import SourceSpec
from longspan.data.tokenizer import MASK, Tokenizer, byte_level, train_bpe

BYTES = byte_level(mask=True)
TEXT = "def main(x1): return 42  # don't panic\n\n    über_alles = [x, 'y']"
BPE = train_bpe([TEXT] * 20 + ["the returned value is panicking mainly"] * 20, 290, True)


def batch(tokens_BT: np.ndarray, first: int = 0) -> TokenBatch:
    return TokenBatch(
        tokens_BT=torch.from_numpy(tokens_BT),
        targets_BT=torch.full(tokens_BT.shape, 7, dtype=torch.int64),
        indices_B=torch.arange(first, first + len(tokens_BT)),
    )


def drawn(n_rows: int, n_tokens: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_rows, n_tokens), dtype=np.int64)


def test_shares_are_fifteen_and_eighty_ten_ten() -> None:
    tokens = drawn(64, 2048)
    masked = TokenMasker(Masking(), BYTES, seed=3)(batch(tokens))
    chosen = (masked.targets_BT != IGNORE).numpy()
    now = masked.tokens_BT.numpy()
    n = chosen.sum()
    assert chosen.mean() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / tokens.size) ** 0.5)
    hidden, same = (now == BYTES.mask_id)[chosen].sum() / n, (now == tokens)[chosen].sum() / n
    sigma = (0.8 * 0.2 / n) ** 0.5
    assert hidden == pytest.approx(0.8, abs=4 * sigma)
    assert same == pytest.approx(0.1 + 0.1 / 256, abs=4 * sigma)  # a random token may be the one that was there
    swapped = chosen & (now != tokens) & (now != BYTES.mask_id)
    assert swapped.sum() / n == pytest.approx(0.1 * 255 / 256, abs=4 * sigma)
    counts = np.bincount(now[swapped], minlength=258)
    assert counts[256:].sum() == 0  # no special token is drawn
    assert (counts[:256] > 0).mean() > 0.98
    # What was not chosen is as it was and carries no loss; what was chosen is asked for as it was.
    assert (now[~chosen] == tokens[~chosen]).all()
    assert (masked.targets_BT.numpy()[chosen] == tokens[chosen]).all()
    # Places are chosen alike wherever they are in the sequence.
    assert chosen[:, :1024].mean() == pytest.approx(chosen[:, 1024:].mean(), abs=0.01)


def test_other_shares() -> None:
    tokens = drawn(16, 2048)
    masked = TokenMasker(Masking(probability=0.4, masked=0.0, random=1.0), BYTES, seed=0)(batch(tokens))
    chosen = (masked.targets_BT != IGNORE).numpy()
    assert chosen.mean() == pytest.approx(0.4, abs=0.02)
    assert not (masked.tokens_BT == BYTES.mask_id).any()
    kept = TokenMasker(Masking(probability=0.4, masked=0.0, random=0.0), BYTES, seed=0)(batch(tokens))
    assert torch.equal(kept.tokens_BT, torch.from_numpy(tokens))


def test_special_tokens_are_never_asked_for() -> None:
    tokens = drawn(8, 512)
    tokens[:, ::3] = BYTES.eos_id
    masked = TokenMasker(Masking(probability=0.9), BYTES, seed=0)(batch(tokens))
    assert (masked.tokens_BT[:, ::3] == BYTES.eos_id).all()
    assert (masked.targets_BT[:, ::3] == IGNORE).all()


def test_a_mask_is_a_function_of_the_seed_and_the_place_in_the_stream() -> None:
    tokens = np.tile(drawn(1, 256), (6, 1))
    masker = TokenMasker(Masking(), BYTES, seed=5)
    whole = masker(batch(tokens))
    # However the sequences are dealt out to micro-batches.
    for first in range(0, 6, 2):
        part = TokenMasker(Masking(), BYTES, seed=5)(batch(tokens[first : first + 2], first))
        assert torch.equal(part.tokens_BT, whole.tokens_BT[first : first + 2])
        assert torch.equal(part.targets_BT, whole.targets_BT[first : first + 2])
    # The same text is masked anew wherever else it stands in the stream, and by another seed.
    rows = {tuple((row != IGNORE).tolist()) for row in whole.targets_BT}
    assert len(rows) == 6
    other = TokenMasker(Masking(), BYTES, seed=6)(batch(tokens))
    assert not torch.equal(other.targets_BT, whole.targets_BT)
    assert torch.equal(batch(tokens).tokens_BT, torch.from_numpy(tokens))  # the batch that came in is untouched


def test_known_draws() -> None:
    """Masks of a published run stay what they are."""
    masked = TokenMasker(Masking(), BYTES, seed=0)(batch(np.arange(40, dtype=np.int64)[None]))
    assert (masked.targets_BT != IGNORE).nonzero()[:, 1].tolist() == [4, 5, 18, 35, 37]


# -- words ------------------------------------------------------------------------------------------------------------


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens = np.array(tokenizer.encode(text), dtype=np.int64)
    starts = WordTable(tokenizer).starts(tokens)
    return [tokenizer.decode(tokens[starts == start].tolist()) for start in np.unique(starts)]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_words_are_runs_of_letters_digits_or_signs_with_their_space(tokenizer: Tokenizer) -> None:
    text = "def main2(über): return 42 == x"
    expected = ["def", " main", "2", "(", "über", "):", " return", " 42", " ==", " x"]
    assert words(tokenizer, text) == expected
    assert "".join(words(tokenizer, TEXT)) == TEXT


def test_words_of_wordpiece_and_sentencepiece_follow_their_marks() -> None:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "[MASK]": 2, "play": 3, "##ing": 4, "##s": 5, "chess": 6}
    pieces = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.add_special_tokens(["[UNK]", "[SEP]", "[MASK]"])
    wordpiece = Tokenizer(pieces.to_str(), "[SEP]")
    assert wordpiece.mask_id == 2
    assert wordpiece.special_ids == {0, 1, 2}
    tokens = np.array([3, 4, 6, 3, 5, 1, 4])
    assert WordTable(wordpiece).starts(tokens).tolist() == [0, 0, 2, 3, 3, 5, 6]

    vocabulary = {"</s>": 0, "<mask>": 1, "▁play": 2, "ing": 3, "▁chess": 4}
    pieces = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="</s>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["</s>", "<mask>"])
    sentencepiece = Tokenizer(pieces.to_str(), "</s>")
    assert WordTable(sentencepiece).starts(np.array([2, 3, 4, 0, 3])).tolist() == [0, 0, 2, 3, 4]


def test_whole_words_share_their_fate() -> None:
    text = "the returned value is panicking mainly " * 300
    tokens = np.array(BPE.encode(text), dtype=np.int64)
    masked = TokenMasker(Masking(whole_words=True), BPE, seed=1)(batch(tokens[None]))
    chosen = (masked.targets_BT != IGNORE).numpy()[0]
    starts = WordTable(BPE).starts(tokens)
    sizes = np.bincount(starts)
    assert sizes.max() > 2  # there are words of several tokens
    of_words = np.bincount(starts, weights=chosen)
    assert ((of_words == 0) | (of_words == sizes)).all()
    assert chosen.mean() == pytest.approx(0.15, abs=0.03)
    apart = TokenMasker(Masking(), BPE, seed=1)(batch(tokens[None]))
    of_words = np.bincount(starts, weights=(apart.targets_BT != IGNORE).numpy()[0])
    assert ((of_words > 0) & (of_words < sizes)).any()


# -- tokenizers and refusals ------------------------------------------------------------------------------------------


def test_text_cannot_write_the_mask_token() -> None:
    for tokenizer in (BYTES, BPE):
        assert tokenizer.mask_id not in tokenizer.encode(f"a {MASK} b")
        assert tokenizer.decode(tokenizer.encode(f"a {MASK} b")) == f"a {MASK} b"


def test_a_tokenizer_without_mask_token_is_refused() -> None:
    assert byte_level().mask_id is None
    with pytest.raises(ValueError, match="has no mask token"):
        TokenMasker(Masking(), byte_level(), seed=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"probability": 0.0}, "probability=0.0: a share of the tokens"),
        ({"probability": 1.0}, "probability=1.0"),
        ({"masked": 0.8, "random": 0.3}, "masked=0.8 and random=0.3: shares of at most 1 together"),
        ({"masked": -0.1}, "masked=-0.1"),
    ],
)
def test_impossible_shares_are_refused(fields: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Masking(**fields)


def test_stores_with_a_mask_token_are_stores_of_their_own(tmp_path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 50)
    sources = (SourceSpec(kind="files", path=str(tmp_path / "text.txt")),)
    found = {}
    for kind in ("bytes", "bpe"):
        for mask in (False, True):
            asked = TokenizerSettings(kind=kind, vocab_size=300, mask=mask)
            settings = PrepareSettings(
                sources=sources, tokenizer=asked, cache=tmp_path / "cache", validation_fraction=0.0, workers=1
            )
            found[kind, mask] = prepare(settings)
    assert len({prepared.directory for prepared in found.values()}) == 4
    for (_, mask), prepared in found.items():
        assert (prepared.tokenizer.mask_id is not None) == mask
