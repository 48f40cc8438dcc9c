"""The decode backend on CPU: its plain path, what it refuses, who is asked first, and the kernel interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    Phase,
    UnsupportedAttention,
    Window,
    attend,
)
from longspan.kernels.attention.quantize import quantize
from longspan.kernels.attention.registry import prepare, resolve
from longspan.kernels.testing import conformance

CAUSAL = AttentionSpec(causal=True)
B, T, S, H, G, D = 2, 3, 40, 6, 2, 16


def qkv(dtype: torch.dtype = torch.float64, n_queries: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, n_queries, H, D), (B, S, G, D), (B, S, G, D + 8))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_the_plain_path_conforms() -> None:
    conformance("decode", examples=25, max_length=33).raise_if_failed()


def test_double_precision_is_double() -> None:
    spec = AttentionSpec(causal=True, window=Window(left=9), sink_tokens=2, alibi=True, softcap=3.0, learned_sink=True)
    params = AttentionParams(alibi_slopes=torch.rand(H).double(), sink_logits=torch.randn(H).double())
    exact = attend(*qkv(), spec=spec, params=params, backend="reference", return_lse=True)
    ours = attend(*qkv(), spec=spec, params=params, backend="decode", return_lse=True)
    assert ours.lse is not None
    assert exact.lse is not None
    torch.testing.assert_close(ours.out, exact.out, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.lse, exact.lse, rtol=0, atol=1e-13)


def test_keys_and_values_are_never_repeated_for_their_heads() -> None:
    """Over 1,024 keys of 2 heads that 16 query heads share, nothing is as large as the repeated keys."""
    q, k, v = torch.randn(1, 1, 16, 64), torch.randn(1, 1024, 2, 64), torch.randn(1, 1024, 2, 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        attend(q, k, v, spec=CAUSAL, backend="decode")
    assert largest <= k.numel()


@pytest.mark.parametrize(
    ("spec", "call", "words"),
    [
        (CAUSAL, {"n_queries": 17}, r"n_queries=17 \(at most 16\)"),
        (CAUSAL, {"needs_grad": True}, r"backward \(for generation only\)"),
        (CAUSAL, {"phase": Phase.TRAIN}, r"phase=train \(has decode, prefill\)"),
        (AttentionSpec(causal=True, dropout=0.1), {}, r"dropout=0.1 \(for generation only\)"),
        (CAUSAL, {"head_dim": 264}, r"head_dim=264 \(at most 256\)"),
        (CAUSAL, {"device": "mps"}, "device=mps"),
    ],
)
def test_refusals(spec: AttentionSpec, call: dict[str, object], words: str) -> None:
    asked = AttentionCall(**{"phase": Phase.DECODE, **call})
    with pytest.raises(UnsupportedAttention, match=words):
        resolve("decode", spec, asked)


@pytest.mark.parametrize(
    ("call", "first"),
    [
        ({"device": "cuda"}, "decode"),
        ({"device": "cuda", "phase": Phase.PREFILL, "n_queries": 8, "paged": True}, "decode"),
        ({"device": "cuda", "phase": Phase.PREFILL, "n_queries": 8, "kv_dtype": torch.int8}, "decode"),
        ({"device": "cuda", "phase": Phase.PREFILL, "n_queries": 64, "paged": True}, "reference"),
        ({"device": "cuda", "phase": Phase.PREFILL, "n_queries": 8, "n_keys": 8}, "sdpa"),
        ({}, "sdpa"),
        ({"n_kv_heads": 1}, "decode"),
        ({"paged": True}, "decode"),
        ({"kv_dtype": torch.int8}, "decode"),
        ({"needs_lse": True}, "decode"),
        ({"needs_lse": True, "n_queries": 17, "phase": Phase.PREFILL}, "reference"),
    ],
)
def test_auto_asks_decode_where_it_belongs(call: dict[str, object], first: str) -> None:
    if call.get("device") == "cuda" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    base = {"phase": Phase.DECODE, "n_heads": 4, "n_queries": 1, "n_keys": 4096}
    asked = AttentionCall(**{**base, **call})
    assert resolve("auto", CAUSAL, asked).name == first


def test_the_mask_is_derived_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(causal=True, documents=True)
    ids = (torch.arange(S) // 7).expand(B, S)
    context = AttentionContext(q_documents=ids[:, S - T :], kv_documents=ids)
    expected = attend(*qkv(), spec=spec, context=context, backend="reference").out
    call = AttentionCall(phase=Phase.PREFILL, n_queries=T, n_keys=S, head_dim=D)
    prepare(context, spec, call, backend="decode")
    monkeypatch.setattr(AttentionContext, "allowed", None)  # nobody may ask again
    torch.testing.assert_close(
        attend(*qkv(), spec=spec, context=context, backend="decode").out, expected, rtol=0, atol=1e-14
    )


def test_a_page_outside_the_pool_is_refused() -> None:
    q, k, v = qkv()
    context = AttentionContext(page_table=torch.tensor([[0, 1], [0, 2]]))
    with pytest.raises(ValueError, match=r"page_table\[1, 1\]=2: the pool has pages 0 … 1"):
        attend(q, k, v, spec=CAUSAL, context=context, backend="decode")


def test_traces_as_one_graph() -> None:
    q, k, v = (x.float() for x in qkv())
    k, k_scale = quantize(k, torch.int8)
    v, v_scale = quantize(v, torch.int8)
    params = AttentionParams(k_scale_BSG=k_scale, v_scale_BSG=v_scale)

    def step(q: Tensor) -> Tensor:
        return attend(q, k, v, spec=CAUSAL, params=params, backend="decode").out

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(q), step(q))


INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.timeout(900)
def test_interpreted() -> None:
    file = Path(__file__).with_name("interpreted_decode.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "--tb=short"],
        env=INTERPRETED,
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_the_kernel_conforms_when_interpreted() -> None:
    arguments = ["backend=decode", "max_length=50", "examples=25", "dtypes=[fp32,fp16]"]
    done = subprocess.run(
        [sys.executable, "-m", "longspan.scripts.cli", "conformance", *arguments],
        env=INTERPRETED,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
