"""What a grid will cost, before it starts: steps, tokens, time, and what each number of heads saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from longspan.model.accounting import kv_bytes_per_token, parameters
from longspan.model.config import DecoderConfig

from .metrics import clock, short_count
from .plan import find_peak, plan_for
from .precision import choose_arithmetic, choose_device
from .uptrain_recipe import Uptraining

_MEASURING = 3.0  # forward passes over the evaluated tokens: windows overlap by half, and retrieval is about as much


@dataclass(frozen=True, slots=True)
class GridCosts:
    """A table, a row a chain, and what all of it comes to."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str]


def costs_of(grid: Uptraining) -> GridCosts:
    """Nothing is read but configs. Raises UserError where the device is not there."""
    device = choose_device(grid.base.trainer.accelerator)
    arithmetic = choose_arithmetic(grid.base.trainer.precision, device)
    peak = find_peak(device, arithmetic, world=1)
    rows: list[tuple[str, ...]] = []
    seconds: float | None = 0.0
    tokens = steps = 0
    for chain in grid.chains:
        last = chain.cells[-1]
        model = grid.model_of(last)
        config = replace(grid.base, model=model, trainer=replace(grid.base.trainer, steps=max(1, chain.steps)))
        plan = plan_for(config, device, arithmetic, peak)
        taken = None if plan.seconds is None else plan.seconds if chain.steps else 0.0
        if plan.seconds is not None and taken is not None and seconds is not None:
            per_token = plan.seconds / plan.tokens / 3  # a forward pass
            scored = grid.base.evaluation.max_tokens or 200_000
            seconds += taken + len(chain.cells) * _MEASURING * scored * per_token
        else:
            seconds = None
        steps += chain.steps
        tokens += chain.steps * grid.tokens_per_step
        cache = f"{kv_bytes_per_token(model):,}" if isinstance(model, DecoderConfig) else "-"
        rows.append(
            (
                chain.name,
                ", ".join(f"{cell.alpha:g}" for cell in chain.cells),
                f"{chain.steps:,}",
                f"{chain.steps * grid.tokens_per_step:,}",
                f"{parameters(model).total:,}",
                cache,
                "-" if taken is None or not chain.steps else clock(taken),
            )
        )
    workers = grid.request.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    total = "unknown" if seconds is None else f"about {clock(seconds / max(1, workers))}"
    lines = [
        "",
        f"cells       {len(grid.cells):,}, {sum(1 for chain in grid.chains if chain.steps):,} trainings",
        f"parent      {grid.parent}, {grid.parent_steps:,} steps",
        f"schedule    {grid.request.schedule}, learning rate {grid.lr:.3g}",
        f"training    {steps:,} steps, {short_count(tokens)} tokens ({grid.tokens_per_step:,} a step)",
        f"time        {total} on {workers} {'GPU' if device.type == 'cuda' else 'CPU process'}"
        f"{'s' if workers > 1 else ''}; {peak.basis}; small models take longer than their FLOPs say",
    ]
    head = ("run", "alpha", "steps", "tokens", "parameters", "KV bytes/token (bf16)", "time")
    return GridCosts(head, rows, lines)
