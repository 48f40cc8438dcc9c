"""Everybody who computes a case: ours and its peers, each as its authors would have it called.

A contender says why it cannot (`refuses`), or prepares everything that depends on the mask alone, outside the timing.
All get the same values; a peer whose documentation puts heads before time gets them contiguous in that order.

Legend: B batch, S positions, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longspan.kernels.attention import attend

from .attempts import missing
from .shapes import CUDNN, FLASH, FLASH_4, FLEX, LONGFORMER, Case
from .tensors import Inputs, Values, document_ids, global_flags, make_context
from .timing import Step

OURS = "longspan-"  # and the name of the backend
_MASK_AT_ONCE = 16384  # beyond this length the builder of block masks is compiled: it would materialise all pairs


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contender ready to run.

    step     forward and backward
    values   (output, gradients) of a step as tensors [B, S, heads, D]
    inputs   what the contender computed attention of, where that is not the case's own inputs (it projects)
    """

    step: Step
    values: Callable[[Tensor, tuple[Tensor | None, ...]], Values]
    inputs: Inputs | None = None


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot compute this case here, in one line."""
        ...

    def prepare(self, case: Case, inputs: Inputs) -> Prepared: ...


def contenders(backend: str) -> dict[str, Contender]:
    """Ours, computed by `backend`, first; then every peer, by name."""
    ours = Ours(backend)
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    peers = (Sdpa(FLASH, flash), Sdpa(CUDNN, cudnn), Flex(), Longformer(), Flash4(), Ours("triton"))
    return {each.name: each for each in (ours, *peers)}


def _step(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], gradient: Tensor) -> Step:
    return Step(forward, lambda out: torch.autograd.grad(out, leaves, gradient, allow_unused=True))


def _time_first(inputs: Inputs, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """For [B, S, heads, D]."""
    q, k, v, gradient = inputs.q, inputs.k, inputs.v, inputs.gradient
    step = _step(lambda: forward(q, k, v), (q, k, v), gradient)
    return Prepared(step, lambda out, gradients: Values(out.detach(), *gradients))


def _heads_first(inputs: Inputs, forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """For [B, heads, S, D], contiguous."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    step = _step(lambda: forward(q, k, v), (q, k, v), inputs.gradient.transpose(1, 2).contiguous())

    def values(out: Tensor, gradients: tuple[Tensor | None, ...]) -> Values:
        return Values(out.detach().transpose(1, 2), *(None if x is None else x.transpose(1, 2) for x in gradients))

    return Prepared(step, values)


class Ours:
    """`attend` with one backend; its masks are derived from the context before the clock starts, as in training."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = OURS + backend

    def refuses(self, case: Case, device: torch.device) -> str | None:
        return None  # `attend` does, by raising UnsupportedAttention with its reasons

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        context = make_context(case, inputs.q.device)

        def forward(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
            return attend(q_BTHD, k_BSGD, v_BSGD, spec=case.spec, context=context, backend=self.backend).out

        return _time_first(inputs, forward)


class Sdpa:
    """torch's scaled_dot_product_attention, pinned to one of its kernels."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name = name
        self.backend = backend

    def refuses(self, case: Case, device: torch.device) -> str | None:
        if not case.dense:
            return "this kernel takes no mask but causal"
        if self.backend is SDPBackend.CUDNN_ATTENTION and device.type != "cuda":
            return "cuDNN runs on CUDA only"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        shared = case.heads != case.kv_heads

        def forward(q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
            with sdpa_kernel(self.backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q_BHSD, k_BGSD, v_BGSD, is_causal=case.spec.causal, enable_gqa=shared
                )

        return _heads_first(inputs, forward)


# -- FlexAttention -----------------------------------------------------------------------------------------------------

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (b, h, q_idx, kv_idx) -> bool


class Flex:
    """torch's FlexAttention, compiled, with a block mask of a mask_mod as its tutorial writes them."""

    name = FLEX

    def refuses(self, case: Case, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "FlexAttention has a backward pass on CUDA only"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        block_mask = block_mask_of(case, inputs.q.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        shared = case.heads != case.kv_heads

        def forward(q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
            return compiled(q_BHSD, k_BGSD, v_BGSD, block_mask=block_mask, enable_gqa=shared)

        return _heads_first(inputs, forward)


def block_mask_of(case: Case, device: torch.device) -> BlockMask | None:
    mod = mask_mod(case, device)
    if mod is None:
        return None
    build: Callable[..., BlockMask] = create_block_mask
    if case.length > _MASK_AT_ONCE:
        build = torch.compile(create_block_mask)
    return build(mod, None, None, case.length, case.length, device=str(device))


def mask_mod(case: Case, device: torch.device) -> MaskMod | None:
    """The case's mask as a user of FlexAttention writes it, one function for each kind; None: full attention."""
    spec, (left, right) = case.spec, case.spec.window.span
    if case.dense:
        return _causal if spec.causal else None
    if spec.block_sparse is not None:
        block = spec.block_sparse.q_block
        pattern = torch.tensor(spec.block_sparse.pattern, device=device)
        return lambda b, h, q_idx, kv_idx: pattern[q_idx // block, kv_idx // block]
    if spec.documents:
        ids = document_ids(case, device)
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])
    if left is None or right is None:
        raise ValueError(f"{case.name}: no mask_mod is written for this mask")
    if spec.causal:
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= left)
    if spec.global_tokens and case.global_at == tuple(range(n_global := len(case.global_at))):
        return lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= left) | (q_idx < n_global) | (kv_idx < n_global)
    if spec.global_tokens:
        flagged = global_flags(case, device)
        return lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= left) | flagged[q_idx] | flagged[kv_idx]
    dilation = spec.window.dilation
    if dilation > 1:
        return lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= left) & ((q_idx - kv_idx) % dilation == 0)
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= left


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


