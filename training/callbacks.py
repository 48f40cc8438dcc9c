"""What happens between optimizer steps, in one order on every rank:

    count -> validate -> metrics row -> checkpoint -> stop if a signal came

One callback does it all, because the order is the guarantee: a checkpoint never stands between a step and its
validation, and a row is on disk before the checkpoint that would continue after it. Lightning's own restart bookkeeping
is not used; a resumed fit is a fresh fit whose counters start at the step.
"""

from __future__ import annotations

import logging
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from longspan.evaluation.readers.predictions import Tally

from . import rng
from .checkpointing import Best, Checkpoints, best_of
from .datamodule import StreamData
from .errors import RunFailed, Terminated
from .metrics import MetricsLog, Row
from .module import LanguageModel, StepResult
from .objectives_labelled import LabelledLoss
from .progress import ProgressView
from .signals import SignalFlag

logger = logging.getLogger("longspan.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """At which optimizer step the stage (of a plain run: the run) ends, and after how many each thing happens."""

    steps: int
    log_every: int
    val_every: int
    save_every: int

    def due(self, every: int, step: int) -> bool:
        """Every so many steps, and at the last one."""
        return step % every == 0 or step >= self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of a run."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What turns steps into tokens, and seconds into tokens per second, MFU and the time that is left.

    tokens_per_step  of the global batch
    flops_per_token  forward and backward
    peak_flops       of all devices together; None: unknown, and then there is no MFU
    before, after    (steps, tokens, FLOPs) of the run's stages before this one and after it
    """

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    before: Share = Share()
    after: Share = Share()

    def tokens(self, step: int) -> int:
        """Read up to a step of this stage."""
        return self.before.tokens + (step - self.before.steps) * self.tokens_per_step

    def seconds_left(self, step: int, last_step: int, seconds: float) -> float | None:
        """What is left of the run after a step of this stage, at the FLOP/s of its `seconds` so far."""
        flops_per_step = self.tokens_per_step * self.flops_per_token
        done = self.before.flops + (step - self.before.steps) * flops_per_step
        left = (last_step - step) * flops_per_step + self.after.flops
        return seconds * left / done if done else None


class _Stopwatch:
    """Seconds of training; stopped while the run validates and saves."""

    def __init__(self, seconds_before: float) -> None:
        self._total = seconds_before
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)

    def go(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._total, self._since = self.seconds, None


class RunLoop(Callback):
    """Everything around the steps of a run. `metrics` and `view` are there on the main process only."""

    def __init__(
        self,
        *,
        data: StreamData,
        cadence: Cadence,
        throughput: Throughput,
        checkpoints: Checkpoints,
        signals: SignalFlag,
        seed: int,
        view: ProgressView | None = None,
        resume: dict[str, Any] | None = None,
        advice: str = "resume=auto",
        stage: str | None = None,
        tally: Callable[[], Tally] | None = None,
    ) -> None:
        self.best: Best | None = None
        self.validation_loss: float | None = None
        self.scores: dict[str, float] = {}
        self._tally = tally
        self._data = data
        self._cadence = cadence
        self._throughput = throughput
        self._checkpoints = checkpoints
        self._signals = signals
        self._seed = seed
        self.metrics: MetricsLog | None = None
        self._view = view
        self._resume = resume
        self._advice = advice
        self._stage = stage
        self._validated_step = 0
        self._last_row: tuple[int, float] = (0, 0.0)  # (step, seconds) of the row before
        self._last_view: tuple[int, float] = (0, 0.0)
        self._watch = _Stopwatch(0.0)

    @property
    def seconds(self) -> float:
        """Of training so far, over all sessions of the run."""
        return self._watch.seconds

    def adopt(self, state: dict[str, Any]) -> None:
        """Takes what a saved state says about the run so far."""
        self.best = best_of(state)
        self.validation_loss = state["validation_loss"]
        self._validated_step = state["validated_step"]
        self._watch = _Stopwatch(float(state["seconds"]))

    # -- start ---------------------------------------------------------------------------------------------------------

    @property
    def owes_validation(self) -> bool:
        """Whether a signal stopped the run after the step it resumes from, before that step's validation and row."""
        return self._resume is not None and self._validation_due(
            int(self._resume["step"]), validated_step=int(self._resume["validated_step"])
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _language_model(pl_module)
        self._signals.install()  # Lightning has put its own handlers in front
        rng.seed_everything(self._seed, trainer.global_rank)
        if self._resume is not None:
            self._restore(trainer, module, self._resume)
        self._last_row = self._last_view = (trainer.global_step, self._watch.seconds)
        if self.owes_validation:
            self._validate(trainer, module)
            self._write_row(trainer, module)
            self._save(trainer, module)  # or the next session would owe it again
        self._resume = None
        self._watch.go()

    def _restore(self, trainer: Trainer, module: LanguageModel, state: dict[str, Any]) -> None:
        """Puts every piece of the saved state back in place. Weights and the place in the data are there already: the
        loaders had to know it before now."""
        self.adopt(state)
        step = int(state["step"])
        loop = trainer.fit_loop.epoch_loop
        for progress in (loop.manual_optimization.optim_step_progress.total, loop.batch_progress.total):
            progress.ready = progress.completed = step
        optimizer = module.plain_optimizer()
        # What was learned comes from the checkpoint, what was configured from the config.
        configured = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        if state["optimizer"] is not None:  # a stage may begin without
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(module.model, optimizer, state["optimizer"], options=options)
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)
        module.last = StepResult(**state["last"]) if state["last"] is not None else None
        module.skipped, module.skips_in_a_row = state["skipped"], state["skips_in_a_row"]
        saved = state["rng"]
        if len(saved) == trainer.world_size:
            rng.restore(saved[trainer.global_rank], module.device)
        else:
            rng.seed_everything(self._seed + step, trainer.global_rank)
            logger.warning(
                "resumed with %d processes, saved by %d: the data order is the same, random masks (dropout) are not",
                trainer.world_size,
                len(saved),
            )

    # -- after each step -----------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        module = _language_model(pl_module)
        step = trainer.global_step
        self._data.consumed += self._data.global_batch
        stopped_by = self._signalled(trainer)
        self._watch.stop()
        improved = False
        due = self._validation_due(step, validated_step=self._validated_step)
        if due and not stopped_by:
            improved = self._validate(trainer, module)
        validated = self._validated_step == step
        postponed = due and not validated  # to the next session, and the row that names its result with it
        if not postponed and (validated or step == 1 or self._cadence.due(self._cadence.log_every, step)):
            self._write_row(trainer, module)
        self._show(trainer, module, always=validated)
        if improved or stopped_by or self._cadence.due(self._cadence.save_every, step):
            self._save(trainer, module)
        if stopped_by:
            name = signal.Signals(stopped_by).name
            raise Terminated(
                stopped_by,
                f"{name}: saved {self._checkpoints.path(step)}; the same command with {self._advice} continues",
            )
        self._watch.go()

    def _signalled(self, trainer: Trainer) -> int:
        """The signal that any rank received, the same on all."""
        received = self._signals.received
        if trainer.world_size == 1:
            return received
        flag = torch.tensor(received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def _validation_due(self, step: int, *, validated_step: int) -> bool:
        due = self._cadence.due(self._cadence.val_every, step)
        return self._data.has_validation and validated_step != step and due

    @torch.no_grad()
    def _validate(self, trainer: Trainer, module: LanguageModel) -> bool:
        """Token-weighted loss over the validation batches of all ranks, with scores where the objective has some;
        whether the loss is the best so far."""
        tally = None if self._tally is None else self._tally()
        if isinstance(module.objective, LabelledLoss):
            module.objective.tally = tally
        module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=module.device)
        for index, batch in enumerate(self._data.val_dataloader()):
            total += module.validation_step(batch.to(module.device), index)
        module.train()
        module.reshard()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        if tally is not None:
            self.scores = tally.scores(_everywhere(tally.parts(), trainer.world_size))
        nll, n_tokens = total.tolist()
        self._validated_step = trainer.global_step
        self.validation_loss = nll / n_tokens if n_tokens else float("nan")
        if self.best is None or self.validation_loss < self.best.validation_loss:
            self.best = Best(trainer.global_step, self.validation_loss)
            return True
        return False

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _row(self, trainer: Trainer, module: LanguageModel, since: tuple[int, float]) -> Row:
        step, seconds = trainer.global_step, self._watch.seconds
        n_steps, duration = step - since[0], seconds - since[1]
        speed = n_steps * self._throughput.tokens_per_step / duration if n_steps and duration > 0 else None
        peak = self._throughput.peak_flops
        last = module.last
        validated = self._validated_step == step
        scores = self.scores if validated else {}
        return Row(
            step=step,
            tokens=self._throughput.tokens(step),
            loss=last.loss if last is not None else None,
            validation_loss=self.validation_loss if validated else None,
            lr=last.lr if last is not None else None,
            grad_norm=last.grad_norm if last is not None else None,
            tokens_per_second=speed,
            mfu=speed * self._throughput.flops_per_token / peak if speed is not None and peak else None,
            seconds=seconds,
            skipped=module.skipped,
            stage=self._stage,
            accuracy=scores.get("accuracy"),
            exact_match=scores.get("exact_match"),
            f1=scores.get("f1", scores.get("macro_f1")),
        )

    def _write_row(self, trainer: Trainer, module: LanguageModel) -> None:
        if self.metrics is not None:
            row = self._row(trainer, module, self._last_row)
            self.metrics.write(row)
            self._last_row = (row.step, row.seconds)

    def _show(self, trainer: Trainer, module: LanguageModel, *, always: bool) -> None:
        if self._view is None:
            return
        step = trainer.global_step
        line = always or step == self._cadence.steps or self._view.due()
        if not (line or self._view.live):
            return
        row = self._row(trainer, module, self._last_view)
        eta = self._throughput.seconds_left(step, self._cadence.steps, row.seconds)
        self._view.show(row, memory_bytes=_memory_bytes(module.device), eta_seconds=eta, line=line)
        if line:
            self._last_view = (step, row.seconds)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, module: LanguageModel) -> None:
        """All ranks take part (they hold random states, and under FSDP parts of the weights); the main one writes."""
        step = trainer.global_step
        states = [rng.capture(module.device)]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, rng.capture(module.device))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = get_optimizer_state_dict(module.model, module.plain_optimizer(), options=options)
        weights = None
        if module.sharded:
            whole = get_model_state_dict(module.model, options=options)
            weights = {name: tensor for name, tensor in whole.items() if isinstance(tensor, Tensor)}
        failure = ""
        if trainer.is_global_zero:
            state = {
                "optimizer": optimizer,
                "rng": states,
                "data": self._data.state_dict(),
                "seconds": self._watch.seconds,
                "last": asdict(module.last) if module.last is not None else None,
                "skipped": module.skipped,
                "skips_in_a_row": module.skips_in_a_row,
                "best": asdict(self.best) if self.best is not None else None,
                "validation_loss": self.validation_loss,
                "validated_step": self._validated_step,
            }
            try:
                self._checkpoints.save(module.model, step, state, weights=weights, best=self.best)
            except RunFailed as error:
                failure = str(error)
        failure = trainer.strategy.broadcast(failure)
        if failure:
            raise RunFailed(failure)


def _language_model(module: LightningModule) -> LanguageModel:
    if not isinstance(module, LanguageModel):
        raise TypeError(f"RunLoop trains a LanguageModel, not a {type(module).__name__}")
    return module


def _everywhere(mine: list[tuple[float, ...]], world: int) -> list[tuple[float, ...]]:
    """What all ranks have."""
    if world == 1:
        return mine
    gathered: list[list[tuple[float, ...]]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(gathered, mine)
    return [part for parts in gathered for part in parts]


def _memory_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
