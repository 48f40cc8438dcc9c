"""The parent as a teacher: objectives whose target is what another model makes of the same tokens.

Legend: B sequences, T tokens each, D width, V vocabulary; N = B·T, n rows of a chunk.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.data.batch import IGNORE, TokenBatch
from longspan.kernels.cross_entropy import CHUNK_LOGITS, linear_cross_entropy
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder

from .objectives import attention_context

M = TypeVar("M", bound=nn.Module)


class _Aside(Generic[M]):
    """A model that takes no part in what happens to the modules around it: it stays in evaluation mode, in no optimizer
    and in no checkpoint, and follows the data to their device."""

    def __init__(self, model: M) -> None:
        self.model = model.eval().requires_grad_(False)

    def on(self, device: torch.device) -> M:
        return self.model.to(device)


class DistilledTokenLoss(nn.Module):
    """A decoder that predicts each next token and is held to the teacher's distribution (Hinton et al. 2015, arXiv
    1503.02531):

        (1 - weight) · nll + weight · temperature² · KL(teacher ‖ student), both softened by the temperature

    temperature² keeps the gradients of both parts of one size. The logits of both exist a chunk of rows at a time.
    """

    def __init__(self, model: Decoder, teacher: Decoder, *, weight: float, temperature: float) -> None:
        super().__init__()
        self.model = model
        self._teacher = _Aside(teacher)
        self._weight = weight
        self._temperature = temperature

    def forward(self, batch: TokenBatch) -> Tensor:
        context, targets_N = attention_context(batch), batch.targets_BT.flatten()
        hidden_ND = self.model.hidden(batch.tokens_BT, context, positions_BT=batch.positions_BT).flatten(0, 1)
        with torch.no_grad():
            teacher = self._teacher.on(batch.tokens_BT.device)
            taught_ND = teacher.hidden(batch.tokens_BT, context, positions_BT=batch.positions_BT).flatten(0, 1)
        nll = linear_cross_entropy(hidden_ND, self.model.head_weight, targets_N, ignore_index=IGNORE)
        asked_N = targets_N != IGNORE
        divergence = self._divergence(hidden_ND[asked_N], taught_ND[asked_N], teacher.head_weight)
        return (1 - self._weight) * nll + self._weight * self._temperature**2 * divergence

    def _divergence(self, hidden_ND: Tensor, taught_ND: Tensor, teacher_VD: Tensor) -> Tensor:
        rows = max(1, CHUNK_LOGITS.get(hidden_ND.device.type, CHUNK_LOGITS["cpu"]) // self.model.head_weight.shape[0])
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for hidden_nD, taught_nD in zip(hidden_ND.split(rows), taught_ND.split(rows), strict=True):
            part = checkpoint(self._of_rows, hidden_nD, taught_nD, teacher_VD, use_reentrant=False)
            assert isinstance(part, Tensor)
            total = total + part
        return total

    def _of_rows(self, hidden_nD: Tensor, taught_nD: Tensor, teacher_VD: Tensor) -> Tensor:
        student_nV = F.linear(hidden_nD, self.model.head_weight).float() / self._temperature
        teacher_nV = F.linear(taught_nD, teacher_VD).float() / self._temperature
        return F.kl_div(
            student_nV.log_softmax(dim=-1), teacher_nV.log_softmax(dim=-1), log_target=True, reduction="sum"
        )


class DistilledHiddenLoss(nn.Module):
    """An encoder that is held to the teacher's last hidden states: their squared distance, as a share of the teacher's
    mean square. It needs no head and no labels, so encoders of embeddings can be trained on any text.

    What the hidden states do not depend on is frozen: heads, the pooler, projections of global tokens.
    """

    def __init__(self, model: Encoder, teacher: Encoder) -> None:
        super().__init__()
        self.model = model
        self._teacher = _Aside(teacher)
        for name, parameter in model.named_parameters():
            if ".global_attention." in name or name.startswith(("pooler.", "head.")):
                parameter.requires_grad_(False)

    def forward(self, batch: TokenBatch) -> Tensor:
        context, asked_BT = attention_context(batch), batch.targets_BT != IGNORE
        hidden_BTD = self.model.hidden(batch.tokens_BT, context, positions_BT=batch.positions_BT)
        with torch.no_grad():
            teacher = self._teacher.on(batch.tokens_BT.device)
            taught_BTD = teacher.hidden(batch.tokens_BT, context, positions_BT=batch.positions_BT)
        student_ND, teacher_ND = hidden_BTD[asked_BT].float(), taught_BTD[asked_BT].float()
        distances_N = (student_ND - teacher_ND).square().mean(dim=-1)
        return distances_N.sum() / teacher_ND.square().mean().clamp(min=1e-12)
