"""Which backend runs an attention call: registration, choice, refusals with reasons, and `attend`, the one entry point.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H % G == 0), D head dim of q and k, E of v.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

import torch
from torch import Tensor

from .backend import (
    AttentionBackend,
    AttentionCall,
    AttentionOutput,
    AttentionParams,
    Capabilities,
    Feature,
    Phase,
    PreparesContext,
    Reason,
    Rejection,
    UnsupportedAttention,
    needed,
    short,
)
from .context import AttentionContext
from .inputs import check_inputs, describe
from .quantize import LARGEST
from .spec import AttentionSpec

logger = logging.getLogger(__name__)

Factory = Callable[[], AttentionBackend]
Choice = str | Sequence[str]  # "auto", one backend, or backends in order of preference


# -- registration ------------------------------------------------------------------------------------------------------


def _builtin(module: str, name: str) -> Factory:
    """A factory that imports `module` of this package on first use."""
    return lambda: getattr(import_module(f".{module}", __package__), name)()


_factories: dict[str, Factory] = {
    "reference": _builtin("reference", "Reference"),
    "sdpa": _builtin("sdpa", "SDPA"),
    "flex": _builtin("flex", "Flex"),
    "triton": _builtin("flash", "Triton"),
    "decode": _builtin("decode", "Decode"),
    "hopper": _builtin("hopper.backend", "Hopper"),
}
_loaded: dict[str, AttentionBackend] = {}
_chosen: dict[tuple[Choice, AttentionSpec, AttentionCall], AttentionBackend] = {}  # what `attend` resolved before
_CHOSEN_LIMIT = 4096  # decoding asks with a new n_keys at every token
_logged: set[Rejection] = set()


def register(name: str, factory: Factory, *, replace: bool = False) -> None:
    """Make a backend known under `name`; `factory` runs on first use, so what it needs is imported only then.

    Raises ValueError when the name is taken (unless `replace`) or means something else here.
    """
    if name == "auto":
        raise ValueError("register('auto', …): 'auto' means the preference order; choose another name")
    if name in _factories and not replace:
        raise ValueError(f"register({name!r}, …): this name is taken; pass replace=True to replace that backend")
    _factories[name] = factory
    _loaded.pop(name, None)
    _chosen.clear()


def get(name: str) -> AttentionBackend:
    """The backend of that name, loaded on first use. Raises ValueError for an unknown one."""
    backend = _loaded.get(name)
    if backend is None:
        if name not in _factories:
            near = get_close_matches(name, [*_factories, "auto"], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(sorted(_factories))
            raise ValueError(f"unknown attention backend {name!r}: {hint}registered are {known}; or 'auto'")
        try:
            backend = _factories[name]()
        except ImportError as error:
            backend = _NotImportable(name, str(error))
        _loaded[name] = backend
    return backend


class _NotImportable:
    """Stands for a backend whose module does not import here: it can be asked about, and refuses everything."""

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        self.problem = problem
        self.capabilities = Capabilities(features=frozenset(), phases=frozenset(), dtypes={})

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        return (Reason("import", self.problem),)

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGE: Tensor,
        /,
        *,
        spec: AttentionSpec,
        context: AttentionContext,
        params: AttentionParams,
        return_lse: bool = False,
    ) -> AttentionOutput:
        raise UnsupportedAttention([Rejection(self.name, (Reason("import", self.problem),))])


def _load_all() -> bool:
    """Imports cannot be traced, and a traced dict does not see what is added to it: load before it is looked at."""
    for name in _factories:
        get(name)
    return True


# What torch.compiler.assume_constant_result does; the decorator itself would import dynamo, and triton with it.
_load_all._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # functions take attributes


def available() -> dict[str, Capabilities]:
    """Every registered backend's capabilities; one that does not import here has none. Never fails."""
    return {name: get(name).capabilities for name in _factories}


# -- choice ------------------------------------------------------------------------------------------------------------

_SMALL_MASK = 2**22  # query-key pairs: a dense mask of 2,048 × 2,048


def preference(spec: AttentionSpec, call: AttentionCall) -> tuple[str, ...]:
    """What "auto" tries, in order: a pure function of the device, the spec and the call.

    CPU            sdpa, decode, reference; decode first over heads that sdpa would repeat
    CUDA           decode in generation and over keys in pages or eight bits; else hopper, on the GPUs that it is for,
                   and triton; both skip what is masked, hopper was ahead of triton, and triton of torch's
                   FlashAttention, wherever they were measured; triton first for global tokens and sinks, for which
                   hopper needs more launches (docs/results.md); flex where positions are explicit, over which triton
                   skips nothing; sdpa first, without gradients, wherever a dense mask is small: there every new kind of
                   call would cost more in compilation than it saves
    another device reference
    """
    if call.device == "cpu":
        repeats = call.phase == Phase.DECODE and call.n_kv_heads not in (None, call.n_heads)
        return ("decode", "sdpa", "reference") if repeats else ("sdpa", "decode", "reference")
    if call.device == "cuda":
        if call.phase == Phase.DECODE or call.paged or call.kv_dtype is not None:
            return ("decode", "sdpa", "triton", "flex", "reference")
        pairs = None if call.n_queries is None or call.n_keys is None else call.n_queries * call.n_keys
        fused = ("triton", "hopper") if spec.global_tokens or spec.sink_tokens else ("hopper", "triton")
        small = pairs is not None and pairs <= _SMALL_MASK and not call.needs_grad
        if small:
            return ("sdpa", *fused, "flex", "reference")
        if call.positions:
            return ("flex", "triton", "sdpa", "reference")
        return (*fused, "flex", "sdpa", "reference")
    return ("reference",)


