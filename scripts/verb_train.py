"""`longspan train`: a run from its config."""

from __future__ import annotations

from longspan.training.schema import RunConfig, as_request

from .output import as_yaml


def run(config: RunConfig) -> int:
    if config.dry_run:
        from longspan.training.plan import plan  # without Lightning, which takes seconds to import

        print(as_yaml(as_request(config)))
        print("\n".join(f"# {line}" for line in plan(config).lines()))
        return 0
    from longspan.training.precision import choose_device

    choose_device(config.trainer.accelerator, config.trainer.devices)  # refused before Lightning is imported
    from longspan.training.run import train

    train(config)
    return 0
