"""One token of attention over a long cache: how near to the speed of memory, and to its peers.

    longspan bench suite=decode [shapes=tiny|quick|full] [only=…]

A decode call reads every key and value once, so its measure is bytes of K and V per second, beside what a copy reaches
in the same run. Every contender's output is compared with the reference in fp32 first; ours is void, and not timed,
where its error exceeds twice that of torch's own attention. Calls are timed one by one behind 0.7 ms of writes (L2 is
cold, launches cost nothing); calls that read little are also timed inside a CUDA graph of 32, as decoding runs them.

Legend: B batch, S keys, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionParams, AttentionSpec, Window, attend
from longspan.kernels.attention.quantize import quantize

from .attempts import caught, missing, short
from .environment import SMOKE, append, facts_of_run, installed, quantiles
from .timing import Clock, Machine, interleaved_calls, make_clock, measure_machine

Storage = Literal["bfloat16", "int8", "float8_e4m3fn"]
OURS = "longspan-decode"
_GRAPHED_BELOW = 64 * 2**20  # bytes of K and V: what a token takes there is launches rather than memory
_GRAPH_CALLS = 32
_SHARE, _LARGE = 0.85, 256 * 2**20
_TOLD = ("case", "contender", "version", "status", "us", "gb_per_s", "of_copy", "graph_us", "error", "storage_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """window: keys that a query sees, itself included; page: slots of a page, None: contiguous."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    window: int | None = None
    page: int | None = None
    storage: Storage = "bfloat16"

    @property
    def name(self) -> str:
        extras = "".join(
            (
                f" window {self.window}" if self.window else "",
                f" pages of {self.page}" if self.page else "",
                f" {self.storage}" if self.storage != "bfloat16" else "",
            )
        )
        heads = f"h{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"b{self.batch} {heads} d{self.head_dim} s{self.length}{extras}"

    @property
    def spec(self) -> AttentionSpec:
        window = Window() if self.window is None else Window.causal_keys(self.window)
        return AttentionSpec(causal=True, window=window)

    @property
    def nbytes(self) -> int:
        """Of the keys and values that the query sees, with the scales of 8-bit storage (fp32, one a token and head)."""
        seen = self.length if self.window is None else min(self.window, self.length)
        each = 2 * self.head_dim if self.storage == "bfloat16" else self.head_dim + 4
        return 2 * self.batch * seen * self.kv_heads * each


