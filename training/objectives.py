"""What a model is trained on: each objective is a model with its loss, and a step sees no more of it than `Objective`.

Legend: B sequences, T tokens each, D width, V vocabulary; of an encoder–decoder, S source and T target tokens; N = B·T,
n of them asked for.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.data.batch import IGNORE, Batch, TokenBatch
from longspan.data.seq2seq import Seq2SeqBatch
from longspan.kernels.attention import AttentionContext
from longspan.kernels.cross_entropy import linear_cross_entropy
from longspan.model.build import Model
from longspan.model.cross_attention import Source
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.heads import MaskedLMHead
from longspan.model.seq2seq import Seq2Seq

from .objectives_labelled import LabelledLoss

B_contra = TypeVar("B_contra", bound=Batch, contravariant=True)


class Objective(Protocol[B_contra]):
    """A module that holds the model and whose `forward` is the loss, so that whatever wraps a forward pass (FSDP's
    hooks) covers the head as well.

    forward  sum of nll over the batch's `n_loss_tokens`, in nats: an fp32 scalar. Called in training mode for steps and
             in evaluation mode for validation
    """

    @property
    def model(self) -> Model: ...

    def forward(self, batch: B_contra) -> Tensor: ...

    def __call__(self, batch: B_contra) -> Tensor: ...


def objective_for(model: Model, *, label_smoothing: float = 0.0) -> Objective[Any]:
    """What this model learns from the batches that its data makes."""
    if isinstance(model, Decoder):
        return NextTokenLoss(model)
    if isinstance(model, Encoder):
        return MaskedTokenLoss(model) if model.config.head == "mlm" else LabelledLoss(model)
    return TargetLoss(model, label_smoothing=label_smoothing)


class NextTokenLoss(nn.Module):
    """A decoder that predicts each next token."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Tensor:
        hidden_BTD = self.model.hidden(batch.tokens_BT, attention_context(batch), positions_BT=batch.positions_BT)
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.model.head_weight, batch.targets_BT.flatten(), ignore_index=IGNORE
        )


class MaskedTokenLoss(nn.Module):
    """An encoder with the loss of its masked-LM head, which is applied to the tokens that are asked for alone.

    No token of a batch is global and nothing reads the pooler, so their weights would only hang in the gradient
    reduction: they are frozen. (Beltagy et al. 2020 copy the local projections over the global ones after this stage.)
    """

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model
        for name, parameter in model.named_parameters():
            if ".global_attention." in name or name.startswith("pooler."):
                parameter.requires_grad_(False)

    def forward(self, batch: TokenBatch) -> Tensor:
        head = self.model.head
        if not isinstance(head, MaskedLMHead):
            raise TypeError("masked language modelling trains a masked-LM head, and this model has none")
        hidden_BTD = self.model.hidden(batch.tokens_BT, attention_context(batch), positions_BT=batch.positions_BT)
        asked_BT = batch.targets_BT != IGNORE
        return linear_cross_entropy(
            head.features(hidden_BTD[asked_BT]),
            head.matrix(self.model.embedding.weight),
            batch.targets_BT[asked_BT],
            bias_V=head.bias,
        )


class TargetLoss(nn.Module):
    """An encoder–decoder that reads a source and predicts each next token of its target.

    label_smoothing  ε: in training a prediction is compared with 1 - ε of its target and ε of all tokens alike
                     (Szegedy et al. 2016, arXiv 1512.00567, §7); validation counts the target alone
    """

    def __init__(self, model: Seq2Seq, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, batch: Seq2SeqBatch) -> Tensor:
        model = self.model
        about = AttentionContext(kv_lengths=batch.source_lengths_B, is_global=batch.is_global_BS)
        states_BSD = model.encode(batch.source_BS, about)
        source = Source(states_BSD, AttentionContext(kv_lengths=batch.source_lengths_B))
        # Padding of targets comes after all that is asked for, and a causal decoder looks back alone.
        hidden_BTD = model.hidden(batch.decoder_input_BT, source)
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
        bias_V = model.head.bias[0]
        nll = linear_cross_entropy(hidden_ND, model.head_weight, targets_N, bias_V=bias_V, ignore_index=IGNORE)
        if not (self.training and self.label_smoothing):
            return nll
        return nll + self.label_smoothing * _lead(hidden_ND, model.head_weight, bias_V, targets_N)


def _lead(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over asked tokens of the target's logit minus the mean logit: the mean nll over the whole vocabulary minus
    the target's, for the normaliser is the same in both, so that no logits need to exist."""
    asked_N = targets_N != IGNORE
    targets_n = targets_N[asked_N]
    exact = torch.promote_types(weight_VD.dtype, torch.float32)
    ahead_nD = F.embedding(targets_n, weight_VD).to(exact) - weight_VD.mean(0, dtype=exact)
    ahead_n = bias_V[targets_n].to(exact) - bias_V.mean(dtype=exact)
    return ((hidden_ND[asked_N].to(exact) * ahead_nD).sum(-1) + ahead_n).sum()


def attention_context(batch: TokenBatch) -> AttentionContext | None:
    """What attention must know of a batch: its document ids, where documents are masked from each other."""
    return None if batch.documents_BT is None else AttentionContext(q_documents=batch.documents_BT)
