"""Models that answer prompts for `context_processing`, and fusion in the decoder.

Fusion (Izacard and Grave 2021, arXiv 2007.01282, §3): an encoder–decoder's encoder reads the parts of a text apart,
each with the question, and the decoder attends to all of them at once. Cross-attention has no positions, so parts may
be as many as memory holds, and their order does not matter.

Legend: B parts of one encoder pass, S tokens of the longest of them, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.model.cache_layers import check_memory
from longspan.model.cache_plan import cross_cache_bytes
from longspan.model.conditional import Conditional
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.prompts import from_sequences
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq, about_source

from ..passes import batches, rotates_by_length
from .context_processing import LongText, Processed, Written, chunk_spans, context_span


def long_text(
    question: Question, tokenizer: Tokenizer, *, start: Sequence[int] = (), end: Sequence[int] = ()
) -> LongText:
    """A question in tokens, tokenised as one text.

    start, end   tokens that stand around every prompt: what documents begin with; an encoder's template
    """
    ((ids_T, chars_T2),) = tokenizer.encode_offsets([question.before + question.context + question.after])
    first, last = context_span(question, chars_T2)
    ids = ids_T.tolist()
    return LongText(
        before=[*start, *ids[:first]],
        context=ids[first:last],
        after=[*ids[last:], *end],
        query=question.query or question.after,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelWriter:
    """A `context_processing.Writer`: a decoder, or an encoder–decoder that reads prompts as sources.

    sampling          how prompts are continued; temperature=0 writes the likeliest
    max_prompt        tokens that the model reads at most; of a decoder, less those that it writes
    batch             prompts in a pass, alike in length
    global_positions  of every source (LED's first token)
    """

    model: Decoder | Seq2Seq
    tokenizer: Tokenizer
    sampling: Sampling
    max_prompt: int
    batch: int = 8
    stop_strings: tuple[str, ...] = ()
    global_positions: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def write(self, prompts: Sequence[Sequence[int]]) -> list[Written]:
        written: dict[int, Written] = {}
        for rows in batches(list(map(len, prompts)), self.batch, alike=rotates_by_length(self.model)):
            completions = complete(
                self.model,
                [prompts[row] for row in rows],
                self.sampling,
                tokenizer=self.tokenizer,
                stop_strings=self.stop_strings,
                global_positions=self.global_positions,
            )
            for row, completion in zip(rows, completions, strict=True):
                written[row] = Written((completion.text or "").strip(), completion.logprobs)
        return [written[row] for row in range(len(prompts))]


@torch.no_grad()
def fuse(
    model: Seq2Seq, parts: Sequence[Sequence[int]], *, global_positions: Sequence[int] = (), batch: int = 8
) -> Conditional:
    """The model bound to one source, whose encoder states are those of the parts, each encoded alone, one behind the
    other: prompt it with `model.start(1)`.

    global_positions   which tokens of every part are global (those behind a part's end are none)
    batch              parts in an encoder pass
    Raises ValueError for no parts, empty ones, tokens that the model does not have, and keys and values that do not fit
    into memory.
    """
    device = model.head_weight.device
    needed = cross_cache_bytes(model.config, 1, sum(map(len, parts)), model.head_weight.dtype).total
    check_memory(needed, device, f"cross-attention's cache of {len(parts)} fused parts")
    states: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, max(len(parts), 1), batch):
            sources = from_sequences(parts[first : first + batch], None, device)
            flags_BS = None
            if global_positions:
                places = [place for place in global_positions if place < sources.longest]
                flags_BS = torch.zeros_like(sources.tokens_BT, dtype=torch.bool)
                flags_BS[:, places] = True
                flags_BS &= sources.real()
            lengths_B = torch.tensor(sources.lengths, device=device) if sources.ragged else None
            states_BSD = model.encode(sources.tokens_BT, about_source(None, lengths_B=lengths_B, is_global_BS=flags_BS))
            states += [states_SD[:length] for states_SD, length in zip(states_BSD, sources.lengths)]
        return Conditional(model, model.remember(torch.cat(states)[None]))
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """The strategy: parts as long as the encoder reads, neighbours sharing `overlap` tokens (at most half of a part),
    and one answer to all of them."""

    overlap: int = 128

    def __call__(self, text: LongText, writer: ModelWriter) -> Processed:
        """Raises ValueError for a decoder; NoRoom where instructions and question leave no room for the text."""
        model = writer.model
        if not isinstance(model, Seq2Seq):
            raise ValueError("fusion: parts are encoded apart and decoded together, which only an encoder–decoder can")
        room = text.room(writer.max_prompt)
        spans = chunk_spans(len(text.context), room, min(self.overlap, room // 2)) or (range(0),)
        bound = fuse(
            model,
            [text.prompt((span,)) for span in spans],
            global_positions=writer.global_positions,
            batch=writer.batch,
        )
        (completion,) = complete(
            bound,
            model.start(1).tolist(),
            writer.sampling,
            tokenizer=writer.tokenizer,
            stop_strings=writer.stop_strings,
        )
        return Processed((completion.text or "").strip(), spans, len(spans))
