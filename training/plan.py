"""What a run will cost, before it starts: parameters, tokens, FLOPs, memory and time. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from longspan.model import accounting
from longspan.model.accounting import MemoryEstimate, ParameterCount
from longspan.model.cache_plan import cache_bytes
from longspan.model.config import DecoderConfig, EncoderConfig

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
# With data.document_mask attention skips what lies in other documents. Their lengths are known once the data is there.
UPPER_BOUND = "an upper bound: attention is counted as if each sequence were one document"
PACKED = "the mean over the packed sequences of the training stream, attention counted inside documents"


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
    flops_note       how the document mask is counted, in words; empty: there is none
    memory           at the peak of a step, on one device, in bytes
    kv_cache_bytes   a decoder's cache for one sequence of the training context, in bf16; None: an encoder has none
    kv_bytes_per_token  the same for each token, in layers that keep all
    seconds          of training alone; None where no rate is known
    basis            how `seconds` came about, in words
    stages           the costs of each; empty: the run has none. Tokens per step and FLOPs per token are then their
                     means, memory that of the stage that needs most, and the cache the last one's
    """

    model: DecoderConfig | EncoderConfig
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
            lines.insert(
                4, f"kv cache    {short_count(self.kv_cache_bytes)}B for a sequence of data.context tokens, in bf16"
            )
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
    model, trainer, context = config.model, config.trainer, config.data.context
    tokens_per_step = trainer.global_batch * context
    tokens = trainer.steps * tokens_per_step
    per_token, note = _flops_per_token(config, documents)
    name = name or device_name(device)
    seconds, basis = None, f"no peak rate is known for {name}"
    if peak.flops is not None:
        efficiency = GPU_EFFICIENCY if device.type == "cuda" else CPU_EFFICIENCY
        seconds = tokens * per_token / (peak.flops * efficiency)
        basis = f"at {efficiency:.0%} of {peak.flops / 1e12:.3g} TFLOP/s, {peak.basis}"
    return Plan(
        model=model,
        parameters=accounting.parameters(model),
        steps=trainer.steps,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops_per_token=per_token,
        flops_note=note,
        flops=tokens * per_token,
        memory=accounting.training_memory(
            model,
            micro_batch=trainer.micro_batch,
            length=context,
            precision=arithmetic.precision,
            optimizer=config.optimizer.name,
            activation_checkpointing=trainer.activation_checkpointing,
        ),
        kv_cache_bytes=cache_bytes(model, 1, context, "bfloat16").total if isinstance(model, DecoderConfig) else None,
        kv_bytes_per_token=accounting.kv_bytes_per_token(model) if isinstance(model, DecoderConfig) else None,
        device=name,
        precision=f"{arithmetic.precision} ({arithmetic.reason})",
        seconds=seconds,
        basis=basis,
    )


def _flops_per_token(config: RunConfig, documents: Mapping[int, float] | None) -> tuple[float, str]:
    """Forward and backward, and how the document mask is counted."""
    model, context, masking = config.model, config.data.context, config.data.masking
    predicted = 1.0 if masking is None else masking.probability
    if not config.data.document_mask:
        return accounting.training_flops_per_token(model, length=context, predicted=predicted), ""
    if documents is None or not accounting.countable_when_packed(model):
        return accounting.training_flops_per_token(model, length=context, predicted=predicted), UPPER_BOUND
    flops = accounting.packed_training_flops_per_token(model, length=context, documents=documents, predicted=predicted)
    return flops, PACKED


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
