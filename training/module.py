"""The LightningModule: one Lightning batch is one optimizer step, so accumulation is inside the step, right per token.

The loss of a step is  sum of nll / number of loss tokens  over the whole global batch, whatever each micro-batch and
each rank holds. The count is known before the first backward pass, so every micro-batch is divided by the final number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from longspan.data.batch import Batch
from longspan.model.build import Model
from longspan.model.seq2seq import Seq2Seq

from .errors import RunFailed
from .objectives import Objective
from .optim import Factor, build_optimizer
from .precision import Arithmetic
from .schema import OptimizerConfig

# A run whose every step is skipped learns nothing and says nothing; this many in a row end it.
MAX_SKIPS_IN_A_ROW = 50

# Of a kind of block. 36 lengths are the most of 16,384 tokens, in steps and in validation.
MAX_GRAPHS = 96


class NonFinite(RunFailed):
    """A NaN or infinite loss or gradient."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    loss       nats per loss token of the global batch
    grad_norm  of the whole gradient before clipping
    lr         that this step used
    skipped    the step was not taken: loss or gradient was not finite
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool


class LanguageModel(LightningModule):
    """A model's training on its objective, whatever the two are, by manual optimization."""

    def __init__(
        self,
        objective: Objective[Any],  # of the batches that come
        *,
        optimizer: OptimizerConfig,
        factor: Factor,
        arithmetic: Arithmetic,
        clip: float | None = 1.0,
        nonfinite: Literal["stop", "skip"] = "stop",
        shard: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.objective = objective
        self.skipped = 0
        self.last: StepResult | None = None
        self._optimizer_config = optimizer
        self._arithmetic = arithmetic
        self._clip = clip
        self._nonfinite = nonfinite
        self._shard = shard
        self.skips_in_a_row = 0
        self._factor = factor

    @property
    def model(self) -> Model:
        return self.objective.model

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the weights in parts."""
        return isinstance(self.objective, FSDPModule)

    def reshard(self) -> None:
        """Frees what a forward pass without a backward pass leaves gathered (FSDP keeps the root for it)."""
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()

    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Lightning's wrapper."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"one optimizer is configured, not {type(optimizer).__name__}")
        return optimizer

    # -- set-up --------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """FSDP: shards each block, then what is left (embeddings, final norm, head) with the loss around it."""
        if not self._shard or isinstance(self.objective, FSDPModule):
            return
        policy = MixedPrecisionPolicy(param_dtype=self._arithmetic.autocast, reduce_dtype=torch.float32)
        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        for block in blocks_of(self.model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.get_submodule("objective"), mesh=mesh, mp_policy=policy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self._optimizer_config)

    # -- a step --------------------------------------------------------------------------------------------------------

    def training_step(self, micro_batches: Sequence[Batch], batch_idx: int) -> None:
        optimizer = self.optimizers()  # Lightning's wrapper counts the steps
        if not isinstance(optimizer, LightningOptimizer):
            raise TypeError(f"one optimizer is configured, not {type(optimizer).__name__}")
        # A function of the step alone: nothing to save, nothing to restore.
        lr = self._optimizer_config.lr * self._factor(self.trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        n_loss_tokens = self._sum_over_ranks(torch.stack([batch.n_loss_tokens for batch in micro_batches]).sum())
        # DDP and FSDP average gradients over ranks; the loss is a sum over ranks divided once.
        scale = self.trainer.world_size / n_loss_tokens.clamp(min=1)

        nlls = []
        for i, batch in enumerate(micro_batches):
            with self._gradient_sync(i == len(micro_batches) - 1):
                with self._autocast():
                    nll = self.objective(batch)
                self.manual_backward(nll * scale)
            nlls.append(nll.detach())

        loss = self._sum_over_ranks(torch.stack(nlls).double().sum()) / n_loss_tokens.clamp(min=1)
        norm = self._gradient_norm()
        loss_value, norm_value, finite = torch.stack([loss, norm.double(), (loss + norm).isfinite().double()]).tolist()
        if not finite:
            self._on_nonfinite(loss_value, norm_value, micro_batches, nlls)
            # With no gradients the optimizer changes nothing, and the step still counts: data and schedule go on.
            optimizer.zero_grad(set_to_none=True)
        elif self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self._clip, norm)
        self.skips_in_a_row = 0 if finite else self.skips_in_a_row + 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.last = StepResult(loss_value, norm_value, lr, skipped=not finite)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """[sum of nll, number of loss tokens] of one micro-batch on this rank, fp64."""
        with self._autocast():
            nll = self.objective(batch)
        return torch.stack([nll.double(), batch.n_loss_tokens.double()])

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(value, reduce_op="sum")
        return reduced if isinstance(reduced, Tensor) else value

    def _autocast(self) -> AbstractContextManager[object]:
        # Around forward passes only: a backward pass inside autocast would cast its own products a second time.
        dtype = self._arithmetic.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        """Gradients travel between ranks once a step, with the last micro-batch."""
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last)
        elif isinstance(self.trainer.model, DistributedDataParallel) and not last:
            return self.trainer.model.no_sync()
        return nullcontext()

    def _on_nonfinite(self, loss: float, norm: float, batches: Sequence[Batch], nlls: Sequence[Tensor]) -> None:
        """Counts the step, or ends the run naming it. All ranks agree, because both values are sums over all ranks."""
        self.skipped += 1
        bad = [batch for batch, nll in zip(batches, nlls, strict=True) if not nll.isfinite()] or batches
        mine = [int(index) for batch in bad for index in batch.indices_B]
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        if self._nonfinite == "stop":
            hint = "lower optimizer.lr, or set trainer.nonfinite=skip to skip such steps"
        elif self.skips_in_a_row + 1 >= MAX_SKIPS_IN_A_ROW:
            hint = f"{MAX_SKIPS_IN_A_ROW} steps in a row were skipped"
        else:
            return
        sequences = sorted(index for indices in self._gather(mine) for index in indices)
        raise NonFinite(f"step {self.trainer.global_step + 1}: {what} in sequences {_ranges(sequences)}; {hint}")

    def _gather(self, mine: list[int]) -> list[list[int]]:
        if self.trainer.world_size == 1:
            return [mine]
        gathered: list[list[int]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(gathered, mine)
        return gathered


def blocks_of(model: Model) -> list[nn.Module]:
    """The layers of all its stacks, in the order of computation."""
    return [*model.encoder.blocks, *model.blocks] if isinstance(model, Seq2Seq) else list(model.blocks)


def checkpoint_activations(model: Model) -> None:
    """Each block keeps only its input and is run again in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    After `compile_blocks`, if at all.
    """
    for block in blocks_of(model):
        forward: Callable[..., Any] = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)


def compile_blocks(model: Model) -> None:
    """Compiles each block's forward pass: short compilations that equal blocks share, clean names in the state dict.

    Before `checkpoint_activations`, which runs what was compiled a second time: torch.compile traces nothing that a
    checkpoint calls. Each shape of a batch has a graph of its own (lengths are part of what masks are found by), so
    padded batches have few (`data.lengths`); torch's limit, 8 for a function, leaves what comes later uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    for block in blocks_of(model):
        # Bound to the block, so that a copy of the model computes with its own weights.
        block.forward = MethodType(torch.compile(type(block).forward, dynamic=False), block)


def _ranges(indices: Sequence[int]) -> str:
    """[3, 4, 5, 9] -> '3-5, 9'"""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
