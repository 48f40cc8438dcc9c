"""Windows of text, and what a model's attentions read on them: the statistics of grouped-query surgery.

Legend: B windows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.data.sources import from_path, read
from longspan.data.tokenizer import Tokenizer
from longspan.model.build import Model
from longspan.model.encoder import Encoder
from longspan.model.seq2seq import Seq2Seq
from longspan.model.surgery import second_moments

LONGEST = 512


def input_moments(model: Model, tokenizer: Tokenizer, path: str, *, windows: int = 64) -> dict[str, Tensor]:
    """`second_moments` on `windows` windows of the texts at a path (as `data.path`), each as long as the model takes,
    and at most 512 tokens. An encoder–decoder reads each window and writes it again.

    Raises ValueError where the texts are too short for a single window.
    """
    if not isinstance(model, Seq2Seq):
        framed, longest = isinstance(model, Encoder), model.config.max_positions
    else:
        framed, longest = True, min(model.config.encoder.max_positions, model.config.decoder.max_positions - 1)
    length = min(LONGEST, longest)
    tokens_BT = text_windows(path, tokenizer, length=length, count=windows, framed=framed)
    if isinstance(model, Seq2Seq):
        return second_moments(model, ((row[None], torch.cat([model.start(1), row[None]], dim=1)) for row in tokens_BT))
    return second_moments(model, ((row[None],) for row in tokens_BT))


def text_windows(path: str, tokenizer: Tokenizer, *, length: int, count: int, framed: bool) -> Tensor:
    """At most `count` windows of `length` tokens, [B, T], in turns from each document, evenly spaced in it; each behind
    the token that begins a text, and `framed` (encoders) before the one that ends it too.

    Raises ValueError where no document is long enough.
    """
    frame = tokenizer.frame
    before = frame.before if framed else tokenizer.start_ids[-1:] or (tokenizer.eos_id,)
    start, end = list(before), list(frame.after if framed else ())
    inside = length - len(start) - len(end)
    documents = [ids for document in read(from_path(path)) if len(ids := tokenizer.encode(document.text)) >= inside]
    if not documents:
        raise ValueError(f"{path}: no document has {length:,} tokens; give longer ones")
    each = -(-count // len(documents))
    rows: list[list[int]] = []
    for place in range(each):
        for ids in documents:
            first = (len(ids) - inside) * (2 * place + 1) // (2 * each)
            rows.append([*start, *ids[first : first + inside], *end])
    return torch.tensor(rows[:count])
