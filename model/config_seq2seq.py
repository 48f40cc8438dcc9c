"""An encoder–decoder as frozen data (no torch here)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from longspan.kernels.attention.spec import AttentionSpec

from .config_attention import FORBID_EXTRA, MLP, AttentionPlan, ModelConfigError
from .config_decoder import DecoderConfig
from .config_encoder import EncoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """One of the two stacks of an encoder–decoder; its problems are found by `Seq2SeqConfig`.

    n_layers       blocks
    n_heads        query heads in a layer
    n_kv_heads     key/value heads; None: n_heads
    head_dim       None: d_model // n_heads
    d_ff           hidden width of the MLP
    max_positions  longest input of this stack, in tokens
    attention      self-attention per layer; None: full, causal in the decoder
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA

    n_layers: int = 6
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 3072
    max_positions: int = 1024
    attention: AttentionPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqConfig:
    """A model that reads a source in both directions and writes a target: BART and LED by configuration.

    vocab_size           rows of the one embedding of source, target and head
    d_model              width of the residual streams
    encoder, decoder     the two stacks
    position_offset      row of both learned tables at which position 0 lies. BART: 2, as fairseq counted; LED: 0
    norm_eps             of LayerNorm: after the embeddings and after every branch
    mlp                  gelu (exact), gelu_tanh, swiglu
    scale_embedding      token embeddings are multiplied by sqrt(d_model) (Vaswani et al. 2017, arXiv 1706.03762, §3.4)
    dropout              on embeddings and residual branches (attention's own dropout is in its specs)
    init_std             standard deviation of normal initialisation
    cross_attention      of every decoder layer, over the whole source: its dropout, scale and softcap may be set
    cross_kv_heads       its key/value heads; None: as many as in the decoder's self-attention
    global_projections   encoder layers whose spec has global_tokens read and answer global tokens' queries through
                         projections of their own (Beltagy et al. 2020, arXiv 2004.05150, §3.1)
    decoder_start_token  what stands before every target
    forced_bos_token     what every generated target begins with; None: whatever is likeliest
    forced_eos_token     what a generated target ends with when it reaches its greatest length; None: anything

    Raises ModelConfigError with every problem at once.
    """

    __pydantic_config__: ClassVar = FORBID_EXTRA

    architecture: Literal["seq2seq"] = "seq2seq"
    vocab_size: int = 50265
    d_model: int = 768
    encoder: StackConfig = field(default_factory=StackConfig)
    decoder: StackConfig = field(default_factory=StackConfig)
    position_offset: int = 2
    norm_eps: float = 1e-5
    mlp: MLP = "gelu"
    scale_embedding: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    cross_attention: AttentionSpec = field(default_factory=lambda: AttentionSpec(causal=False))
    cross_kv_heads: int | None = None
    global_projections: bool = False
    decoder_start_token: int = 2
    forced_bos_token: int | None = None
    forced_eos_token: int | None = None

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ModelConfigError(problems)

    @property
    def encoder_half(self) -> EncoderConfig:
        """The encoder, as the config of a model of its own."""
        stack = self.encoder
        return EncoderConfig(
            vocab_size=self.vocab_size,
            n_layers=stack.n_layers,
            d_model=self.d_model,
            n_heads=stack.n_heads,
            n_kv_heads=stack.n_kv_heads,
            head_dim=stack.head_dim,
            d_ff=stack.d_ff,
            max_positions=stack.max_positions,
            position_offset=self.position_offset,
            n_types=0,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            head="none",
            dropout=self.dropout,
            init_std=self.init_std,
            attention=_full(causal=False) if stack.attention is None else stack.attention,
            global_projections=self.global_projections,
        )

    @property
    def decoder_half(self) -> DecoderConfig:
        """The decoder without its cross-attention, as the config of a model of its own: what a cache keeps."""
        stack = self.decoder
        return DecoderConfig(
            vocab_size=self.vocab_size,
            n_layers=stack.n_layers,
            d_model=self.d_model,
            n_heads=stack.n_heads,
            n_kv_heads=stack.n_kv_heads,
            head_dim=stack.head_dim,
            d_ff=stack.d_ff,
            max_positions=stack.max_positions,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            dropout=self.dropout,
            init_std=self.init_std,
            attention=_full(causal=True) if stack.attention is None else stack.attention,
        )

    @property
    def cross_heads(self) -> int:
        """`cross_kv_heads`, resolved."""
        return self.decoder_half.kv_heads if self.cross_kv_heads is None else self.cross_kv_heads


def _full(*, causal: bool) -> AttentionPlan:
    return AttentionPlan(patterns={"full": AttentionSpec(causal=causal)}, layers=("full",))


def _problems(config: Seq2SeqConfig) -> list[str]:
    halves = {"encoder": _half_problems(config, "encoder"), "decoder": _half_problems(config, "decoder")}
    shared = [problem for problem in halves["encoder"] if problem in halves["decoder"]]  # of fields that both have
    found = shared + [f"{half}: {text}" for half, texts in halves.items() for text in texts if text not in shared]
    if replace(config.cross_attention, dropout=0.0, scale=None, softcap=None) != AttentionSpec(causal=False):
        found.append("cross_attention: it sees the whole source; only dropout, scale and softcap can be set")
    if (cross := config.cross_kv_heads) is not None and (cross < 1 or config.decoder.n_heads % cross):
        found.append(
            f"cross_kv_heads={cross}: decoder.n_heads={config.decoder.n_heads} is not a multiple of it: "
            "each key/value head serves the same number of query heads"
        )
    for name in ("decoder_start_token", "forced_bos_token", "forced_eos_token"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            found.append(f"{name}={token}: a token of the vocabulary, 0 … {config.vocab_size - 1}")
    return found


def _half_problems(config: Seq2SeqConfig, half: Literal["encoder", "decoder"]) -> tuple[str, ...]:
    try:
        _ = config.encoder_half if half == "encoder" else config.decoder_half
    except ModelConfigError as error:
        return error.problems
    return ()
