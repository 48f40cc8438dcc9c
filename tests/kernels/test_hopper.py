"""The `hopper` backend without a GPU: the kernel's own text in NumPy, and the pure functions around it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    BlockLayout,
    UnsupportedAttention,
    Window,
    attend,
    available,
)
from longspan.kernels.attention.backend import Feature
from longspan.kernels.attention.hopper import backend as hopper
from longspan.kernels.attention.hopper.gathered import gathered, outside_of_windows
from longspan.kernels.attention.hopper.order import schedule, visits
from longspan.kernels.attention.hopper.tiles import (
    BACKWARD_L2_BYTES,
    HEAD_DIMS,
    ROWS,
    BackwardTiles,
    choose,
    heads_at_a_time,
    padded,
)
from longspan.kernels.attention.plan import make_plan
from longspan.kernels.attention.registry import get

# Tests are not a package, so a file beside this one is loaded by its path.
_file = importlib.util.spec_from_file_location("interpreted_gluon", Path(__file__).with_name("interpreted_gluon.py"))
assert _file is not None
assert _file.loader is not None
gluon = importlib.util.module_from_spec(_file)
_file.loader.exec_module(gluon)

CAUSAL, FULL = AttentionSpec(causal=True), AttentionSpec(causal=False)
N = 128
WIDE = AttentionSpec(causal=True, window=Window(left=300))


# -- the kernel's text -------------------------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch,
    spec: AttentionSpec,
    shape: tuple[int, ...],
    *,
    consumers: int = 2,
    columns: int = N,
    stages: int = 2,
    slots: int = 2,
    halves: bool = False,
    programs: int = 3,
    documents: bool = False,
    seed: int = 0,
) -> None:
    """One call of `shape` (B, T, S, H, G, D, E) by the interpreted kernel, compared with the reference in fp64."""
    B, T, S, H, G, D, E = shape
    generator = np.random.default_rng(seed)

    def normal(*sizes: int) -> np.ndarray:
        return generator.standard_normal(sizes).astype(np.float32)

    q, k, v = normal(B, T, H, D), normal(B, S, G, D), normal(B, S, G, E)
    out, lse = np.full((B, T, H, E), np.nan, np.float32), np.full(B * H * T, np.nan, np.float32)
    slopes, sinks = generator.random(H).astype(np.float32), normal(H)
    context = gluon.context_of(spec, shape, generator, sorted_ids=documents)
    plan = make_plan(context, spec, T, S, torch.device("cpu"))
    masks = hopper.masks_of(plan, spec, T, S, consumers * ROWS)
    q_doc, k_doc, spans, _, _, always, n_always, outside, always_doc, *_, most_always, _ = masks
    keys = gathered(torch.from_numpy(k), torch.from_numpy(v), always, n_always, most_always, outside, always_doc)
    far = (None,) * 6 if keys is None else keys.tensors
    n_tiles = -(-T // (consumers * ROWS))
    programs = min(programs, n_tiles * B * H)
    order = schedule(spec, T, S, B * H, max(1, H // 2), programs, consumers * ROWS, columns, -(-most_always // columns))
    machine = gluon.Machine(programs, seed)
    window = spec.window
    gluon.kernel(monkeypatch, machine)(
        gluon.Descriptor(q, ROWS, padded(D)),
        gluon.Descriptor(k, columns, padded(D)),
        gluon.Descriptor(v, columns, padded(E)),
        gluon.Descriptor(out, ROWS, padded(E)),
        gluon.Pointer(lse),
        gluon.Pointer(order.reshape(-1)),
        *(gluon.pointer(x, B) for x in (spans, q_doc, k_doc)),
        gluon.Pointer(slopes),
        gluon.Pointer(sinks),
        *(None if x is None else gluon.Descriptor(x.numpy(), columns, padded(x.shape[3])) for x in far[:2]),
        *(gluon.pointer(x, B) for x in far[2:]),
        *map(gluon.Int, (T, S, H, H // G)),
        spec.softmax_scale(D),
        spec.softcap or 1.0,
        *map(gluon.Int, (window.left or 0, window.right or 0, n_tiles, order.shape[1])),
        *(consumers, columns, padded(D), padded(E), slots, stages, 240),
        *(spec.causal, window.left is not None, window.right is not None and not spec.causal),
        *(spec.documents, spec.softcap is not None, spec.alibi, spec.learned_sink, halves),
    )
    true = attend(
        *(torch.from_numpy(x).double() for x in (q, k, v)),
        spec=spec,
        context=context,
        params=AttentionParams(alibi_slopes=torch.from_numpy(slopes), sink_logits=torch.from_numpy(sinks)),
        backend="reference",
        return_lse=True,
    )
    assert true.lse is not None
    ordinary = np.ones((B, T), bool) if plan.is_global is None else plan.is_global.numpy() == 0  # others are dense.py's
    np.testing.assert_allclose(out[ordinary], true.out.numpy()[ordinary], atol=5e-6)
    found, expected = (x.transpose(0, 2, 1)[ordinary] for x in (lse.reshape(B, H, T), true.lse.numpy()))
    np.testing.assert_allclose(found, expected, atol=5e-6)


CASES = {
    "one tile": (CAUSAL, (1, 64, 64, 1, 1, 64, 64)),
    "odd lengths in groups": (CAUSAL, (2, 301, 301, 4, 2, 64, 64)),
    "more keys, padded": (CAUSAL, (1, 130, 700, 2, 1, 40, 64)),
    "rows that see nothing": (CAUSAL, (1, 400, 90, 2, 2, 64, 128)),
    "full": (FULL, (1, 200, 450, 2, 1, 128, 64)),
    "two-sided window": (AttentionSpec(causal=False, window=Window(70, 9)), (1, 500, 450, 2, 1, 64, 64)),
    "one-sided window": (AttentionSpec(causal=False, window=Window(right=130)), (1, 300, 300, 1, 1, 64, 64)),
    "causal window": (AttentionSpec(causal=True, window=Window(left=129)), (1, 600, 600, 2, 1, 64, 64)),
    "documents": (AttentionSpec(causal=True, documents=True), (2, 500, 500, 2, 1, 64, 64)),
    "documents in a window": (
        AttentionSpec(causal=False, documents=True, window=Window.symmetric(100)),
        (2, 300, 420, 2, 1, 64, 64),
    ),
    "sinks": (AttentionSpec(causal=True, window=Window(left=129), sink_tokens=5), (2, 400, 400, 4, 2, 64, 64)),
    "sinks in two tiles": (
        AttentionSpec(causal=True, window=Window(left=20), sink_tokens=200),
        (1, 500, 500, 1, 1, 64, 64),
    ),
    "sinks of documents": (
        AttentionSpec(causal=True, documents=True, window=Window(left=40), sink_tokens=3),
        (2, 300, 301, 2, 1, 64, 64),
    ),
    "sinks, rows before the first key": (
        AttentionSpec(causal=False, window=Window(30, 0), sink_tokens=2),
        (1, 300, 100, 2, 1, 64, 64),
    ),
    "globals": (
        AttentionSpec(causal=False, window=Window.symmetric(50), global_tokens=True),
        (3, 301, 301, 2, 1, 64, 64),
    ),
    "causal globals": (
        AttentionSpec(causal=True, window=Window(left=60), global_tokens=True, sink_tokens=2),
        (2, 400, 400, 2, 1, 64, 64),
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
        (2, 500, 500, 2, 1, 64, 64),
    ),
    "all at once": (
        AttentionSpec(causal=True, documents=True, window=Window(left=200), alibi=True, softcap=3.0, learned_sink=True),
        (1, 500, 500, 2, 1, 64, 64),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_text_computes_attention(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, shape = CASES[name]
    for seed, (consumers, stages, halves) in enumerate(((2, 2, False), (2, 2, True), (3, 4, True), (2, 3, False))):
        run(
            monkeypatch, spec, shape, consumers=consumers, stages=stages, halves=halves, documents=seed == 0,
            seed=seed,
        )  # fmt: skip


# Wider than 128, of which the larger decides about the tiles: the queries' place is single, and the output's where both
# are as wide.
WIDE_HEADS = {
    "odd lengths in groups": (CAUSAL, (2, 301, 301, 4, 2, 256, 256)),
    "padded": (FULL, (1, 200, 330, 2, 1, 136, 136)),
    "rows that see nothing": (CAUSAL, (1, 400, 90, 2, 2, 192, 256)),
    "narrower values": (CAUSAL, (1, 290, 350, 2, 1, 192, 128)),
    "wider values": (AttentionSpec(causal=False, window=Window(70, 9)), (1, 400, 350, 2, 1, 64, 256)),
    "causal window": (AttentionSpec(causal=True, window=Window(left=129)), (1, 500, 500, 2, 1, 192, 192)),
    "documents": (AttentionSpec(causal=True, documents=True), (2, 400, 400, 2, 1, 256, 256)),
    "globals": (
        AttentionSpec(causal=False, window=Window.symmetric(40), global_tokens=True),
        (1, 300, 330, 2, 1, 256, 192),
    ),
    "all at once": (CASES["all at once"][0], (1, 400, 400, 2, 1, 256, 256)),
}


@pytest.mark.parametrize("name", WIDE_HEADS)
def test_the_tiles_that_ship_for_wide_heads_compute_attention(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    spec, shape = WIDE_HEADS[name]
    tiles = choose(max(shape[5:]), edges=spec.documents or spec.window.left is not None)
    assert tiles.slots == 1
    for seed in range(2):
        run(
            monkeypatch, spec, shape, consumers=tiles.consumers, columns=tiles.columns, stages=tiles.stages,
            slots=tiles.slots, programs=3 - seed, documents=seed == 0, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        # a slot is given away before the values in it are multiplied
        {
            "            mbarrier.arrive(empty.index(stage), count=1)\n": "",
            "            acc, p_half = warpgroup_mma_wait(0, deps=(acc, p_half))\n":
            "            mbarrier.arrive(empty.index(stage), count=1)\n"
            "            acc, p_half = warpgroup_mma_wait(0, deps=(acc, p_half))\n",
        },
        # the next item's queries are never waited for
        {"        mbarrier.wait(q_full.index(slot), (turn >> (SLOTS - 1)) & 1)\n": ""},
        # nobody gives the queries' slot back
        {"            mbarrier.arrive(q_empty.index(slot), count=1)\n": "            pass\n"},
        # nor that of an item's first keys, and of the last one's last values
        {"        mbarrier.arrive(empty.index(at % STAGES), count=1)\n": ""},
        # the last item's last values are others
        {"\n    copy_tile(desc_v, desc_far_v, last_b, last_key,": "\n    copy_tile(desc_v, desc_far_v, last_b, 0,"},
        # the sums are not rescaled
        {"            acc = acc * gl.convert_layout(shrink, out_rows)[:, None]\n": ""},
        # no mask
        {"            if it < n_partial:\n": "            if it < 0:\n"},
        # the right half has no sums
        {"total += gl.convert_layout(lane_sums(rest,": "gl.convert_layout(lane_sums(rest,"},
        # weighs half as much
        {"rest = gl.exp2(rest)": "rest = gl.exp2(rest - 1.0)"},
        # it is taken for the left one
        {"p = joined(p, rest, N, s_layout)": "p = joined(rest, p, N, s_layout)"},
    ],
    ids=[
        "values early", "queries unwaited", "queries kept", "keys kept", "last values", "no rescaling", "no mask",
        "half the sums", "half the weights", "halves swapped",
    ],
)  # fmt: skip
@pytest.mark.parametrize("slots", [1, 2])
def test_the_interpreter_notices(monkeypatch: pytest.MonkeyPatch, slots: int, changes: dict[str, str]) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    text = gluon.SOURCE.read_text(encoding="utf-8")
    for was, becomes in changes.items():
        assert was in text
        text = text.replace(was, becomes)
    monkeypatch.setattr(gluon, "text", lambda _: text)

    def several() -> None:
        for seed in range(5):
            run(
                monkeypatch, WIDE, (1, 900, 900, 2, 1, 64, 64), halves=bool(seed % 2), stages=2 + seed % 2, slots=slots,
                seed=seed,
            )  # fmt: skip

    with pytest.raises((AssertionError, RuntimeError)):
        several()


FAR = AttentionSpec(causal=False, documents=True, window=Window(20, 30), alibi=True, sink_tokens=60, global_tokens=True)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("if desc_far is None or far < 0:", "if desc_far is None or far < 2**30:"),
        ("    return (gl.load(N_FAR + b) + N - 1) // N\n", "    return gl.load(N_FAR + b) // N\n"),
        # what lies in the window counts twice
        ("ok = cols[None, :] < (gl.load(OUTSIDE", "ok = cols[None, :] < (S + gl.load(OUTSIDE"),
        # behind it nothing is seen, or too much
        ("    if HAS_RIGHT:\n        after", "    if not HAS_RIGHT:\n        after"),
        ("(cols < gl.load(N_FAR + b) - begin)", "(cols < S)"),
        ("        k_doc = gl.load(FAR_DOC + b * S + begin + cols", "        k_doc = gl.load(FAR_DOC + b * S + cols"),
        ("                    k_pos = far_places(", "                    far_places("),
    ],
    ids=["near for far", "tiles", "window", "right", "too many", "documents", "positions"],
)
def test_the_interpreter_notices_what_is_wrong_with_keys_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, was: str, becomes: str
) -> None:
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    text = gluon.SOURCE.read_text(encoding="utf-8")
    assert text.count(was) == 1
    monkeypatch.setattr(gluon, "text", lambda _: text.replace(was, becomes))

    def several() -> None:
        for seed in range(2):
            spec = replace(FAR, alibi=seed == 0)
            run(monkeypatch, spec, (2, 400, 400, 1, 1, 64, 64), documents=True, seed=seed)

    with pytest.raises((AssertionError, RuntimeError)):
        several()


@pytest.mark.parametrize(
    ("was", "becomes", "shape"),
    [
        # queries come before the last have been read
        (
            "        mbarrier.wait(q_empty.index(slot), ((turn >> (SLOTS - 1)) & 1) ^ 1)\n",
            "",
            (1, 900, 900, 2, 1, 64, 64),
        ),
        (
            "        mbarrier.wait(q_empty.index(slot), ((turn >> (SLOTS - 1)) & 1) ^ 1)\n",
            "",
            (1, 900, 900, 2, 1, 64, 128),
        ),
        # queries come before the rows have left
        (
            "            tma.store_wait(0)\n            mbarrier.arrive(q_empty.index(slot), count=1)\n",
            "            mbarrier.arrive(q_empty.index(slot), count=1)\n",
            (1, 900, 900, 2, 1, 64, 64),
        ),
    ],
    ids=["queries early", "queries early, rows elsewhere", "queries among rows"],
)
def test_the_interpreter_notices_about_a_single_place(
    monkeypatch: pytest.MonkeyPatch, was: str, becomes: str, shape: tuple[int, ...]
) -> None:
    text = gluon.SOURCE.read_text(encoding="utf-8")
    assert was in text
    monkeypatch.setattr(gluon, "PATIENCE", 0.5)
    monkeypatch.setattr(gluon, "text", lambda _: text.replace(was, becomes))

    def several() -> None:
        for seed in range(5):
            run(monkeypatch, WIDE, shape, slots=1, seed=seed)

    with pytest.raises((AssertionError, RuntimeError)):
        several()


def test_whole_calls_with_global_tokens_agree_with_fp64() -> None:
    """The launches, the kernels here and the dense ones together, gradients included."""
    pytest.importorskip("triton.experimental.gluon")
    file = Path(__file__).with_name("interpreted_hopper.py")
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "6 calls agree" in done.stdout


# -- who works on what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [CAUSAL, FULL, AttentionSpec(causal=True, window=Window(left=300))])
@pytest.mark.parametrize(("T", "heads", "group", "programs"), [(1000, 6, 2, 5), (4096, 64, 16, 132), (130, 1, 1, 2)])
def test_every_item_is_done_once_and_nobody_waits_long(
    spec: AttentionSpec, T: int, heads: int, group: int, programs: int
) -> None:
    order = schedule(spec, T, T, heads, group, programs, 128, N)
    lengths = visits(spec, T, T, 128, N)
    items = [row[1 : 1 + row[0]] for row in order]
    assert sorted(np.concatenate(items)) == list(range(heads * len(lengths)))
    assert min(map(len, items)) > 0  # a program begins with the product of its first item
    loads = [sum(lengths[item % len(lengths)] + 1 for item in mine) for mine in items]
    assert max(loads) - min(loads) <= max(lengths) + 1
    for mine in items:  # of a group of heads the longest first
        groups = [item // len(lengths) // group for item in mine]
        assert groups == sorted(groups)
        for _, same in itertools.groupby(mine, key=lambda item: item // len(lengths) // group):
            costs = [lengths[item % len(lengths)] for item in same]
            assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize(
    ("T", "length", "group", "better"),
    [(65_536, 2048, 1, 0.85), (16_384, 4096, 4, 0.85), (16_384, 512, 4, 0.85), (16_384, 16_384, 4, None)],
)
def test_documents_are_shared_out_evenly_without_being_known(
    T: int, length: int, group: int, better: float | None
) -> None:
    """What the busiest program has beyond its share: over eight draws less than if all were one document."""
    heads, programs, n_tiles = 16, 132, T // 128

    def beyond(documents: bool, first_tile: np.ndarray) -> float:
        spec = AttentionSpec(causal=True, documents=documents)
        items = [row[1 : 1 + row[0]] for row in schedule(spec, T, T, heads, group, programs, 128, N)]
        assert sorted(np.concatenate(items)) == list(range(heads * n_tiles))
        costs = np.arange(n_tiles) - first_tile + 2
        loads = np.array([costs[mine % n_tiles].sum() for mine in items])
        return float(loads.max() / loads.mean() - 1)

    if better is None:
        assert beyond(True, np.zeros(n_tiles, int)) < 0.12
        return
    found = []
    for seed, spread in itertools.product(range(4), ("even", "exponential")):
        random, n = np.random.default_rng(seed), 8 * T // length
        even = spread == "even"
        drawn = random.integers(length // 2, 3 * length // 2 + 1, n) if even else random.exponential(length, n) + 16
        starts = np.concatenate([[0], np.cumsum(drawn.astype(int))])
        first_tile = starts[np.searchsorted(starts, np.arange(0, T, 128), side="right") - 1] // N
        found.append((beyond(True, first_tile), beyond(False, first_tile)))
    ours, theirs = np.mean(found, axis=0)
    assert ours < better * theirs
    assert ours < 0.25


@pytest.mark.parametrize(("T", "S"), [(500, 500), (100, 700), (700, 100)])
def test_visits_are_the_tiles_in_which_somebody_sees_something(T: int, S: int) -> None:
    for spec in (
        CAUSAL,
        FULL,
        AttentionSpec(causal=True, window=Window(left=127)),
        AttentionSpec(causal=False, window=Window(5, 130)),
    ):
        seen = AttentionContext().allowed(spec, slice(0, T), slice(0, S), lengths=(T, S))[0].numpy()
        for tile, n in enumerate(visits(spec, T, S, 128, N)):
            columns = np.flatnonzero(seen[tile * 128 : (tile + 1) * 128].any(axis=0))
            assert n == (columns[-1] // N - columns[0] // N + 1 if len(columns) else 1)


def test_heads_at_a_time_share_the_cache() -> None:
    assert heads_at_a_time(16, 1, 1024, 256) == 16
    assert heads_at_a_time(64, 1, 16_384, 256) == 4
    assert heads_at_a_time(64, 8, 16_384, 256) == 32
    assert heads_at_a_time(8, 4, 2**20, 256) == 4
    assert heads_at_a_time(16, 1, 16_384, 256, BACKWARD_L2_BYTES) == 1
    assert heads_at_a_time(64, 4, 4096, 256, BACKWARD_L2_BYTES) == 16


# -- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136, 192, 256])
def test_tiles_fit_a_processor(head_dim: int, edges: bool) -> None:
    tiles = choose(head_dim, edges=edges)
    threads = (tiles.consumers + 1) * 128
    assert tiles.compiled_registers * threads <= 65_536
    assert tiles.consumers * 128 * tiles.registers + 128 * 24 <= 65_536
    width = padded(head_dim)
    assert width in HEAD_DIMS
    assert width >= head_dim
    for other in HEAD_DIMS[: HEAD_DIMS.index(width) + 1]:
        for D, E in ((width, other), (other, width)):
            out = 0 if tiles.slots == 1 and D == E else tiles.rows * E
            shared = 2 * (tiles.slots * tiles.rows * D + tiles.stages * tiles.columns * (D + E) + out)
            assert shared + 1024 <= 232_448


def test_a_head_dim_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim=264: .* up to 256"):
        choose(264)


def test_spans_of_tiles_bound_the_spans_of_their_rows() -> None:
    spans = torch.randint(0, 50, (2, 130, 4), dtype=torch.int32)
    tiles = hopper.spans_of_tiles(spans, 64)
    assert tiles.shape == (2, 3, 4)
    for i, part in enumerate(spans.split(64, dim=1)):
        expected = (part[..., 0].amin(1), part[..., 1].amax(1), part[..., 2].amin(1), part[..., 3].amax(1))
        assert torch.equal(tiles[:, i], torch.stack(expected, dim=-1))


def test_spans_of_tiles_are_derived_once_for_a_context() -> None:
    spec, ids = AttentionSpec(causal=True, documents=True), torch.arange(300)[None] // 70
    context, cpu = AttentionContext(q_documents=ids, kv_documents=ids), torch.device("cpu")
    plan = make_plan(context, spec, 300, 300, cpu)
    assert plan.q_span is not None
    assert plan.k_span is not None
    found = hopper._masks(context, spec, 300, 300, cpu, 192)
    of_rows = ((plan.q_span, 192), (plan.q_span, BackwardTiles.rows), (plan.k_span, BackwardTiles.rows))
    expected = (plan.q_doc, plan.k_doc, *(hopper.spans_of_tiles(x, rows) for x, rows in of_rows))
    for x, y in zip(found, expected):
        assert isinstance(x, torch.Tensor)
        assert y is not None
        assert torch.equal(x, y)
    assert found[5:] == (*(None,) * 9, 0, 0)
    assert hopper._masks(context, spec, 300, 300, cpu, 192) is found
    _, _, spans, *_ = hopper._masks(context, spec, 300, 300, cpu, BackwardTiles.rows)
    assert isinstance(spans, torch.Tensor)
    assert spans.shape[1] == 3


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(causal=True, window=Window(left=5), sink_tokens=3, documents=True),
        AttentionSpec(causal=False, window=Window(4, 2), sink_tokens=20),
        AttentionSpec(causal=False, window=Window(right=3), global_tokens=True),
        AttentionSpec(causal=True, window=Window(left=0), global_tokens=True, sink_tokens=2),
    ],
)
@pytest.mark.parametrize(("T", "S"), [(40, 40), (20, 50), (50, 20)])
def test_what_lies_outside_of_a_window_is_told_by_numbers(spec: AttentionSpec, T: int, S: int) -> None:
    generator = np.random.default_rng(T)
    context = gluon.context_of(spec, (3, T, S), generator, sorted_ids=False)
    plan = make_plan(context, spec, T, S, torch.device("cpu"))
    outside = outside_of_windows(plan, spec, T, S)
    assert outside is not None
    assert plan.always is not None
    assert plan.n_always is not None
    at, pos = torch.arange(S), torch.arange(T) + S - T
    for index, count, bounds in zip(plan.always, plan.n_always, outside, strict=True):
        found = ((at < bounds[:, :1]) | (at >= bounds[:, 1:])) & (at < count)
        left, right = spec.window.span
        expected = torch.zeros(T, S, dtype=torch.bool)
        if left is not None:
            expected |= index < pos[:, None] - left
        if right is not None and not spec.causal:
            expected |= index > pos[:, None] + right
        assert torch.equal(found, expected & (at < count))
    assert outside_of_windows(make_plan(context, FULL, T, S, torch.device("cpu")), FULL, T, S) is None


def test_tiles_that_all_items_share_count_for_the_order() -> None:
    order = schedule(WIDE, 1000, 1000, 4, 4, 3, 128, N, 50)  # so long that items weigh nearly the same
    assert {row[0] for row in order} == {10, 11}


# -- the backend -------------------------------------------------------------------------------------------------------


def test_off_hopper_it_refuses_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hopper" in available()
    call = AttentionCall(device="cuda", dtype=torch.bfloat16, head_dim=128)
    for found, words in (((8, 0), "device=cuda of capability 8.0 (9.0 only)"), (None, "torch sees no GPU")):
        monkeypatch.setattr(hopper, "oldest_capability", lambda found=found: found)
        assert words in " ".join(map(str, hopper.Hopper().unsupported(CAUSAL, call)))
    monkeypatch.setattr(hopper, "oldest_capability", lambda: (9, 0))
    monkeypatch.setattr(hopper, "_missing", lambda: "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert hopper.Hopper().unsupported(CAUSAL, call) == ()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in str(hopper.Hopper().unsupported(CAUSAL, call)[0])
    monkeypatch.setattr(hopper, "_missing", lambda: "this triton has no Gluon")
    assert "no Gluon" in str(hopper.Hopper().unsupported(CAUSAL, call)[0])
    q = torch.zeros(1, 4, 2, 64)
    with pytest.raises(UnsupportedAttention, match="device=cpu"):
        attend(q, q, q, spec=CAUSAL, backend="hopper")


@pytest.mark.parametrize(
    ("spec", "feature"),
    [
        (AttentionSpec(causal=True, dropout=0.1), Feature.DROPOUT),
        (AttentionSpec(causal=True, window=Window(left=4, dilation=2)), Feature.DILATION),
        (AttentionSpec(causal=True, block_sparse=BlockLayout.from_rows([[True]])), Feature.BLOCK_SPARSE),
    ],
)
def test_what_it_lacks_is_refused_by_name(spec: AttentionSpec, feature: Feature) -> None:
    call = AttentionCall(device="cuda", dtype=torch.bfloat16, head_dim=64)
    assert any(str(reason).startswith(feature) for reason in get("hopper").unsupported(spec, call))


def test_it_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from longspan.kernels.attention import registry\n"
        "from longspan.kernels.attention.hopper import backend, order, tiles\n"
        "print(registry.get('hopper').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "hopper", done.stderr
