"""Choice of a backend: refusals with reasons, no silent fallback, messages for wrong inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionBackend,
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    Capabilities,
    Feature,
    Phase,
    UnsupportedAttention,
    Window,
    attend,
    available,
    explain,
    flash,
    register,
    registry,
)
from longspan.kernels.attention.hopper import backend as hopper
from longspan.kernels.attention.reference import Reference
from longspan.kernels.attention.registry import get, preference, prepare, resolve
from longspan.kernels.attention.sdpa import MASK_LIMIT, Mask, mask_kind

CAUSAL, FULL = AttentionSpec(causal=True), AttentionSpec(causal=False)
LOCAL = AttentionSpec(causal=True, window=Window(left=7))
CALL = AttentionCall(head_dim=16, n_heads=4)


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    before = dict(registry._factories)
    yield
    registry._factories.clear()
    registry._factories.update(before)
    for name in set(registry._loaded) - set(before):
        del registry._loaded[name]
    registry._chosen.clear()
    registry._logged.clear()


def test_available_lists_every_backend() -> None:
    found = available()
    assert {"reference", "sdpa", "flex", "triton", "decode", "hopper"} <= set(found)
    assert all(isinstance(capabilities, Capabilities) for capabilities in found.values())
    assert found["reference"].features == frozenset(Feature)
    assert all(isinstance(get(name), AttentionBackend) for name in found)


def test_an_explicit_choice_never_falls_back() -> None:
    call = AttentionCall(dtype=torch.float64, device="cuda", needs_lse=True)
    with pytest.raises(UnsupportedAttention) as caught:
        resolve("sdpa", CAUSAL, call, asked_by="layer pattern 'local'")
    assert str(caught.value) == (
        "sdpa cannot run this attention: lse (returns none); dtype=float64 on cuda (has bfloat16, float16, float32). "
        "Asked by layer pattern 'local'. Backends that can: reference."
    )


@pytest.mark.parametrize(
    ("spec", "call", "backend", "words"),
    [
        (AttentionSpec(causal=True, softcap=30.0), {}, "sdpa", "softcap=30.0"),
        (AttentionSpec(causal=True, learned_sink=True), {}, "sdpa", "learned_sink"),
        (AttentionSpec(causal=True, dropout=0.1), {}, "sdpa", "dropout=0.1"),
        (AttentionSpec(causal=True, dropout=0.1), {}, "flex", "dropout=0.1"),
        (CAUSAL, {"needs_lse": True}, "sdpa", "lse"),
        (CAUSAL, {"paged": True}, "sdpa", "paged"),
        (CAUSAL, {"paged": True}, "flex", "paged"),
        (CAUSAL, {"needs_grad": True}, "flex", "backward on cpu"),
        (CAUSAL, {"dtype": torch.bfloat16}, "flex", "dtype=bfloat16 on cpu"),
        (CAUSAL, {"device": "cuda", "head_dim": 8}, "flex", "head_dim=8"),
        (CAUSAL, {"device": "cuda", "head_dim": 320}, "flex", "head_dim=320"),
        (CAUSAL, {"device": "mps"}, "reference", "device=mps"),
        (LOCAL, {"n_queries": 8193, "n_keys": 8192}, "sdpa", "a dense mask of 8193×8192"),
        (AttentionSpec(causal=True, alibi=True), {"dtype": torch.bfloat16}, "sdpa", "alibi"),
    ],
)
def test_refusals_name_what_was_asked(spec: AttentionSpec, call: dict[str, object], backend: str, words: str) -> None:
    reasons = get(backend).unsupported(spec, AttentionCall(**call))  # pyright: ignore[reportArgumentType]
    assert any(reason.need.startswith(words) for reason in reasons), reasons
    with pytest.raises(UnsupportedAttention, match=f"{backend} cannot run this attention: "):
        resolve(backend, spec, AttentionCall(**call))  # pyright: ignore[reportArgumentType]


def test_a_mask_is_limited_only_where_it_is_needed() -> None:
    n = 8192
    sdpa = get("sdpa")
    assert n * n == MASK_LIMIT
    assert not sdpa.unsupported(LOCAL, AttentionCall(n_queries=n, n_keys=n))
    assert not sdpa.unsupported(CAUSAL, AttentionCall(n_queries=10 * n, n_keys=10 * n))
    assert sdpa.unsupported(CAUSAL, AttentionCall(n_queries=10 * n, n_keys=10 * n, kv_lengths=True))
    assert not sdpa.unsupported(LOCAL, AttentionCall())  # lengths unknown: a model is being built


@pytest.mark.parametrize(
    ("spec", "T", "S", "indexed", "kind"),
    [
        (FULL, 5, 9, False, Mask.NONE),
        (CAUSAL, 5, 5, False, Mask.CAUSAL),
        (CAUSAL, 4, 5, False, Mask.DENSE),  # torch's is_causal would be top-left
        (CAUSAL, 1, 5, False, Mask.NONE),
        (CAUSAL, 5, 5, True, Mask.DENSE),
        (FULL, 5, 5, True, Mask.DENSE),
        (AttentionSpec(causal=True, window=Window(left=4)), 5, 5, False, Mask.CAUSAL),
        (AttentionSpec(causal=True, window=Window(left=3)), 5, 5, False, Mask.DENSE),
        (AttentionSpec(causal=True, window=Window(left=8)), 1, 9, False, Mask.NONE),
        (AttentionSpec(causal=False, window=Window(left=8, right=4)), 5, 9, False, Mask.NONE),
        (AttentionSpec(causal=False, window=Window(left=8, right=3)), 5, 9, False, Mask.DENSE),
        (AttentionSpec(causal=False, window=Window(left=7, right=4)), 5, 9, False, Mask.DENSE),
        (AttentionSpec(causal=True, window=Window(dilation=2)), 5, 5, False, Mask.DENSE),
        (AttentionSpec(causal=True, sink_tokens=2), 5, 5, False, Mask.CAUSAL),
        (AttentionSpec(causal=True, documents=True), 5, 5, False, Mask.DENSE),
    ],
)
def test_sdpa_masks_exactly_where_it_must(spec: AttentionSpec, T: int, S: int, indexed: bool, kind: Mask) -> None:
    assert mask_kind(spec, T, S, indexed=indexed) is kind
    if not indexed and not spec.documents:
        allowed = AttentionContext().allowed(spec, slice(0, T), slice(0, S))[0]
        if kind is Mask.NONE:
            assert bool(allowed.all())
        if kind is Mask.CAUSAL:
            assert torch.equal(allowed, torch.ones(T, S, dtype=torch.bool).tril())


def test_an_ordered_choice_logs_each_refusal_once(caplog: pytest.LogCaptureFixture) -> None:
    call = AttentionCall(needs_lse=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert resolve(["sdpa", "flex", "reference"], CAUSAL, call).name == "flex"
    assert [record.getMessage() for record in caplog.records] == [
        "sdpa cannot run this attention: lse (returns none). Using flex."
    ]


def test_when_none_of_a_list_can_every_reason_is_told() -> None:
    spec = AttentionSpec(causal=True, dropout=0.1)
    with pytest.raises(UnsupportedAttention) as caught:
        resolve(("sdpa", "flex"), spec, CALL)
    assert [rejection.backend for rejection in caught.value.tried] == ["sdpa", "flex"]
    assert caught.value.able == ("reference",)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sdpo", "did you mean 'sdpa'"), ("flexx", "did you mean 'flex'"), ("zzz", "registered are decode, flex")],
)
def test_an_unknown_name_is_told_its_neighbour(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown attention backend '{name}': .*{hint}"):
        resolve(name, CAUSAL, CALL)


def test_an_empty_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="an empty list"):
        resolve([], CAUSAL, CALL)


@pytest.mark.parametrize(
    ("spec", "call", "first"),
    [
        (CAUSAL, AttentionCall(), "sdpa"),
        (LOCAL, AttentionCall(), "sdpa"),
        (CAUSAL, AttentionCall(device="cuda"), "hopper"),
        (LOCAL, AttentionCall(device="cuda"), "hopper"),
        (CAUSAL, AttentionCall(device="cuda", head_dim=136), "hopper"),
        (CAUSAL, AttentionCall(device="cuda", value_dim=256), "hopper"),
        (LOCAL, AttentionCall(device="cuda", phase=Phase.DECODE), "decode"),
        (CAUSAL, AttentionCall(device="cuda", kv_lengths=True), "hopper"),
        (CAUSAL, AttentionCall(device="cuda", positions=True), "flex"),
        (LOCAL, AttentionCall(device="cuda", n_queries=2048, n_keys=2048), "sdpa"),
        (LOCAL, AttentionCall(device="cuda", n_queries=2048, n_keys=2049), "hopper"),
        (LOCAL, AttentionCall(device="cuda", n_queries=8, n_keys=8, needs_grad=True), "hopper"),
        (CAUSAL, AttentionCall(device="mps"), "reference"),
    ],
)
def test_auto_prefers(spec: AttentionSpec, call: AttentionCall, first: str) -> None:
    assert preference(spec, call)[0] == first


def test_off_hopper_auto_takes_triton_where_it_prefers_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "oldest_capability", lambda: (8, 0))
    monkeypatch.setattr(hopper, "oldest_capability", lambda: (8, 0))
    call = AttentionCall(device="cuda", dtype=torch.bfloat16, needs_grad=True)
    assert preference(CAUSAL, call)[:2] == ("hopper", "triton")
    sinks = AttentionSpec(causal=True, window=Window(left=9), sink_tokens=2)
    assert preference(sinks, call)[:2] == ("triton", "hopper")  # not seen on a GPU yet
    assert resolve("auto", CAUSAL, call).name == "triton"


def test_auto_takes_the_next_that_can_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve("auto", AttentionSpec(causal=True, softcap=1.0), AttentionCall()).name == "reference"
    assert not caplog.records


def test_explain_is_a_table_that_never_fails() -> None:
    text = explain(LOCAL, AttentionCall(needs_lse=True, n_queries=8, n_keys=8))
    lines = text.splitlines()
    assert lines[0].startswith(
        "causal, window=(7, None), lse; train on cpu in float32, 1 heads of 64, 8 queries × 8 keys"
    )
    assert "  reference  can (auto)" in lines
    assert "  sdpa       cannot: lse (returns none)" in lines
    register("broken", _no_module)
    text = explain(LOCAL, AttentionCall(device="quantum", dtype=torch.int8, head_dim=0))
    assert "can" not in {line.split()[1] for line in text.splitlines()[1:]}
    assert "import (No module named 'no_such_module')" in text


def _no_module() -> AttentionBackend:
    raise ModuleNotFoundError("No module named 'no_such_module'")


def test_a_backend_that_does_not_import_can_still_be_asked_about() -> None:
    register("broken", _no_module)
    assert available()["broken"].features == frozenset()
    with pytest.raises(UnsupportedAttention, match="broken cannot run this attention: import"):
        attend(*qkv(), spec=CAUSAL, backend="broken")


def test_strangers_register_and_run() -> None:
    class Stranger(Reference):
        name = "stranger"

    register("stranger", Stranger)
    ours = attend(*qkv(), spec=LOCAL, backend="stranger").out
    assert torch.equal(ours, attend(*qkv(), spec=LOCAL, backend="reference").out)
    with pytest.raises(ValueError, match="this name is taken"):
        register("stranger", Stranger)
    register("stranger", Reference, replace=True)
    assert resolve("stranger", CAUSAL, CALL).name == "reference"
    with pytest.raises(ValueError, match="'auto' means the preference order"):
        register("auto", Stranger)


def test_auto_grad_mode_is_part_of_the_question() -> None:
    q, k, v = qkv()
    with pytest.raises(UnsupportedAttention, match="backward on cpu"):
        attend(q.requires_grad_(), k, v, spec=CAUSAL, backend="flex")
    with torch.no_grad():
        attend(q, k, v, spec=CAUSAL, backend="flex")
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(UnsupportedAttention, match="backward on cpu"):
        attend(*qkv(), spec=AttentionSpec(causal=True, alibi=True), params=AttentionParams(slopes), backend="flex")


def qkv(B: int = 2, T: int = 6, S: int = 6, H: int = 4, G: int = 2, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(B, T, H, D, generator=generator),
        torch.randn(B, S, G, D, generator=generator),
        torch.randn(B, S, G, D, generator=generator),
    )


q, k, v = qkv()
DOCUMENTS = AttentionSpec(causal=True, documents=True)


@pytest.mark.parametrize(
    ("tensors", "spec", "context", "params", "match"),
    [
        ((q[0], k, v), CAUSAL, {}, {}, r"q has shape \[6, 4, 8\]; attention takes \[batch, time, heads, head_dim\]"),
        ((q, k, v[:, :5]), CAUSAL, {}, {}, r"k is \[2, 6, 2, 8\] and v is \[2, 5, 2, 8\]"),
        ((q, k[..., :7], v), CAUSAL, {}, {}, "q has head_dim 8 and k has 7"),
        ((q[:, :, :3], k, v), CAUSAL, {}, {}, "3 query heads cannot share 2 key/value heads"),
        ((q, k[:1], v[:1]), CAUSAL, {}, {}, "q has a batch of 2 and k, v one of 1"),
        ((q, k.double(), v), CAUSAL, {}, {}, "different dtypes: q float32, k float64, v float32"),
        ((q, k.to("meta"), v), CAUSAL, {}, {}, "different devices: cpu, meta, cpu"),
        ((q, k, v), CAUSAL, {"kv_lengths": torch.zeros(3)}, {}, r"kv_lengths has shape \[3\]; it must be \[2\]"),
        (
            (q, k, v),
            CAUSAL,
            {"q_positions": torch.zeros(2, 5)},
            {},
            r"q_positions has shape \[2, 5\]; it must be \[2, 6\]",
        ),
        ((q, k, v), CAUSAL, {"is_global": torch.zeros(2, 7)}, {}, r"is_global has shape \[2, 7\]; it must be \[2, 6\]"),
        ((q, k, v), CAUSAL, {"is_global": torch.zeros(2, 6)}, {}, "is_global has dtype float32; it must be bool"),
        ((q, k, v), CAUSAL, {"kv_lengths": torch.zeros(2, device="meta")}, {}, "kv_lengths is on meta, but q, k and v"),
        ((q, k, v), DOCUMENTS, {}, {}, "neither q_documents nor kv_documents"),
        ((q, k, v), DOCUMENTS, {"q_documents": torch.zeros(3, 6)}, {}, r"q_documents has shape \[3, 6\]"),
        (
            (q[:, :5], k, v),
            DOCUMENTS,
            {"kv_documents": torch.zeros(2, 6, dtype=torch.int64)},
            {},
            "pass both q_documents and kv_documents",
        ),
        ((q, k, v), AttentionSpec(causal=True, alibi=True), {}, {}, r"spec.alibi=True needs params.alibi_slopes"),
        ((q, k, v), AttentionSpec(causal=True, learned_sink=True), {}, {}, "needs params.sink_logits"),
        (
            (q, k, v),
            AttentionSpec(causal=True, alibi=True),
            {},
            {"alibi_slopes": torch.ones(2)},
            r"alibi_slopes has shape \[2\]; it must be \[4\], one for each query head",
        ),
    ],
)
def test_wrong_inputs_are_told_in_one_line(
    tensors: tuple[Tensor, Tensor, Tensor],
    spec: AttentionSpec,
    context: dict[str, Tensor],
    params: dict[str, Tensor],
    match: str,
) -> None:
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=match) as caught:
            attend(
                *tensors,
                spec=spec,
                context=AttentionContext(**context),
                params=AttentionParams(**params),
                backend=backend,
            )
        assert "\n" not in str(caught.value)


def test_prepare_needs_lengths() -> None:
    with pytest.raises(ValueError, match="no n_queries and n_keys"):
        prepare(AttentionContext(), LOCAL, CALL)


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(q, k.bfloat16(), v, spec=CAUSAL)
    assert mixed.out.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.out.float(), attend(q, k, v, spec=CAUSAL).out, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"q_positions": torch.arange(8.0)[None]}, r"context\.q_positions has dtype float32; it must be int64"),
        ({"kv_lengths": torch.tensor([7.5])}, r"context\.kv_lengths has dtype float32; it must be int64"),
        (
            {"q_documents": torch.zeros(1, 8, dtype=torch.bool)},
            r"context\.q_documents has dtype bool; it must be int64",
        ),
        ({"is_global": torch.zeros(1, 8)}, r"context\.is_global has dtype float32; it must be bool"),
    ],
)
def test_context_tensors_of_another_dtype(context: dict[str, torch.Tensor], message: str) -> None:
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, spec=CAUSAL, context=AttentionContext(**context))


@pytest.mark.parametrize("seed", [torch.tensor(3.0), torch.tensor([3, 4])])
def test_a_dropout_seed_that_is_none(seed: torch.Tensor) -> None:
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match=r"params\.dropout_seed is a .* it must be int64, without dimensions"):
        attend(q, q, q, spec=AttentionSpec(causal=True, dropout=0.1), params=AttentionParams(dropout_seed=seed))
