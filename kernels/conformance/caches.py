"""`cache_conformance`: whatever a cache does with its storage, attention over it must mean what training meant.

A case is a stack of layers and a program: calls of any number of new tokens a row, and steps back. Each call's output
is held to ONE fp64 reference over the whole sequence, so that train = prefill = chunked prefill = decode.

Legend: B rows, T new tokens of a call, N tokens of the longest row, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import Tensor

from ..attention.backend import AttentionParams, Feature
from ..attention.caching import AS_STORED, CachedKeys, CacheStep, KeyValueCache
from ..attention.context import AttentionContext
from ..attention.reference import Reference
from ..attention.registry import Choice, attend
from ..attention.spec import AttentionSpec
from .cache_cases import CacheCase, Program, by_construction
from .judge import judge, plain_attention
from .report import ConformanceError
from .suite import NEEDS_HYPOTHESIS

Layers = tuple[tuple[AttentionSpec, ...], ...]
MakeCache = Callable[[Layers, int, int, int, int, torch.dtype], KeyValueCache]
Stored = Callable[[Tensor], Tensor]


@dataclass(slots=True, kw_only=True)
class CacheReport:
    """The outcome of `cache_conformance`. `failures`: what went wrong -> the smallest case that shows it, and how.
    `worst` is the largest error as a fraction of its budget among what passed."""

    cases: int = 0
    calls: int = 0
    seconds: float = 0.0
    worst: float = 0.0
    stayed: int = 0  # steps back that the cache refused, as it may
    failures: dict[str, tuple[CacheCase, str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failures

    def text(self) -> str:
        verdict = "conforms" if self.ok else "DOES NOT CONFORM"
        lines = [
            f"the cache {verdict}: {self.cases} cases, {self.calls} calls in {self.seconds:.1f} s; "
            f"worst error / budget {self.worst:.2f}; {self.stayed} steps back refused"
        ]
        for check, (case, problem) in self.failures.items():
            lines += ["", f"{check}: {problem}", f"  {case!r}"]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raises ConformanceError with the report."""
        if not self.ok:
            raise ConformanceError(self.text())

    def add(self, case: CacheCase, problems: dict[str, str]) -> bool:
        for check, problem in problems.items():
            known = self.failures.get(check)
            if known is None or case.size < known[0].size:
                self.failures[check] = (case, problem)
        return bool(problems)


def cache_conformance(
    make_cache: MakeCache,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    backend: Choice = "auto",
    stored: Stored | None = None,
    without: Collection[Feature] = (),
    examples: int = 25,
    seed: int = 0,
    max_length: int = 64,
    thorough: bool = True,
) -> CacheReport:
    """Holds a cache to the definition of attention.

    make_cache  (layers, batch, length, kv_heads, head_dim, dtype) -> an empty cache on `device`: one tuple of specs a
                layer, whose key/value heads they share equally, in order; `length` tokens a row at most. Fill its
                storage with NaN to see that what was not written is not read
    backend     who computes attention: as in `attend`
    stored      what storage makes of keys and values, where that is more than a rounding to `dtype`: x -> the values
                that attention will see
    without     features that this cache does not take (global_tokens, documents, kv_lengths: rows of different lengths)
    examples    random cases, beside those by construction; max_length: of a row, in those
    thorough    False: a fifth of the cases by construction

    Deterministic for a seed. Never raises because of what a cache does: that is in the report. Raises ImportError
    without hypothesis (unless examples=0).
    """
    if examples and find_spec("hypothesis") is None:
        raise ImportError(NEEDS_HYPOTHESIS)
    report, started = CacheReport(), time.perf_counter()

    def fails(case: CacheCase) -> bool:
        report.cases += 1
        run = _Run(case, device, backend, stored)
        try:
            run.program(make_cache(case.layers, case.batch, case.length, case.kv_heads, case.head_dim, case.dtype))
        except Exception as error:  # noqa: BLE001  # somebody's code: whatever it raises is a finding
            run.problems["call"] = f"raised {type(error).__name__}: {' '.join(str(error).split())}"[:500]
        report.calls += run.calls
        report.worst = max(report.worst, run.worst)
        report.stayed += run.stayed
        return report.add(case, run.problems)

    for case in by_construction(dtypes, frozenset(without), seed, thorough=thorough):
        fails(case)
    if examples:
        from .cache_draws import explore

        explore(fails, dtypes, frozenset(without), examples=examples, random_seed=seed, max_length=max_length)
    report.seconds = time.perf_counter() - started
    return report


