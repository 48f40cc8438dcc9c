"""`conformance`: every case through a backend, every finding into a report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec

import torch

from ..attention.backend import (
    AttentionBackend,
    AttentionCall,
    Capabilities,
    Feature,
    Reason,
    short,
)
from ..attention.registry import get
from ..attention.spec import AttentionSpec
from .accuracy import Finding, compare, run, truth, untouched
from .cases import Case
from .invariances import applicable, check
from .plan import OF_A_CASE, all_at_once, basics, by_construction, case_with, head_dims, limits
from .report import Report
from .tensors import materialise

NEEDS_HYPOTHESIS = "the conformance suite draws its cases with hypothesis: pip install 'longspan[conformance]'"


def conformance(
    backend: AttentionBackend | str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    examples: int = 25,
    features: Collection[Feature] | None = None,
    seed: int = 0,
    max_length: int = 128,
    thorough: bool = True,
) -> Report:
    """Holds a backend to the definition of attention: what it claims must be right, what it does not it must refuse.

    backend     an AttentionBackend, or the name of a registered one
    device      "cpu" or "cuda"
    dtypes      default: all that the capabilities list for the device, float64 only if there is no other
    examples    random cases, beside those by construction
    features    what to exercise; default: all that is claimed. lse and gradients wherever they are claimed
    max_length  of queries and keys
    thorough    False: plain attention, each feature alone with one invariance each, all at once, and the random cases:
                a first look at a slow kernel (Triton's interpreter takes about a second for each run)

    Deterministic for a seed. Never raises because of what a backend does: that is in the report. Raises ValueError for
    an unknown name, ImportError without hypothesis (unless examples=0).
    """
    if examples and find_spec("hypothesis") is None:
        raise ImportError(NEEDS_HYPOTHESIS)
    backend = get(backend) if isinstance(backend, str) else backend
    started = time.perf_counter()
    wanted = frozenset(Feature) if features is None else frozenset(features) | {Feature.LSE, Feature.BACKWARD}
    session = _Session(backend, device, _dtypes(backend.capabilities, device, dtypes), wanted, max_length)
    session.claims()
    if session.limits.features or session.accepts_plain:
        for case in basics(session.limits, seed):
            session.examine(case, every_invariance=thorough and case.dtype == session.limits.dtypes[0])
        for case in by_construction(session.limits, seed) if thorough else ():
            session.examine(case)
        for case in all_at_once(session.limits, seed):
            session.examine(case)
        if examples:
            from .draws import explore

            explore(session.limits, session.examine_one_invariance, examples=examples, random_seed=seed)
        session.coverage()
    session.report.seconds = time.perf_counter() - started
    return session.report


def replay(backend: AttentionBackend | str, case: Case, *, device: str = "cpu") -> Report:
    """One case, as a report prints it, with every check that applies: for debugging a failure."""
    backend = get(backend) if isinstance(backend, str) else backend
    session = _Session(backend, device, (case.dtype,), frozenset(Feature), max(case.n_queries, case.n_keys))
    session.examine(case, every_invariance=True)
    return session.report


def _dtypes(capabilities: Capabilities, device: str, asked: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...]:
    claimed = capabilities.dtypes.get(device, ())
    if asked is None:
        return tuple(dtype for dtype in claimed if dtype != torch.float64) or claimed
    if strangers := [short(dtype) for dtype in asked if dtype not in claimed]:
        has = ", ".join(map(short, claimed)) or "nothing"
        raise ValueError(f"dtypes: the backend does not claim {', '.join(strangers)} on {device}; it has {has}")
    return tuple(asked)


class _Session:
    """One run: what the backend said it can do here, what it was given, what came of it."""

    def __init__(
        self,
        backend: AttentionBackend,
        device: str,
        dtypes: tuple[torch.dtype, ...],
        wanted: frozenset[Feature],
        max_length: int,
    ) -> None:
        self.backend, self.device, self.wanted = backend, device, wanted
        self.report = Report(backend=backend.name, device=device, dtypes=tuple(map(short, dtypes)))
        dims = head_dims(backend.capabilities)
        self.limits = limits(backend.capabilities, frozenset(), dtypes, max_length, dims)
        self.accepts_plain = False
        self.exercised: set[Feature] = set()

    # -- claims --------------------------------------------------------------------------------------------------------

    def claims(self) -> None:
        """Asks about everything that is claimed and everything that is not, and settles what the cases may need."""
        capabilities = self.backend.capabilities
        problems = self.report.claims
        if not self.limits.dtypes:
            has = ", ".join(sorted(capabilities.dtypes)) or "no device"
            problems.append(f"nothing to check on {self.device}: it runs on {has}{self._why(self._plain())}")
            return
        accepted = tuple(dtype for dtype in self.limits.dtypes if self._accepts(frozenset(), (dtype,)))
        for dtype in self.limits.dtypes:
            if dtype not in accepted:
                why = self._why(dataclasses.replace(self._plain(), dtype=dtype))
                problems.append(f"claims {short(dtype)} on {self.device}, but refuses plain attention in it{why}")
        self.accepts_plain = bool(accepted)
        if not accepted:
            return
        dims = tuple(dim for dim in self.limits.head_dims if self._accepts_dim(dim))
        self.limits = dataclasses.replace(self.limits, dtypes=accepted, head_dims=dims or self.limits.head_dims)
        here = set()
        for feature in sorted(self.wanted):
            if feature not in capabilities.features:
                self._must_refuse(feature)
            elif self._accepts(frozenset({feature}), accepted):
                here.add(feature)
            elif feature in (capabilities.notes or {}):
                self._note_refusal(self._case(frozenset({feature}), accepted[0]))
            else:
                why = self._why(self._case(frozenset({feature}), accepted[0]))
                problems.append(f"claims {feature}, but refuses it on {self.device}, which no note says{why}")
        self.limits = dataclasses.replace(self.limits, features=frozenset(here))
        self._must_refuse_calls()

    def _plain(self) -> Case:
        return self._case(frozenset(), (*self.limits.dtypes, torch.float32)[0])

    def _case(self, features: frozenset[Feature], dtype: torch.dtype) -> Case:
        case = case_with(features & OF_A_CASE, self.limits, n_keys=16, dtype=dtype, seed=0)
        return dataclasses.replace(case, lse=Feature.LSE in features, backward=Feature.BACKWARD in features)

    def _accepts(self, features: frozenset[Feature], dtypes: tuple[torch.dtype, ...]) -> bool:
        """Does it take these, with or without causality, in any of the dtypes?"""
        candidates = (self._case(of, dtype) for dtype in dtypes for of in (features, features | {Feature.CAUSAL}))
        return any(not self._reasons(case.spec, case.call(self.device)) for case in candidates)

    def _accepts_dim(self, dim: int) -> bool:
        case = dataclasses.replace(self._case(frozenset(), self.limits.dtypes[0]), head_dim=dim, value_dim=dim)
        causal = dataclasses.replace(case, spec=AttentionSpec(causal=True))
        return any(not self._reasons(c.spec, c.call(self.device)) for c in (case, causal))

    def _must_refuse(self, feature: Feature) -> None:
        case = self._case(frozenset({feature}), self.limits.dtypes[0])
        self._must_name(str(feature), case.spec, case.call(self.device))

    def _must_refuse_calls(self) -> None:
        """Dtypes, head dims and devices beyond the capabilities are refused by name."""
        capabilities, call = self.backend.capabilities, self._plain().call(self.device)
        spec = AttentionSpec(causal=Feature.CAUSAL in self.limits.features)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            if dtype not in capabilities.dtypes[self.device]:
                self._must_name(short(dtype), spec, dataclasses.replace(call, dtype=dtype))
        step = capabilities.head_dim_multiple
        beyond = [] if capabilities.max_head_dim is None else [capabilities.max_head_dim + step]
        for dim in beyond + ([step + 1] if step > 1 else []):
            self._must_name("head_dim", spec, dataclasses.replace(call, head_dim=dim, value_dim=dim))
        self._must_name("device", spec, dataclasses.replace(call, device="nowhere"))

    def _must_name(self, word: str, spec: AttentionSpec, call: AttentionCall) -> None:
        reasons = self._reasons(spec, call)
        if not reasons:
            self.report.claims.append(f"does not claim {word}, but does not refuse it: {spec!r}, {call!r}")
        elif not any(word in str(reason) for reason in reasons):
            said = "; ".join(map(str, reasons))
            self.report.claims.append(f"does not claim {word}, and refuses it without naming it: {said}")

    def _reasons(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        try:
            return tuple(self.backend.unsupported(spec, call))
        except Exception as error:  # noqa: BLE001  # somebody's code: whatever it raises is a finding
            problem = f"unsupported() raised {_sentence(error)} for {spec!r}, {call!r}"
            if problem not in self.report.claims:
                self.report.claims.append(problem)
            return (Reason("unsupported() raised", _sentence(error)),)

    def _why(self, case: Case) -> str:
        reasons = self._reasons(case.spec, case.call(self.device))
        return ": " + "; ".join(map(str, reasons)) if reasons else ""

    def _note_refusal(self, case: Case) -> None:
        reason = self._why(case).removeprefix(": ")
        self.report.refusals[reason] = self.report.refusals.get(reason, 0) + 1

    def coverage(self) -> None:
        """A skip is not an outcome: what is claimed here and never ran is a failure."""
        for feature in sorted(self.limits.features - self.exercised):
            self.report.claims.append(f"claims {feature}, but refused every case that needs it")

    # -- cases ---------------------------------------------------------------------------------------------------------

    def examine(self, case: Case, *, every_invariance: bool = False) -> bool:
        """Runs a case with the checks that apply; True when one fails. What is refused with gradients or lse is tried
        without: a backend may have a feature in its forward only."""
        for lse, backward in ((case.lse, case.backward), (case.lse, False), (False, case.backward), (False, False)):
            attempt = dataclasses.replace(case, lse=lse, backward=backward)
            if not self._reasons(attempt.spec, attempt.call(self.device)):
                break
            self._note_refusal(attempt)
        else:
            return False
        return self._run(attempt, every_invariance)

    def examine_one_invariance(self, case: Case) -> bool:
        if self._reasons(case.spec, case.call(self.device)):
            self._note_refusal(case)
            return False
        return self._run(case, every_invariance=False)

    def _run(self, case: Case, every_invariance: bool) -> bool:
        self.report.cases += 1
        self.exercised |= case.features
        findings: list[Finding] = []
        try:
            inputs = materialise(case, self.device)
            results = run(self.backend, inputs)
        except Exception as error:  # noqa: BLE001  # as above
            findings.append(Finding("call", case, math.inf, f"raised {_sentence(error)}"))
            return self.report.add(findings)
        findings += compare(results, truth(inputs), case)
        findings.append(untouched(inputs))
        names = applicable(case)
        for name in names if every_invariance else (names[case.seed % len(names)],):
            try:
                findings.append(check(name, self.backend, inputs, results))
            except Exception as error:  # noqa: BLE001  # as above
                findings.append(Finding(name, case, math.inf, f"raised {_sentence(error)}"))
        return self.report.add(findings)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
