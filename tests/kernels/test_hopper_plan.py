"""What `hopper` remembers of a launch: it launches as Triton does, and no two calls share a plan by mistake."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from longspan.kernels.attention import AttentionSpec, Window
from longspan.kernels.attention.hopper import backward_launch, launch, plan
from longspan.kernels.attention.triton.launch import spec_text

CAUSAL = AttentionSpec(causal=True)


# -- a launch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """In place of a descriptor as TMA reads it: everything that it was made of."""

    made_of: tuple[object, ...]


SIGNATURE = {
    "desc_q": "tensordesc<bf16[1, 64, 1, 64],NVMMA>", "desc_s": "tensordesc<fp32[32],NVMMA>", "OUT": "*fp32",
    "SPANS": "constexpr", "SLOPES": "*bf16", "T": "i32", "scale": "fp32", "M": "constexpr",
}  # fmt: skip
METAS = [
    {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64, 1, 64], "fp4_padded": False},
    {"swizzle": 0, "elem_size": 4, "elem_type": 7, "block_size": [32], "fp4_padded": False},
]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What Triton's launcher in C was given, launch by launch; Triton's own text in Python runs above it."""
    found: list[tuple[object, ...]] = []

    def record(*arguments: object) -> None:
        # Copied: a list that is filled anew for the next launch must not pass for what this one was given.
        found.append(tuple(tuple(x) if isinstance(x, list) else x for x in arguments))

    def encode(*arguments: object) -> Map:
        return Map(tuple(tuple(x) if isinstance(x, (list, torch.Size)) else x for x in arguments))

    utils = SimpleNamespace(
        launch=record,
        build_signature_metadata=lambda signature: tuple(signature),
        fill_tma_descriptor=encode,
        fill_tma_descriptor_tiled=encode,
    )
    gpu = SimpleNamespace(utils=utils, get_current_device=lambda: 1, get_current_stream=lambda device: 70 + device)
    # triton 3.6 compiles a launcher for each signature; later ones have one for all in `utils`.
    monkeypatch.setattr(plan.nvidia, "compile_module_from_src", lambda **_: utils, raising=False)
    monkeypatch.setattr(plan.nvidia, "library_dirs", list, raising=False)
    monkeypatch.setattr(plan.nvidia, "annotate_arguments", tuple, raising=False)
    monkeypatch.setattr(plan.nvidia, "PyCUtensorMap", Map)
    monkeypatch.setattr(plan.driver, "_active", gpu)
    return found


