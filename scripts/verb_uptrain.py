"""`longspan uptrain`: fewer key/value heads, trained further, with controls and a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.training.config_plain import plain
from longspan.training.errors import UserError
from longspan.training.schema import RunRequest, UptrainConfig
from longspan.training.uptrain_recipe import run_config_of, settle_uptraining

from .compose import compose, group_options
from .output import as_yaml, table


def run(config: UptrainConfig) -> int:
    recipe = None if config.recipe is None else _recipe(config.recipe)
    if config.dry_run:
        from longspan.training.uptrain_costs import costs_of

        grid = settle_uptraining(config, recipe)
        costs = costs_of(grid)
        asked = plain(config)
        sections = asked.pop("overrides")
        print(as_yaml({name: value for name, value in {**asked, **sections}.items() if value is not None}), end="")
        print(table(costs.head, costs.rows))
        print("\n".join(costs.lines))
        return 0
    from longspan.training.uptrain import uptrain  # Lightning, which takes seconds to import

    uptrain(config, recipe)
    return 0


def _recipe(name: str) -> Mapping[str, Any]:
    """A run directory's config, or an experiment's."""
    found = run_config_of(Path(name)) if Path(name).is_dir() else None
    if found is not None:
        return found
    experiments = group_options("train")["experiment"]
    if name not in experiments:
        what = (
            "is a directory without a config.yaml"
            if Path(name).is_dir()
            else "is neither a run directory nor an experiment"
        )
        raise UserError(f"recipe={name}: {what}; experiments are {', '.join(experiments)}")
    return compose("train", [f"experiment={name}"], schema=RunRequest).raw
