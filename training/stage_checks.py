"""What is wrong with the stages of a run: how they are put together, and each of them as a run (no torch here)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .config_checks import check_lengths, check_schedule, check_trainer
from .config_errors import Problem
from .stages import stage_problems, stages_of

if TYPE_CHECKING:
    from .schema import RunConfig


def check_stages(config: RunConfig, *, lengths: bool = True, fixed_by: str | None = None) -> Iterator[Problem]:
    """Nothing for a run without stages.

    lengths   False: the model is not known yet, so neither is how long its sequences may be
    fixed_by  names the checkpoint that brings the model
    """
    if not config.stages:
        return
    problems = list(stage_problems(config))
    yield from problems
    if problems:
        return

    def of_run(each: RunConfig) -> Iterator[Problem]:
        if lengths:
            yield from check_lengths(each, fixed_by=fixed_by)
        yield from check_trainer(each)
        yield from check_schedule(each)

    said = {problem.text for problem in of_run(config)}
    for i, stage in enumerate(stages_of(config)):
        where = f"stages.{i}" if isinstance(config.stages, tuple) else "stages"
        for problem in of_run(stage.config):
            if problem.text not in said:
                yield Problem((where, *problem.keys), f"{where} ({stage.name}): {problem.text}")
