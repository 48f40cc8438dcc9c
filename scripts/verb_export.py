"""`longspan export`: a Hugging Face directory from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import resolve_checkpoint
from longspan.model.conversion import export_model, plan_export
from longspan.training.config_plain import plain
from longspan.training.precision import STORED
from longspan.training.schema import ExportConfig

from .output import as_yaml, refuse_occupied


def run(config: ExportConfig) -> int:
    checkpoint = resolve_checkpoint(config.checkpoint)
    translation = plan_export(checkpoint, model_type=config.model_type, repeat_kv=config.repeat_kv)
    if config.dry_run:
        asked = {**plain(config), "model_type": translation.model_type}
        print(as_yaml({**asked, "config.json": translation.config}), end="")
        return 0
    output = Path(config.output)
    refuse_occupied(output, overwrite=config.overwrite)
    has_tokenizer = (checkpoint / "tokenizer.json").is_file()
    written = export_model(
        checkpoint,
        output,
        model_type=config.model_type,
        dtype=STORED[config.dtype],
        eos_token_id=Tokenizer.load(checkpoint).eos_id if has_tokenizer else None,
        shard_bytes=config.shard_bytes,
        repeat_kv=config.repeat_kv,
        overwrite=config.overwrite,
    )
    print(f"exported as {translation.model_type} to {written}/")
    if not has_tokenizer:
        print(f"{checkpoint} has no tokenizer.json, so {written}/ has none")
    return 0
