"""`longspan prepare`: the tokenizer and the store of a run, of documents or labelled examples, and what is in them."""

from __future__ import annotations

from longspan.data.example_build import prepare_examples
from longspan.data.examples import ExampleStore
from longspan.data.prepare import Prepared, Stage, prepare
from longspan.data.writer import SPLITS
from longspan.training.config_plain import plain
from longspan.training.data_settings import STAGE_WORDS, prepare_settings, skipped_files
from longspan.training.example_settings import example_settings
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

        made = (
            prepare(prepare_settings(config.data), progress=progress)
            if config.data.examples is None
            else prepare_examples(example_settings(config.data), progress=progress)
        )
    if isinstance(made, Prepared):
        _show_documents(made)
    else:
        _show_examples(made)
    return 0


def _show_documents(prepared: Prepared) -> None:
    rows = [
        (split, source, f"{count.documents:,}", f"{count.tokens:,}", f"{count.bytes:,}")
        for split, counts in prepared.store.counts.items()
        for source, count in counts.items()
    ]
    print(table(("split", "source", "documents", "tokens", "bytes"), rows))
    for name, words in skipped_files(prepared.store).items():
        print(f"{name}: {words}")
    print(f"vocabulary {prepared.tokenizer.vocab_size:,}; store {prepared.directory}")


def _show_examples(store: ExampleStore) -> None:
    rows = [
        (split, name, f"{len(store.records(split)):,}", f"{int(store.lengths(name)[store.records(split)].sum()):,}")
        for split in SPLITS
        for name in store.texts
    ]
    print(table(("split", "text", "examples", "tokens"), rows))
    if store.labels:
        print(f"classes: {', '.join(store.labels)}")
    if store.refused:
        print(f"{store.refused:,} records cannot be used, the first: {store.manifest['refused']['first'][0]}")
    print(f"vocabulary {store.vocab_size:,}; store {store.directory}")
