"""The backward kernels of `hopper` without a GPU: their own text in NumPy, against fp64."""

from __future__ import annotations

import importlib.util
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionParams, AttentionSpec, Window, attend
from longspan.kernels.attention.hopper import backend as hopper
from longspan.kernels.attention.hopper.backward_launch import lse_factor, squares_for
from longspan.kernels.attention.hopper.gathered import gathered, statistics_of_rows
from longspan.kernels.attention.hopper.tiles import HEAD_DIMS, ROWS, adds_dq, choose_backward, padded
from longspan.kernels.attention.plan import make_plan
from longspan.kernels.testing import judge, twin

# Tests are not a package, so a file beside this one is loaded by its path.
_file = importlib.util.spec_from_file_location("interpreted_gluon", Path(__file__).with_name("interpreted_gluon.py"))
assert _file is not None
assert _file.loader is not None
gluon = importlib.util.module_from_spec(_file)
_file.loader.exec_module(gluon)

CAUSAL, FULL = AttentionSpec(causal=True), AttentionSpec(causal=False)
WIDE = AttentionSpec(causal=True, window=Window(left=300))
TALL = 2 * ROWS  # keys or queries of a program
STATS_ROWS = 32
LINES = 128  # of a square of dq


def run(
    monkeypatch: pytest.MonkeyPatch,
    spec: AttentionSpec,
    shape: tuple[int, ...],
    *,
    queries: int = 64,
    keys: int = 128,
    stages: int = 2,
    owners: int = 2,
    group: int = 2,
    documents: bool = False,
    seed: int = 0,
    kernels: tuple[str, ...] = ("dkdv", "dq"),
    dtype: torch.dtype = torch.float32,
    loudness: float = 1.0,
    lse_used: bool = True,
) -> None:
    """Gradients for `shape` (B, T, S, H, G, D, E) by the interpreted kernels, compared with autograd's in fp64: of fp32
    inputs closely, of fp16 within the conformance budget. `loudness`: of the output's gradient."""
    B, T, S, H, G, D, E = shape
    generator = np.random.default_rng(seed)

    half = dtype == torch.float16

    def normal(*sizes: int) -> np.ndarray:
        return generator.standard_normal(sizes).astype(np.float32)

    q, k, v, d_out = (
        x.astype(np.float16) if half else x
        for x in (normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, E), loudness * normal(B, T, H, E))
    )
    slopes, sinks, d_lse = generator.random(H).astype(np.float32), normal(H), loudness * lse_used * normal(B, H, T)
    context = gluon.context_of(spec, shape, generator, sorted_ids=documents)
    plan = make_plan(context, spec, T, S, torch.device("cpu"))
    (
        q_doc,
        k_doc,
        _,
        q_spans,
        k_spans,
        always,
        n_always,
        *more,
        is_global,
        rows,
        n_rows,
        seen,
        row_doc,
        most_always,
        most_rows,
    ) = hopper.masks_of(plan, spec, T, S, TALL)
    q_doc, k_doc, q_spans, k_spans = (gluon.pointer(x, B) for x in (q_doc, k_doc, q_spans, k_spans))
    tensors = [torch.from_numpy(x) for x in (q, k, v, d_out)]
    far_keys = gathered(tensors[1], tensors[2], always, n_always, most_always, *more)
    far_rows = gathered(tensors[0], tensors[3], rows, n_rows, most_rows, seen, row_doc)

    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (q, k, v, slopes, sinks)]
    true = attend(
        *leaves[:3],
        spec=spec,
        context=context,
        params=AttentionParams(alibi_slopes=leaves[3], sink_logits=leaves[4]),
        backend="reference",
        return_lse=True,
    )
    assert true.lse is not None
    expected = torch.autograd.grad(
        (true.out, true.lse),
        leaves,
        (torch.from_numpy(d_out).double(), torch.from_numpy(d_lse).double()),
        allow_unused=True,
    )
    plain: tuple[Tensor, ...] = ()
    if half:
        twins = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
        params = AttentionParams(alibi_slopes=torch.from_numpy(slopes), sink_logits=torch.from_numpy(sinks))
        same = twin(*twins, spec=spec, context=context, params=params)
        assert same.lse is not None
        plain = torch.autograd.grad((same.out, same.lse), twins, (torch.from_numpy(d_out), torch.from_numpy(d_lse)))

    ordinary_rows = torch.ones(B, T, dtype=torch.bool) if is_global is None else is_global.expand(B, -1) == 0
    ordinary_keys = torch.ones(B, S, dtype=torch.bool)
    if always is not None and n_always is not None:  # `always` begins with them
        ordinary_keys.scatter_(1, always.expand(B, -1).long(), torch.arange(S) >= n_always.expand(B)[:, None])

    def close(found: np.ndarray, which: int) -> None:
        """Where the gradient is not one of `dense.py`'s."""
        chosen = ordinary_keys if which else ordinary_rows
        assert np.isfinite(found).all()
        if half:
            trio = (torch.from_numpy(found), expected[which], plain[which])
            ours, exact, theirs = (x[chosen] / loudness for x in trio)
            verdict = judge(ours, exact, theirs, score=8.0)
            assert not verdict.problem, (which, verdict.problem)
        else:
            _close(found[chosen], expected[which][chosen])

    rounded = -(-T // TALL) * TALL
    stats = np.full(B * H * 2 * rounded, np.nan, np.float32)
    ordinary_lse = true.lse.masked_fill(~ordinary_rows[:, None], -torch.inf)
    pointer, number = gluon.Pointer, gluon.Int
    machine = gluon.Machine(B * H * rounded // STATS_ROWS, seed)
    gluon.kernel(monkeypatch, machine, "stats_kernel")(
        *(pointer(_numpy(x).reshape(-1)) for x in (true.out.to(dtype), torch.from_numpy(d_out), ordinary_lse)),
        pointer(d_lse.reshape(-1)) if lse_used else None,
        pointer(stats),
        lse_factor(spec, D),
        *map(number, (T * H * E, H * E, E) * 2),
        *map(number, (T, H, E, rounded)),
        padded(E),
    )
    row_stats, far_q, far_k = None, (None,) * 7, (None,) * 6
    if far_rows is not None:
        shaped = torch.from_numpy(stats).view(B, H, 2, rounded)
        row_stats = statistics_of_rows(shaped, true.lse.detach().float(), far_rows, lse_factor(spec, D), TALL)
        tiles = (gluon.Descriptor(x.numpy(), queries, padded(x.shape[3])) for x in (far_rows.x, far_rows.y))
        far_q = (*tiles, gluon.Vector(row_stats.reshape(-1).numpy(), queries), *_pointers(far_rows.tensors[2:], B))
    if far_keys is not None:
        tiles = (gluon.Descriptor(x.numpy(), keys, padded(x.shape[3])) for x in (far_keys.x, far_keys.y))
        far_k = (*tiles, *_pointers(far_keys.tensors[2:], B))
    window = spec.window
    scales = (spec.softmax_scale(D), spec.softcap or 1.0, number(window.left or 0), number(window.right or 0))
    masks = (
        spec.causal, window.left is not None, window.right is not None and not spec.causal, spec.documents,
        spec.softcap is not None, spec.alibi,
    )  # fmt: skip

    if "dkdv" in kernels or "fused" in kernels:
        n_tiles = -(-S // (owners * ROWS))
        dk, dv = np.full_like(k, np.nan), np.full_like(v, np.nan)
        sums = squares_for(torch.from_numpy(q), choose_backward(D)).numpy() if "fused" in kernels else None
        machine = gluon.Machine(n_tiles * B * G, seed)
        gluon.kernel(monkeypatch, machine, "dkdv_kernel")(
            gluon.Descriptor(q, queries, padded(D)),
            gluon.Descriptor(k, ROWS, padded(D)),
            gluon.Descriptor(v, ROWS, padded(E)),
            gluon.Descriptor(d_out, queries, padded(E)),
            gluon.Vector(stats, queries),
            gluon.Descriptor(dk, ROWS, padded(D)),
            gluon.Descriptor(dv, ROWS, padded(E)),
            None if sums is None else gluon.Lines(sums, LINES),
            *(k_spans, q_doc, k_doc, pointer(slopes), *far_q),
            *map(number, (T, S, H, G, H // G)),
            *scales,
            *map(number, (n_tiles, B * G, group, rounded, 0 if row_stats is None else row_stats.shape[3])),
            *(queries, padded(D), padded(E), stages, owners, 240, *masks, sums is not None),
        )
        close(dk, 1)
        close(dv, 2)
        if sums is not None:
            dq = np.full_like(q, np.nan)
            machine = gluon.Machine(sums.shape[0] // LINES, seed)
            gluon.kernel(monkeypatch, machine, "round_kernel")(
                *(pointer(x.reshape(-1)) for x in (sums, dq)),
                spec.softmax_scale(D),
                *map(number, (T * H * D, H * D, D, T, H, D, -(-T // queries))),
                queries == ROWS,
            )
            close(dq, 0)
    if "dq" in kernels:
        n_tiles = -(-T // TALL)
        dq, d_slopes = np.full_like(q, np.nan), np.full(B * H * T, np.nan, np.float32)
        machine = gluon.Machine(n_tiles * B * H, seed)
        gluon.kernel(monkeypatch, machine, "dq_kernel")(
            gluon.Descriptor(q, ROWS, padded(D)),
            gluon.Descriptor(k, keys, padded(D)),
            gluon.Descriptor(v, keys, padded(E)),
            gluon.Descriptor(d_out, ROWS, padded(E)),
            gluon.Descriptor(dq, ROWS, padded(D)),
            *(pointer(stats), pointer(d_slopes), q_spans, q_doc, k_doc, pointer(slopes), *far_k),
            *map(number, (T, S, H, H // G)),
            *scales,
            *map(number, (n_tiles, B * H, group, rounded)),
            *(keys, padded(D), padded(E), stages, 240, *masks),
        )
        close(dq, 0)
        assert not dq[~ordinary_rows.numpy()].any()
        if spec.alibi and not half and is_global is None:
            _close(d_slopes.reshape(B, H, T).sum(axis=(0, 2)), expected[3])
    if spec.learned_sink and not half:
        lse, minus_delta = true.lse.detach(), torch.from_numpy(stats).view(B, H, 2, rounded)[:, :, 1, :T]
        weight = torch.where(lse == -torch.inf, 0.0, torch.exp(leaves[4].detach()[:, None] - lse))
        _close((weight * minus_delta).sum(dim=(0, 2)).numpy(), expected[4])


def _pointers(tensors: tuple[Tensor | None, ...], B: int) -> list[object]:
    return [gluon.pointer(x, B) for x in tensors]


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().contiguous().numpy()


def _close(found: np.ndarray, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * scale)


CASES = {
    "one tile": (CAUSAL, (1, 64, 64, 1, 1, 64, 64)),
    "odd lengths in groups": (CAUSAL, (2, 301, 301, 4, 2, 64, 64)),
    "more keys, padded": (CAUSAL, (1, 130, 700, 2, 1, 40, 64)),
    "rows that see nothing": (CAUSAL, (1, 400, 90, 2, 2, 64, 128)),
    "keys that nobody sees": (AttentionSpec(causal=True, window=Window(left=20)), (1, 40, 500, 2, 1, 64, 64)),
    "full": (FULL, (1, 200, 450, 2, 1, 128, 64)),
    "two-sided window": (AttentionSpec(causal=False, window=Window(70, 9)), (1, 500, 450, 2, 1, 64, 64)),
    "one-sided window": (AttentionSpec(causal=False, window=Window(right=130)), (1, 300, 300, 1, 1, 64, 64)),
    "causal window": (AttentionSpec(causal=True, window=Window(left=129)), (1, 600, 600, 2, 1, 64, 64)),
    "documents": (AttentionSpec(causal=True, documents=True), (2, 500, 500, 2, 1, 64, 64)),
    "documents in a window": (
        AttentionSpec(causal=False, documents=True, window=Window.symmetric(100)),
        (2, 300, 420, 2, 1, 64, 64),
    ),
    "alibi": (AttentionSpec(causal=True, alibi=True), (1, 300, 300, 4, 2, 64, 64)),
    "softcap": (AttentionSpec(causal=False, softcap=2.0), (1, 150, 300, 2, 1, 64, 64)),
    "sinks": (AttentionSpec(causal=True, window=Window(left=129), sink_tokens=5), (2, 400, 400, 4, 2, 64, 64)),
    "sinks in several tiles": (
        AttentionSpec(causal=False, window=Window(20, 30), sink_tokens=200, alibi=True),
        (1, 500, 500, 2, 1, 64, 64),
    ),
    "sinks of documents": (
        AttentionSpec(causal=True, documents=True, window=Window(left=40), sink_tokens=3, softcap=2.0),
        (2, 300, 301, 2, 1, 64, 64),
    ),
    "globals": (
        AttentionSpec(causal=False, window=Window.symmetric(50), global_tokens=True),
        (3, 301, 301, 4, 2, 64, 64),
    ),
    "causal globals": (
        AttentionSpec(causal=True, window=Window(left=60), global_tokens=True, sink_tokens=2),
        (2, 800, 800, 2, 1, 64, 64),
    ),
    "globals of documents, one-sided window": (
        AttentionSpec(causal=False, documents=True, window=Window(right=9), global_tokens=True),
        (2, 250, 420, 2, 1, 40, 64),
    ),
    "everything and globals": (
        AttentionSpec(
            causal=True,
            documents=True,
            window=Window(left=50),
            alibi=True,
            softcap=3.0,
            learned_sink=True,
            global_tokens=True,
            sink_tokens=3,
        ),
        (2, 500, 500, 4, 2, 64, 64),
    ),
    "all at once": (
        AttentionSpec(causal=True, documents=True, window=Window(left=200), alibi=True, softcap=3.0, learned_sink=True),
        (1, 500, 500, 4, 2, 64, 64),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_text_computes_gradients(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, shape = CASES[name]
    for seed, (queries, keys, stages, group) in enumerate(((64, 128, 2, 2), (128, 64, 3, 5))):
        run(
            monkeypatch, spec, shape, queries=queries, keys=keys, stages=stages, group=group, documents=seed == 0,
            seed=seed, lse_used=seed == 0,
        )  # fmt: skip


# Wider than 128, of which the larger decides about the tiles: one consumer has dk and the other dv.
WIDE_HEADS = {
    "odd lengths in groups": (CAUSAL, (2, 301, 301, 4, 2, 256, 256)),
    "padded": (FULL, (1, 200, 330, 2, 1, 136, 136)),
    "rows that see nothing": (CAUSAL, (1, 400, 90, 2, 2, 192, 256)),
    "narrower values": (CAUSAL, (1, 290, 350, 2, 1, 192, 128)),
    "wider values": (AttentionSpec(causal=False, window=Window(70, 9)), (1, 400, 350, 2, 1, 64, 256)),
    "keys that nobody sees": (CASES["keys that nobody sees"][0], (1, 40, 300, 2, 1, 256, 256)),
    "causal window": (AttentionSpec(causal=True, window=Window(left=129)), (1, 500, 500, 2, 1, 192, 192)),
    "documents": (AttentionSpec(causal=True, documents=True), (2, 460, 460, 2, 1, 256, 256)),
    "alibi": (AttentionSpec(causal=True, alibi=True), (1, 300, 300, 4, 2, 192, 256)),
    "softcap": (AttentionSpec(causal=False, softcap=2.0), (1, 150, 300, 2, 1, 256, 192)),
    "globals": (
        AttentionSpec(causal=False, window=Window.symmetric(40), global_tokens=True),
        (1, 300, 330, 2, 1, 256, 192),
    ),
    "all at once": (CASES["all at once"][0], (1, 400, 400, 4, 2, 256, 256)),
}


@pytest.mark.parametrize("name", WIDE_HEADS)
def test_the_tiles_that_ship_for_wide_heads_compute_gradients(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, shape = WIDE_HEADS[name]
    curved = spec.alibi or spec.softcap is not None
    tiles = choose_backward(max(shape[5:]), curved=curved, documents=spec.documents)
    assert tiles.owners == 1
    for seed in range(2):
        for kernel, stages in (("dkdv", tiles.query_stages), ("dq", tiles.key_stages)):
            run(
                monkeypatch, spec, shape, queries=tiles.queries, keys=tiles.keys, stages=stages, owners=tiles.owners,
                kernels=(kernel,), group=2 + 3 * seed, documents=seed == 0, seed=seed, lse_used=seed == 0,
            )  # fmt: skip


FUSED = {  # of global tokens and sinks the kernel of dk and dv does not know all keys
    **{
        f"{name}, {'padded to ' if padding else ''}{width}": (spec, (*shape[:5], width - padding, width))
        for name, (spec, shape) in CASES.items()
        if not (spec.alibi or spec.softcap or spec.global_tokens or spec.sink_tokens)
        for width, padding in ((64, 24 if shape[5] < 64 else 0), (128, 32 if shape[5] < 64 else 0))
    },
    "learned sinks": (AttentionSpec(causal=True, learned_sink=True), (1, 200, 200, 2, 2, 128, 128)),
}


@pytest.mark.parametrize("name", FUSED)
def test_dq_on_the_way_is_the_same(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, shape = FUSED[name]
    tiles = choose_backward(shape[5], documents=spec.documents)
    for seed, stages in enumerate((tiles.query_stages, 3)):
        run(
            monkeypatch, spec, shape, queries=tiles.queries, stages=stages, documents=seed == 0, seed=seed,
            kernels=("fused",),
        )  # fmt: skip


def test_dq_is_added_on_the_way_where_queries_see_enough() -> None:
    for width, enough in ((64, 1024), (40, 1024), (128, 2048), (72, 2048)):
        assert adds_dq(CAUSAL, 2 * enough, 2 * enough, width, width)
        assert not adds_dq(CAUSAL, 2 * enough - 2, 2 * enough - 2, width, width)
    assert adds_dq(CAUSAL, 4096, 4096, 128, 128)
    assert not adds_dq(CAUSAL, 4094, 4094, 128, 128)
    assert adds_dq(CAUSAL, 128, 2112, 72, 96)
    assert adds_dq(FULL, 2048, 2048, 128, 96)
    assert not adds_dq(FULL, 2**20, 2047, 128, 128)
    assert not adds_dq(AttentionSpec(causal=True, window=Window(left=2046)), 2**20, 2**20, 128, 128)
    assert adds_dq(AttentionSpec(causal=True, window=Window(left=2047)), 2**20, 2**20, 128, 128)
    assert not adds_dq(AttentionSpec(causal=False, window=Window.symmetric(1023)), 2**20, 2**20, 128, 128)
    assert adds_dq(AttentionSpec(causal=False, window=Window.symmetric(1024)), 2**20, 2**20, 128, 128)
    assert adds_dq(AttentionSpec(causal=False, window=Window(right=9)), 4096, 4096, 128, 128)
    for spec in (
        AttentionSpec(causal=True, documents=True),
        AttentionSpec(causal=True, alibi=True),
        AttentionSpec(causal=True, softcap=5.0),
        AttentionSpec(causal=True, global_tokens=True),
        AttentionSpec(causal=True, window=Window(left=4095), sink_tokens=4),
    ):
        assert not adds_dq(spec, 2**20, 2**20, 128, 128)
    assert not adds_dq(CAUSAL, 2**20, 2**20, 128, 64)
    assert not adds_dq(CAUSAL, 2**20, 2**20, 256, 256)
    # Of keys that are not there only causality keeps the weights, which may be infinite, from dq.
    assert adds_dq(CAUSAL, 5000, 5000, 64, 64)
    for spec in (FULL, AttentionSpec(causal=False, window=Window.symmetric(2000))):
        assert adds_dq(spec, 5000, 5120, 64, 64)
        assert not adds_dq(spec, 5120, 5000, 64, 64)


def test_dq_on_the_way_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, CAUSAL, (1, 300, 300, 4, 2, 128, 128), kernels=("fused",), dtype=torch.float16)


@pytest.mark.parametrize(
    "changes",
    [
        # nobody waits for the other's part
        {"            mbarrier.wait(ds_full.index((at + 1) % 2), (at // 2) & 1)\n": ""},
        # one slot
        {"slot * CONSUMERS": "0 * CONSUMERS", "at % 2 * CONSUMERS": "0 * CONSUMERS", "(CONSUMERS + CID)": "(CID)"},
        # what lies there is added before anything was put there
        {"        ds_s.index(CONSUMERS + CID).store(gl.zeros([ROWS, M], dtype, s_layout))\n": ""},
        # the last tile's part stays behind
        {"    if FUSED and n_rounds > 0:": "    if FUSED and n_rounds > 10**9:"},
        # the other's keys are written over while they are read
        {"        mbarrier.wait(read.index(0), 0)\n": ""},
        # the buffer is written to while it is copied
        {"    tma.store_wait(0)  # the last one": "    # the last one"},
        # the same half twice
        {"k.slice(CID * ROWS, ROWS, dim=1)": "k.slice(0, ROWS, dim=1)"},
        # the heads of a group are one head
        {"square = ((b * H + g * R + r) * tiles": "square = ((b * H + g * R) * tiles"},
    ],
    ids=["unwaited", "one slot", "not zero", "last", "keys gone", "buffer", "half of columns", "one head"],
)
def test_the_interpreter_notices_what_is_wrong_with_dq(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    source = gluon.SOURCE.with_name("backward_dkdv.py")
    found = gluon.text(source)
    for was, becomes in changes.items():
        assert was in found
        found = found.replace(was, becomes)
    texts = {x: gluon.text(x) for x in (gluon.SOURCE, *gluon.BACKWARD)} | {source: found}
    monkeypatch.setattr(gluon, "text", texts.__getitem__)

    def several() -> None:
        for seed in range(6):
            run(monkeypatch, WIDE, (1, 500, 500, 2, 1, 128, 128), kernels=("fused",), seed=seed)

    with pytest.raises((AssertionError, RuntimeError)):
        several()


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize(
    "spec",
    [CAUSAL, AttentionSpec(causal=True, documents=True), AttentionSpec(causal=True, alibi=True, softcap=3.0)],
    ids=["causal", "documents", "curved"],
)
def test_the_tiles_that_ship_compute_gradients(monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, D: int) -> None:
    tiles, shape = choose_backward(D, curved=spec.alibi, documents=spec.documents), (1, 500, 500, 2, 1, D, D)
    run(
        monkeypatch, spec, shape, queries=tiles.queries, stages=tiles.query_stages, owners=tiles.owners,
        kernels=("dkdv",),
    )  # fmt: skip
    run(monkeypatch, spec, shape, keys=tiles.keys, stages=tiles.key_stages, kernels=("dq",))


@pytest.mark.parametrize(
    ("name", "loudness"),
    [
        ("odd lengths in groups", 1.0),
        ("odd lengths in groups", 2.0**9),
        ("more keys, padded", 2.0**-10),
        ("documents", 2.0**9),
        ("alibi", 2.0**-10),
        ("all at once", 1.0),
    ],
)
@pytest.mark.parametrize("owners", [1, 2])
def test_in_fp16_gradients_keep_to_the_budget(
    monkeypatch: pytest.MonkeyPatch, owners: int, name: str, loudness: float
) -> None:
    """Weights and their gradients are rounded to fp16 where the kernels do so; nothing is scaled for it, as nothing is
    in the plain softmax that sets the budget."""
    spec, shape = CASES[name]
    run(monkeypatch, spec, shape, owners=owners, dtype=torch.float16, loudness=loudness, documents=True)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        # a slot is given away before the product that reads it
        (
            "            dv, p_half, dk, ds_half = warpgroup_mma_wait(0, deps=(dv, p_half, dk, ds_half))\n",
            "            mbarrier.arrive(empty.index(stage), count=1)\n"
            "            dv, p_half, dk, ds_half = warpgroup_mma_wait(0, deps=(dv, p_half, dk, ds_half))\n",
        ),
        (
            "        dq, ds_half = warpgroup_mma_wait(0, deps=(dq, ds_half))\n"
            "        mbarrier.arrive(empty.index(stage), count=1)\n",
            "        mbarrier.arrive(empty.index(stage), count=1)\n"
            "        dq, ds_half = warpgroup_mma_wait(0, deps=(dq, ds_half))\n",
        ),
        # nobody gives a slot back
        ("(dv, p_half))\n        mbarrier.arrive(empty.index(stage), count=1)\n", "(dv, p_half))\n"),
        ("(dq, ds_half))\n        mbarrier.arrive(empty.index(stage), count=1)\n", "(dq, ds_half))\n"),
        # keys, values and queries are never waited for
        ("    mbarrier.wait(kv_full.index(OWN), 0)\n", ""),
        ("    mbarrier.wait(q_full.index(CID), 0)\n", ""),
        # no mask
        ("s = unseen(", "unseen("),
        ("s = hidden(", "hidden("),
        # the heads of a group are one head
        ("        if it == n:\n", "        if it < 0:\n"),
        ("        h = g * R + r\n", "        h = g * R\n"),
        # the heads of a chunk are the first one's
        ("return tile, begin + at % size", "return tile, begin"),
    ],
    ids=[
        "queries early", "keys early", "queries kept", "keys kept", "keys unwaited", "queries unwaited",
        "no mask of keys", "no mask of rows", "one round", "one head", "no heads",
    ],
)  # fmt: skip
def test_the_interpreter_notices(monkeypatch: pytest.MonkeyPatch, was: str, becomes: str) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    texts = {source: gluon.text(source) for source in gluon.BACKWARD}
    assert any(was in text for text in texts.values())
    broken = {gluon.SOURCE: gluon.text(gluon.SOURCE)} | {x: text.replace(was, becomes) for x, text in texts.items()}
    monkeypatch.setattr(gluon, "text", broken.__getitem__)

    def several() -> None:
        for seed in range(4):
            run(monkeypatch, WIDE, (1, 700, 700, 2, 1, 64, 64), keys=64, seed=seed)

    with pytest.raises((AssertionError, RuntimeError)):
        several()


FAR = AttentionSpec(causal=True, documents=True, window=Window(left=20), alibi=True, sink_tokens=60, global_tokens=True)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        # of the kernel of dq: keys that may be seen from everywhere
        ("            s = beyond(", "            beyond("),
        ("                k_pos = far_places(", "                far_places("),
        ("        n += far_tiles(N_ALWAYS, b, N)\n", "        n += 0\n"),
        # of the kernel of dk and dv: queries that may see everything
        ("            s = unpermitted(", "            unpermitted("),
        ("                rows = far_places(", "                far_places("),
        ("FAR_DOC + b * T + begin + cols", "FAR_DOC + b * T + begin + 0 * cols"),
        (">= seen_from[:, None]", ">= -seen_from[:, None]"),
        ("far_stats + far_rounded + far,", "far_stats + far,"),
        ("        far_stats = (b * H + h) * 2 * far_rounded\n", "        far_stats = b * H * 2 * far_rounded\n"),
        ("        n += far_tiles(N_FAR_ROWS, b, M)\n", "        n += 0\n"),
    ],
    ids=[
        "mask of keys",
        "positions",
        "tiles of keys",
        "mask of rows",
        "places",
        "documents",
        "causality",
        "delta",
        "head",
        "tiles of rows",
    ],
)
def test_the_interpreter_notices_what_is_wrong_with_global_tokens(
    monkeypatch: pytest.MonkeyPatch, was: str, becomes: str
) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    texts = {source: gluon.text(source) for source in gluon.BACKWARD}
    assert sum(text.count(was) for text in texts.values()) == 1
    broken = {gluon.SOURCE: gluon.text(gluon.SOURCE)} | {x: text.replace(was, becomes) for x, text in texts.items()}
    monkeypatch.setattr(gluon, "text", broken.__getitem__)
    with pytest.raises((AssertionError, RuntimeError, RuntimeWarning)):
        run(monkeypatch, FAR, (2, 400, 400, 2, 1, 64, 64), keys=64, documents=True)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        # gradients take the place of keys and values that the other consumer still reads
        ("        mbarrier.wait(read.index(0), 0)\n", ""),
        # nobody says that they have been read
        ("        mbarrier.arrive(read.index(0), count=1)\n", ""),
        # a slot is given away before the product that reads it
        (
            "            dk, ds_half = warpgroup_mma_wait(0, deps=(dk, ds_half))\n",
            "            mbarrier.arrive(empty.index(stage), count=1)\n"
            "            dk, ds_half = warpgroup_mma_wait(0, deps=(dk, ds_half))\n",
        ),
        (
            "            dv, p_half = warpgroup_mma_wait(0, deps=(dv, p_half))\n",
            "            mbarrier.arrive(empty.index(stage), count=1)\n"
            "            dv, p_half = warpgroup_mma_wait(0, deps=(dv, p_half))\n",
        ),
        # spans are taken for those of ROWS keys
        ("* ((n_tiles + CONSUMERS - 1) // CONSUMERS) + tile // CONSUMERS", "* n_tiles + tile"),
        ("* ((n_tiles + CONSUMERS - 1) // CONSUMERS) + tile", "* (n_tiles // CONSUMERS) + tile"),
        # a tile has the keys of two
        ("tile * OWNERS + OWN", "tile * CONSUMERS + OWN"),
    ],
    ids=["early", "unsaid", "queries early to dk", "queries early to dv", "spans", "spans of a batch", "keys"],
)
def test_the_interpreter_notices_about_shared_keys(monkeypatch: pytest.MonkeyPatch, was: str, becomes: str) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    texts = {source: gluon.text(source) for source in (gluon.SOURCE, *gluon.BACKWARD)}
    assert any(was in text for text in texts.values())
    broken = {source: text.replace(was, becomes) for source, text in texts.items()}
    monkeypatch.setattr(gluon, "text", broken.__getitem__)

    def several() -> None:
        for seed in range(8):
            spec = AttentionSpec(causal=True, documents=True)
            run(
                monkeypatch, spec, (2, 700, 700, 2, 1, 64, 64), owners=1, documents=True, seed=seed, kernels=("dkdv",)
            )  # fmt: skip

    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        several()


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_a_processor(head_dim: int, curved: bool, documents: bool) -> None:
    tiles = choose_backward(head_dim, curved=curved, documents=documents)
    threads = 3 * 128
    assert tiles.compiled_registers * threads <= 65_536
    assert 2 * 128 * tiles.registers + 128 * 24 <= 65_536
    assert tiles.owners == 1 or head_dim <= 128  # 2 · 256 accumulators of 64 keys are more than a consumer's registers
    assert tiles.query_stages >= 2  # with one a consumer would wait for a tile that it leaves no room for
    assert tiles.rows % tiles.queries == 0  # the statistics of rows are rounded up to `rows`
    for owned, columns, stages in (
        (tiles.owners * ROWS, tiles.queries, tiles.query_stages),
        (tiles.rows, tiles.keys, tiles.key_stages),
    ):
        row = 2 * head_dim
        assert 2 * row * (owned + stages * columns) + 8 * stages * columns + 1024 <= 232_448


def test_the_operator_hands_on_what_the_kernels_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    from longspan.kernels.attention.hopper import operator

    q, k, v, out, *rest = (torch.zeros(1, 8, 2, 64) for _ in range(18))
    sinks = torch.zeros(2, dtype=torch.bfloat16)
    inputs = (q, k, v, None, sinks, *rest, 16, 32, "spec")
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: setattr(ctx, "saved_tensors", tensors))
    operator._save(ctx, inputs, (out, torch.zeros(1, 2, 8)))
    named = dict(zip(signature(operator.forward).parameters, inputs, strict=True)) | {"out": out}
    d_out, d_lse = torch.ones(1), torch.ones(2)
    gradients = tuple(torch.full((1,), float(i)) for i in range(5))

    def backward(*given: object) -> tuple[Tensor, ...]:
        found = dict(zip(signature(operator.backward).parameters, given, strict=True))
        assert found.pop("d_out") is d_out
        assert found.pop("d_lse") is d_lse
        assert found.pop("lse") is ctx.saved_tensors[1]
        assert all(x is named[name] for name, x in found.items())
        return gradients

    found = operator._gradients(backward, ctx.saved_tensors, ctx.rest, d_out, d_lse)
    dq, dk, dv, d_slopes, d_sinks = found
    assert (dq, dk, dv, d_slopes) == (*gradients[:3], None)
    assert d_sinks is not None
    assert d_sinks.dtype == torch.bfloat16
    assert d_sinks.item() == 4
    monkeypatch.setattr(operator, "_backward_op", backward)
    assert len(operator._traced_gradients(ctx, d_out, d_lse)) == len(inputs)
