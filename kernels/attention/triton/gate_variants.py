"""What the compile gate compiles: calls of attention, and the kernels that `launch` would start for them.

Nothing about tiles or flags is repeated here. A call is made with meta tensors through `launch.forward` and
`launch.backward` while Triton believes in a GPU of the wanted architecture; Triton's own hook, which it calls before it
compiles, tells what would have been compiled, and refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ..context import AttentionContext
from ..hopper.tiles import BackwardTiles
from ..plan import Plan, make_plan
from ..spec import AttentionSpec, BlockLayout, Window
from . import gate_decode
from .gate_decode import DECODING, DecodeCase

B, T, H = 2, 4096, 16
ARCHS = (80, 90)  # compute capabilities without the dot
WALKS = ("forward", "dq", "dkdv")  # the kernels of ordinary rows
FUSED = "fused"  # dk and dv with dq on the way: `dkdv` of the hopper backend where it is worth it
DENSE = ("global_rows", "global_rows_dq", "always_keys_dkdv")  # tiles of global rows and always-visible keys
JOINS = ("merge_rows", "sum_rows", "join_splits", "stats", "round")  # rows by themselves, no products


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call, of B = 2, T = S = 4,096 and 16 query heads, and which of its kernels are compiled.

    group      query heads that share a key/value head
    n_globals  global tokens, the first of the sequence, where the spec has them
    ragged     explicit positions and lengths, as left and right padding give
    quick      compiled by the tests that run by default
    hopper     by the `hopper` backend, on sm_90 only
    """

    name: str
    spec: AttentionSpec
    head_dim: int
    kernels: tuple[str, ...] = WALKS
    dtype: torch.dtype = torch.bfloat16
    group: int = 1
    n_globals: int = 16
    ragged: bool = False
    quick: bool = False
    hopper: bool = False

    @property
    def archs(self) -> tuple[int, ...]:
        return (90,) if self.hopper else ARCHS

    def variant(self, kernel: str) -> str:
        return f"{self.name} {kernel}"


