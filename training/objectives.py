"""What a model is trained on: each objective is a model with its loss, and a step sees no more of it than `Objective`.

Legend: B sequences, T tokens each, D width, V vocabulary; of an encoder–decoder, S source and T target tokens.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from longspan.data.batch import IGNORE, Batch, TokenBatch
from longspan.kernels.attention import AttentionContext
from longspan.kernels.cross_entropy import linear_cross_entropy
from longspan.model.build import Model
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.heads import MaskedLMHead

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


def objective_for(model: Model) -> Objective[Any]:
    """What this model learns from the batches that its data makes. Raises TypeError for a model that none fits."""
    if isinstance(model, Decoder):
        return NextTokenLoss(model)
    if isinstance(model, Encoder):
        return MaskedTokenLoss(model)
    raise TypeError(f"no objective trains a {type(model).__name__}")


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


def attention_context(batch: TokenBatch) -> AttentionContext | None:
    """What attention must know of a batch: its document ids, where documents are masked from each other."""
    return None if batch.documents_BT is None else AttentionContext(q_documents=batch.documents_BT)
