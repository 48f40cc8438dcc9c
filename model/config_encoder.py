"""A bidirectional encoder as frozen data (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from longspan.kernels.attention.spec import AttentionSpec

from .config_attention import (
    FORBID_EXTRA,
    MLP,
    AttentionPlan,
    HeadGroup,
    ModelConfigError,
    Norm,
    Positions,
    choice_problems,
    count_problems,
    head_problems,
    pattern_problems,
    positive_problems,
    probability_problems,
    specs_of,
)

NormOrder = Literal["post", "pre"]
EncoderHead = Literal["none", "mlm", "classification", "qa"]


def _full_attention() -> AttentionPlan:
    return AttentionPlan(patterns={"full": AttentionSpec(causal=False)}, layers=("full",))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder that reads in both directions: BERT, RoBERTa and Longformer by configuration.

    vocab_size          rows of the token embedding (and of the masked-LM head)
    n_layers            blocks
    d_model             width of the residual stream
    n_heads             query heads in a layer
    n_kv_heads          key/value heads; None: n_heads
    head_dim            None: d_model // n_heads
    d_ff                hidden width of the MLP
    max_positions       longest input the model is built for, in tokens
    positions           learned | rope | alibi | none. `alibi` sets alibi=True on every spec of the attention plan
    position_offset     row of the learned table at which position 0 lies; the table has max_positions + position_offset
                        rows. RoBERTa and Longformer: 2, their padding token's id plus 1, as fairseq counted
    rope_theta          base of the rotary frequencies
    n_types             token types (BERT's segments) with an embedding each; 0: there is no such table
    norm                of the embeddings, in each block, and in the masked-LM head
    norm_eps            added to the variance (the mean square) under its root
    norm_order          post: x = norm(x + branch(x)), as BERT; pre: x + branch(norm(x)), and a norm after the stack
    mlp                 gelu (exact), gelu_tanh, swiglu; the masked-LM head has its GELU
    bias                biases in projections, MLP and LayerNorm
    pooler              a dense layer with tanh over the first token
    head                what `forward` gives: none (hidden states [B, T, D]), mlm (logits [B, T, V]), classification
                        (logits [B, C], over the pooler), qa (logits [B, T, 2]: start and end of the answer)
    tied_head           the masked-LM head's matrix is the token embedding
    labels              names of the classes of head=classification, in order
    dropout             on embeddings and residual branches (attention's own dropout is in its spec)
    head_dropout        before the classifier; None: dropout
    init_std            standard deviation of normal initialisation
    attention           per-layer attention
    global_projections  layers whose spec has global_tokens read and answer global tokens' queries through projections
                        of their own (Beltagy et al. 2020, arXiv 2004.05150, §3.1)

    Raises ModelConfigError with every problem at once.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA

    architecture: Literal["encoder"] = "encoder"
    vocab_size: int = 30522
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 3072
    max_positions: int = 512
    positions: Positions = "learned"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    n_types: int = 2
    norm: Norm = "layernorm"
    norm_eps: float = 1e-12
    norm_order: NormOrder = "post"
    mlp: MLP = "gelu"
    bias: bool = True
    pooler: bool = False
    head: EncoderHead = "mlm"
    tied_head: bool = True
    labels: tuple[str, ...] = ()
    dropout: float = 0.0
    head_dropout: float | None = None
    init_std: float = 0.02
    attention: AttentionPlan = field(default_factory=_full_attention)
    global_projections: bool = False

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

    def head_groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """The layer's heads by spec, in order: one group where all heads share one."""
        return self.attention.head_groups(layer, self.n_heads)

    def pattern_groups(self) -> dict[str, tuple[HeadGroup, ...]]:
        """Every pattern that some layer has, as head groups."""
        return self.attention.pattern_groups(self.n_layers, self.n_heads)

    def has_global_projections(self, layer: int) -> bool:
        """Whether the layer has projections for global rows."""
        return self.global_projections and self.head_groups(layer)[0].spec.global_tokens


def _problems(config: EncoderConfig) -> list[str]:
    counts = ("vocab_size", "n_layers", "d_model", "n_heads", "d_ff", "max_positions", "n_kv_heads", "head_dim")
    found = count_problems(config, counts)
    countable = not found  # the checks at the end divide by these numbers
    choices = {"positions": Positions, "norm": Norm, "norm_order": NormOrder, "mlp": MLP, "head": EncoderHead}
    found += choice_problems(config, choices)
    found += positive_problems(config, ("rope_theta", "norm_eps", "init_std"))
    found += probability_problems(config, ("dropout", "head_dropout"))
    found += [
        f"{name}={getattr(config, name)}: it is 0 or more"
        for name in ("position_offset", "n_types")
        if getattr(config, name) < 0
    ]
    found += _head_problems(config)
    if not countable:
        return found
    found += head_problems(config)
    for name, pattern in config.attention.patterns.items():
        where = f"attention.patterns.{name}"
        found += pattern_problems(config, where, pattern)
        if any(spec.causal for spec in specs_of(pattern)):
            found.append(f"{where}: causal=true, but an encoder reads in both directions; set causal: false")
    return found + _global_problems(config)


def _head_problems(config: EncoderConfig) -> list[str]:
    found: list[str] = []
    if config.position_offset > 0 and config.positions != "learned":
        found.append(
            f"position_offset={config.position_offset} with positions={config.positions}: "
            "only a learned table has rows to skip; set it to 0"
        )
    if config.head == "classification":
        if not config.labels:
            found.append("labels=[]: head=classification names at least 1 class (one alone is a score)")
        if not config.pooler:
            found.append("pooler=False: head=classification reads the pooled first token; set pooler: true")
    elif config.labels:
        found.append(f"labels={list(config.labels)} with head={config.head}: only head=classification has classes")
    return found


def _global_problems(config: EncoderConfig) -> list[str]:
    if not config.global_projections:
        return []
    found: list[str] = []
    for name, pattern in config.attention.patterns.items():
        specs = specs_of(pattern)
        if len({spec.global_tokens for spec in specs}) > 1:
            found.append(
                f"attention.patterns.{name}: with global_projections its groups have global_tokens all or none"
            )
        elif specs and specs[0].global_tokens and any(spec.learned_sink for spec in specs):
            found.append(f"attention.patterns.{name}: learned_sink does not go with global_projections")
    used = config.pattern_groups().values()
    if not any(group.spec.global_tokens for groups in used for group in groups):
        found.append("global_projections=True, but no layer's attention has global_tokens: true")
    return found
