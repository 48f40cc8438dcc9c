"""The encoder–decoder: BART and LED by configuration.

What it is, in the order of computation:

  * one token embedding, of source, target and head (optionally times sqrt(d_model)); a learned position table for each
    side; norm and dropout on the sum
  * encoder: `encoder.Encoder`, post-norm, without a head. BART's sees everything; LED's has a window on either side of
    every token and global tokens with projections of their own
  * decoder blocks, post-norm: x = norm(x + attention(x)); x = norm(x + cross_attention(x, source)); x = norm(x +
    mlp(x)); dropout on the branches. Self-attention is the decoder-only model's, causal, full or windowed
  * what a query may see is the spec's and the context's business alone: no mask is built here
  * head: the embedding transposed, and a bias that is not trained
  * generation: `encode` and `remember` once for a source, then `hidden` with a cache, any number of tokens a call

The target comes as the decoder reads it: it begins with `decoder_start_token`, and the logits at a token are of the
next one. Shifting belongs to the data.

Legend: B sources, N targets (B, or B * beams), S source tokens, T target tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext, Phase
from longspan.kernels.attention.caching import CacheStep, KeyValueCache

from . import encoder as encoders
from .attention import Attention, BackendChoice, phase_of
from .config import Seq2SeqConfig
from .cross_attention import CrossAttention, CrossCache, Source
from .encoder import Encoder
from .initial import draw_weights
from .layers import feed_forward, norm


class ScaledEmbedding(nn.Embedding):
    """Embeddings times sqrt(their width); the head reads the matrix as it is."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding_dim**0.5


class DecoderBlock(nn.Module):
    """One layer: self-attention, cross-attention and MLP, each added to the residual stream and then normalised."""

    def __init__(
        self,
        *,
        attention: Attention,
        attention_norm: nn.Module,
        cross_attention: CrossAttention,
        cross_attention_norm: nn.Module,
        mlp: nn.Module,
        mlp_norm: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = attention_norm
        self.cross_attention = cross_attention
        self.cross_attention_norm = cross_attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_NTD: Tensor, source: Source | CrossCache, context: AttentionContext, step: CacheStep | None = None
    ) -> Tensor:
        phase = phase_of(step, x_NTD.shape[1])
        x_NTD = self.attention_norm(x_NTD + self.dropout(self.attention(x_NTD, None, context, step)))
        x_NTD = self.cross_attention_norm(x_NTD + self.dropout(self.cross_attention(x_NTD, source, phase)))
        return self.mlp_norm(x_NTD + self.dropout(self.mlp(x_NTD)))


