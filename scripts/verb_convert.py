"""`longspan convert`: surgery on a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.surgery.calibration import input_moments
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.model.config_surgery import keys_of
from longspan.model.surgery import Conversion, Surgery, convert_model, cost, make_surgery, plan_conversion, save_moments
from longspan.training.config_plain import plain
from longspan.training.schema import ConvertConfig

from .output import as_yaml, progress_bars, refuse_occupied, table


def run(config: ConvertConfig) -> int:
    conversion = plan_conversion(config.checkpoint, _surgeries(config))
    if config.dry_run:
        print(as_yaml(_plan(config, conversion)), end="")
        return 0
    output = Path(config.output)
    refuse_occupied(output, overwrite=config.overwrite)
    with _measured(config) as measured, progress_bars() as bars:
        task = bars.add_task("weights", total=None)
        written = convert_model(
            config.checkpoint,
            output,
            _surgeries(measured),
            overwrite=config.overwrite,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    print(f"{', '.join(config.surgery)}: converted to {written}/")
    print(_costs(conversion))
    return 0


def _surgeries(config: ConvertConfig) -> list[Surgery]:
    return [make_surgery(name, _keys(config, name)) for name in config.surgery]


@contextmanager
def _measured(config: ConvertConfig) -> Iterator[ConvertConfig]:
    """With `statistics` as a file of numbers, where it names texts: what the model's attentions read on them."""
    if config.statistics is None or config.statistics.endswith(".safetensors"):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="longspan-") as scratch:
        directory = resolve_checkpoint(config.checkpoint)
        moments = input_moments(load_model(directory), Tokenizer.load(directory), config.statistics)
        file = save_moments(moments, Path(scratch) / f"{Path(config.statistics).name}.safetensors")
        yield replace(config, statistics=str(file))


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