class _Run:
    """One case through one cache: what every row's tokens are, what came out, what was wrong."""

    def __init__(self, case: CacheCase, device: str, backend: Choice, stored: Stored | None) -> None:
        self.case, self.device, self.backend = case, torch.device(device), backend
        self.stored = stored if stored is not None else _as_it_is
        self.random = torch.Generator().manual_seed(case.seed)
        self.problems: dict[str, str] = {}
        self.worst, self.calls, self.stayed = 0.0, 0, 0
        B, N, G, D = case.batch, case.length, case.kv_heads, case.head_dim
        heads = G * case.shared
        self.lengths = [0] * B
        self.q, self.k, self.v = ([self._draw(B, N, n, D) for _ in case.layers] for n in (heads, G, G))
        self.out = [torch.zeros_like(q) for q in self.q]
        self.documents_BN = self._documents(B, N)
        self.flags_BN = (torch.rand(B, N, generator=self.random) < 0.2).to(self.device)
        self.params = [
            [self._params(spec, heads // len(specs)) for spec in specs] for specs in case.layers
        ]  # one a head group

    # -- the program ---------------------------------------------------------------------------------------------------

    def program(self, cache: KeyValueCache) -> None:
        for step in self.case.program:
            if isinstance(step, int):
                self._compare()
                self._step_back(cache, step)
            else:
                self._call(cache, step)
            if cache.length != max(self.lengths):
                self._wrong("length", f"cache.length is {cache.length} after {self.lengths} tokens")
            if self.problems:
                return
        self._compare()

    def _call(self, cache: KeyValueCache, counts: tuple[int, ...]) -> None:
        case, starts = self.case, list(self.lengths)
        T = max(counts) + case.padding
        self.calls += 1
        index_BT = torch.tensor(starts)[:, None] + torch.arange(T)
        real_BT = (torch.arange(T) < torch.tensor(counts)[:, None]).to(self.device)
        index_BT = index_BT.clamp(max=case.length - 1).to(self.device)
        context = AttentionContext(
            q_documents=self.documents_BN.gather(1, index_BT) if case.gives(Feature.DOCUMENTS) else None,
            is_global=self.flags_BN.gather(1, index_BT) if case.gives(Feature.GLOBAL_TOKENS) else None,
            kv_lengths=None if min(counts) == T else torch.tensor(counts, device=self.device),
        )
        step = cache.begin(T, context)
        self._check_positions(step, starts, real_BT)
        rows = torch.arange(case.batch, device=self.device)[:, None]
        for layer, specs in enumerate(case.layers):
            # What pads a row is poison: it must not reach any result.
            q, k, v = (
                x[layer][rows, index_BT].masked_fill(~real_BT[..., None, None], torch.nan)
                for x in (self.q, self.k, self.v)
            )
            keys = step.append(layer, k, v)
            if T > AS_STORED and (keys.context.page_table is not None or keys.k_BSGD.dtype != case.dtype):
                self._wrong("plain tensors", f"a call of {T} tokens reads pages or {keys.k_BSGD.dtype}")
            out = self._attend(layer, specs, q.nan_to_num(0), keys)
            self.out[layer][rows.expand_as(index_BT)[real_BT], index_BT[real_BT]] = out[real_BT]
        step.finish()
        self.lengths = [start + count for start, count in zip(starts, counts, strict=True)]

    def _attend(self, layer: int, specs: tuple[AttentionSpec, ...], q: Tensor, keys: CachedKeys) -> Tensor:
        outputs = []
        for group, spec in enumerate(specs):
            q_part, k, v, k_scale, v_scale = (
                None if x is None else x.chunk(len(specs), dim=2)[group]
                for x in (q, keys.k_BSGD, keys.v_BSGE, keys.k_scale_BSG, keys.v_scale_BSG)
            )
            assert q_part is not None
            assert k is not None
            assert v is not None
            params = self.params[layer][group]
            result = attend(
                q_part,
                k,
                v,
                spec=self.case.effective(spec),
                context=keys.context,
                params=AttentionParams(params.alibi_slopes, params.sink_logits, None, k_scale, v_scale),
                backend=self.backend,
            )
            outputs.append(result.out)
        return torch.cat(outputs, dim=2)

    def _step_back(self, cache: KeyValueCache, length: int) -> None:
        """Forgets the end and goes on with other tokens; a cache that cannot says so and keeps all."""
        truncate = getattr(cache, "truncate", None)
        if truncate is None or length >= max(self.lengths):
            self.stayed += 1
            return
        try:
            truncate(length)
        except ValueError:
            self.stayed += 1
            return
        for row, held in enumerate(self.lengths):
            self.lengths[row] = min(held, length)
            for x in (*self.q, *self.k, *self.v):
                x[row, self.lengths[row] :] = self._draw(*x[row, self.lengths[row] :].shape)

    # -- the truth -----------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Everything computed so far against attention over the whole rows."""
        if self.problems or not max(self.lengths):
            return
        case, N = self.case, max(self.lengths)
        lengths_B = torch.tensor(self.lengths, device=self.device)
        real_BN = torch.arange(N, device=self.device) < lengths_B[:, None]
        for layer, specs in enumerate(case.layers):
            k, v = (self.stored(x[layer][:, :N]) for x in (self.k, self.v))
            for group, spec in enumerate(specs):
                q, k_part, v_part, ours = (
                    x.chunk(len(specs), dim=2)[group] for x in (self.q[layer][:, :N], k, v, self.out[layer][:, :N])
                )
                context = AttentionContext(
                    q_positions=torch.arange(N, device=self.device)[None],
                    q_documents=self.documents_BN[:, :N] if case.gives(Feature.DOCUMENTS) else None,
                    is_global=self.flags_BN[:, :N] if case.gives(Feature.GLOBAL_TOKENS) else None,
                    kv_lengths=lengths_B,
                )
                effective, params = case.effective(spec), self.params[layer][group]
                wide = AttentionParams(*(None if x is None else x.double() for x in _learned(params)))
                exact = Reference()(
                    q.double(), k_part.double(), v_part.double(), spec=effective, context=context, params=wide
                ).out
                twin = plain_attention(
                    q, k_part.to(case.dtype), v_part.to(case.dtype), spec=effective, context=context, params=params
                )
                scale = effective.softmax_scale(case.head_dim)
                verdict = judge(
                    ours[real_BN],
                    exact[real_BN],
                    twin[real_BN],
                    magnitude=float(v_part[real_BN].abs().max()),
                    score=scale * float(q[real_BN].norm(dim=-1).max() * k_part[real_BN].norm(dim=-1).max()),
                )
                if verdict.problem:
                    self._wrong("out", f"layer {layer}, {effective!r}: {verdict.problem}")
                else:
                    self.worst = max(self.worst, verdict.ratio)

    def _check_positions(self, step: CacheStep, starts: list[int], real_BT: Tensor) -> None:
        T = real_BT.shape[1]
        expected_BT = torch.tensor(starts, device=self.device)[:, None] + torch.arange(T, device=self.device)
        found_BT = step.positions_BT.expand(expected_BT.shape)
        if not torch.equal(found_BT[real_BT], expected_BT[real_BT]):
            self._wrong("positions", f"rows of {starts} tokens: the next stand at {found_BT.tolist()}")
        if real_BT.any() and step.reach <= int(found_BT.max()):
            self._wrong("reach", f"reach={step.reach}, but a token stands at {int(found_BT.max())}")

    def _wrong(self, check: str, problem: str) -> None:
        self.problems.setdefault(check, problem)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device, self.case.dtype)

    def _documents(self, batch: int, length: int) -> Tensor:
        """Runs of a few tokens; an id may come back later."""
        ids = torch.tensor([5, 2, 2 + 2**32, 9])
        changes = torch.rand(batch, length, generator=self.random) < 0.15
        return ids[(changes.cumsum(dim=1) + torch.arange(batch)[:, None]) % len(ids)].to(self.device)

    def _params(self, spec: AttentionSpec, heads: int) -> AttentionParams:
        slopes = 0.5 ** torch.arange(1, heads + 1, dtype=torch.float32)
        sinks = torch.randn(heads, generator=self.random)
        return AttentionParams(
            alibi_slopes=slopes.to(self.device) if spec.alibi else None,
            sink_logits=sinks.to(self.device) if spec.learned_sink else None,
        )


def _learned(params: AttentionParams) -> tuple[Tensor | None, Tensor | None]:
    return params.alibi_slopes, params.sink_logits


def _as_it_is(x: Tensor) -> Tensor:
    return x


__all__ = ["CacheCase", "CacheReport", "Program", "cache_conformance"]
