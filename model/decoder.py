"""The decoder-only transformer: GPT-2, Llama and everything between them, by configuration.

What it is, in the order of computation:

  * token embedding; plus a learned position table when positions=learned (GPT-2), or sinusoids when
    positions=sinusoidal, dropout on the sum
  * n_layers pre-norm blocks: x += attention(norm(x)); x += mlp(norm(x)); dropout on both branches
  * norms: LayerNorm or RMSNorm; a last norm before the head
  * attention: separate q, k, v projections (optionally computed as one), grouped key/value heads, optional RMSNorm on
    q and k, rotation when positions=rope, then one `attend` per head group with the spec of the layer's pattern
  * what a query may see is the spec's and the context's business alone: no mask is built here
  * MLP: GELU (exact or tanh) or SwiGLU; biases everywhere or nowhere, or in attention apart from the rest; never in
    RMSNorm and the head
  * head: the embedding transposed, or its own matrix; training multiplies by `head_weight` inside the loss instead
  * generation: the same modules with a cache; prefill, chunks of it and single tokens are one code path

Legend: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext, Phase
from longspan.kernels.attention.caching import CacheStep, KeyValueCache

from .attention import Attention, BackendChoice
from .config import DecoderConfig
from .initial import draw_weights
from .layers import feed_forward, norm
from .positions import Rotary, Sinusoids


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, *, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
        step: CacheStep | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, context, step))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


class Decoder(nn.Module):
    """Built by `from_config`. `config` is kept for saving and accounting; the forward pass does not read it."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        embedding: nn.Embedding,
        position_embedding: nn.Embedding | None,
        sinusoids: Sinusoids | None,
        rotary: Rotary | None,
        blocks: list[Block],
        final_norm: nn.Module,
        head: nn.Linear | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.sinusoids = sinusoids
        self.rotary = rotary
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = final_norm
        self.head = head
        # One attention of each distinct layer pattern (in a dict, so that none is registered twice).
        self._kinds = {config.attention.of_layer(layer)[0]: block.attention for layer, block in enumerate(blocks)}

    def forward(
        self,
        tokens_BT: Tensor,
        context: AttentionContext | None = None,
        *,
        positions_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V]. Arguments as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, context, positions_BT=positions_BT, cache=cache))

    def hidden(
        self,
        tokens_BT: Tensor,
        context: AttentionContext | None = None,
        *,
        positions_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        context        documents, global tokens, positions for attention. With a cache it describes these T tokens alone
                       (the cache remembers what earlier ones were): q_documents, is_global, and kv_lengths, how many
                       of the T are real in each row. Without document ids each row is one document; without flags no
                       token is global
        positions_BT   int64 positions for the position encoding; None: the context's q_positions, or the cache's
        cache          receives the keys and values of these tokens and supplies those of earlier ones

        Raises ValueError for tokens that are not [B, T], for positions beyond a learned table and for a cache that is
        full.
        """
        if tokens_BT.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens_BT.shape)}; the model reads [batch, time]")
        context = AttentionContext() if context is None else context
        step = None if cache is None else cache.begin(tokens_BT.shape[1], context)
        positions_BT, reach = self._positions(tokens_BT, context, positions_BT, step)

        x_BTD = self.embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_BT)
        if self.sinusoids is not None:
            x_BTD = x_BTD * x_BTD.shape[-1] ** 0.5 + self.sinusoids(positions_BT, reach).to(x_BTD.dtype)
        x_BTD = self.dropout(x_BTD)
        rotation = None
        if self.rotary is not None:
            # A sequence that grows keeps the scale of the length that its cache was made for.
            rotation = self.rotary(positions_BT, reach, reach if step is None else step.capacity)
        if step is None:
            self._prepare(context, tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, context, step)
        if step is not None:
            step.finish()
        return self.norm(x_BTD)

    def logits(self, hidden_xD: Tensor) -> Tensor:
        """[…, V] of hidden states […, D]."""
        return nn.functional.linear(hidden_xD, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: logits are `hidden @ head_weight.T`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def _positions(
        self,
        tokens_BT: Tensor,
        context: AttentionContext,
        positions_BT: Tensor | None,
        step: CacheStep | None,
    ) -> tuple[Tensor, int]:
        """Positions for the encoding, [B or 1, T], and a bound above all of them that is known on the host."""
        reach = tokens_BT.shape[1] if step is None else step.reach
        positions_BT = context.q_positions if positions_BT is None else positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(reach, device=tokens_BT.device)[None] if step is None else step.positions_BT
        elif not (self.training and positions_BT.is_cuda) and positions_BT.numel():
            # Explicit positions are read back, except in training on a GPU, where each step would wait for it.
            reach = int(positions_BT.max()) + 1
        if self.position_embedding is not None and reach > self.position_embedding.num_embeddings:
            raise ValueError(
                f"position {reach - 1} is beyond the {self.position_embedding.num_embeddings} learned positions of "
                "this model (0 is the first); shorten the input or convert the model's positions"
            )
        return positions_BT, reach

    def _prepare(self, context: AttentionContext, tokens_BT: Tensor) -> None:
        """Masks are derived here, once for each kind of layer; compiled blocks then only read them."""
        device = tokens_BT.device
        autocast = torch.is_autocast_enabled(device.type)
        for attention in self._kinds.values():
            attention.prepare(
                context,
                n_tokens=tokens_BT.shape[1],
                device=device,
                dtype=torch.get_autocast_dtype(device.type) if autocast else self.head_weight.dtype,
                needs_grad=torch.is_grad_enabled() and self.head_weight.requires_grad,
            )

    # -- who computes attention ---------------------------------------------------------------------------------------

    def set_backends(
        self, *, train: BackendChoice = "auto", prefill: BackendChoice = "auto", decode: BackendChoice = "auto"
    ) -> None:
        """`train` serves every call without a cache, `prefill` several tokens with one, `decode` single tokens."""
        for attention in self._attentions():
            attention.backends = {Phase.TRAIN: train, Phase.PREFILL: prefill, Phase.DECODE: decode}

    def backend(self, phase: Phase | str) -> BackendChoice:
        """What `set_backends` chose for this phase."""
        return self._attentions()[0].backends[Phase(phase)]

    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def check_attention(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        phase: Phase | str,
        needs_grad: bool,
        n_queries: int | None = None,
        n_keys: int | None = None,
    ) -> None:
        """Raises UnsupportedAttention, naming the layer pattern, if a layer's attention cannot run as asked."""
        for name, attention in self._kinds.items():
            attention.check(
                asked_by=f"layer pattern '{name}'",
                device=device,
                dtype=dtype,
                phase=Phase(phase),
                needs_grad=needs_grad,
                n_queries=n_queries,
                n_keys=n_keys,
            )


# -- building ---------------------------------------------------------------------------------------------------------


def from_config(
    config: DecoderConfig,
    *,
    seed: int | None = None,
    fused_qkv: bool = False,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with freshly initialised weights; on `device="meta"`, the bare structure.

    The weights are a function of (seed, tensor name): equal on every machine and for both q/k/v layouts. `seed=None`
    draws one from torch's generator.
    """
    with torch.device("meta"):
        model = _assemble(config, fused_qkv)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    initialize(model, int(torch.randint(2**31, ())) if seed is None else seed)
    return model


def _assemble(config: DecoderConfig, fused_qkv: bool) -> Decoder:
    def norm_layer() -> nn.Module:
        return norm(config.norm, config.d_model, eps=config.norm_eps, bias=config.bias)

    def block(layer: int) -> Block:
        attention = Attention(
            layer=layer,
            groups=config.head_groups(layer),
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_dim=config.dim_per_head,
            bias=config.has_qkv_bias,
            out_bias=config.has_out_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            fused_qkv=fused_qkv,
        )
        mlp = feed_forward(config.mlp, config.d_model, config.d_ff, bias=config.bias)
        return Block(
            attention_norm=norm_layer(), attention=attention, mlp_norm=norm_layer(), mlp=mlp, dropout=config.dropout
        )

    learned, rope, fixed = (config.positions == kind for kind in ("learned", "rope", "sinusoidal"))
    return Decoder(
        config,
        embedding=nn.Embedding(config.vocab_size, config.d_model),
        position_embedding=nn.Embedding(config.max_positions, config.d_model) if learned else None,
        sinusoids=Sinusoids(config.d_model, config.max_positions) if fixed else None,
        rotary=Rotary(config.dim_per_head, config.max_positions, config.rope_theta, config.rope_scaling)
        if rope
        else None,
        blocks=[block(layer) for layer in range(config.n_layers)],
        final_norm=norm_layer(),
        head=None if config.tied_head else nn.Linear(config.d_model, config.vocab_size, bias=False),
        dropout=config.dropout,
    )


def initialize(model: Decoder, seed: int) -> None:
    """Initialises every tensor (GPT-2: Radford et al. 2019, §2.3), each from a generator of its own:

    embedding, position_embedding, head        normal(0, init_std)
    q_proj, k_proj, v_proj, gate_proj, up_proj normal(0, init_std)
    o_proj, down_proj (they end in the         normal(0, init_std / sqrt(2 n_layers))
      residual stream, 2 n_layers of them)
    norm weights                               1
    biases, sink_logits                        0
    """
    std = model.config.init_std
    residual_std = std / (2 * model.config.n_layers) ** 0.5
    draw_weights(model, seed, lambda owner: residual_std if owner.endswith(("o_proj", "down_proj")) else std)