def compiled(signature: dict[str, str] = SIGNATURE, metas: list[dict[str, object]] = METAS, **more: int) -> Any:
    numbers = {"num_ctas": 1, "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0}
    numbers |= {"profile_scratch_align": 1, "launch_cooperative_grid": 0, "launch_pdl": 0} | more
    metadata = SimpleNamespace(tensordesc_meta=metas, **numbers)
    src = SimpleNamespace(signature=signature, constants={}, fn=SimpleNamespace(arg_names=list(signature)))
    run = plan.nvidia.CudaLauncher(src, metadata)
    return SimpleNamespace(run=run, metadata=metadata, src=src, function=99, packed_metadata=(4, 1, 1000))


def tensors() -> list[Tensor]:
    return [torch.zeros(2, 80, 3, 64, dtype=torch.bfloat16), torch.zeros(320), torch.zeros(7), torch.zeros(3)]


def arguments(q: Tensor, s: Tensor, out: Tensor, slopes: Tensor) -> list[object]:
    return [launch.descriptor(q, 64), backward_launch._numbers(s, 32), out, None, slopes, 80, 0.5, 64]


def as_pointers(x: object) -> object:
    if isinstance(x, Tensor):
        return x.data_ptr()
    return tuple(map(as_pointers, x)) if isinstance(x, tuple) else x


def test_a_launch_gives_what_triton_gives(given: list[tuple[object, ...]]) -> None:
    kernel = compiled()
    first, second = tensors(), tensors()
    known = plan.Launch(kernel, 12, arguments(*first))
    for q, s, out, slopes in (first, second, first):
        given.clear()
        kernel.run(12, 1, 1, 71, 99, (4, 1, 1000), None, None, None, *arguments(q, s, out, slopes))
        assert known(q, s, out, None, slopes) == 71
        by_triton, by_us = map(as_pointers, given)
        assert by_triton == by_us


def test_a_launch_without_descriptors_gives_what_triton_gives(given: list[tuple[object, ...]]) -> None:
    kernel = compiled({"OUT": "*fp32", "T": "i32", "M": "constexpr"}, [])
    x, y = torch.zeros(5), torch.zeros(5)
    known = plan.Launch(kernel, 3, [x, 5, 64])
    given.clear()
    kernel.run(3, 1, 1, 71, 99, (4, 1, 1000), None, None, None, y, 5, 64)
    known(y)
    assert as_pointers(given[0]) == as_pointers(given[1])


def test_descriptors_are_kept_by_address_and_few(monkeypatch: pytest.MonkeyPatch, given: list[object]) -> None:
    monkeypatch.setattr(plan, "_MAPS", 3)
    q, s, out, slopes = tensors()
    known = plan.Launch(compiled(), 1, arguments(q, s, out, slopes))
    for _ in range(3):
        for x in [torch.zeros_like(q) for _ in range(5)]:
            known(x, s, out, None, slopes)
            assert any(isinstance(y, Map) and y.made_of[0] == x.data_ptr() for y in _flat(given[-1]))
        assert 0 < max(len(slot.known) for slot in known._slots if slot is not None) <= 3


def _flat(x: object) -> Iterator[object]:
    if isinstance(x, tuple):
        for y in x:
            yield from _flat(y)
    else:
        yield x


@pytest.mark.parametrize("metas", [METAS, []], ids=["descriptors", "addresses"])
def test_launches_of_two_threads_do_not_mix(given: list[Any], metas: list[dict[str, object]]) -> None:
    signature = SIGNATURE if metas else {"X": "*bf16", "S": "*fp32"} | dict(list(SIGNATURE.items())[2:])
    calls = [tensors(), tensors()]
    filled = [arguments(*x) if metas else [*x[:2], *arguments(*x)[2:]] for x in calls]
    known = plan.Launch(compiled(signature, metas), 1, filled[0])
    expected = []
    for q, s, out, slopes in calls:
        known(q, s, out, None, slopes)
        expected.append(given[-1])
    (q, s, out, slopes), other = calls

    def meanwhile() -> int:
        known(*other[:3], None, other[3])
        return slopes.data_ptr()

    known(q, s, out, None, SimpleNamespace(data_ptr=meanwhile))  # pyright: ignore[reportArgumentType]: all it needs
    assert given[-2:] == expected[::-1]


@pytest.mark.usefixtures("given")
def test_where_launches_are_not_understood_triton_goes_on_launching(caplog: pytest.LogCaptureFixture) -> None:
    launched: list[tuple[object, ...]] = []

    class Kernel:
        def __init__(self, made: object) -> None:
            self.made = made

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given, **options: launched.append((grid, options)) or self.made

    for unknown in (compiled(global_scratch_size=128), SimpleNamespace()):
        assert plan.first(Kernel(unknown), 5, arguments(*tensors()), {"num_warps": 4}) is None
    assert launched == [((5,), {"num_warps": 4})] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "scratch memory" in caplog.text
    assert plan.first(Kernel(None), 5, arguments(*tensors()), {}) is None  # nothing was launched: nothing to say
    assert len(caplog.records) == 2
    assert isinstance(plan.first(Kernel(compiled()), 5, arguments(*tensors()), {}), plan.Launch)


@pytest.mark.usefixtures("given")
def test_a_thread_that_has_not_used_cuda_gets_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H100 answered: descriptors cannot be encoded there before the runtime has been asked anything."""
    known = plan.Launch(compiled(), 1, arguments(*tensors()))
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(query=lambda: asked.append(True)))
    encode = plan.nvidia.make_tensordesc_arg

    def elsewhere(*given: object) -> object:
        if not asked:
            raise RuntimeError("Triton Error [CUDA]: Failed to create tensor map descriptor: invalid device context")
        return encode(*given)

    monkeypatch.setattr(plan.nvidia, "make_tensordesc_arg", elsewhere)
    q, s, out, slopes = tensors()
    assert known(q, s, out, None, slopes) == 71
    assert asked == [True]

    def broken(*_: object) -> object:
        raise RuntimeError("Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument")

    monkeypatch.setattr(plan.nvidia, "make_tensordesc_arg", broken)
    with pytest.raises(RuntimeError, match="invalid argument"):
        known(*tensors()[:3], None, slopes)
    assert asked == [True]


def test_launches_that_are_not_understood_are_refused(given: list[object]) -> None:
    with pytest.raises(ValueError, match="scratch memory"):
        plan.Launch(compiled(global_scratch_size=128), 1, arguments(*tensors()))


# -- which calls share a plan ------------------------------------------------------------------------------------------


LAYOUT = ("shape", "dtype", "stride", "is_contiguous", "data_ptr")


def _alike(x: Tensor, y: Tensor) -> bool:
    strides = [[s for n, s in zip(z.shape, z.stride()) if n > 1] for z in (x, y)]
    places = [z.data_ptr() % 16 for z in (x, y)]
    return x.shape == y.shape and x.dtype == y.dtype and strides[0] == strides[1] and places[0] == places[1]


def test_layouts_are_equal_where_all_that_matters_is() -> None:
    base = torch.zeros(4096, dtype=torch.bfloat16)
    drawn = [
        base.as_strided(size, stride, offset).view(dtype)
        for size in ((2, 3, 4, 8), (2, 4, 3, 8), (1, 3, 4, 8), (2, 3, 4, 16))
        for stride in ((96, 32, 8, 1), (96, 8, 24, 1), (192, 64, 16, 1), (999, 32, 8, 1))
        for offset in (0, 1, 4, 8, 64)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    for x, y in itertools.product(drawn, drawn):
        if plan.layout(x) == plan.layout(y):
            assert _alike(x, y), (x.shape, x.stride(), y.stride())
    assert plan.layout(drawn[0]) == plan.layout(torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16))
    assert plan.layout(None) != plan.layout(drawn[0])
    one, other = (SimpleNamespace(**{n: getattr(base, n) for n in LAYOUT}, get_device=lambda i=i: i) for i in (0, 1))
    assert plan.alike(one) == plan.alike(one)  # pyright: ignore[reportArgumentType]: all that it reads
    assert plan.alike(one) != plan.alike(other)  # pyright: ignore[reportArgumentType]
    assert plan.alike(drawn[0], None, drawn[1]) != plan.alike(drawn[0], drawn[1], None)


@dataclass(frozen=True)
class Call:
    """One call of `forward` and `backward`; every field is something that plans must tell apart."""

    spec: AttentionSpec = CAUSAL
    sizes: tuple[int, ...] = (2, 48, 48, 4, 2, 64, 64)  # B, T, S, H, G, D, E
    dtype: torch.dtype = torch.bfloat16
    heads_first: str = ""  # of which tensors
    shifted: str = ""  # by eight bytes from a multiple of 16: of those of which no copy is made
    slopes: torch.dtype = torch.float32
    ids: torch.dtype = torch.int32
    lse_used: bool = True
    most: int = 16  # global tokens and sinks, where the spec has them


GLOBALS = AttentionSpec(causal=False, window=Window.symmetric(5), global_tokens=True)
DOCUMENTS, ALIBI, SINKS = (
    AttentionSpec(causal=True, documents=True),
    AttentionSpec(causal=True, alibi=True),
    AttentionSpec(causal=True, learned_sink=True),
)
CALLS = [
    Call(),
    *(Call(sizes=(*Call().sizes[:i], n, *Call().sizes[i + 1 :])) for i, n in enumerate((3, 50, 50, 8, 4, 72, 72))),
    *(
        Call(replace(CAUSAL, **change))
        for change in (
            {"causal": False},
            {"window": Window(left=7)},
            {"window": Window(left=8)},
            {"softcap": 3.0},
            {"softcap": 4.0},
            {"scale": 0.3},
        )
    ),
    Call(AttentionSpec(causal=False, window=Window(right=7))),
    Call(dtype=torch.float16),
    Call(lse_used=False),
    *(Call(heads_first=name) for name in "qkv"),
    Call(DOCUMENTS),
    Call(DOCUMENTS, ids=torch.int64),
    Call(ALIBI),
    Call(ALIBI, slopes=torch.bfloat16),
    Call(ALIBI, shifted="s"),
    Call(SINKS),
    Call(GLOBALS),
    Call(GLOBALS, most=32),
    Call(replace(GLOBALS, global_tokens=False, sink_tokens=2)),
]
OTHER_SINKS = [Call(SINKS, slopes=torch.bfloat16), Call(SINKS, shifted="i")]
CALLS += OTHER_SINKS


def place(x: Tensor, shifted: bool) -> Tensor:
    """x, eight bytes off."""
    if not shifted:
        return x
    room = x.new_empty(x.numel() + 8 // x.element_size())
    return room[8 // x.element_size() :].view(x.shape).copy_(x)


def inputs(call: Call) -> tuple[tuple[Any, Any, Any, Any, Any], tuple[Any, ...]]:
    """(q, k, v, slopes, sinks), and what `masks_of` makes."""
    B, T, S, H, G, D, E = call.sizes
    made = {}
    for name, size in (("q", (B, T, H, D)), ("k", (B, S, G, D)), ("v", (B, S, G, E))):
        x = torch.zeros(size, dtype=call.dtype)
        made[name] = x.transpose(1, 2).contiguous().transpose(1, 2) if name in call.heads_first else x
    slopes = place(torch.ones(H, dtype=call.slopes), "s" in call.shifted) if call.spec.alibi else None
    sinks = place(torch.ones(H, dtype=call.slopes), "i" in call.shifted) if call.spec.learned_sink else None
    documents, always, rows = (None,) * 5, (None,) * 4, (None,) * 5
    if call.spec.documents:
        spans = [torch.zeros(B, -(-n // 128), 4, dtype=torch.int32) for n in (T, T, S)]
        documents = torch.zeros(B, T, dtype=call.ids), torch.zeros(B, S, dtype=call.ids), *spans
    if call.spec.global_tokens or call.spec.sink_tokens:
        sizes = ((1, S), (1,), (1, T, 2))
        always = *(torch.zeros(size, dtype=torch.int32) for size in sizes), None
    if call.spec.global_tokens:
        sizes = ((1, T), (1, T), (1,))
        rows = *(torch.zeros(size, dtype=torch.int32) for size in sizes), None, None
    mosts = tuple(call.most if x[0] is not None else 0 for x in (always, rows))
    return (made["q"], made["k"], made["v"], slopes, sinks), (*documents, *always, *rows, *mosts)


class Known:
    """In place of a `Launch`: a call that it would serve must look like the one that it was made for."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        leading = itertools.takewhile(lambda x: x is None or isinstance(x, Tensor) or hasattr(x, "base"), arguments)
        self.first: list[Any] = [getattr(x, "base", x) for x in leading]
        self.served = 0

    def __call__(self, *tensors: Tensor | None) -> int:
        assert len(tensors) == len(self.first)
        for was, x in zip(self.first, tensors):
            assert (x is None) == (was is None)
            assert x is None or _alike(x, was)
        self.served += 1
        return 0


def ignore(*_: object) -> None:
    """In place of dense kernels."""


def test_plans_serve_the_same_call_again_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Known] = []

    def first(kernel: object, programs: int, arguments: tuple[object, ...], options: object) -> Known:
        made.append(Known(arguments))
        return made[-1]

    dense = SimpleNamespace(global_rows=ignore, global_rows_dq=ignore, always_keys_dkdv=ignore)
    for module in (launch, backward_launch):
        monkeypatch.setattr(module, "dense_of", lambda *_: (dense, None))
        monkeypatch.setattr(module, "first", first)
        monkeypatch.setattr(module, "_plans", plan.Plans())
    monkeypatch.setattr(plan.driver, "_active", SimpleNamespace(get_current_stream=lambda device: 0))
    new = 0
    for again in (False, True):
        for call in CALLS:
            (q, k, v, slopes, sinks), (q_doc, k_doc, spans, *masks) = inputs(call)
            rest: Any = (*masks, spec_text(call.spec))
            out, lse = launch.forward(q, k, v, slopes, sinks, q_doc, k_doc, spans, *rest)
            d_lse = torch.zeros_like(lse) if call.lse_used else None
            saved = (out, lse, q, k, v, slopes, sinks, q_doc, k_doc)
            backward_launch.backward(torch.zeros_like(out), d_lse, *saved, *rest)
            # The forward pass does not read the lse's gradient, nor the backward pass sinks.
            new += 0 if again else 3 if not call.lse_used else 1 if call in OTHER_SINKS else 4
            assert len(made) == new, call
    assert all(known.served >= 1 for known in made)


