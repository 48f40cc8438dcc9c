"""`longspan estimate`: what a run will cost."""

from __future__ import annotations

import sys

from longspan.training.config_paths import missing_data
from longspan.training.plan import plan
from longspan.training.schema import EstimateConfig, as_request

from .output import as_yaml


def run(config: EstimateConfig) -> int:
    if config.dry_run:
        print(as_yaml(as_request(config)))
    for problem in missing_data(config.data):
        print(f"note: {problem.text} (on this machine)", file=sys.stderr)
    print("\n".join(plan(config, hardware=config.hardware).lines()))
    return 0
