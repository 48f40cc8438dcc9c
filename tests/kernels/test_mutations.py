"""The suite catches the defects that attention code has had: each is put into a small correct kernel, one at a time.

Legend: B batch, T queries, S keys, s a tile of keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionOutput,
    AttentionParams,
    AttentionSpec,
    Capabilities,
    Feature,
    Reason,
)
from longspan.kernels.attention.backend import check
from longspan.kernels.attention.context import in_layout
from longspan.kernels.attention.reference import dropout_keep, key_distance
from longspan.kernels.testing import Report, conformance

F = Feature
TILE = 16


class Small:
    """FlashAttention in PyTorch: an online softmax over tiles of keys and a backward that recomputes the weights.

    `defect` names the one thing that it gets wrong; "" for none.
    """

    name = "small"
    capabilities = Capabilities(
        features=frozenset(Feature) - {F.PAGED, F.QUANTIZED_KV},
        dtypes={"cpu": (torch.float32, torch.float16, torch.bfloat16)},
        max_head_dim=256,
    )

    def __init__(self, defect: str = "") -> None:
        self.defect = defect

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        return check(self.capabilities, spec, call)

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGE: Tensor,
        /,
        *,
        spec: AttentionSpec,
        context: AttentionContext,
        params: AttentionParams,
        return_lse: bool = False,
    ) -> AttentionOutput:
        if self.defect == "takes memory for contiguous":
            shape = q_BTHD.shape
            strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
            q_BTHD = q_BTHD + (q_BTHD.as_strided(shape, strides) - q_BTHD).detach()
        if self.defect == "scales q in place":
            q_BTHD.detach().mul_(1.0001)
        if self.defect != "reads empty slots":
            k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
        job = Job(self.defect, spec, context, params, q_BTHD, k_BSGD)
        out, lse = Flash.apply(q_BTHD, k_BSGD, v_BSGE, params.alibi_slopes, params.sink_logits, job)
        if self.defect == "is not deterministic":
            out = out + 1e-6 * torch.rand_like(out)
        return AttentionOutput(out, lse if return_lse else None)


class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor, job: Job) -> Any:
        out, lse = job.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.job = job
        return out.to(q.dtype), lse

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.job.backward(q, k, v, out, lse, *upstream), None


class Job:
    """One call: the mask, and the two passes over tiles of keys."""

    def __init__(
        self,
        defect: str,
        spec: AttentionSpec,
        context: AttentionContext,
        params: AttentionParams,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
    ) -> None:
        self.defect, self.spec, self.params = defect, spec, params
        B, T, H, D = q_BTHD.shape
        S, G = k_BSGD.shape[1:3]
        self.scale = spec.softmax_scale(D)
        self.head = torch.arange(H) % G if defect == "strided head groups" else torch.arange(H) // (H // G)
        self.counts_BTS = self.times_counted(context, T, S).expand(B, T, S)
        self.distance_BTS = key_distance(context, T, S, q_BTHD.device).float()
        if defect == "ALiBi without abs":
            self.distance_BTS = (context.query_positions(T, S)[:, :, None] - context.key_positions(S)[:, None]).float()
        if defect == "ALiBi from the wrong offset":
            self.distance_BTS = (torch.arange(T)[None, :, None] - torch.arange(S)).abs().float()
        self.keep_BHTS = torch.ones(B, H, T, S)
        if spec.dropout:
            self.keep_BHTS = dropout_keep(params.dropout_seed, spec.dropout, (B, H, T, S), q_BTHD.device).float()
            if defect != "dropout does not rescale":
                self.keep_BHTS = self.keep_BHTS / (1 - spec.dropout)

    def times_counted(self, context: AttentionContext, T: int, S: int) -> Tensor:
        """[B, T, S] float: how often a key enters a query's softmax; 0 or 1 but for one defect."""
        spec, defect = self.spec, self.defect
        q_pos = context.query_positions(T, S)[:, :, None]
        kv_pos = context.key_positions(S)[:, None, :]
        top_left = torch.arange(T)[None, :, None]
        inside = torch.ones(1, T, S, dtype=torch.bool)
        left, right = spec.window.left, spec.window.right
        d = spec.window.dilation
        if defect == "window dropped":
            left = right = None
        if defect == "window of the first keys":
            q_pos_of_window = top_left
        else:
            q_pos_of_window = q_pos
        back = q_pos_of_window - kv_pos
        reach = 1 if defect == "dilation counted as span" else d
        if left is not None:
            left += {"window one too far left": 1, "window one short on the left": -1}.get(defect, 0)
            left = left // 2 if defect == "total window for one per side" else left
            inside = inside & (back <= left * reach)
        if right is not None:
            right += {"window one too far right": 1, "window one short on the right": -1}.get(defect, 0)
            inside = inside & (back >= -right * reach)
        inside = inside & (back % d == 0)
        if defect == "keys lost in chunked prefill" and left is not None:
            inside = inside & (kv_pos >= S - left - 1)
        if spec.block_sparse is not None:
            inside = inside & in_layout(spec.block_sparse, q_pos, kv_pos)
        wide = inside
        if spec.sink_tokens:
            of = dataclasses.replace(spec, documents=False) if defect == "sinks of the sequence" else spec
            wide = wide | context.sink_keys(of, T, S)[:, None]
        twice = torch.zeros(1, dtype=torch.bool)
        ahead = kv_pos > q_pos
        if spec.global_tokens and context.is_global is not None:
            flagged = context.is_global[:, None] | context.global_queries(spec, T, S)[:, :, None]
            if defect == "globals counted twice":
                twice = inside & context.is_global[:, None]
            if defect == "globals see the future":
                ahead = ahead & ~flagged
            wide = wide | flagged
        exists = self.existing(context, S)
        if exists is not None:
            wide = wide & exists[:, None]
        if spec.causal:
            wide = wide & ~((kv_pos > top_left) if defect == "causal from the top left" else ahead)
        if spec.documents and defect != "documents leak":
            q_documents, kv_documents = context.documents(T, S)
            if defect == "document ids as int32":
                q_documents, kv_documents = q_documents.int(), kv_documents.int()
            wide = wide & (q_documents[:, :, None] == kv_documents[:, None])
        return wide.float() * (1 + twice.float())

    def existing(self, context: AttentionContext, S: int) -> Tensor | None:
        if context.kv_lengths is None or self.defect not in ("kv_lengths ignored", "kv_lengths of the first row"):
            return context.existing_keys(S)
        lengths = None if self.defect == "kv_lengths ignored" else context.kv_lengths[:1].expand_as(context.kv_lengths)
        return dataclasses.replace(context, kv_lengths=lengths, derived={}).existing_keys(S)

    def tiles(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """(keys, k of the tile for each head, v, scores [B, H, T, s] with -inf, derivative of the softcap)."""
        for start in range(0, k.shape[1], TILE):
            keys = slice(start, start + TILE)
            k_BsHD, v_BsHE = (x[:, keys, self.head].float() for x in (k, v))
            scores = torch.einsum("bthd,bshd->bhts", q.float(), k_BsHD) * self.scale
            bias = torch.zeros(())
            if self.params.alibi_slopes is not None:
                bias = -self.params.alibi_slopes.float()[:, None, None] * self.distance_BTS[:, None, :, keys]
            slope = torch.ones(())
            cap = self.spec.softcap
            if cap is not None and self.defect == "softcap after the bias":
                scores, bias = scores + bias, torch.zeros(())
            if cap is not None:
                slope = 1 - torch.tanh(scores / cap).square()
                scores = cap * torch.tanh(scores / cap)
            yield keys, k_BsHD, v_BsHE, scores + bias + self.counts_BTS[:, None, :, keys].log(), slope

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        B, T, H, E = *q.shape[:3], v.shape[3]
        top, total, acc = torch.full((B, H, T), -torch.inf), torch.zeros(B, H, T), torch.zeros(B, H, T, E)
        for keys, _, v_BsHE, scores, _ in self.tiles(q, k, v):
            new_top = torch.maximum(top, scores.amax(dim=-1))
            safe = new_top if self.defect == "NaN on empty tiles" else torch.where(new_top == -torch.inf, 0, new_top)
            weights = torch.exp(scores - safe[..., None])
            rescale = torch.exp(top - safe)
            total = total * rescale + weights.sum(dim=-1)
            if self.defect == "inverse in the rescale":
                rescale = 1 / rescale.clamp(min=1e-6)
            dropped = weights * self.keep_BHTS[..., keys]
            acc = acc * rescale[..., None] + torch.einsum("bhts,bshe->bhte", dropped, v_BsHE)
            top = new_top
        sees = total > 0
        lse = torch.where(sees, top + torch.log(torch.where(sees, total, 1)), -torch.inf)
        if self.params.sink_logits is not None:
            with_sink = torch.logaddexp(lse, self.params.sink_logits.float()[:, None])
            lse_before, lse = lse, torch.where(sees, with_sink, with_sink if self.defect == "sink as a key" else lse)
            total = total * torch.where(sees, torch.exp(lse - lse_before), 1)
        if self.defect == "leaves empty rows as they are":
            out = torch.empty(B, H, T, E)
            out[sees] = (acc / total[..., None])[sees]
        elif self.defect == "NaN on empty rows":
            out = acc / total[..., None]
        else:
            out = torch.where(sees[..., None], acc / torch.where(sees, total, 1)[..., None], 0)
        if self.defect == "mean of v on empty rows":
            out = torch.where(sees[..., None], out, v[:, :, self.head].float().mean(dim=1)[:, :, None])
        lse = lse / math.log(2) if self.defect == "lse in log2" else lse
        return out.transpose(1, 2), lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
    ) -> tuple[Tensor | None, ...]:
        defect = self.defect
        d_out = d_out.float()
        delta = (d_out * out).sum(dim=-1).transpose(1, 2)
        if d_lse is not None and defect != "gradient of lse dropped":
            delta = delta - d_lse
        lse = torch.where(lse == -torch.inf, torch.inf if defect != "NaN gradients on empty rows" else lse, lse)
        dq, dk, dv = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        d_slopes = torch.zeros(q.shape[2])
        for keys, k_BsHD, v_BsHE, scores, slope in self.tiles(q, k, v):
            p = torch.exp(scores - lse[..., None])
            kept = self.keep_BHTS[..., keys]
            dp = torch.einsum("bthe,bshe->bhts", d_out, v_BsHE)
            if defect != "dropout not replayed in backward":
                dp = dp * kept
            ds = p * (dp - delta[..., None])
            d_slopes -= (ds * self.distance_BTS[:, None, :, keys]).sum(dim=(0, 2, 3))
            ds = ds if defect == "softcap's derivative forgotten" else ds * slope
            scale_q = 1.0 if defect == "no scale in dq" else self.scale
            scale_k = 1.0 if defect == "no scale in dk" else self.scale
            dq += scale_q * torch.einsum("bhts,bshd->bthd", ds, k_BsHD)
            for head, group in enumerate(self.head.tolist()):
                if defect == "dk of one head in a group" and head % 2:
                    continue
                dk[:, keys, group] += scale_k * torch.einsum("bts,btd->bsd", ds[:, head], q[:, :, head].float())
                dv[:, keys, group] += torch.einsum("bts,bte->bse", (p * kept)[:, head], d_out[:, :, head])
        sinks = self.params.sink_logits
        d_sinks = None
        if sinks is not None:
            d_sinks = (-torch.exp(sinks.float()[:, None] - lse) * delta).sum(dim=(0, 2))
        grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
        return *grads, None if self.params.alibi_slopes is None else d_slopes, d_sinks


