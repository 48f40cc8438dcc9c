"""How far an encoder's embeddings are from another's, on the same texts.

Legend: B texts, T tokens each, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from longspan.model.encoder import Encoder

from ..passes import Precision, autocast
from ..perplexity.documents import StoredDocuments, documents_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """distance   1 - cosine, the mean over texts
    cosine        of mean-pooled hidden states (how sentence embeddings are made of them)
    token_cosine  of hidden states token by token
    """

    distance: float
    cosine: float
    token_cosine: float
    texts: int
    length: int

    @property
    def words(self) -> str:
        return (
            f"Cosine between mean-pooled hidden states of the model and of its parent, the mean over {self.texts:,} "
            f"held-out texts of {self.length:,} tokens."
        )


@torch.no_grad()
def embedding_distance(
    model: Encoder,
    parent: Encoder,
    documents: StoredDocuments,
    *,
    length: int,
    max_tokens: int | None,
    batch: int,
    device: torch.device,
    precision: Precision,
) -> Similarity:
    """Held-out documents cut into texts of `length` tokens (remainders are left out), at most `max_tokens` in all.

    Raises ValueError where no document is that long.
    """
    cosines: list[torch.Tensor] = []
    by_token: list[torch.Tensor] = []
    for texts_BT in _batches(documents, length, max_tokens, batch):
        tokens_BT = torch.from_numpy(texts_BT).to(device)
        with autocast(device, precision):
            ours_BTD, theirs_BTD = model.hidden(tokens_BT).float(), parent.hidden(tokens_BT).float()
        cosines.append(F.cosine_similarity(ours_BTD.mean(dim=1), theirs_BTD.mean(dim=1), dim=-1).double())
        by_token.append(F.cosine_similarity(ours_BTD, theirs_BTD, dim=-1).mean(dim=1).double())
    if not cosines:
        raise ValueError(f"no held-out document has {length:,} tokens; lower data.context")
    cosine = float(torch.cat(cosines).mean())
    return Similarity(
        distance=1 - cosine,
        cosine=cosine,
        token_cosine=float(torch.cat(by_token).mean()),
        texts=sum(len(each) for each in cosines),
        length=length,
    )


def _batches(documents: StoredDocuments, length: int, max_tokens: int | None, batch: int) -> Iterator[np.ndarray]:
    rows: list[np.ndarray] = []
    left = None if max_tokens is None else max_tokens // length
    for document in documents_from(documents):
        tokens = np.asarray(document.tokens, dtype=np.int64)
        for first in range(0, len(tokens) - length + 1, length):
            if left is not None:
                if left == 0:
                    break
                left -= 1
            rows.append(tokens[first : first + length])
            if len(rows) == batch:
                yield np.stack(rows)
                rows = []
    if rows:
        yield np.stack(rows)
