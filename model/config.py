"""What a model is made of, as frozen data that every layer of the framework can read (no torch here).

Configs never enter modules: `zoo.build` turns them into constructor arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from longspan.kernels.attention.spec import AttentionSpec

_FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic where these stand in a config

Positions = Literal["learned", "rope", "alibi", "none"]
Norm = Literal["layernorm", "rmsnorm"]
MLP = Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """A run of query heads that share one spec, for layers whose heads differ (Longformer dilates two heads)."""

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    heads: int
    spec: AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Which attention each layer has. `patterns` names the kinds; `layers` lists one name a layer and repeats
    cyclically when it is shorter than the stack (["local", "local", "global"] over 12 layers is that four times)."""

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    patterns: Mapping[str, AttentionSpec | tuple[HeadGroup, ...]] = field(
        default_factory=lambda: {"full": AttentionSpec(causal=True)}
    )
    layers: tuple[str, ...] = ("full",)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("attention.layers is empty: it names at least one pattern")
        for name in self.layers:
            if name not in self.patterns:
                raise ValueError(
                    f"attention.layers names the pattern '{name}', but attention.patterns has {', '.join(self.patterns)}"
                )

    def of_layer(self, layer: int) -> tuple[str, AttentionSpec | tuple[HeadGroup, ...]]:
        """(pattern name, spec or head groups) of one layer."""
        name = self.layers[layer % len(self.layers)]
        return name, self.patterns[name]

    def specs(self) -> dict[str, tuple[AttentionSpec, ...]]:
        """Every pattern's specs, by name."""
        return {
            name: (pattern,) if isinstance(pattern, AttentionSpec) else tuple(group.spec for group in pattern)
            for name, pattern in self.patterns.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model: the GPT-2 and the Llama families by configuration.

    vocab_size       rows of the embedding (and of the head)
    n_layers, d_model, n_heads
    n_kv_heads       key/value heads; None: n_heads (multi-head), 1: multi-query
    head_dim         None: d_model // n_heads
    d_ff             hidden width of the MLP
    max_positions    longest context the model is built for; with learned positions, the table's rows
    positions        learned | rope | alibi | none
    rope_theta       base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)
    norm, norm_eps   pre-normalisation in each block and before the head
    mlp              gelu (exact), gelu_tanh (GPT-2), swiglu (Llama)
    bias             biases in projections, MLP and LayerNorm
    tied_head        the output head is the embedding
    qk_norm          RMSNorm on each head's q and k before rotation
    dropout          on embeddings and residual branches (attention's own dropout is in its spec)
    init_std         standard deviation of normal initialisation; residual projections use init_std / sqrt(2 n_layers)
    attention        per-layer attention
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    architecture: Literal["decoder"] = "decoder"
    vocab_size: int = 50257
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 3072
    max_positions: int = 1024
    positions: Positions = "learned"
    rope_theta: float = 10_000.0
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    mlp: MLP = "gelu_tanh"
    bias: bool = True
    tied_head: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionPlan = field(default_factory=AttentionPlan)
