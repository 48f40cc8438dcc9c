"""`longspan import`: a checkpoint directory from a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

from longspan.data.tokenizer import Tokenizer, TokenizerError
from longspan.data.tokenizer_files import write_definition
from longspan.model.conversion import Translation, import_model, plan_import
from longspan.training.config_plain import plain
from longspan.training.precision import STORED
from longspan.training.schema import ImportConfig

from .output import as_yaml, progress_bars, refuse_occupied


def run(config: ImportConfig) -> int:
    translation = plan_import(config.source)
    if config.dry_run:
        print(as_yaml({**plain(config), "model_type": translation.model_type, "model": translation.config}), end="")
        return 0
    output = Path(config.output)
    refuse_occupied(output, overwrite=config.overwrite)
    with progress_bars() as bars:
        task = bars.add_task("weights", total=None)
        written = import_model(
            config.source,
            output,
            dtype=STORED[config.dtype],
            overwrite=config.overwrite,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    print(f"{translation.model_type} imported to {written}/")
    _tell_tokenizer(config.source, written, translation)
    return 0


def _tell_tokenizer(source: str, written: Path, translation: Translation) -> None:
    """Makes tokenizer.json of older files where it is missing, and says what is wrong with the one that is there: the
    weights are sound without it."""
    try:
        made = write_definition(written, translation.model_type)
        if made is not None:
            print(f"{made.name} made of the vocabulary files in {source}")
        tokens = Tokenizer.load(written).vocab_size
    except FileNotFoundError:
        print(f"{source} has no tokenizer.json: put one into {written}/ before text is read or written")
    except TokenizerError as error:
        print(f"no text can be read or written yet: {error}", file=sys.stderr)
    else:
        rows = int(translation.config["vocab_size"])
        if tokens > rows:
            print(
                f"{written}/tokenizer.json has {tokens:,} tokens, but the model knows {rows:,}: it may be another "
                "model's",
                file=sys.stderr,
            )