def examine(backend: Small, *features: Feature) -> Report:
    """The cases by construction alone, in fp32, among these features: a subset of what every run contains."""
    return conformance(backend, examples=0, dtypes=[torch.float32], features=features, max_length=33)


# defect: (the features whose cases are run, the check that must fail)
DEFECTS: dict[str, tuple[tuple[Feature, ...], str]] = {
    # which keys
    "window one too far left": ((F.WINDOW,), "forward"),
    "window one short on the left": ((F.WINDOW, F.CAUSAL), "forward"),
    "window one too far right": ((F.WINDOW,), "unseen keys"),
    "window one short on the right": ((F.WINDOW,), "forward"),
    "window dropped": ((F.WINDOW,), "unseen keys"),
    "total window for one per side": ((F.WINDOW,), "forward"),
    "window of the first keys": ((F.WINDOW, F.CROSS_LENGTH), "forward"),
    "keys lost in chunked prefill": ((F.WINDOW, F.CAUSAL, F.CROSS_LENGTH), "forward"),
    "dilation counted as span": ((F.WINDOW, F.DILATION), "forward"),
    "causal from the top left": ((F.CAUSAL, F.CROSS_LENGTH), "forward"),
    "documents leak": ((F.DOCUMENTS,), "unseen keys"),
    "document ids as int32": ((F.DOCUMENTS,), "forward"),
    "sinks of the sequence": ((F.SINK_TOKENS, F.DOCUMENTS, F.WINDOW), "forward"),
    "globals counted twice": ((F.GLOBAL_TOKENS, F.WINDOW), "forward"),
    "globals see the future": ((F.GLOBAL_TOKENS, F.CAUSAL), "forward"),
    "kv_lengths ignored": ((F.KV_LENGTHS,), "forward"),
    "kv_lengths of the first row": ((F.KV_LENGTHS,), "batch independence"),
    "strided head groups": ((F.GQA,), "forward"),
    # scores and softmax
    "inverse in the rescale": ((), "forward"),
    "softcap after the bias": ((F.SOFTCAP, F.ALIBI), "forward"),
    "ALiBi without abs": ((F.ALIBI,), "forward"),
    "ALiBi from the wrong offset": ((F.ALIBI, F.CROSS_LENGTH), "forward"),
    "lse in log2": ((), "lse"),
    "dropout does not rescale": ((F.DROPOUT,), "forward"),
    # rows that see nothing
    "NaN on empty tiles": ((F.CAUSAL, F.WINDOW), "forward"),
    "NaN on empty rows": ((F.KV_LENGTHS,), "forward"),
    "mean of v on empty rows": ((F.CAUSAL, F.CROSS_LENGTH), "empty rows"),
    "leaves empty rows as they are": ((F.KV_LENGTHS,), "forward"),
    "sink as a key": ((F.LEARNED_SINK, F.KV_LENGTHS), "empty rows"),
    "NaN gradients on empty rows": ((F.KV_LENGTHS,), "dq"),
    # gradients
    "no scale in dq": ((), "dq"),
    "no scale in dk": ((), "dk"),
    "dk of one head in a group": ((F.GQA,), "dk"),
    "dropout not replayed in backward": ((F.DROPOUT,), "dq"),
    "softcap's derivative forgotten": ((F.SOFTCAP,), "dk"),
    "gradient of lse dropped": ((), "dq"),
    # memory
    "reads empty slots": ((F.KV_LENGTHS,), "forward"),
    "takes memory for contiguous": ((), "forward"),
    "scales q in place": ((), "inputs untouched"),
    "is not deterministic": ((), "determinism"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_caught(defect: str) -> None:
    features, check = DEFECTS[defect]
    report = examine(Small(defect), *features)
    assert not report.ok
    assert check in report.failures, report.text()
    assert "Case(spec=AttentionSpec(" in report.text()


def test_without_a_defect_it_conforms() -> None:
    report = conformance(Small(), examples=10, dtypes=[torch.float32, torch.float16], max_length=40)
    report.raise_if_failed()
    assert report.cases > 200
