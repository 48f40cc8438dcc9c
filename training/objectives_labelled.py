"""What an encoder is fine-tuned on: the class of a text, and the two ends of an answer in a text.

The task's own tokens are global where the model has global attention (Beltagy et al. 2020, arXiv 2004.05150, §5): the
first token for a class, the question for an answer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.data.labelled import LabelledBatch
from longspan.evaluation.readers.predictions import Tally, logits_of
from longspan.model.encoder import Encoder
from longspan.model.heads import Classifier, SpanHead


class LabelledLoss(nn.Module):
    """An encoder with a head for classes or for answers. A row's loss is the cross entropy of its class, or the mean of
    those of its answer's first and last token; windows without an answer are asked for the first token.

    `tally`, where there is one, is shown every batch of evaluation mode with its logits.
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        if not isinstance(model.head, Classifier | SpanHead):
            raise TypeError(f"labelled examples train a head for classes or answers, not head={model.config.head}")
        self.model = model
        self.tally: Tally | None = None
        if isinstance(model.head, SpanHead) and model.pooler is not None:
            # Nothing reads it, so its weights would only hang in the gradient reduction.
            model.pooler.requires_grad_(False)

    def forward(self, batch: LabelledBatch) -> Tensor:
        logits = logits_of(self.model, batch)
        if self.tally is not None and not self.training:
            self.tally.add(batch, logits)
        return class_nll(logits, batch) if isinstance(self.model.head, Classifier) else span_nll(logits, batch)


def class_nll(logits_BC: Tensor, batch: LabelledBatch) -> Tensor:
    """Sum over the rows, in nats: an fp32 scalar."""
    return F.cross_entropy(logits_BC.float(), batch.targets_BN[:, 0], reduction="sum")


def span_nll(logits_BT2: Tensor, batch: LabelledBatch) -> Tensor:
    """Sum over the rows of the mean of both ends, in nats: an fp32 scalar. Padding is no place for an answer."""
    n_tokens = logits_BT2.shape[1]
    place_T = torch.arange(n_tokens, device=logits_BT2.device)
    padding_BT = place_T >= batch.lengths_B[:, None]
    logits_B2T = logits_BT2.float().masked_fill(padding_BT[..., None], float("-inf")).transpose(1, 2)
    return F.cross_entropy(logits_B2T.flatten(0, 1), batch.targets_BN.flatten(), reduction="sum") / 2
