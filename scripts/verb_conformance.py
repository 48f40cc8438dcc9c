"""`longspan conformance`: an attention backend against the definition. The one place that imports a user's class."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from longspan.kernels.attention import AttentionBackend, Feature, available
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
    report = conformance(
        load(config.backend),
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