def test_a_gradient_that_tma_cannot_read_is_copied_and_shares_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Known] = []
    monkeypatch.setattr(backward_launch, "first", lambda *x: made.append(Known(x[2])) or made[-1])
    monkeypatch.setattr(backward_launch, "_plans", plan.Plans())
    q, lse = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 8)
    rest: Any = (*(None,) * 15, 0, 0, spec_text(CAUSAL))
    for d_out in (torch.zeros_like(q), q.new_zeros(1, 1, 1, 1).expand_as(q)):
        backward_launch.backward(
            d_out,
            lse.new_zeros(()).expand_as(lse),
            q,
            lse,
            q,
            q,
            q,
            *rest,
        )
    assert [known.served for known in made] == [1, 1, 1]


@pytest.mark.parametrize("capturing", [True, False])
def test_an_order_outlives_its_plan_where_it_is_still_read(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    """By a CUDA graph, which reads it when it is replayed, and by streams other than the default one (0)."""
    streams: list[object] = []
    order: Any = SimpleNamespace(device="cuda:0", record_stream=streams.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    monkeypatch.setattr(launch, "_recorded", {})
    launch._keep(order, 0)
    assert (streams, launch._recorded) == ([], {})
    launch._keep(order, 71)
    assert list(launch._recorded.values()) == ([order] if capturing else [])
    assert streams == ([] if capturing else ["current of cuda:0"])


def test_plans_are_bounded_and_step_aside_for_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: plan.Plans[int] = plan.Plans()
    for i in range(plan.PLANS + 3):
        plans.put(i, i)
    assert len(plans) == plan.PLANS
    assert plans.get(2) is None
    assert plans.get(3) == 3
    hook = plan.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [lambda metadata: None])
    assert plans.get(3) is None
