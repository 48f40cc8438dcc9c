"""What the keys of `longspan uptrain` must agree on, found before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .config_errors import Problem, assignment
from .schema_uptrain import UptrainRequest


def check_decided(overrides: Mapping[str, Mapping[str, object]]) -> Iterator[Problem]:
    """What a grid decides by itself; `overrides` are the sections as they were written."""
    for key, reason in UptrainRequest.decided.items():
        section, _, name = key.partition(".")
        if name in overrides.get(section, {}):
            yield Problem((key,), f"{assignment(key, overrides[section][name])}: leave it out; {reason}")


def check_uptrain(request: UptrainRequest) -> Iterator[Problem]:
    yield from _outside(request)
    for key in ("kv_heads", "init", "alpha", "seeds"):
        values = getattr(request, key)
        for value in dict.fromkeys(value for value in values if values.count(value) > 1):
            yield Problem((key,), f"{assignment(key, list(values))}: {value} is there twice")
    if all(alpha == 0 for alpha in request.alpha) and request.distill.enabled:
        yield Problem(("distill.enabled", "alpha"), "distill.enabled=true: needs training; give an alpha above 0")
    if request.warmup > 1 and request.warmup != int(request.warmup):
        yield Problem(
            ("warmup",),
            f"{assignment('warmup', request.warmup)}: is neither a share of the parent's steps (below 1) nor a whole "
            "number of steps",
        )
    if "random" in request.init and request.grouping == "similar":
        yield Problem(
            ("grouping", "init"),
            "grouping=similar with init=random: new heads are like no others; choose grouping=contiguous",
        )
    if request.statistics is not None and request.grouping != "similar" and not {"aligned", "svd"} & set(request.init):
        yield Problem(
            ("statistics", "init"),
            f"{assignment('statistics', request.statistics)}: init={', '.join(request.init)} compares no heads; leave "
            "it out, or add aligned or svd",
        )
    if request.resume is not None and request.overwrite:
        yield Problem(
            ("overwrite", "resume"),
            f"overwrite=true: would delete the cells that resume={request.resume} keeps; give one of them",
        )


def _outside(request: UptrainRequest) -> Iterator[Problem]:
    """Numbers of lists, each told alone."""
    for alpha in request.alpha:
        if not 0 <= alpha <= 1:
            yield Problem(("alpha",), f"alpha={alpha:g}: expected a share of the parent's steps, from 0 to 1")
    for heads in request.kv_heads:
        if heads < 1:
            yield Problem(("kv_heads",), f"kv_heads={heads}: expected a whole number, at least 1")
    for seed in request.seeds:
        if seed < 0:
            yield Problem(("seeds",), f"seeds={seed}: expected a whole number, at least 0")
