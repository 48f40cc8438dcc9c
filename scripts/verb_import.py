"""`longspan import`: a checkpoint directory from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from longspan.model.conversion import import_model, plan_import
from longspan.training.config_plain import plain
from longspan.training.precision import STORED
from longspan.training.schema import ImportConfig

from .output import as_yaml, refuse_occupied


def run(config: ImportConfig) -> int:
    translation = plan_import(config.source)
    if config.dry_run:
        print(as_yaml({**plain(config), "model_type": translation.model_type, "model": translation.config}), end="")
        return 0
    output = Path(config.output)
    refuse_occupied(output, overwrite=config.overwrite)
    written = import_model(config.source, output, dtype=STORED[config.dtype], overwrite=config.overwrite)
    print(f"{translation.model_type} imported to {written}/")
    if not (written / "tokenizer.json").is_file():
        print(f"{config.source} has no tokenizer.json: put one into {written}/ before text is read or written")
    return 0
