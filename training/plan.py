"""What a run will cost, before it starts: parameters, tokens, FLOPs, memory and time. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from longspan.model import accounting
from longspan.model.accounting import MemoryEstimate, ParameterCount
from longspan.model.config import ModelConfig, Seq2SeqConfig

from .costs import sequence_costs
from .errors import UserError
from .metrics import clock, short_count
from .precision import Arithmetic, choose_arithmetic, choose_device, measured_matmul_flops
from .schema import RunConfig
from .stages import Stage, stages_of, windows_in_words
from .start import check_every_stage, find_directory, find_origin, settle

# Shares of the peak that a training step reaches: rules of thumb between few measurements, not predictions. On one H100
# with trainer=gpu, gpt2-small at length 1024 reached 0.33 and llama-300m at 4096 0.39 of the dense bf16 peak; on two
# cores with AMX the quickstart reached 0.2 to 0.5 of the measured rate of one large matrix product.
GPU_EFFICIENCY = 0.35
CPU_EFFICIENCY = 0.3
ABSENT_GPU = "H100"


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of all devices together that MFU is a share of, and where the number comes from."""

    flops: float | None
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The costs of a run.

    tokens           that training reads
    flops_per_token  forward and backward, exact for the attention pattern
    flops_note       how sequences are counted, in words; empty: each as a whole context
    memory           at the peak of a step, on one device, in bytes
    kv_cache_bytes   what generation keeps of one training sequence, in bf16; None: an encoder generates nothing
    kv_bytes_per_token  the same for each token, in layers that keep all
    seconds          of training alone; None where no rate is known
    basis            how `seconds` came about, in words
    stages           the costs of each; empty: the run has none. Tokens per step and FLOPs per token are then their
                     means, memory that of the stage that needs most, and the cache the last one's
    """

    model: ModelConfig
    parameters: ParameterCount
    steps: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    flops_note: str
    flops: float
    memory: MemoryEstimate
    kv_cache_bytes: int | None
    kv_bytes_per_token: int | None
    device: str
    precision: str
    seconds: float | None
    basis: str
    stages: tuple[StagePlan, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data, as accounting.json has it."""
        stages: dict[str, object] = {"stages": [each.to_dict() for each in self.stages]} if self.stages else {}
        return stages | {
            "parameters": {**asdict(self.parameters), "total": self.parameters.total},
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.steps,
            "training_flops_per_token": self.flops_per_token,
            "training_flops": self.flops,
            "training_flops_note": self.flops_note,
            "kv_cache_bytes": self.kv_cache_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "device": self.device,
            "precision": self.precision,
            "estimated_seconds": self.seconds,
            "estimate_basis": self.basis,
        }

    def lines(self) -> list[str]:
        """For a person: what it is, what it costs, how long it takes."""
        count, memory = self.parameters, self.memory
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in asdict(memory).items())
        note = f"; {self.flops_note}" if self.flops_note else ""
        time = "unknown" if self.seconds is None else f"about {clock(self.seconds)}"
        lines = [
            f"parameters  {count.total:,} ({count.non_embedding:,} without embeddings)",
            f"tokens      {self.tokens:,} "
            + (f"in {self.steps:,} steps" if self.stages else f"= {self.steps:,} steps × {self.tokens_per_step:,}"),
            f"FLOPs       {self.flops:.3g} ({self.flops_per_token:.3g} per token, forward and backward{note})",
            f"memory      {memory.total / 2**30:.2f} GiB per device ({parts})",
            f"device      {self.device}, {self.precision}",
            f"time        {time} ({self.basis})",
        ]
        if self.kv_cache_bytes is not None:
            whose = "a source and its target" if isinstance(self.model, Seq2SeqConfig) else "a sequence"
            size = short_count(self.kv_cache_bytes)
            lines.insert(4, f"kv cache    {size}B for {whose} of data.context tokens, in bf16")
        return lines + (stage_table(self.stages) if self.stages else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage and the costs of it alone."""

    stage: Stage
    plan: Plan

    def to_dict(self) -> dict[str, object]:
        plan = self.plan
        return self.stage.to_dict() | {
            "training_flops": plan.flops,
            "memory": plan.memory.total,
            "estimated_seconds": plan.seconds,
        }


def stage_table(stages: Sequence[StagePlan]) -> list[str]:
    """A line for each stage under a line of headings, in columns."""
    rows = [("stage", "steps", "context", "windows", "lr", "batch", "tokens", "FLOPs", "memory", "time")]
    for each in stages:
        stage, plan, trainer = each.stage, each.plan, each.stage.config.trainer
        rows.append(
            (
                str(stage.name),
                f"{stage.steps:,}",
                f"{stage.config.data.context:,}",
                windows_in_words(stage.config.model),
                f"{stage.config.optimizer.lr * stage.lr_factor:.3g}",
                f"{trainer.global_batch} / {trainer.micro_batch}",
                f"{plan.tokens:,}",
                f"{plan.flops:.3g}",
                f"{plan.memory.total / 2**30:.2f} GiB",
                "unknown" if plan.seconds is None else clock(plan.seconds),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def plan(config: RunConfig, *, hardware: str | None = None) -> Plan:
    """The plan of `config` on this machine, or on GPUs of the kind `hardware` ("H100", "A100": accounting.PEAK_FLOPS).

    Where a GPU is asked for and none is here, ABSENT_GPU stands for it: a cluster's jobs are planned on laptops.
    Raises UserError for unknown hardware, when fewer GPUs than asked for are here, and (as do the errors of checkpoints
    and attention) for what the run itself would refuse before it reads data.
    """
    directory = find_directory(config)
    config = settle(config, find_origin(config, directory), directory)
    if hardware is None and config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        hardware = ABSENT_GPU
    if hardware is not None:
        return _plan_elsewhere(config, hardware)
    device = choose_device(config.trainer.accelerator, config.trainer.devices)
    arithmetic = choose_arithmetic(config.trainer.precision, device)
    check_every_stage(config, device, arithmetic)
    peak = find_peak(device, arithmetic, world=config.trainer.devices * config.trainer.nodes)
    return plan_for(config, device, arithmetic, peak)


def _plan_elsewhere(config: RunConfig, hardware: str) -> Plan:
    device = torch.device("cuda")
    arithmetic = choose_arithmetic(config.trainer.precision, device)
    check_every_stage(config, device, arithmetic)
    flops = accounting.peak_flops(hardware, arithmetic.compute)
    if flops is None:
        known = ", ".join(accounting.PEAK_FLOPS)
        raise UserError(f"hardware={hardware}: no {arithmetic.precision} rate is known for it; known are {known}")
    world = config.trainer.devices * config.trainer.nodes
    peak = Peak(flops * world, f"the data sheet's rate of {world} × {hardware}, which is not in this machine")
    return plan_for(config, device, arithmetic, peak, name=hardware)


def plan_for(
    config: RunConfig,
    device: torch.device,
    arithmetic: Arithmetic,
    peak: Peak,
    *,
    name: str | None = None,
    documents: Sequence[Mapping[int, float] | None] = (),
) -> Plan:
    """The plan where device, arithmetic and config are settled already.

    name       of a device that is not here
    documents  how many documents of each length a training sequence holds on average, for each stage, once the data is
               there: with data.document_mask they make the FLOPs exact, and without them the FLOPs are an upper bound
    """
    stages = stages_of(config)
    counted = documents or (None,) * len(stages)
    plans = [
        _plan_of(stage.config, device, arithmetic, peak, name=name, documents=each)
        for stage, each in zip(stages, counted, strict=True)
    ]
    if not config.stages:
        return plans[0]
    seconds = [each.seconds for each in plans if each.seconds is not None]
    steps, tokens = sum(each.steps for each in plans), sum(each.tokens for each in plans)
    flops = sum(each.flops for each in plans)
    return replace(
        plans[-1],
        steps=steps,
        tokens=tokens,
        tokens_per_step=round(tokens / steps),
        flops=flops,
        flops_per_token=flops / tokens,
        memory=max((each.memory for each in plans), key=lambda memory: memory.total),
        seconds=sum(seconds) if len(seconds) == len(plans) else None,
        stages=tuple(StagePlan(stage=stage, plan=each) for stage, each in zip(stages, plans)),
    )


def _plan_of(
    config: RunConfig,
    device: torch.device,
    arithmetic: Arithmetic,
    peak: Peak,
    *,
    name: str | None,
    documents: Mapping[int, float] | None,
) -> Plan:
    """Of a run without stages, or of one stage."""
    trainer = config.trainer
    tokens_per_step = trainer.global_batch * config.data.context
    tokens = trainer.steps * tokens_per_step
    costs = sequence_costs(config, arithmetic.precision, documents)
    name = name or device_name(device)
    seconds, basis = None, f"no peak rate is known for {name}"
    if peak.flops is not None:
        efficiency = GPU_EFFICIENCY if device.type == "cuda" else CPU_EFFICIENCY
        seconds = tokens * costs.flops_per_token / (peak.flops * efficiency)
        basis = f"at {efficiency:.0%} of {peak.flops / 1e12:.3g} TFLOP/s, {peak.basis}"
    return Plan(
        model=config.model,
        parameters=accounting.parameters(config.model),
        steps=trainer.steps,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops_per_token=costs.flops_per_token,
        flops_note=costs.note,
        flops=tokens * costs.flops_per_token,
        memory=costs.memory,
        kv_cache_bytes=costs.kv_cache_bytes,
        kv_bytes_per_token=costs.kv_bytes_per_token,
        device=name,
        precision=f"{arithmetic.precision} ({arithmetic.reason})",
        seconds=seconds,
        basis=basis,
    )


def find_peak(device: torch.device, arithmetic: Arithmetic, *, world: int) -> Peak:
    """A GPU's from its data sheet; a CPU's is measured, and only where one process has it to itself."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        flops = accounting.peak_flops(name, arithmetic.compute)
        return Peak(None if flops is None else flops * world, f"the data sheet's rate of {world} × {name}")
    if world > 1:
        return Peak(None, "several processes share this CPU")
    return Peak(measured_matmul_flops(arithmetic.compute), "this CPU's measured matrix-product rate")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
