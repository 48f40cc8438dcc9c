"""`longspan bench`: attention kernels against their peers, on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from longspan.benchmarks import decode, generation
from longspan.benchmarks.attention import Plan
from longspan.benchmarks.attention import run as run_suite
from longspan.benchmarks.environment import output_directory
from longspan.benchmarks.plan import REPETITIONS
from longspan.benchmarks.shapes import PEERS, suite
from longspan.kernels.attention import available
from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.schema import BenchConfig

from .output import as_yaml


def run(config: BenchConfig) -> int:
    device = _device(config)
    shapes = config.shapes or ("tiny" if device.type == "cpu" else "quick")
    if config.suite == "decode" or config.suite == "generation":
        every = decode.cases(shapes) if config.suite == "decode" else generation.cases(shapes)
        return _decoding(config, device, shapes, _chosen(config, shapes, every))
    if config.backend not in available():
        raise UserError(f"backend={config.backend}: registered are {', '.join(available())}")
    cases = _chosen(config, shapes, suite(config.suite, shapes))
    peers = _peers(config, PEERS)
    output = output_directory(config.output, smoke=device.type == "cpu")
    times = config.repetitions or REPETITIONS
    if config.dry_run:
        _show(config, device, {"shapes": shapes, "peers": list(peers), "repetitions": times, "output": str(output)})
        print("\n".join(f"# {case.name}: {case.flops('both') / 1e12:.3g} TFLOP forward and backward" for case in cases))
        return 0
    command = f"longspan bench suite={config.suite} shapes={shapes} backend={config.backend}"
    if config.only is not None:
        command += f" only='{config.only}'"
    if config.peers is not None:
        command += f" peers=[{','.join(config.peers)}]"
    if times != REPETITIONS:
        command += f" repetitions={times}"
    if config.time_limit is not None:
        command += f" time_limit={config.time_limit:g}"
    outcome = run_suite(
        Plan(
            suite=config.suite,
            cases=cases,
            peers=peers,
            backend=config.backend,
            device=device,
            repetitions=times,
            output=output,
            command=command,
            time_limit=config.time_limit,
        )
    )
    print(f"\n{outcome.page}\nrows appended to {output / config.suite}.csv and .jsonl; figure and table beside them")
    if not outcome.sound:
        print("something of ours was void or failed")
        return 1
    if not outcome.measured:
        print(f"backend={config.backend} measured nothing here: the reasons stand above under 'Not measured'")
        return 1
    return 0


def _peers(config: BenchConfig, known: Collection[str]) -> tuple[str, ...]:
    """Raises UserError for one that this suite doesn't race."""
    if config.peers is None:
        return tuple(known)
    unknown = [name for name in config.peers if name not in known]
    if unknown:
        raise UserError(f"peers={unknown[0]}: no peer of suite={config.suite}; its peers are {', '.join(known)}")
    return config.peers


class _Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=_Named)


def _chosen(config: BenchConfig, shapes: str, every: Sequence[C]) -> tuple[C, ...]:
    cases = tuple(case for case in every if config.only is None or config.only in case.name)
    if not cases:
        names = "; ".join(case.name for case in every)
        raise UserError(f"only={config.only}: in the name of no case of suite={config.suite} shapes={shapes}: {names}")
    return cases


def _decoding(config: BenchConfig, device: torch.device, shapes: str, cases: Sequence[_Named]) -> int:
    """The suites of decoding, which have contenders and rows of their own."""
    if config.suite == "decode" and config.peers is not None:
        raise UserError("peers: suite=decode measures all that are there; leave it out")
    if config.backend != BenchConfig.backend:
        raise UserError(f"backend={config.backend}: suite={config.suite} measures decoding as it runs; leave it out")
    if config.time_limit is not None:
        raise UserError(f"time_limit={config.time_limit:g}: suite={config.suite} has none; choose cases with only=")
    peers = _peers(config, generation.PEERS)
    output = output_directory(config.output, smoke=device.type == "cpu")
    times = config.repetitions or (REPETITIONS if config.suite == "decode" else generation.REPETITIONS)
    if config.dry_run:
        racing = list(peers) if config.suite == "generation" else None
        _show(config, device, {"shapes": shapes, "peers": racing, "repetitions": times, "output": str(output)})
        print("\n".join(f"# {case.name}" for case in cases))
        return 0
    command = f"longspan bench suite={config.suite} shapes={shapes} repetitions={times}"
    if config.only is not None:
        command += f" only='{config.only}'"
    if config.peers is not None:
        command += f" peers=[{','.join(config.peers)}]"
    if config.suite == "decode":
        sound = decode.run(shapes, device, output, command=command, only=config.only, repetitions=times)
    else:
        sound = generation.run(
            shapes, device, output, command=command, only=config.only, repetitions=times, peers=peers
        )
    print(f"rows appended to {output / config.suite}.csv")
    if not sound:
        print("something of ours was void or failed")
    return 0 if sound else 1


def _show(config: BenchConfig, device: torch.device, settled: Mapping[str, object]) -> None:
    """The request as it would be run, to be typed again: what was left open is settled, what its suite does not read is
    left out."""
    asked = {**plain(config), "device": device.type, **settled}
    unread = ("backend", "time_limit") if config.suite in ("decode", "generation") else ()
    told = {name: value for name, value in asked.items() if value is not None and name not in unread}
    print(as_yaml(told), end="")


def _device(config: BenchConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no CUDA device is visible; device=cpu runs a smoke test")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and config.shapes in ("quick", "full"):
        raise UserError(f"shapes={config.shapes}: these sizes need a GPU; on a CPU there is shapes=tiny")
    return device
