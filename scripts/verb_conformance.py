"""`longspan conformance`: an attention backend against the definition. The one place that imports a user's class."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from longspan.kernels.attention import AttentionBackend, AttentionCall, AttentionSpec, Feature, available
from longspan.kernels.attention.registry import get
from longspan.kernels.testing import NEEDS_HYPOTHESIS, conformance
from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.schema import ConformanceConfig

from .output import as_yaml

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def run(config: ConformanceConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    if config.examples and find_spec("hypothesis") is None:
        raise UserError(f"{NEEDS_HYPOTHESIS}, or examples=0")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no CUDA device is visible")
    known = {str(feature) for feature in Feature}
    if strangers := sorted(set(config.features or ()) - known):
        raise UserError(f"features: no feature is called {strangers[0]}; there are {', '.join(sorted(known))}")
    backend = load(config.backend)
    _check_request(backend, config)
    report = conformance(
        backend,
        device=config.device,
        dtypes=None if config.dtypes is None else [_DTYPES[name] for name in config.dtypes],
        examples=config.examples,
        features=None if config.features is None else [Feature(name) for name in config.features],
        seed=config.seed,
        max_length=config.max_length,
        thorough=config.thorough,
    )
    print(report.text())
    return 0 if report.ok else 1


def _check_request(backend: AttentionBackend, config: ConformanceConfig) -> None:
    """Raises UserError for what cannot be checked: that is no verdict on the backend."""
    for key, values in (("features", config.features), ("dtypes", config.dtypes)):
        if values is not None and not values:
            raise UserError(f"{key}=[]: nothing would be checked; name some, or leave it out")
    claimed = backend.capabilities.features
    if unclaimed := [name for name in config.features or () if Feature(name) not in claimed]:
        has = ", ".join(sorted(claimed))
        raise UserError(f"features: {backend.name} does not claim {unclaimed[0]}; it claims {has}")
    if refusal := _refusal(backend, config.device):
        raise UserError(f"backend={config.backend} device={config.device}: {refusal}")


def _refusal(backend: AttentionBackend, device: str) -> str:
    """Why it refuses even plain attention here; empty when it does not, or asking fails (which the suite reports)."""
    refusals = set()
    for dtype in backend.capabilities.dtypes.get(device, ()):
        call = AttentionCall(device=device, dtype=dtype, n_queries=8, n_keys=8)
        for causal in (True, False):
            try:
                reasons = backend.unsupported(AttentionSpec(causal=causal), call)
            except Exception:  # noqa: BLE001  # somebody's code
                return ""
            if not reasons:
                return ""
            refusals.add("; ".join(map(str, reasons)))
    return min(refusals, default="")


def load(name: str) -> AttentionBackend:
    """A registered backend, or `package.module:Class`, found from the working directory too. Raises UserError."""
    if ":" not in name:
        if name not in available():
            known = ", ".join(sorted(available()))
            raise UserError(f"backend={name}: registered are {known}; a class of your own is package.module:Class")
        return get(name)
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # a console script's path holds only its own directory
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except Exception as error:  # somebody's module may fail in any way; they get to know how
        raise UserError(f"backend={name}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"backend={name}: {module_name} has no {attribute!r}")
    found = getattr(module, attribute)
    try:
        backend = found() if isinstance(found, type) else found
    except Exception as error:  # as above
        raise UserError(f"backend={name}: {attribute}() failed: {type(error).__name__}: {error}") from error
    missing = [part for part in ("name", "capabilities", "unsupported", "__call__") if not hasattr(backend, part)]
    if missing:
        raise UserError(f"backend={name}: no attention backend, because it has no {', '.join(missing)}")
    return backend
