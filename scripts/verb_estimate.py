"""`longspan estimate`: what a run will cost."""

from __future__ import annotations

from longspan.training.plan import plan
from longspan.training.schema import EstimateConfig, as_request

from .output import as_yaml


def run(config: EstimateConfig) -> int:
    if config.dry_run:
        print(as_yaml(as_request(config)))
    print("\n".join(plan(config, hardware=config.hardware).lines()))
    return 0