_CAUSAL, _FULL = AttentionSpec(causal=True), AttentionSpec(causal=False)
_CAUSAL_WINDOW = AttentionSpec(causal=True, window=Window.causal_keys(1024))
_WIDE_WINDOW = AttentionSpec(causal=True, window=Window.causal_keys(2048))  # wide enough for dq on the way
_TWO_SIDED = AttentionSpec(causal=False, window=Window.symmetric(256))
_DOCUMENTS = AttentionSpec(causal=True, documents=True)
_FULL_DOCUMENTS = AttentionSpec(causal=False, documents=True)
_LONGFORMER = AttentionSpec(causal=False, window=Window.symmetric(256), global_tokens=True)
_WITH_SINKS = AttentionSpec(causal=True, window=Window.causal_keys(1024), sink_tokens=4)
_DROPOUT = AttentionSpec(causal=True, dropout=0.1)
_DILATED = AttentionSpec(causal=False, window=Window.symmetric(256, dilation=2))
_BIASED = AttentionSpec(causal=True, softcap=30.0, alibi=True, learned_sink=True)
# A diagonal of blocks with every fourth column: enough for tiles that are wholly, partly and not visible.
_LAYOUT = BlockLayout.from_rows([[abs(i - j) <= 1 or j % 4 == 0 for j in range(T // 128)] for i in range(T // 128)])
_LISTED = AttentionSpec(causal=True, block_sparse=_LAYOUT)
_EVERYTHING = AttentionSpec(
    causal=True,
    window=Window(left=256, dilation=2),
    global_tokens=True,
    documents=True,
    alibi=True,
    softcap=30.0,
    sink_tokens=4,
    learned_sink=True,
    dropout=0.1,
    block_sparse=_LAYOUT,
)

SHIPPED = (
    Case(name="d64 causal", spec=_CAUSAL, head_dim=64, quick=True),
    Case(name="d128 causal", spec=_CAUSAL, head_dim=128, quick=True),
    Case(name="d64 full", spec=_FULL, head_dim=64),
    # quick: of all masks, it is full attention whose copies LLVM once took the condition from (docs/log.md)
    Case(name="d128 full", spec=_FULL, head_dim=128, kernels=("dkdv",), quick=True),
    Case(name="d64 causal window", spec=_CAUSAL_WINDOW, head_dim=64),
    Case(name="d128 causal window 4:1", spec=_CAUSAL_WINDOW, head_dim=128, group=4, quick=True),
    Case(name="d64 two-sided window", spec=_TWO_SIDED, head_dim=64, kernels=("forward", "dkdv")),
    Case(name="d128 two-sided window", spec=_TWO_SIDED, head_dim=128, kernels=("dkdv",)),
    Case(name="d64 documents", spec=_DOCUMENTS, head_dim=64, quick=True),
    Case(name="d128 documents 4:1", spec=_DOCUMENTS, head_dim=128, group=4),
    Case(
        name="d64 globals",
        spec=_LONGFORMER,
        head_dim=64,
        kernels=(*WALKS, *DENSE, "merge_rows", "sum_rows"),
        quick=True,
    ),
    Case(name="d128 globals", spec=_LONGFORMER, head_dim=128, kernels=("dkdv", *DENSE), n_globals=128),
)
EXTREMES = (
    Case(name="d16 causal", spec=_CAUSAL, head_dim=16, kernels=("dkdv",)),
    # ptxas crashed on this one while an accumulator could be 16 wide
    Case(name="d16 documents padded", spec=_FULL_DOCUMENTS, head_dim=16, kernels=("dq",), ragged=True, quick=True),
    Case(name="d96 causal", spec=_CAUSAL, head_dim=96, kernels=("dkdv",)),
    Case(name="d256 causal", spec=_CAUSAL, head_dim=256),
    Case(name="d64 fp32", spec=_CAUSAL, head_dim=64, kernels=("dkdv",), dtype=torch.float32),
    Case(name="d128 fp32", spec=_CAUSAL, head_dim=128, kernels=("forward", "dkdv"), dtype=torch.float32),
    Case(name="d128 fp16", spec=_CAUSAL, head_dim=128, kernels=("forward",), dtype=torch.float16),
    Case(name="d128 softcap alibi sink", spec=_BIASED, head_dim=128, kernels=("forward", "dkdv")),
    Case(name="d64 dropout", spec=_DROPOUT, head_dim=64),
    Case(name="d64 dilated", spec=_DILATED, head_dim=64, kernels=("forward",)),
    Case(name="d64 listed", spec=_LISTED, head_dim=64, kernels=("forward",)),
    Case(name="d128 everything", spec=_EVERYTHING, head_dim=128, kernels=("dkdv",), ragged=True),
)
_WITH_STATS = ("forward", "stats", "dq", "dkdv")
_WITH_FUSED = (*WALKS, FUSED)
HOPPER = (
    Case(name="hopper d64 causal", spec=_CAUSAL, head_dim=64, kernels=(*_WITH_STATS, FUSED), hopper=True, quick=True),
    Case(
        name="hopper d128 causal",
        spec=_CAUSAL,
        head_dim=128,
        kernels=(*_WITH_STATS, FUSED, "round"),
        hopper=True,
        quick=True,
    ),
    Case(name="hopper d64 causal window", spec=_CAUSAL_WINDOW, head_dim=64, kernels=(FUSED, "round"), hopper=True),
    Case(name="hopper d128 wide window", spec=_WIDE_WINDOW, head_dim=128, kernels=(FUSED,), hopper=True),
    Case(name="hopper d64 full", spec=_FULL, head_dim=64, kernels=_WITH_FUSED, hopper=True),
    Case(name="hopper d128 full", spec=_FULL, head_dim=128, kernels=_WITH_FUSED, hopper=True),
    Case(name="hopper d128 fp16", spec=_CAUSAL, head_dim=128, kernels=_WITH_FUSED, dtype=torch.float16, hopper=True),
    Case(name="hopper d64 two-sided window", spec=_TWO_SIDED, head_dim=64, hopper=True),
    Case(name="hopper d128 causal window 4:1", spec=_CAUSAL_WINDOW, head_dim=128, group=4, hopper=True),
    Case(name="hopper d64 documents", spec=_DOCUMENTS, head_dim=64, hopper=True),
    Case(name="hopper d128 documents", spec=_DOCUMENTS, head_dim=128, group=4, hopper=True),
    Case(name="hopper d64 globals", spec=_LONGFORMER, head_dim=64, hopper=True),
    Case(name="hopper d128 globals", spec=_LONGFORMER, head_dim=128, hopper=True),
    Case(name="hopper d128 sinks 4:1", spec=_WITH_SINKS, head_dim=128, group=4, kernels=("forward", "dq"), hopper=True),
    Case(name="hopper d64 softcap alibi sink", spec=_BIASED, head_dim=64, kernels=("dq", "dkdv"), hopper=True),
    Case(name="hopper d128 softcap alibi sink", spec=_BIASED, head_dim=128, hopper=True),
    Case(name="hopper d256 causal", spec=_CAUSAL, head_dim=256, kernels=_WITH_STATS[:-1], hopper=True, quick=True),
    Case(name="hopper d256 two-sided window", spec=_TWO_SIDED, head_dim=256, kernels=("dkdv",), hopper=True),
    Case(name="hopper d256 documents", spec=_DOCUMENTS, head_dim=256, group=4, hopper=True),
    Case(name="hopper d256 softcap alibi sink", spec=_BIASED, head_dim=256, kernels=("dq", "dkdv"), hopper=True),
)
CASES: tuple[Case | DecodeCase, ...] = SHIPPED + DECODING + EXTREMES + HOPPER


def full_product() -> tuple[Case, ...]:
    """Every kind of spec × head dim × dtype, with all its kernels."""
    specs = {
        "causal": _CAUSAL,
        "full": _FULL,
        "causal window": _CAUSAL_WINDOW,
        "two-sided window": _TWO_SIDED,
        "documents": _DOCUMENTS,
        "globals": _LONGFORMER,
        "softcap alibi sink": _BIASED,
        "dropout": _DROPOUT,
        "dilated": _DILATED,
        "listed": _LISTED,
        "everything": _EVERYTHING,
    }
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    portable = tuple(
        Case(
            name=f"d{head_dim} {dtype} {name}",
            spec=spec,
            head_dim=head_dim,
            dtype=dtypes[dtype],
            kernels=(*WALKS, *DENSE) if spec.global_tokens else WALKS,
            ragged=spec is _EVERYTHING,
        )
        for head_dim, dtype, (name, spec) in product((16, 32, 64, 96, 128, 256), dtypes, specs.items())
    )
    served = ("causal", "full", "causal window", "two-sided window", "documents", "globals", "softcap alibi sink")
    return portable + tuple(
        Case(
            name=f"hopper d{head_dim} {dtype} {name}",
            spec=specs[name],
            head_dim=head_dim,
            dtype=dtypes[dtype],
            kernels=_WITH_FUSED if name in ("causal", "full") and head_dim <= 128 else WALKS,
            hopper=True,
        )
        for head_dim, dtype, name in product((64, 128, 256), ("bf16", "fp16"), served)
    )


@dataclass(frozen=True, slots=True)
class Request:
    """What Triton was asked to compile. `maxnreg` bounds a thread's registers, where it was given."""

    function: object
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], object]
    warps: int
    stages: int
    maxnreg: int | None = None

    def constant(self, name: str) -> object:
        return self.constants.get((list(self.signature).index(name),)) if name in self.signature else None

    @property
    def queries(self) -> int | None:
        """Of a tile; None where there are none."""
        return self._size("M")

    @property
    def keys(self) -> int | None:
        return self._size("N")

    @property
    def tile(self) -> str:
        size = "" if self.queries is None else f"{self.queries}x{self.keys} "
        return f"{size}w{self.warps} s{self.constant('STAGES') or self.stages}"

    def _size(self, name: str) -> int | None:
        """Programs of Hopper kernels own queries or keys in consumers of 64; their constants tell of the other side."""
        found = self.constant(name)
        if found is None and "desc_q" in self.signature:
            consumers = self.constant("C") or self.constant("OWNERS")
            found = 64 * consumers if isinstance(consumers, int) else BackwardTiles.rows
        return found if isinstance(found, int) else None


@dataclass(frozen=True, slots=True)
class _Gpu:
    """As much of a driver as Triton asks for before it compiles. A target is a device of its own, because Triton keeps
    what it knows of a target by device."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _refusing(arch: int, requests: dict[str, Request]) -> Iterator[None]:
    from triton import knobs
    from triton.runtime.driver import driver

    def refuse(*, key, repr, fn, compile, is_manual_warmup, already_compiled) -> bool:
        # A kernel that a call starts more than once (sums) is represented by the first.
        name = fn.name.rpartition(".")[2].removesuffix("_kernel")
        request = Request(
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            compile["num_warps"],
            compile["num_stages"],
            json.loads(compile["specialization_data"])["options"]["maxnreg"],
        )
        requests.setdefault(FUSED if request.constant("FUSED") else name, request)
        return True

    before = knobs.runtime.jit_cache_hook, driver._active  # not `active`, which looks for a GPU
    knobs.runtime.jit_cache_hook = refuse
    driver.set_active(_Gpu(arch))
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook, driver._active = before


@lru_cache(maxsize=8)
def requests(case: Case | DecodeCase, arch: int) -> dict[str, Request]:
    """By kernel, what `case` compiles on an `arch` such as 90."""
    found: dict[str, Request] = {}
    with _refusing(arch, found):
        if isinstance(case, DecodeCase):
            gate_decode.call(case)
        else:
            _training_step(case)
    return found


def _training_step(case: Case) -> None:
    from . import launch

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    spec, D = case.spec, case.head_dim
    plan = _plan(case)
    q, k, v = meta(B, T, H, D), meta(B, T, H // case.group, D), meta(B, T, H // case.group, D)
    per_head = meta(H, dtype=torch.float32)
    rest = (
        per_head if spec.alibi else None,
        per_head if spec.learned_sink else None,
        meta(dtype=torch.int64) if spec.dropout else None,
        *(x.to("meta") if isinstance(x, Tensor) else x for x in (getattr(plan, f.name) for f in fields(Plan))),
        launch.spec_text(spec),
    )
    if case.hopper:
        _hopper_step(case, plan, q, k, v, *rest[:2])
        return
    out, lse = launch.forward(q, k, v, *rest)
    launch.backward(torch.empty_like(out), torch.empty_like(lse), out, lse, q, k, v, *rest)


def _hopper_step(case: Case, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *per_head: Tensor | None) -> None:
    from ..hopper import backward_launch, launch
    from ..hopper.backend import masks_of, tiles_of
    from .launch import spec_text

    masks = masks_of(plan, case.spec, T, T, tiles_of(case.spec, case.head_dim).rows)
    q_doc, k_doc, spans, *rest = (x.to("meta") if isinstance(x, Tensor) else x for x in masks)
    spec = spec_text(case.spec)
    out, lse = launch.forward(q, k, v, *per_head, q_doc, k_doc, spans, *rest, spec)
    given = (torch.empty_like(out), torch.empty_like(lse), out, lse, q, k, v, *per_head, q_doc, k_doc, *rest, spec)
    before = torch.are_deterministic_algorithms_enabled()
    for deterministic in (True, False):  # dq by a kernel of its own, and on the way where that is worth it
        torch.use_deterministic_algorithms(deterministic)
        try:
            backward_launch.backward(*given)
        finally:
            torch.use_deterministic_algorithms(before)


def _plan(case: Case) -> Plan:
    position = torch.arange(T).expand(B, T)
    context = AttentionContext(
        q_documents=position // 1000 if case.spec.documents else None,
        is_global=position < case.n_globals if case.spec.global_tokens else None,
        q_positions=position if case.ragged else None,
        kv_positions=position if case.ragged else None,
        kv_lengths=torch.full((B,), T - 100) if case.ragged else None,
    )
    return make_plan(context, case.spec, T, T, torch.device("cpu"))
