"""One decoder, one budget of tokens, two context lengths: what the longer one is worth.

    python -m longspan.benchmarks.context_lengths data.path=NOVELS [contexts=512,2048] [documents=20000] [share=0.2]
        [tokens=65536] [seed=0] [runs=DIR] [any key of `longspan train`]

Each context is a run of `longspan train experiment=context_lengths` with `tokens` tokens a step, on the same mixture:
`share` of it are made documents that ask for the facts in them (`longspan.data.synthetic.recall_text`; 700 to 11,000
characters each), the rest is the text of `data.path`. A run that is finished already in `runs` is not trained again.
Measured afterwards by `longspan evaluate checkpoints=[…]`, whose questions are drawn from other seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from longspan.data.synthetic import recall_text
from longspan.evaluation.files import write_atomically

from .arguments import split_arguments
from .runs import train_once

OWN = ("contexts", "documents", "share", "tokens", "seed", "runs", "data.path")
WORDS = (60, 120, 240, 480, 960)  # of the text around the facts
WORDS_OF_A_FACT = 30
FIRST_SEED = 1_000_000  # far from the seeds that evaluations draw from


def made_documents(number: int, seed: int) -> list[str]:
    """Of each size alike, with a fact to every thirty words."""
    sizes = [WORDS[index % len(WORDS)] for index in range(number)]
    return [
        recall_text(words, words // WORDS_OF_A_FACT, seed=FIRST_SEED + seed, index=index)
        for index, words in enumerate(sizes)
    ]


def write_documents(path: Path, documents: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({"text": each}) + "\n" for each in documents).encode())


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    if "data.path" not in own:
        print("missing: data.path=NOVELS, the text that is most of the mixture", file=sys.stderr)
        return 2
    seed, share, tokens = int(own.get("seed", "0")), float(own.get("share", "0.2")), int(own.get("tokens", "65536"))
    number = int(own.get("documents", "20000"))
    runs = Path(own.get("runs", "runs/context_lengths"))
    made = runs / f"documents-{number}-{seed}.jsonl"
    if not made.is_file():
        write_documents(made, made_documents(number, seed))
    sources = [
        {"kind": "files", "path": own["data.path"], "name": "text", "weight": round(1 - share, 6)},
        {"kind": "files", "path": str(made), "name": "made", "weight": share},
    ]
    given = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in source.items()) + "}" for source in sources)
    for context in map(int, own.get("contexts", "512,2048").split(",")):
        sequences = tokens // context
        settings = [
            f"seed={seed}", f"data.sources=[{given}]", f"data.context={context}", f"model.max_positions={context}",
            f"trainer.global_batch={sequences}", f"trainer.micro_batch={sequences}", *keys,
        ]  # fmt: skip
        train_once(runs / f"context-{context}-{share:g}-{seed}", "context_lengths", settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
