"""`longspan prepare`: the tokenizer and token store of a run, and what is in them."""

from __future__ import annotations

from longspan.data.prepare import Stage, prepare
from longspan.training.config_plain import plain
from longspan.training.data_settings import STAGE_WORDS, prepare_settings, skipped_files
from longspan.training.schema import PrepareConfig

from .output import as_yaml, progress_bars, table


def run(config: PrepareConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    with progress_bars() as bars:
        tasks = {}

        def progress(stage: Stage, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGE_WORDS[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total)

        prepared = prepare(prepare_settings(config.data), progress=progress)
    rows = [
        (split, source, f"{count.documents:,}", f"{count.tokens:,}", f"{count.bytes:,}")
        for split, counts in prepared.store.counts.items()
        for source, count in counts.items()
    ]
    print(table(("split", "source", "documents", "tokens", "bytes"), rows))
    for name, words in skipped_files(prepared.store).items():
        print(f"{name}: {words}")
    print(f"vocabulary {prepared.tokenizer.vocab_size:,}; store {prepared.directory}")
    return 0
