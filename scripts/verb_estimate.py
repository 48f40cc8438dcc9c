"""`longspan estimate`: what a run will cost."""

from __future__ import annotations

from longspan.training.plan import plan
from longspan.training.schema import RunConfig, as_request

from .output import as_yaml


def run(config: RunConfig) -> int:
    if config.dry_run:
        print(as_yaml(as_request(config)))
    print("\n".join(plan(config).lines()))
    return 0
