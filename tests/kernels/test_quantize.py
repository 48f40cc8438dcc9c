"""Keys and values in eight bits: what quantising loses, what `attend` accepts, and who serves it.

Legend: B batch, S keys, G key/value heads, D head dim.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    UnsupportedAttention,
    attend,
)
from longspan.kernels.attention.quantize import LARGEST, dequantize, quantize

B, T, S, H, G, D = 2, 3, 8, 4, 2, 16
SPEC = AttentionSpec(causal=True)
DTYPES = pytest.mark.parametrize("dtype", list(LARGEST), ids=str)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@DTYPES
def test_the_error_is_what_the_format_allows(dtype: torch.dtype) -> None:
    x = rows(B, S, G, D) * torch.tensor([1e-6, 1.0, 1e3, 1.0, 1.0, 1.0, 1.0, 1e-20])[:, None, None]
    stored, scale = quantize(x, dtype)
    assert (stored.dtype, stored.shape) == (dtype, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:3])
    largest = x.abs().amax(dim=-1, keepdim=True)
    step = largest / 254 if dtype == torch.int8 else (x.abs() / 16).maximum(largest * 2**-10 / 448)
    assert bool(((dequantize(stored, scale, torch.float32) - x).abs() <= step * (1 + 1e-5)).all())
    top = stored.float().abs().amax(dim=-1)
    assert bool((top == LARGEST[dtype]).all()), "the largest of each row uses the whole range"


@DTYPES
def test_a_row_of_zeros_stays_zero_and_has_scale_one(dtype: torch.dtype) -> None:
    x = rows(B, S, G, D)
    x[0, 3, 1] = 0
    x[1, 0, 0] = 1e-42  # too small for any scale in fp32
    stored, scale = quantize(x, dtype)
    for place in ((0, 3, 1), (1, 0, 0)):
        assert float(scale[place]) == 1
        assert bool((dequantize(stored, scale, torch.float64)[place] == 0).all())


def test_each_token_and_head_has_its_own_scale() -> None:
    x = rows(B, S, G, D)
    louder = x.clone()
    louder[1, 2, 0] *= 1000
    (stored, scale), (stored2, scale2) = quantize(x, torch.int8), quantize(louder, torch.int8)
    changed = scale != scale2
    assert changed.nonzero().tolist() == [[1, 2, 0]]
    assert torch.equal(stored, stored2)


def test_other_dtypes_store_nothing() -> None:
    with pytest.raises(ValueError, match=r"quantize\(…, torch.float16\): keys and values are stored in int8, float8"):
        quantize(rows(1, 1, 1, 4), torch.float16)


def stored_case(dtype: torch.dtype) -> tuple[list[Tensor], AttentionParams]:
    k, k_scale = quantize(rows(B, S, G, D, seed=1), dtype)
    v, v_scale = quantize(rows(B, S, G, D, seed=2), dtype)
    return [rows(B, T, H, D), k, v], AttentionParams(k_scale_BSG=k_scale, v_scale_BSG=v_scale)


@DTYPES
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_the_reference_attends_to_the_stored_values(dtype: torch.dtype, paged: bool) -> None:
    (q, k, v), params = stored_case(dtype)
    assert params.k_scale_BSG is not None
    assert params.v_scale_BSG is not None
    values = [dequantize(k, params.k_scale_BSG, torch.float64), dequantize(v, params.v_scale_BSG, torch.float64)]
    expected = attend(q.double(), *values, spec=SPEC, backend="reference").out
    context = AttentionContext()
    if paged:  # pages of four keys, in reversed order
        order = torch.arange(B * S // 4).flip(0)
        context.page_table = order.view(B, -1)
        k, v, k_scale, v_scale = (
            x.reshape(-1, 4, *x.shape[2:]).view(torch.uint8 if x.dtype == dtype else x.dtype)[order].view(x.dtype)
            for x in (k, v, params.k_scale_BSG, params.v_scale_BSG)
        )
        params = AttentionParams(k_scale_BSG=k_scale, v_scale_BSG=v_scale)
    out = attend(q.double(), k, v, spec=SPEC, context=context, params=params, backend="reference").out
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    half = attend(q.bfloat16(), k, v, spec=SPEC, context=context, params=params, backend="reference").out
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_who_needs_full_width_refuses(backend: str) -> None:
    (q, k, v), params = stored_case(torch.int8)
    with pytest.raises(
        UnsupportedAttention, match=rf"{backend} cannot .*quantized_kv=int8 \(needs the inputs' dtype\)"
    ):
        attend(q, k, v, spec=SPEC, params=params, backend=backend)


def test_autocast_leaves_what_is_stored_alone() -> None:
    (q, k, v), params = stored_case(torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, spec=SPEC, params=params).out
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(q, k, v, spec=SPEC, params=params).out, rtol=0, atol=0.03)


def test_what_does_not_fit_is_told_in_one_line() -> None:
    (q, k, v), params = stored_case(torch.int8)
    k_scale, v_scale = params.k_scale_BSG, params.v_scale_BSG
    assert k_scale is not None
    wrong = [
        ((k, v), (None, v_scale), r"k and v are int8, which needs params\.k_scale_BSG"),
        ((k, v), (k_scale, None), r"k and v are int8, which needs params\.v_scale_BSG"),
        ((k, v), (k_scale[:, :3], v_scale), r"k_scale_BSG has shape \[2, 3, 2\]; it must be \[2, 8, 2\]"),
        ((k, v), (k_scale.double(), v_scale), "k_scale_BSG has dtype float64; it must be float32 or float16"),
        ((k, v), (k_scale.to("meta"), v_scale), "k_scale_BSG is on meta, but k and v are on cpu"),
        ((k, v.float()), (k_scale, v_scale), "k is int8 and v is float32: stored in eight bits, both have one dtype"),
        ((k.float(), v.float()), (k_scale, None), "scales of k or v, which are float32; scales belong to int8 and fl"),
        ((k.double(), v.float()), (None, None), "different dtypes: q float32, k float64, v float32"),
    ]
    for stored, scales, match in wrong:
        for backend in ("auto", "reference"):
            given = AttentionParams(k_scale_BSG=scales[0], v_scale_BSG=scales[1])
            with pytest.raises(ValueError, match=match):
                attend(q, *stored, spec=SPEC, params=given, backend=backend)