def resolve(choice: Choice, spec: AttentionSpec, call: AttentionCall, *, asked_by: str = "") -> AttentionBackend:
    """The backend that runs this attention.

    `choice` is one name (that backend or an error: an explicit choice never falls back), a sequence of names (the
    first that can; every refusal on the way is logged once), or "auto" (the first of `preference` that can).
    `asked_by` names the asker in the error, e.g. "layer pattern 'local'".

    Raises UnsupportedAttention, with every reason of every backend that was asked; ValueError for an unknown name.
    """
    if choice == "auto":
        names: Sequence[str] = preference(spec, call)
    else:
        names = (choice,) if isinstance(choice, str) else choice
        if not names:
            raise ValueError("attention backend: an empty list; name at least one, or 'auto'")
    tried = []
    for name in names:
        backend = get(name)
        reasons = backend.unsupported(spec, call)
        if not reasons:
            if choice != "auto":
                _log_once(tried, used=name)
            return backend
        tried.append(Rejection(name, reasons))
    able = [name for name in _factories if name not in names and not get(name).unsupported(spec, call)]
    raise UnsupportedAttention(tried, able=able, asked_by=asked_by)


def _log_once(refused: Sequence[Rejection], *, used: str) -> None:
    for rejection in refused:
        if not torch.compiler.is_compiling() and rejection not in _logged:
            _logged.add(rejection)
            logger.warning("%s Using %s.", rejection, used)


def explain(spec: AttentionSpec, call: AttentionCall) -> str:
    """A table for people: which backends can run this attention, which cannot and why, and what "auto" takes."""
    features = [words for feature, words in needed(spec, call).items() if feature != Feature.BACKWARD]
    length = "" if call.n_keys is None else f", {call.n_queries} queries × {call.n_keys} keys"
    asked = (
        f"{', '.join(features) or 'full attention'}; {call.phase}{' with gradients' if call.needs_grad else ''} "
        f"on {call.device} in {short(call.dtype)}, {call.n_heads} heads of {call.head_dim}{length}"
    )
    reasons = {name: get(name).unsupported(spec, call) for name in _factories}
    auto = next((name for name in preference(spec, call) if not reasons[name]), None)
    width = max(map(len, reasons))
    rows = []
    for name, why in sorted(reasons.items(), key=lambda item: bool(item[1])):
        can = "can" + (" (auto)" if name == auto else "") if not why else "cannot: " + "; ".join(map(str, why))
        rows.append(f"  {name:<{width}}  {can}")
    return "\n".join([asked, *rows])


# -- the call ----------------------------------------------------------------------------------------------------------


def attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    *,
    spec: AttentionSpec,
    context: AttentionContext | None = None,
    params: AttentionParams | None = None,
    backend: Choice = "auto",
    return_lse: bool = False,
) -> AttentionOutput:
    """Softmax attention as `spec` and `context` define it (`AttentionContext.allowed`), by the backend chosen.

    q [B, T, H, D], k [B, S, G, D], v [B, S, G, E]; query head h reads key/value head h // (H // G). With a page table
    k and v are pools [n_pages, page, G, …]; stored in eight bits (`quantize`), they need their scales in `params`.
    Returns out [B, T, H, E] in q's dtype and, if asked for, lse [B, H, T] in fp32 (fp64 for fp64 inputs), natural log
    of the softmax's denominator. A query that sees no key gets zeros, lse -inf and finite gradients. Under autocast the
    inputs are cast as torch's own attention casts them. `spec.dropout` always applies: in evaluation pass a spec
    without it.

    Raises UnsupportedAttention when the backend cannot, ValueError when shapes, dtypes or devices do not fit.
    """
    context = AttentionContext() if context is None else context
    params = AttentionParams() if params is None else params
    device = q_BTHD.device.type
    if torch.is_autocast_enabled(device) and q_BTHD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q_BTHD = q_BTHD.to(dtype)
        k_BSGD, v_BSGE = (x if x.dtype in LARGEST else x.to(dtype) for x in (k_BSGD, v_BSGE))
    call = describe(q_BTHD, k_BSGD, v_BSGE, context, params, return_lse)
    check_inputs(q_BTHD, k_BSGD, v_BSGE, spec, context, params, call)
    return _choose(backend, spec, call)(
        q_BTHD, k_BSGD, v_BSGE, spec=spec, context=context, params=params, return_lse=return_lse
    )


def prepare(
    context: AttentionContext,
    spec: AttentionSpec,
    call: AttentionCall,
    *,
    device: torch.device | None = None,
    backend: Choice = "auto",
) -> None:
    """Derive now what the backend of this call would derive from `context` (a dense mask, a block mask), so that
    layers share it and a compiled region finds it done. `call` needs n_queries and n_keys; `device` where q will be.

    Raises what `attend` would raise.
    """
    if call.n_queries is None or call.n_keys is None:
        raise ValueError("prepare: the call has no n_queries and n_keys; masks depend on them")
    chosen = _choose(backend, spec, call)
    if isinstance(chosen, PreparesContext):
        chosen.prepare(
            context, spec, call.n_queries, call.n_keys, torch.device(call.device) if device is None else device
        )


def _choose(choice: Choice, spec: AttentionSpec, call: AttentionCall) -> AttentionBackend:
    """`resolve`, remembering: the question is the same in every layer and step."""
    choice = choice if isinstance(choice, str) else tuple(choice)
    if torch.compiler.is_compiling():
        _load_all()
        return resolve(choice, spec, call)  # answered once, while tracing
    backend = _chosen.get((choice, spec, call))
    if backend is None:
        backend = resolve(choice, spec, call)
        if len(_chosen) >= _CHOSEN_LIMIT:
            _chosen.clear()
        _chosen[choice, spec, call] = backend
    return backend