# -- Hugging Face's Longformer -----------------------------------------------------------------------------------------


class Longformer:
    """transformers' LongformerSelfAttention as it stands, its projections (local and global) within the time.

    Its global projections are given the local ones' weights, so that it computes what the other contenders do; its own
    q, k and v are `Prepared.inputs`. Gradients go to the hidden states and all weights.
    """

    name = LONGFORMER

    def refuses(self, case: Case, device: torch.device) -> str | None:
        window = case.spec.window
        if case.spec.causal or window.left is None or window.left != window.right or window.dilation > 1:
            return "has symmetric undilated windows only"
        if case.heads != case.kv_heads:
            return "has no grouped key/value heads"
        if case.length % (2 * window.left):
            return f"needs a length that is a multiple of {2 * window.left}"
        return missing("transformers", "transformers")

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        device, dtype = inputs.q.device, inputs.q.dtype
        B, S, H, D = inputs.q.shape
        width = H * D
        config = LongformerConfig(
            hidden_size=width,
            num_attention_heads=H,
            num_hidden_layers=1,
            attention_window=[2 * (case.spec.window.left or 0)],
            attention_probs_dropout_prob=0.0,
        )
        generator = torch.Generator(device).manual_seed(1)
        module = LongformerSelfAttention(config, layer_id=0).to(device=device, dtype=dtype)
        for local, of_globals in (
            (module.query, module.query_global),
            (module.key, module.key_global),
            (module.value, module.value_global),
        ):
            # Standard normal q, k and v out of standard normal hidden states.
            torch.nn.init.normal_(local.weight, std=width**-0.5, generator=generator)
            torch.nn.init.zeros_(local.bias)
            of_globals.load_state_dict(local.state_dict())
        hidden_BSW = torch.randn((B, S, width), generator=generator, device=device).to(dtype).requires_grad_()
        flags_BS = global_flags(case, device).expand(B, S)
        arguments: dict[str, Any] = {
            "attention_mask": flags_BS.to(dtype) * 10000,
            "is_index_masked": torch.zeros_like(flags_BS),
            "is_index_global_attn": flags_BS,
            "is_global_attn": bool(case.global_at),
        }

        def forward() -> Tensor:
            return module(hidden_BSW, **arguments)[0]

        gradient_BTHD = inputs.gradient
        with torch.no_grad():
            q, k, v = (project(hidden_BSW).view(B, S, H, D) for project in (module.query, module.key, module.value))
        return Prepared(
            _step(forward, (hidden_BSW, *module.parameters()), gradient_BTHD.reshape(B, S, width)),
            lambda out, gradients: Values(out.detach().view(B, S, H, D)),
            Inputs(q, k, v, gradient_BTHD),
        )


# -- flash-attn-4 ------------------------------------------------------------------------------------------------------


class Flash4:
    """flash-attn-4 (`flash_attn.cute`): dense, windowed, and packed documents by cumulative lengths."""

    name = FLASH_4

    def refuses(self, case: Case, device: torch.device) -> str | None:
        spec = case.spec
        if spec.global_tokens or spec.block_sparse is not None or spec.window.dilation > 1:
            return "has no global tokens, no dilation, and block masks by CuTe functions only"
        if device.type != "cuda":
            return "runs on CUDA only"
        return missing("flash_attn.cute", "flash-attn-4")

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]: an optional peer

        spec, window = case.spec, case.spec.window
        if spec.documents:
            ends = torch.tensor(case.documents, device=inputs.q.device).cumsum(0)
            starts = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
            longest = max(case.documents)

            def packed(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
                out, _ = flash_attn_varlen_func(
                    q_BTHD[0],
                    k_BSGD[0],
                    v_BSGD[0],
                    cu_seqlens_q=starts,
                    cu_seqlens_k=starts,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    causal=spec.causal,
                )
                return out[None]

            return _time_first(inputs, packed)

        def forward(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
            out, _ = flash_attn_func(
                q_BTHD, k_BSGD, v_BSGD, causal=spec.causal, window_size=(window.left, window.right)
            )
            return out

        return _time_first(inputs, forward)
