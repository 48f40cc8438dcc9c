"""A decoder-only language model as frozen data (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .config_attention import (
    FORBID_EXTRA,
    MLP,
    AttentionPlan,
    HeadGroup,
    ModelConfigError,
    Norm,
    choice_problems,
    count_problems,
    head_problems,
    pattern_problems,
    positive_problems,
    probability_problems,
    specs_of,
)
from .config_rope import RopeScaling

Positions = Literal["learned", "sinusoidal", "rope", "alibi", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model: the GPT-2 and the Llama families by configuration.

    vocab_size       rows of the embedding (and of the head)
    n_layers         blocks
    d_model          width of the residual stream
    n_heads          query heads in a layer
    n_kv_heads       key/value heads; None: n_heads (multi-head), 1: multi-query
    head_dim         None: d_model // n_heads
    d_ff             hidden width of the MLP
    max_positions    longest context the model is built for; with learned positions, the table's rows
    positions        learned | sinusoidal | rope | alibi | none. `sinusoidal` is added to the embedding times the root
                     of d_model (Vaswani et al. 2017, arXiv 1706.03762, §3.4 and 3.5). `alibi` sets alibi=True on every
                     spec of the attention plan, so that the stored config says what happens; single layers may ask for
                     it under any other choice
    rope_theta       base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)
    rope_scaling     how rotary positions are stretched beyond the length that the model was trained with; None: not
    norm             pre-normalisation in each block and before the head
    norm_eps         added to the variance (the mean square) under its root
    mlp              gelu (exact), gelu_tanh (GPT-2), swiglu (Llama)
    bias             biases in projections, MLP and LayerNorm (RMSNorm and the head never have one)
    qkv_bias         biases in the q, k and v projections; None: as `bias` (Qwen2 has these alone)
    out_bias         bias in the attention's output projection; None: as `bias`
    tied_head        the output head is the embedding
    qk_norm          RMSNorm on each head's q and k before rotation
    dropout          on embeddings and residual branches (attention's own dropout is in its spec)
    init_std         standard deviation of normal initialisation; residual projections use init_std / sqrt(2 n_layers)
    attention        per-layer attention

    Raises ModelConfigError with every problem at once.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA

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
    rope_scaling: RopeScaling | None = None
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    mlp: MLP = "gelu_tanh"
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    tied_head: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionPlan = field(default_factory=AttentionPlan)

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ModelConfigError(problems)
        if self.positions == "alibi":
            object.__setattr__(self, "attention", self.attention.with_alibi())

    @property
    def kv_heads(self) -> int:
        """`n_kv_heads`, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def dim_per_head(self) -> int:
        """`head_dim`, resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        """`qkv_bias`, resolved."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_out_bias(self) -> bool:
        """`out_bias`, resolved."""
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def receptive_field(self) -> int | None:
        """How many tokens before its own can change a prediction, wherever in a sequence it stands; None: all of them,
        or it knows where the sequence begins (learned or sinusoidal positions, sink tokens, a block layout, scaling
        that depends on the length). Each layer reaches a window further (Beltagy et al. 2020, arXiv 2004.05150, §3.1).
        """
        if self.positions in ("learned", "sinusoidal"):
            return None
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic":
            return None
        field = 0
        for layer in range(self.n_layers):
            specs = [group.spec for group in self.head_groups(layer)]
            reach = [None if spec.window.left is None else spec.window.left * spec.window.dilation for spec in specs]
            if any(spec.sink_tokens or spec.block_sparse is not None for spec in specs) or None in reach:
                return None
            field += max(keys for keys in reach if keys is not None)
        return field

    def head_groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """The layer's heads by spec, in order: one group where all heads share one."""
        return self.attention.head_groups(layer, self.n_heads)

    def pattern_groups(self) -> dict[str, tuple[HeadGroup, ...]]:
        """Every pattern that some layer has, as head groups."""
        return self.attention.pattern_groups(self.n_layers, self.n_heads)


def _problems(config: DecoderConfig) -> list[str]:
    counts = ("vocab_size", "n_layers", "d_model", "n_heads", "d_ff", "max_positions", "n_kv_heads", "head_dim")
    found = count_problems(config, counts)
    countable = not found  # the checks at the end divide by these numbers
    found += choice_problems(config, {"positions": Positions, "norm": Norm, "mlp": MLP})
    found += positive_problems(config, ("rope_theta", "norm_eps", "init_std"))
    found += probability_problems(config, ("dropout",))
    if config.rope_scaling is not None and config.positions != "rope":
        found.append(f"rope_scaling: positions={config.positions} has no rotation to stretch; set positions: rope")
    if not countable:
        return found
    found += head_problems(config)
    for name, pattern in config.attention.patterns.items():
        where = f"attention.patterns.{name}"
        found += pattern_problems(config, where, pattern)
        if not all(spec.causal for spec in specs_of(pattern)):
            found.append(f"{where}: causal=false, but a decoder predicts the next token; set causal: true")
    return found