def cases(shapes: str) -> tuple[DecodeCase, ...]:
    """tiny: a smoke test; quick: what the targets ask; full: contexts 1K … 128K, batches 1, 8, 64, MHA, GQA and MQA."""
    if shapes == "tiny":
        few = DecodeCase(batch=2, heads=4, kv_heads=2, head_dim=32, length=96)
        return (few, replace(few, window=16), replace(few, page=16), replace(few, storage="int8"))
    mha = DecodeCase(batch=8, heads=16, kv_heads=16, head_dim=128, length=8192)
    gqa = DecodeCase(batch=8, heads=16, kv_heads=4, head_dim=128, length=32768)
    single = DecodeCase(batch=1, heads=16, kv_heads=4, head_dim=128, length=131072)
    quick = (
        mha,
        gqa,
        replace(gqa, page=16),
        replace(gqa, page=64),
        replace(gqa, storage="int8"),
        replace(gqa, storage="float8_e4m3fn"),
        single,
        replace(single, length=1024),
        replace(single, window=1024),
        replace(single, window=1024, length=8192),
        DecodeCase(batch=64, heads=12, kv_heads=12, head_dim=64, length=4096),
    )
    if shapes == "quick":
        return quick
    sweep = [
        DecodeCase(batch=batch, heads=16, kv_heads=kv_heads, head_dim=128, length=length)
        for batch, lengths in ((1, (1024, 8192, 32768, 131072)), (8, (1024, 8192, 32768)), (64, (1024, 4096)))
        for kv_heads in (16, 4, 1)
        for length in lengths
    ]
    return (*quick, *(case for case in sweep if case not in quick))


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inputs:
    """q [B, 1, H, D]; k, v [B, S, G, D] as a cache holds them (one head's keys side by side), in bf16 (fp32 on a CPU);
    kept: what our call reads, which may lie in pages or in 8 bits."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: tuple[Tensor, Tensor]
    context: AttentionContext
    params: AttentionParams


def make_inputs(case: DecodeCase, device: torch.device) -> Inputs:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    B, S, G, D = case.batch, case.length, case.kv_heads, case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q = normal(B, 1, case.heads, D)
    k, v = (normal(B, G, S, D).transpose(1, 2) for _ in range(2))
    kept, params = (k, v), AttentionParams()
    if case.storage != "bfloat16":
        (k8, k_scale), (v8, v_scale) = (quantize(x, getattr(torch, case.storage)) for x in (k, v))
        kept, params = (k8, v8), AttentionParams(k_scale_BSG=k_scale, v_scale_BSG=v_scale)
    context = AttentionContext(kv_lengths=torch.full((B,), S, device=device))
    if case.page is not None:
        pages = math.ceil(S / case.page)
        order = torch.randperm(B * pages, generator=generator, device=device)  # as allocation leaves them
        table = torch.empty_like(order)
        table[order] = torch.arange(B * pages, device=device)
        kept = (_paged(kept[0], case.page, order), _paged(kept[1], case.page, order))
        context.page_table = table.view(B, pages).int()
        context.q_positions = torch.full((B, 1), S - 1, device=device)
    return Inputs(q, k, v, kept, context, params)


def _paged(x_BSGD: Tensor, page: int, order: Tensor) -> Tensor:
    """[B, S, G, D] -> pool [n_pages, page, G, D] with page i of the pool taken from place order[i]."""
    B, S, G, D = x_BSGD.shape
    whole = torch.nn.functional.pad(x_BSGD, (0, 0, 0, 0, 0, -S % page))
    pool = whole.reshape(B * whole.shape[1] // page, page, G, D)[order]
    return pool.transpose(1, 2).contiguous().transpose(1, 2)  # head-major within a page


# -- contenders --------------------------------------------------------------------------------------------------------

Call = Callable[[], Tensor]  # -> [B, 1, H, D]


@dataclass(frozen=True, slots=True)
class Contender:
    """prepare   makes the call, with everything that is done once for many calls
    missing   why it cannot take part, known without trying
    package   whose version belongs to the number; "": torch's or ours
    """

    prepare: Callable[[], Call]
    missing: str | None = None
    package: str = ""


def contenders(case: DecodeCase, inputs: Inputs) -> dict[str, Contender]:
    """Ours first. Peers read bf16 whatever ours reads, and contiguous keys (FlashInfer pages): that is theirs."""
    q_BTHD, k_BSGD, v_BSGD = inputs.q, inputs.k, inputs.v
    shared = case.heads != case.kv_heads
    start = 0 if case.window is None else max(0, case.length - case.window)

    def ours() -> Call:
        k, v = inputs.kept
        return lambda: (
            attend(q_BTHD, k, v, spec=case.spec, context=inputs.context, params=inputs.params, backend="decode").out
        )

    def sdpa() -> Call:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD[:, start:], v_BSGD[:, start:]))
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, enable_gqa=shared).transpose(1, 2)

    def flex() -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, enable_gqa=shared).transpose(1, 2)

    every = {OURS: Contender(ours), "sdpa": Contender(sdpa)}
    if q_BTHD.is_cuda and case.window is None:
        every["flex"] = Contender(flex)
    every["flashinfer"] = Contender(
        lambda: _flashinfer(case, inputs), missing("flashinfer", "flashinfer-python"), "flashinfer-python"
    )
    every["xformers"] = Contender(lambda: _xformers(case, inputs, start), missing("xformers", "xformers"), "xformers")
    return every


def _flashinfer(case: DecodeCase, inputs: Inputs) -> Call:
    """Its batched decoding over pages, planned once for all layers of a step, as its documentation has it."""
    import flashinfer  # pyright: ignore[reportMissingImports]: an optional peer

    B, page, device = case.batch, case.page or 16, inputs.q.device
    pages = math.ceil(case.length / page)
    in_order = torch.arange(B * pages, device=device)
    # Keys of all heads side by side ("NHD"), which is its default.
    k, v = (_paged(x, page, in_order).contiguous() for x in (inputs.k, inputs.v))
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=case.heads >= 4 * case.kv_heads
    )
    wrapper.plan(
        torch.arange(0, (B + 1) * pages, pages, dtype=torch.int32, device=device),
        in_order.int(),
        torch.full((B,), case.length - (pages - 1) * page, dtype=torch.int32, device=device),
        case.heads,
        case.kv_heads,
        case.head_dim,
        page,
        window_left=-1 if case.window is None else case.window - 1,
        q_data_type=inputs.q.dtype,
        kv_data_type=k.dtype,
    )
    q_BHD = inputs.q[:, 0].contiguous()
    return lambda: wrapper.run(q_BHD, (k, v))[:, None]


def _xformers(case: DecodeCase, inputs: Inputs, start: int) -> Call:
    """memory_efficient_attention_forward, which picks its split-K kernel for single queries; query heads that share
    keys are an axis of their own, over which keys are expanded without a copy."""
    from xformers.ops import memory_efficient_attention_forward  # pyright: ignore[reportMissingImports]: an optional peer

    groups = (case.kv_heads, case.heads // case.kv_heads)
    q_BTGRD = inputs.q.unflatten(2, groups)
    k_BSGRD, v_BSGRD = (x[:, start:, :, None].expand(-1, -1, -1, groups[1], -1) for x in (inputs.k, inputs.v))
    return lambda: memory_efficient_attention_forward(q_BTGRD, k_BSGRD, v_BSGRD).flatten(2, 3)


def exact(case: DecodeCase, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[B, 1, H, D] in fp32, row by row of the batch, of what our call reads and of the values before 8-bit storage."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    k8, v8 = inputs.kept
    scales = inputs.params
    for b in range(case.batch):
        q = inputs.q[b : b + 1].float()
        plain = inputs.k[b : b + 1].float(), inputs.v[b : b + 1].float()
        rows[1].append(attend(q, *plain, spec=case.spec, backend="reference").out)
        if scales.k_scale_BSG is None or scales.v_scale_BSG is None:
            rows[0].append(rows[1][-1])
            continue
        k = k8[b : b + 1].float() * scales.k_scale_BSG[b : b + 1, ..., None].float()
        v = v8[b : b + 1].float() * scales.v_scale_BSG[b : b + 1, ..., None].float()
        rows[0].append(attend(q, k, v, spec=case.spec, backend="reference").out)
    return torch.cat(rows[0]), torch.cat(rows[1])


def _error(out: Tensor, exact_out: Tensor) -> float:
    return float((out.float() - exact_out).norm() / exact_out.norm())


# -- the run -----------------------------------------------------------------------------------------------------------


def run(
    shapes: str, device: torch.device, output: Path, *, command: str, only: str | None = None, repetitions: int = 100
) -> bool:
    """Measure, print, append to `decode.csv`. False when something of ours was void, failed or not measured."""
    facts = facts_of_run()
    clock = make_clock(device)
    machine = None if device.type == "cpu" else measure_machine(clock)
    if machine is None:
        print(SMOKE)
    else:
        print(f"copy {machine.copy_tb_per_s:.2f} TB/s read and written")
    chosen = [case for case in cases(shapes) if only is None or only in case.name]
    sound = bool(chosen)
    for case in chosen:
        rows = _measure(case, device, clock, machine, repetitions)
        for row in rows:
            print("  ".join(f"{key}={row[key]}" for key in _TOLD if row[key] != ""))
            sound = sound and (row["contender"] != OURS or row["status"] == "ok")
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        append("decode.csv", [{"date": date, "command": command, **row, **facts} for row in rows], output)
    return sound


def _measure(
    case: DecodeCase, device: torch.device, clock: Clock, machine: Machine | None, repetitions: int
) -> list[dict[str, object]]:
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    truth, before_storage = exact(case, inputs)
    running: dict[str, Call] = {}
    found: dict[str, tuple[str, float | None]] = {}
    versions: dict[str, str] = {}
    for name, contender in contenders(case, inputs).items():
        versions[name] = installed(contender.package) if contender.package and contender.missing is None else ""

        def check(name: str = name, contender: Contender = contender) -> None:
            call = contender.prepare()
            out = call()
            clock.synchronize()
            found[name] = "ok", _error(out, truth if name == OURS else before_storage)
            running[name] = call

        problem = ("skipped", contender.missing) if contender.missing is not None else caught(check)
        if problem is not None:
            found[name] = f"{problem[0]}: {problem[1]}", None
    budget = max(2 * (found["sdpa"][1] or 0.0), 1e-5)
    mine = found[OURS][1]
    if mine is not None and not mine <= budget:
        found[OURS] = f"void: relative error {mine:.2e}, sdpa's {found['sdpa'][1]:.2e}", mine
        del running[OURS]
    for call in running.values():
        for _ in range(10):
            call()
    samples = interleaved_calls(running, clock, repetitions)
    graphed = device.type == "cuda" and case.nbytes < _GRAPHED_BELOW
    rows: list[dict[str, object]] = []
    for name, (status, error) in found.items():
        row = _row(case, name, status, error, samples.get(name), machine)
        row["version"] = versions[name]
        row["graph_us"] = _in_a_graph(running[name]) if graphed and name in running else ""
        rows.append(row)
    quantised = _error(truth, before_storage) if case.storage != "bfloat16" else ""
    for row in rows:
        row["storage_error"] = f"{quantised:.3g}" if isinstance(quantised, float) else ""
    return rows


def _row(
    case: DecodeCase,
    name: str,
    status: str,
    error: float | None,
    samples: Sequence[float] | None,
    machine: Machine | None,
) -> dict[str, object]:
    p20, p50, p80 = quantiles(samples) if samples else (math.nan, math.nan, math.nan)
    # What ours reads; peers read the same keys in bf16.
    nbytes = case.nbytes if name == OURS else replace(case, storage="bfloat16").nbytes
    rate = nbytes / p50 * 1e-6
    share = None if machine is None else rate / (machine.copy_tb_per_s * 1e3)
    asked = name == OURS and share is not None and nbytes >= _LARGE and not math.isnan(share)
    return {
        "case": case.name,
        "contender": name,
        "status": status,
        "n": 0 if samples is None else len(samples),
        "us_p20": short(1e3 * p20),
        "us": short(1e3 * p50),
        "us_p80": short(1e3 * p80),
        "kv_mib": round(nbytes / 2**20, 3),
        "gb_per_s": short(rate),
        "of_copy": "" if share is None else short(share),
        "target": f"≥ {_SHARE} of the run's copy at ≥ 256 MiB" if asked else "",
        "target_met": ("yes" if share is not None and share >= _SHARE else "no") if asked else "",
        "error": "" if error is None else f"{error:.2e}",
        "copy_tb_per_s": "" if machine is None else round(machine.copy_tb_per_s, 3),
        "smoke": machine is None,
    }


def _in_a_graph(call: Call) -> str:
    """Microseconds of a call among 32 recorded in one CUDA graph; the keys may stay in L2, as in decoding they may."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    def record() -> None:
        with torch.cuda.graph(graph):
            for _ in range(_GRAPH_CALLS):
                call()

    problem = caught(record)
    if problem is not None:
        return f"not recordable: {problem[1].partition(':')[0]}"
    times: list[float] = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _GRAPH_CALLS)
    return short(sorted(times)[len(times) // 2])
