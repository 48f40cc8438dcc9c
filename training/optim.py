"""Optimizer, parameter groups and learning-rate schedules.

A schedule is a pure function of the step, so a resumed run needs nothing but its step to be at the right place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .schema import OptimizerConfig, ScheduleConfig
from .stages import Stage

Factor = Callable[[int], float]  # step (0-based) -> learning rate as a share of the peak

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True)
class ParameterSplit:
    """Every trainable parameter once, by name: those that decay and those that do not."""

    decay: Mapping[str, nn.Parameter]
    no_decay: Mapping[str, nn.Parameter]


def split_parameters(model: nn.Module) -> ParameterSplit:
    """Weight matrices decay; embeddings (a tied head is one) and everything with fewer than two dimensions, which is
    every bias and every norm, do not. A parameter shared by several modules is counted once, under its first name,
    and does not decay if any of its owners is an embedding."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _EMBEDDINGS)
        for parameter in module.parameters(recurse=False)
    }
    decay: dict[str, nn.Parameter] = {}
    no_decay: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decay if decays else no_decay)[name] = parameter
    return ParameterSplit(decay, no_decay)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), fused where every parameter is on a GPU."""
    split = split_parameters(model)
    groups = [
        {"params": list(split.decay.values()), "weight_decay": config.weight_decay},
        {"params": list(split.no_decay.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=_on_gpu(model.parameters()),
    )


def _on_gpu(parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter.is_cuda for parameter in parameters)


# -- schedules --------------------------------------------------------------------------------------------------------


def build_schedule(config: ScheduleConfig, steps: int) -> Factor:
    """The schedule of a run of `steps` optimizer steps.

    Warm-up over w steps: step s has the factor (s + 1) / w, so step w - 1 is the first at the peak. The last step
    (steps - 1) has exactly `final_ratio` (1 for `constant`; `rsqrt` has no end); steps past the end keep it.
    Raises ValueError when warm-up (and decay) do not fit into the run.
    """
    warmup = in_steps(config.warmup, steps)
    if warmup > steps:
        raise ValueError(
            f"schedule.warmup={config.warmup:g}: the warm-up is longer than the run (trainer.steps={steps})"
        )
    final = config.final_ratio
    if config.name == "cosine":
        return lambda step: _warm(step, warmup, lambda s: cosine(_progress(s, warmup, steps), final))
    if config.name == "linear":
        return lambda step: _warm(step, warmup, lambda s: linear(_progress(s, warmup, steps), final))
    if config.name == "wsd":
        decay = in_steps(config.decay, steps)
        if warmup + decay > steps:
            raise ValueError(
                f"schedule.warmup={config.warmup:g} and schedule.decay={config.decay:g} are {warmup} and {decay} "
                f"steps, together more than trainer.steps={steps}"
            )
        return lambda step: _warm(step, warmup, lambda s: warmup_stable_decay(s, steps, decay, final))
    if config.name == "rsqrt":
        offset = config.offset
        if offset is not None:
            return lambda step: _warm(step, warmup, lambda s: inverse_square_root(s, offset))
        if warmup == 0:
            raise ValueError("schedule.offset=null: counts from the warm-up, and schedule.warmup=0; give either")
        return lambda step: _warm(step, warmup, lambda s: inverse_square_root(s + 1 - warmup, warmup))
    return lambda step: _warm(step, warmup, lambda _: 1.0)


def stage_schedule(stage: Stage) -> Factor:
    """The schedule of a stage over the steps of its run: its own shape from its first step to its last, times its
    share of the peak."""
    factor = build_schedule(stage.config.schedule, stage.steps)
    return lambda step: stage.lr_factor * factor(step - stage.start)


def in_steps(amount: float, steps: int) -> int:
    """A length that is a share of the run below 1 and a number of steps from there on."""
    return round(amount * steps) if amount < 1 else round(amount)


def cosine(progress: float, final: float) -> float:
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5 without restarts)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, final: float) -> float:
    """A straight line from 1 to `final`."""
    return 1 - (1 - final) * progress


def inverse_square_root(step: int, offset: int) -> float:
    """1/sqrt of the step, which has no end (Raffel et al. 2020, arXiv 1910.10683, §3.1.2), as a share of its value at
    step `offset`, where the run goes on."""
    return math.sqrt(offset / (offset + step))


def warmup_stable_decay(step: int, steps: int, decay: int, final: float) -> float:
    """1 until `decay` steps before the last one, then a line to `final` (Hu et al. 2024, arXiv 2404.06395, §4)."""
    start = steps - 1 - decay
    return 1.0 if decay == 0 else linear(min(max(step - start, 0) / decay, 1.0), final)


def _warm(step: int, warmup: int, after: Factor) -> float:
    return (step + 1) / warmup if step < warmup else after(step)


def _progress(step: int, warmup: int, steps: int) -> float:
    """0 at the first step at the peak, 1 at the last step of the run and beyond."""
    peak = max(warmup - 1, 0)
    span = steps - 1 - peak
    return min((step - peak) / span, 1.0) if span > 0 else 1.0
