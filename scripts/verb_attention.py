"""`longspan attention`: which backends can compute each pattern of a model, in each phase, on this machine."""

from __future__ import annotations

import torch

from longspan.kernels.attention import AttentionCall, Phase, explain
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig
from longspan.training.precision import choose_device
from longspan.training.schema import Accelerator, ExplainConfig, as_request

from .output import as_yaml

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: ExplainConfig) -> int:
    if config.dry_run:
        print(as_yaml(as_request(config)), end="")
        return 0
    for heading, half in _halves(config.model):
        if heading:
            print(heading)
        _explain(half, config)
    return 0


def _halves(model: ModelConfig) -> list[tuple[str, DecoderConfig | EncoderConfig]]:
    """The model itself, or both stacks of an encoder–decoder, each with its heading."""
    if not isinstance(model, Seq2SeqConfig):
        return [("", model)]
    return [("encoder", model.encoder_half), ("decoder", model.decoder_half)]


def _explain(model: DecoderConfig | EncoderConfig, config: ExplainConfig) -> None:
    context = config.context or model.max_positions
    phases = tuple(Phase) if isinstance(model, DecoderConfig) else (Phase.TRAIN,)  # an encoder has no cache
    for name, groups in model.pattern_groups().items():
        layers = [str(layer) for layer in range(model.n_layers) if model.attention.of_layer(layer)[0] == name]
        print(f"pattern {name}: layers {', '.join(layers)}")
        for group in groups:
            if len(groups) > 1:
                print(f"  {group.heads} of {model.n_heads} query heads")
            for phase in phases:
                call = AttentionCall(
                    phase=phase,
                    device=_device(config.accelerator),
                    dtype=_DTYPES[config.precision],
                    head_dim=model.dim_per_head,
                    n_heads=group.heads,
                    n_kv_heads=group.heads * model.kv_heads // model.n_heads,
                    n_queries=1 if phase is Phase.DECODE else context,
                    n_keys=context,
                    needs_grad=phase is Phase.TRAIN,
                )
                print("\n".join(f"  {line}" for line in explain(group.spec, call).splitlines()))


def _device(accelerator: Accelerator) -> str:
    """A question about GPUs may be asked where there is none."""
    return "cuda" if accelerator == "gpu" else choose_device(accelerator).type
