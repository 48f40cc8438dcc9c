"""`longspan convert`: surgery on a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from longspan.model.config_surgery import keys_of
from longspan.model.surgery import Conversion, convert_model, cost, make_surgery, plan_conversion
from longspan.training.config_plain import plain
from longspan.training.schema import ConvertConfig

from .output import as_yaml, progress_bars, refuse_occupied, table


def run(config: ConvertConfig) -> int:
    surgeries = [make_surgery(name, _keys(config, name)) for name in config.surgery]
    conversion = plan_conversion(config.checkpoint, surgeries)
    if config.dry_run:
        print(as_yaml(_plan(config, conversion)), end="")
        return 0
    output = Path(config.output)
    refuse_occupied(output, overwrite=config.overwrite)
    with progress_bars() as bars:
        task = bars.add_task("weights", total=None)
        written = convert_model(
            config.checkpoint,
            output,
            surgeries,
            overwrite=config.overwrite,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    print(f"{', '.join(config.surgery)}: converted to {written}/")
    print(_costs(conversion))
    return 0


def _keys(config: ConvertConfig, surgery: str) -> dict[str, object]:
    return {key: value for key, value in config.keys().items() if key in keys_of(surgery)}


def _plan(config: ConvertConfig, conversion: Conversion) -> dict[str, object]:
    asked = {name: value for name, value in plain(config).items() if value is not None}
    changes = [{step.surgery.name: step.surgery.changes(step.before)} for step in conversion.steps]
    costs = {"before": asdict(cost(conversion.before)), "after": asdict(cost(conversion.after))}
    return {**asked, "changes": changes, **costs, "model": plain(conversion.after)}


def _costs(conversion: Conversion) -> str:
    before, after = cost(conversion.before), cost(conversion.after)
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("longest input", f"{before.length:,}", f"{after.length:,}"),
    ]
    if before.kv_bytes is not None and after.kv_bytes is not None:
        rows.append(("cache bytes of it, bf16", f"{before.kv_bytes:,}", f"{after.kv_bytes:,}"))
    return table(("", "before", "after"), rows)
