"""The reader of a model: by what the model is, and by the strategy that long texts are read by."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.data.tokenizer import Tokenizer
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.seq2seq import Seq2Seq

from .context_processing import Selected
from .decoder import DecoderReader
from .encoder import EncoderReader
from .reader import Reader
from .seq2seq import Seq2SeqReader
from .strategies import BY_STRATEGY, SelectingReader, StrategyReader


def reader_of(
    model: Decoder | Encoder | Seq2Seq,
    tokenizer: Tokenizer,
    *,
    start: Sequence[int],
    max_tokens: int,
    batch: int,
) -> Reader:
    """The reader of a model; `start` is a decoder's."""
    if isinstance(model, Decoder):
        return DecoderReader(model, tokenizer, start=start, max_tokens=max_tokens, batch=batch)
    if isinstance(model, Seq2Seq):
        return Seq2SeqReader(model, tokenizer, max_tokens=max_tokens, batch=batch)
    return EncoderReader(model, tokenizer, max_tokens=max_tokens, batch=batch)


def strategy_reader(
    model: Decoder | Seq2Seq,
    tokenizer: Tokenizer,
    strategy: str,
    *,
    start: Sequence[int],
    max_tokens: int,
    batch: int,
) -> StrategyReader | SelectingReader:
    """The reader of a model that goes by a strategy; see there. Raises ValueError for one that the model cannot do."""
    chosen = BY_STRATEGY[strategy]
    if isinstance(model, Decoder) and isinstance(chosen, Selected):
        return SelectingReader(model, tokenizer, chosen, start=start, max_tokens=max_tokens, batch=batch)
    return StrategyReader(model, tokenizer, strategy, start=start, max_tokens=max_tokens, batch=batch)
