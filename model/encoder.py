"""The bidirectional encoder: BERT, RoBERTa and Longformer by configuration.

What it is, in the order of computation:

  * token embedding, plus a learned position table and an embedding of token types where there are any; norm; dropout
  * n_layers blocks, post-norm: x = norm(x + attention(x)); x = norm(x + mlp(x)), or pre-norm with one last norm;
    dropout on both branches
  * attention: the decoder's, with specs that are not causal. A layer with global projections lets its global tokens
    ask everything a second time, through projections of their own, and takes those answers for their rows
  * what a query may see is the spec's and the context's business alone: no mask is built here
  * pooler: tanh of a dense layer over the first token of each row
  * heads: masked LM (dense, GELU, norm, the embedding transposed plus a bias), classes of the pooled token, and the
    start and end of an answer

Padding. Right padding is `lengths_B`: keys beyond them do not exist, and every backend knows how to skip them. Left
padding is `left_padded(lengths_B, n_tokens)`, a context that says at which position each slot stands: empty slots have
position -1, the first token position 0. Rows of padding in the output mean nothing.

Legend: B batch, T tokens, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext, Phase

from .attention import Attention, BackendChoice
from .config import EncoderConfig
from .global_attention import GlobalAttention, GlobalRows, find_global_rows
from .heads import Classifier, MaskedLMHead, SpanHead
from .initial import draw_weights
from .layers import feed_forward, norm
from .positions import Rotary


def left_padded(lengths_B: Tensor, n_tokens: int) -> AttentionContext:
    """The context of rows whose last `lengths_B` of `n_tokens` tokens are real."""
    slots = torch.arange(n_tokens, device=lengths_B.device)[None]
    return AttentionContext(kv_positions=(slots - (n_tokens - lengths_B)[:, None]).clamp(min=-1))


class EncoderBlock(nn.Module):
    """One layer: attention and MLP, each a branch beside the residual stream, normalised before or after the sum."""

    def __init__(
        self,
        *,
        attention: Attention,
        global_attention: GlobalAttention | None,
        attention_norm: nn.Module,
        mlp: nn.Module,
        mlp_norm: nn.Module,
        dropout: float,
        post_norm: bool,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.global_attention = global_attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.dropout = nn.Dropout(dropout)
        self.post_norm = post_norm

    def forward(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
        rows: GlobalRows | None,
    ) -> Tensor:
        if self.post_norm:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self._attend(x_BTD, rotation, context, rows)))
            return self.mlp_norm(x_BTD + self.dropout(self.mlp(x_BTD)))
        x_BTD = x_BTD + self.dropout(self._attend(self.attention_norm(x_BTD), rotation, context, rows))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))

    def _attend(
        self,
        x_BTD: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        context: AttentionContext,
        rows: GlobalRows | None,
    ) -> Tensor:
        out_BTHK = self.attention.heads(x_BTD, rotation, context)
        if self.global_attention is not None and rows is not None:
            out_BTHK = self.global_attention(x_BTD, out_BTHK, rotation, rows, self.attention.backends[Phase.TRAIN])
        return self.attention.o_proj(out_BTHK.flatten(2))


class Encoder(nn.Module):
    """Built by `from_config`. `config` is kept for saving and accounting; the forward pass does not read it."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        embedding: nn.Embedding,
        position_embedding: nn.Embedding | None,
        position_offset: int,
        type_embedding: nn.Embedding | None,
        embedding_norm: nn.Module,
        rotary: Rotary | None,
        blocks: list[EncoderBlock],
        final_norm: nn.Module | None,
        pooler: nn.Linear | None,
        head: MaskedLMHead | Classifier | SpanHead | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.position_offset = position_offset
        self.type_embedding = type_embedding
        self.embedding_norm = embedding_norm
        self.rotary = rotary
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = final_norm
        self.pooler = pooler
        self.head = head
        # One attention of each distinct layer pattern (in a dict, so that none is registered twice).
        self._kinds = {config.attention.of_layer(layer)[0]: block.attention for layer, block in enumerate(blocks)}
        globals_of = {
            config.attention.of_layer(layer)[0]: block.global_attention
            for layer, block in enumerate(blocks)
            if block.global_attention is not None
        }
        self._global_kinds = tuple(globals_of.values())
        self._distances = any(attention.slopes is not None for attention in self._global_kinds)

    def forward(
        self,
        tokens_BT: Tensor,
        context: AttentionContext | None = None,
        *,
        token_types_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """What the head makes of the hidden states: logits [B, T, V], [B, C] or [B, T, 2]; without a head, the hidden
        states [B, T, D]. Arguments as in `hidden`."""
        context = _padded(context, lengths_B)
        hidden_BTD = self.hidden(tokens_BT, context, token_types_BT=token_types_BT, positions_BT=positions_BT)
        if isinstance(self.head, MaskedLMHead):
            return self.head(hidden_BTD, self.embedding.weight)
        if isinstance(self.head, Classifier):
            return self.head(self.pooled(hidden_BTD, context))
        return hidden_BTD if self.head is None else self.head(hidden_BTD)

    def hidden(
        self,
        tokens_BT: Tensor,
        context: AttentionContext | None = None,
        *,
        token_types_BT: Tensor | None = None,
        lengths_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last block, [B, T, D].

        context         documents, global tokens, positions for attention. Without document ids each row is one
                        document; without flags no token is global
        token_types_BT  int64 in 0 … n_types - 1; None: 0 everywhere
        lengths_B       int64 numbers of real tokens where rows are padded on the right; None: all are real
        positions_BT    int64 positions for the position encoding; None: those of the context, else 0 … T-1

        Raises ValueError for tokens that are not [B, T], token types that the model does not have, positions beyond a
        learned table, and lengths that the context has as well.
        """
        if tokens_BT.dim() != 2:
            raise ValueError(f"tokens have shape {tuple(tokens_BT.shape)}; the model reads [batch, time]")
        context = _padded(context, lengths_B)
        positions_BT, reach = self._positions(tokens_BT, context, positions_BT)

        x_BTD = self.embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_BT + self.position_offset)
        x_BTD = self._with_types(x_BTD, token_types_BT)
        x_BTD = self.dropout(self.embedding_norm(x_BTD))
        rotation = self.rotary(positions_BT, reach) if self.rotary is not None else None
        rows = None
        if self._global_kinds:
            n_rows, n_tokens = tokens_BT.shape
            rows = find_global_rows(context, (n_rows, n_tokens), distances=self._distances)
        self._prepare(context, rows, tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, context, rows)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def pooled(self, hidden_BTD: Tensor, context: AttentionContext | None = None) -> Tensor:
        """[B, D]: tanh of a dense layer over the first real token of each row. `context` is that of the hidden states.

        Raises ValueError for a model without a pooler.
        """
        if self.pooler is None:
            raise ValueError("this model has no pooler; build it with pooler=true, or pool its hidden states yourself")
        exists = None if context is None else context.existing_keys(hidden_BTD.shape[1])
        if exists is None:
            first_BD = hidden_BTD[:, 0]
        else:
            index = exists.int().argmax(dim=1).expand(hidden_BTD.shape[0])
            first_BD = hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), index]
        return torch.tanh(self.pooler(first_BD))

    def _with_types(self, x_BTD: Tensor, token_types_BT: Tensor | None) -> Tensor:
        if self.type_embedding is None:
            if token_types_BT is not None:
                raise ValueError("this model has no token types (n_types=0); leave token_types_BT out")
            return x_BTD
        if token_types_BT is None:
            return x_BTD + self.type_embedding.weight[0]
        n_types = self.type_embedding.num_embeddings
        if not token_types_BT.is_cuda and token_types_BT.numel() and int(token_types_BT.max()) >= n_types:
            raise ValueError(f"token type {int(token_types_BT.max())}: this model has types 0 to {n_types - 1}")
        return x_BTD + self.type_embedding(token_types_BT)

    def _positions(
        self, tokens_BT: Tensor, context: AttentionContext, positions_BT: Tensor | None
    ) -> tuple[Tensor, int]:
        """Positions for the encoding, [B or 1, T], and a bound above all of them that is known on the host."""
        reach = tokens_BT.shape[1]
        for given in (context.q_positions, context.kv_positions):
            positions_BT = given if positions_BT is None else positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(reach, device=tokens_BT.device)[None]
        else:
            positions_BT = positions_BT.clamp(min=0)  # empty slots stand anywhere: nobody reads them
            if not (self.training and positions_BT.is_cuda) and positions_BT.numel():
                # Explicit positions are read back, except in training on a GPU, where each step would wait for it.
                reach = int(positions_BT.max()) + 1
        table = self.position_embedding
        if table is not None and reach > table.num_embeddings - self.position_offset:
            raise ValueError(
                f"position {reach - 1} is beyond the {table.num_embeddings - self.position_offset} learned positions "
                "of this model (0 is the first); shorten the input or convert the model's positions"
            )
        return positions_BT, reach

    def _prepare(self, context: AttentionContext, rows: GlobalRows | None, tokens_BT: Tensor) -> None:
        """Masks are derived here, once for each kind of layer; compiled blocks then only read them."""
        device, weight, n_tokens = tokens_BT.device, self.embedding.weight, tokens_BT.shape[1]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        needs_grad = torch.is_grad_enabled() and weight.requires_grad
        for attention in self._kinds.values():
            attention.prepare(context, n_tokens=n_tokens, device=device, dtype=dtype, needs_grad=needs_grad)
        if rows is not None:
            for attention in self._global_kinds:
                attention.prepare(
                    rows,
                    n_tokens=n_tokens,
                    device=device,
                    dtype=dtype,
                    needs_grad=needs_grad,
                    backend=next(iter(self._kinds.values())).backends[Phase.TRAIN],
                )

    # -- who computes attention ---------------------------------------------------------------------------------------

    def set_backend(self, choice: BackendChoice = "auto") -> None:
        """A name, names tried in order, or "auto"; in every layer, for the global tokens' own attention too."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backends = dict.fromkeys(Phase, choice)

    def check_attention(
        self, *, device: torch.device | str, dtype: torch.dtype, needs_grad: bool, n_tokens: int | None = None
    ) -> None:
        """Raises UnsupportedAttention, naming the layer pattern, if a layer's attention cannot run as asked."""
        for name, attention in self._kinds.items():
            attention.check(
                asked_by=f"layer pattern '{name}'",
                device=device,
                dtype=dtype,
                phase=Phase.TRAIN,
                needs_grad=needs_grad,
                n_queries=n_tokens,
                n_keys=n_tokens,
            )


def _padded(context: AttentionContext | None, lengths_B: Tensor | None) -> AttentionContext:
    if context is None:
        return AttentionContext(kv_lengths=lengths_B)
    if lengths_B is None:
        return context
    if context.kv_lengths is not None:
        raise ValueError("lengths_B and context.kv_lengths say the same thing; give one of them")
    return replace(context, kv_lengths=lengths_B, derived={})


# -- building ---------------------------------------------------------------------------------------------------------


def from_config(
    config: EncoderConfig,
    *,
    seed: int | None = None,
    fused_qkv: bool = False,
    device: torch.device | str = "cpu",
) -> Encoder:
    """An encoder with freshly initialised weights; on `device="meta"`, the bare structure.

    Embeddings and matrices are normal(0, init_std), biases 0, norms 1 (Devlin et al. 2019, arXiv 1810.04805, §A.2). The
    weights are a function of (seed, tensor name); `seed=None` draws one from torch's generator.
    """
    with torch.device("meta"):
        model = _assemble(config, fused_qkv)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    draw_weights(model, int(torch.randint(2**31, ())) if seed is None else seed, lambda name: config.init_std)
    return model


def _assemble(config: EncoderConfig, fused_qkv: bool) -> Encoder:
    def norm_layer() -> nn.Module:
        return norm(config.norm, config.d_model, eps=config.norm_eps, bias=config.bias)

    def block(layer: int) -> EncoderBlock:
        groups = config.head_groups(layer)
        attention = Attention(
            layer=layer,
            groups=groups,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_dim=config.dim_per_head,
            bias=config.bias,
            qk_norm_eps=None,
            fused_qkv=fused_qkv,
        )
        global_attention = GlobalAttention(
            groups=groups,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.kv_heads,
            head_dim=config.dim_per_head,
            bias=config.bias,
        )
        return EncoderBlock(
            attention=attention,
            global_attention=global_attention if config.has_global_projections(layer) else None,
            attention_norm=norm_layer(),
            mlp=feed_forward(config.mlp, config.d_model, config.d_ff, bias=config.bias),
            mlp_norm=norm_layer(),
            dropout=config.dropout,
            post_norm=config.norm_order == "post",
        )

    learned, rope = config.positions == "learned", config.positions == "rope"
    rows = config.max_positions + config.position_offset
    return Encoder(
        config,
        embedding=nn.Embedding(config.vocab_size, config.d_model),
        position_embedding=nn.Embedding(rows, config.d_model) if learned else None,
        position_offset=config.position_offset,
        type_embedding=nn.Embedding(config.n_types, config.d_model) if config.n_types else None,
        embedding_norm=norm_layer(),
        rotary=Rotary(config.dim_per_head, config.max_positions, config.rope_theta) if rope else None,
        blocks=[block(layer) for layer in range(config.n_layers)],
        final_norm=norm_layer() if config.norm_order == "pre" else None,
        pooler=nn.Linear(config.d_model, config.d_model, bias=config.bias) if config.pooler else None,
        head=_head(config, norm_layer),
        dropout=config.dropout,
    )


def _head(config: EncoderConfig, norm_layer: Callable[[], nn.Module]) -> MaskedLMHead | Classifier | SpanHead | None:
    if config.head == "mlm":
        return MaskedLMHead(
            d_model=config.d_model,
            vocab_size=config.vocab_size,
            tied=config.tied_head,
            bias=config.bias,
            approximate="tanh" if config.mlp == "gelu_tanh" else "none",
            final_norm=norm_layer(),
        )
    if config.head == "classification":
        dropout = config.dropout if config.head_dropout is None else config.head_dropout
        return Classifier(d_model=config.d_model, n_labels=len(config.labels), dropout=dropout)
    return SpanHead(d_model=config.d_model) if config.head == "qa" else None
