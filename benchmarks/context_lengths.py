"""One decoder, one budget of tokens, two context lengths: what the longer one is worth.

    python -m longspan.benchmarks.context_lengths data.path=NOVELS [contexts=512,2048] [share=0.5] [words=0,8,30,120]
        [again=4] [documents=60000] [tokens=32768] [seed=0] [runs=DIR] [any key of `longspan train`]

Each context is a run of `longspan train experiment=context_lengths` on the same mixture: the text of `data.path`, and
`documents` made ones of 1 to 8 facts that come back in them (`longspan.data.synthetic.recall_text`). A run that is
finished already in `runs` is not trained again.

share      of the tokens that are of made documents
words      of text around a fact, each of these in as many documents; 0: facts alone
again      how often a fact comes back in its document, said once more or asked for
tokens     in a step

The experiment's tokenizer has a token for each digit; `data.tokenizer.digits=merged` merges them. Measured afterwards
by `longspan evaluate checkpoints=[…]`, whose questions are drawn from other seeds.
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

OWN = ("contexts", "documents", "share", "words", "again", "tokens", "seed", "runs", "data.path")
# As many tokens of each number of facts: in long texts few questions are near their facts.
FACTS = (1,) * 8 + (2,) * 4 + (4,) * 2 + (8,)
FIRST_SEED = 1_000_000  # far from the seeds that evaluations draw from


def made_documents(number: int, words: Sequence[int], again: int, seed: int) -> list[str]:
    """Of each number of words around a fact alike, and of facts as `FACTS` has them."""
    documents = []
    for index in range(number):
        facts, around = FACTS[index % len(FACTS)], words[index // len(FACTS) % len(words)]
        documents.append(recall_text(around * facts, facts, again=again, seed=FIRST_SEED + seed, index=index))
    return documents


def write_documents(path: Path, documents: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({"text": each}) + "\n" for each in documents).encode())


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    if "data.path" not in own:
        print("missing: data.path=NOVELS, the text of the mixture", file=sys.stderr)
        return 2
    seed, share, tokens = int(own.get("seed", "0")), float(own.get("share", "0.5")), int(own.get("tokens", "32768"))
    words = [int(each) for each in own.get("words", "0,8,30,120").split(",")]
    again, number = int(own.get("again", "4")), int(own.get("documents", "60000"))
    runs = Path(own.get("runs", "runs/context_lengths"))
    recipe = f"{'_'.join(map(str, words))}-{again}-{number}-{seed}"
    made = runs / f"documents-{recipe}.jsonl"
    if not made.is_file():
        write_documents(made, made_documents(number, words, again, seed))
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
        train_once(runs / f"context-{context}-{share:g}-{recipe}", "context_lengths", settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