class TiedHead(nn.Module):
    """Logits of tokens: the embedding transposed, and a bias that nobody trains (BART's final_logits_bias)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", torch.empty(1, vocab_size))

    def forward(self, hidden_xD: Tensor, embedding_VD: Tensor) -> Tensor:
        """[…, V] of […, D]."""
        return F.linear(hidden_xD, embedding_VD) + self.bias


class Seq2Seq(nn.Module):
    """Built by `from_config`. `config` is kept for saving and accounting; the forward pass does not read it."""

    def __init__(
        self,
        config: Seq2SeqConfig,
        *,
        encoder: Encoder,
        position_embedding: nn.Embedding,
        position_offset: int,
        embedding_norm: nn.Module,
        blocks: list[DecoderBlock],
        head: TiedHead,
        dropout: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder  # it has the embedding
        self.position_embedding = position_embedding
        self.position_offset = position_offset
        self.embedding_norm = embedding_norm
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        # One attention of each distinct layer pattern (in a dict, so that none is registered twice).
        plan = config.decoder_half.attention
        self._kinds = {plan.of_layer(layer)[0]: block.attention for layer, block in enumerate(blocks)}
        self._crossings = tuple(block.cross_attention for block in blocks)
        specs = config.encoder_half.attention.specs().values()
        self._has_globals = any(spec.global_tokens for of_pattern in specs for spec in of_pattern)

    def forward(
        self,
        source_BS: Tensor,
        decoder_input_BT: Tensor,
        context: AttentionContext | None = None,
        *,
        source_lengths_B: Tensor | None = None,
        decoder_lengths_B: Tensor | None = None,
        is_global_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V].

        context             of the source: which of its tokens exist and which are global
        source_lengths_B    numbers of real source tokens where rows are padded on the right: context.kv_lengths
        decoder_lengths_B   the same of the target
        is_global_BS        which source tokens are global: context.is_global. None: none is

        Raises ValueError for tokens that are not [batch, time], inputs longer than the learned positions, a context
        that packs documents, and global tokens for an encoder that has none.
        """
        context = about_source(context, lengths_B=source_lengths_B, is_global_BS=is_global_BS)
        source = Source(self.encode(source_BS, context), _existing(context))
        target = AttentionContext(kv_lengths=decoder_lengths_B)
        return self.logits(self.hidden(decoder_input_BT, source, target))

    def encode(self, source_BS: Tensor, context: AttentionContext | None = None) -> Tensor:
        """The encoder's states of a source, [B, S, D]. Raises as `forward`."""
        context = about_source(context)
        if context.is_global is not None and not self._has_globals:
            raise ValueError("is_global: this model's encoder has no global attention; leave it out")
        return self.encoder.hidden(source_BS, context)

    def remember(self, states_BSD: Tensor, context: AttentionContext | None = None) -> CrossCache:
        """What every decoder layer reads of these states of `encode`, computed now and once."""
        layers = [attention.keys_values(states_BSD) for attention in self._crossings]
        head_major = ((_head_major(k_BSGK), _head_major(v_BSGK)) for k_BSGK, v_BSGK in layers)
        return CrossCache(tuple(head_major), _existing(about_source(context)))

    def hidden(
        self,
        decoder_input_NT: Tensor,
        source: Source | CrossCache,
        context: AttentionContext | None = None,
        *,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The decoder's states [N, T, D]; `logits` of them are of the tokens that come next.

        source    what `remember` gave
        context   of the target: kv_lengths where rows are padded on the right. With a cache, of these T tokens alone
        cache     receives the keys and values of these tokens and supplies those of earlier ones
        """
        if decoder_input_NT.dim() != 2:
            raise ValueError(f"decoder input has shape {tuple(decoder_input_NT.shape)}; the model reads [batch, time]")
        context = AttentionContext() if context is None else context
        step = None if cache is None else cache.begin(decoder_input_NT.shape[1], context)
        x_NTD = self.encoder.embedding(decoder_input_NT) + self._positions(decoder_input_NT, step)
        x_NTD = self.dropout(self.embedding_norm(x_NTD))
        if step is None:
            self._prepare(decoder_input_NT, source, context)
        for block in self.blocks:
            x_NTD = block(x_NTD, source, context, step)
        if step is not None:
            step.finish()
        return x_NTD

    def logits(self, hidden_NTD: Tensor) -> Tensor:
        """[N, T, V]."""
        return self.head(hidden_NTD, self.head_weight)

    def start(self, batch: int) -> Tensor:
        """[B, 1] `decoder_start_token`: the targets of which nothing is written yet."""
        token, device = self.config.decoder_start_token, self.head_weight.device
        return torch.full((batch, 1), token, dtype=torch.int64, device=device)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: logits are `hidden @ head_weight.T`, and the head's bias."""
        return self.encoder.embedding.weight

    def _positions(self, decoder_input_NT: Tensor, step: CacheStep | None) -> Tensor:
        """Embedded positions, [N or 1, T, D]."""
        reach = decoder_input_NT.shape[1] if step is None else step.reach
        longest = self.position_embedding.num_embeddings - self.position_offset
        if reach > longest:
            raise ValueError(
                f"position {reach - 1} of the target is beyond the {longest} learned positions of this model (0 is the "
                "first); shorten it or convert the model's positions"
            )
        if step is None:
            positions_NT = torch.arange(reach, device=decoder_input_NT.device)[None]
        else:
            positions_NT = step.positions_BT
        return self.position_embedding(positions_NT + self.position_offset)

    def _prepare(self, decoder_input_NT: Tensor, source: Source | CrossCache, context: AttentionContext) -> None:
        """Masks are derived here, once for each kind of layer; compiled blocks then only read them."""
        device, n_tokens = decoder_input_NT.device, decoder_input_NT.shape[1]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.head_weight.dtype
        needs_grad = torch.is_grad_enabled() and self.head_weight.requires_grad
        for attention in self._kinds.values():
            attention.prepare(context, n_tokens=n_tokens, device=device, dtype=dtype, needs_grad=needs_grad)
        self._crossings[0].prepare(
            source.context,
            n_tokens=n_tokens * source.beams,
            n_keys=source.n_tokens,
            device=device,
            dtype=dtype,
            needs_grad=needs_grad,
        )

    # -- who computes attention ---------------------------------------------------------------------------------------

    def set_backends(
        self, *, train: BackendChoice = "auto", prefill: BackendChoice = "auto", decode: BackendChoice = "auto"
    ) -> None:
        """`train` serves the encoder and every call without a cache, `prefill` several tokens with one, `decode` single
        tokens."""
        self.encoder.set_backend(train)
        for module in self.blocks.modules():
            if isinstance(module, Attention | CrossAttention):
                module.backends = {Phase.TRAIN: train, Phase.PREFILL: prefill, Phase.DECODE: decode}

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
        """Raises UnsupportedAttention, naming the layers, if some attention of the decoder, or in training of the
        encoder, cannot run as asked. `n_keys` are the source's, `n_queries` the target's."""
        phase = Phase(phase)
        if phase is Phase.TRAIN:
            self.encoder.check_attention(device=device, dtype=dtype, needs_grad=needs_grad, n_tokens=n_keys)
        for name, attention in self._kinds.items():
            attention.check(
                asked_by=f"decoder layer pattern '{name}'",
                device=device,
                dtype=dtype,
                phase=phase,
                needs_grad=needs_grad,
                n_queries=n_queries,
                n_keys=n_queries if phase is Phase.TRAIN else None,
            )
        self._crossings[0].check(
            device=device, dtype=dtype, phase=phase, needs_grad=needs_grad, n_queries=n_queries, n_keys=n_keys
        )


def about_source(
    context: AttentionContext | None, *, lengths_B: Tensor | None = None, is_global_BS: Tensor | None = None
) -> AttentionContext:
    """The context of a source from its two ways to be given.

    Raises ValueError for what is given twice, and for documents and pages: a row is one source.
    """
    context = AttentionContext() if context is None else context
    for name in ("q_documents", "kv_documents", "page_table"):
        if getattr(context, name) is not None:
            raise ValueError(f"context.{name}: an encoder–decoder reads one source a row, without documents and pages")
    given = {"kv_lengths": lengths_B, "is_global": is_global_BS}
    new = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name in new:
        if getattr(context, name) is not None:
            raise ValueError(f"context.{name} and the keyword argument say the same thing; give one of them")
    return replace(context, **new, derived={}) if new else context


def _existing(context: AttentionContext) -> AttentionContext:
    """What cross-attention has to know of a source: which of its slots hold a token."""
    return AttentionContext(kv_lengths=context.kv_lengths, kv_positions=context.kv_positions)


def _head_major(x_BSGK: Tensor) -> Tensor:
    return x_BSGK.transpose(1, 2).contiguous().transpose(1, 2)


# -- building ---------------------------------------------------------------------------------------------------------


def from_config(
    config: Seq2SeqConfig,
    *,
    seed: int | None = None,
    fused_qkv: bool = False,
    device: torch.device | str = "cpu",
) -> Seq2Seq:
    """An encoder–decoder with freshly initialised weights; on `device="meta"`, the bare structure.

    Embeddings and matrices are normal(0, init_std), biases 0, norms 1. The weights are a function of (seed, tensor
    name); `seed=None` draws one from torch's generator.
    """
    with torch.device("meta"):
        model = _assemble(config, fused_qkv)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    draw_weights(model, int(torch.randint(2**31, ())) if seed is None else seed, lambda name: config.init_std)
    return model


def _assemble(config: Seq2SeqConfig, fused_qkv: bool) -> Seq2Seq:
    half = config.decoder_half

    def norm_layer() -> nn.Module:
        return norm("layernorm", config.d_model, eps=config.norm_eps, bias=True)

    def block(layer: int) -> DecoderBlock:
        attention = Attention(
            layer=layer,
            groups=half.head_groups(layer),
            d_model=config.d_model,
            n_heads=half.n_heads,
            n_kv_heads=half.kv_heads,
            head_dim=half.dim_per_head,
            bias=True,
            qk_norm_eps=None,
            fused_qkv=fused_qkv,
        )
        cross_attention = CrossAttention(
            layer=layer,
            spec=config.cross_attention,
            d_model=config.d_model,
            n_heads=half.n_heads,
            n_kv_heads=config.cross_heads,
            head_dim=half.dim_per_head,
            bias=True,
        )
        return DecoderBlock(
            attention=attention,
            attention_norm=norm_layer(),
            cross_attention=cross_attention,
            cross_attention_norm=norm_layer(),
            mlp=feed_forward(config.mlp, config.d_model, half.d_ff, bias=True),
            mlp_norm=norm_layer(),
            dropout=config.dropout,
        )

    encoder = encoders.from_config(config.encoder_half, fused_qkv=fused_qkv, device="meta")
    if config.scale_embedding:
        encoder.embedding = ScaledEmbedding(config.vocab_size, config.d_model)
    return Seq2Seq(
        config,
        encoder=encoder,
        position_embedding=nn.Embedding(half.max_positions + config.position_offset, config.d_model),
        position_offset=config.position_offset,
        embedding_norm=norm_layer(),
        blocks=[block(layer) for layer in range(half.n_layers)],
        head=TiedHead(config.vocab_size),
        dropout=config.dropout,
    )
