"""An encoder–decoder bound to its sources: for generation, a decoder whose prompts are the beginnings of targets.

    bound = condition(model, source_BS, lengths_B=lengths_B, is_global_BS=is_global_BS)   # encodes, once
    logits = prefill(bound, model.start(batch), create_cache(bound, batch, length))

Legend: B sources, N targets, S source tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.caching import KeyValueCache

from .cache_layers import check_memory
from .cache_plan import cross_cache_bytes
from .config import DecoderConfig
from .cross_attention import CrossCache
from .decoder import Decoder
from .prompts import check_tokens
from .seq2seq import Seq2Seq, about_source


class Conditional:
    """What generation asks of a decoder, of an encoder–decoder whose sources are read. `config` is that of the
    decoder, without cross-attention: what a cache keeps."""

    def __init__(self, model: Seq2Seq, source: CrossCache) -> None:
        self.model = model
        self.source = source
        self.config: DecoderConfig = model.config.decoder_half

    def for_rows(self, sources: Sequence[int]) -> Conditional:
        """For a batch whose row i is a target of source `sources[i]`. Nothing is copied while every source has the same
        number of rows, side by side; sources that have none any more are left behind."""
        runs = [(source, len(list(rows))) for source, rows in groupby(sources)]
        alive, beams = [source for source, _ in runs], {count for _, count in runs}
        if len(beams) == 1 and len(set(alive)) == len(alive):
            return Conditional(self.model, self.source.select(alive).shared_by(beams.pop()))
        return Conditional(self.model, self.source.select(sources))

    def hidden(
        self, tokens_NT: Tensor, context: AttentionContext | None = None, *, cache: KeyValueCache | None = None
    ) -> Tensor:
        return self.model.hidden(tokens_NT, self.source, context, cache=cache)

    def logits(self, hidden_xD: Tensor) -> Tensor:
        return self.model.logits(hidden_xD)

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    @property
    def training(self) -> bool:
        return self.model.training

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()


Generative = Decoder | Conditional


@dataclass(frozen=True, slots=True)
class Unread:
    """An encoder–decoder and sources that it has not read yet: enough to make a cache for their targets.

    Raises ValueError for tokens that the model does not have, and for keys and values of the sources that do not fit
    into memory.
    """

    model: Seq2Seq
    source_BS: Tensor
    lengths_B: Tensor | None = None
    is_global_BS: Tensor | None = None

    def __post_init__(self) -> None:
        if self.source_BS.dim() != 2 or self.source_BS.numel() == 0:
            raise ValueError(
                f"sources have shape {tuple(self.source_BS.shape)}; generation reads [batch, time], not empty"
            )
        config = self.model.config
        check_tokens(config, self.source_BS, what="source")
        batch, length = self.source_BS.shape
        padded = self.lengths_B is not None
        needed = cross_cache_bytes(config, batch, length, self.head_weight.dtype, padded=padded)
        device = self.source_BS.device
        check_memory(needed.total, device, f"cross-attention's cache of {batch} sources of {length} tokens")

    @property
    def config(self) -> DecoderConfig:
        return self.model.config.decoder_half

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    @torch.no_grad()
    def read(self) -> Conditional:
        """The encoder, once, and every decoder layer's keys and values of what it says. Raises as `Seq2Seq.forward`."""
        model = self.model
        context = about_source(None, lengths_B=self.lengths_B, is_global_BS=self.is_global_BS)
        was_training = model.training
        model.eval()
        try:
            return Conditional(model, model.remember(model.encode(self.source_BS, context), context))
        finally:
            model.train(was_training)


def condition(
    model: Seq2Seq, source_BS: Tensor, *, lengths_B: Tensor | None = None, is_global_BS: Tensor | None = None
) -> Conditional:
    """Reads the sources; as `Unread` and its `read`, in one."""
    return Unread(model, source_BS, lengths_B, is_global_BS).read()
