"""One decoder, one budget of tokens, two context lengths: what the longer one is worth.

    python -m longspan.benchmarks.context_lengths data.path=NOVELS [contexts=512,2048] [documents=20000] [share=0.2]
        [tokens=65536] [seed=0] [runs=DIR] [any key of `longspan train`]

Each context is a run of `longspan train experiment=context_lengths` with `tokens` tokens a step, on the same mixture:
`share` of it are made documents that ask for the facts in them (`longspan.data.synthetic.recall_text`; about 256 to
2,048 tokens each), the rest is the text of `data.path`. A run that is finished already in `runs` is not trained again.
Measured afterwards by `longspan evaluate checkpoints=[…]`, whose questions are drawn from other seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from longspan.data.synthetic import recall_text

from .arguments import split_arguments

OWN = ("contexts", "documents", "share", "tokens", "seed", "runs", "data.path")
WORDS = (60, 120, 240, 480, 960)  # of the text around the facts; all in all some three times as many tokens
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
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents), encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    if "data.path" not in own:
        print("missing: data.path=NOVELS, the text that is most of the mixture", file=sys.stderr)
        return 2
    runs = Path(own.get("runs", "runs/context_lengths"))
    seed, share, tokens = int(own.get("seed", "0")), float(own.get("share", "0.2")), int(own.get("tokens", "65536"))
    made = runs / "documents.jsonl"
    if not made.is_file():
        write_documents(made, made_documents(int(own.get("documents", "20000")), seed))
    sources = [
        {"kind": "files", "path": own["data.path"], "name": "text", "weight": round(1 - share, 6)},
        {"kind": "files", "path": str(made), "name": "made", "weight": share},
    ]
    given = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in source.items()) + "}" for source in sources)
    for context in map(int, own.get("contexts", "512,2048").split(",")):
        run = runs / f"context-{context}"
        if (run / "summary.json").is_file():
            continue
        command = [
            sys.executable, "-m", "longspan.scripts.cli", "train", "experiment=context_lengths", f"seed={seed}",
            f"data.sources=[{given}]", f"data.context={context}", f"model.max_positions={context}", f"output={run}",
            f"trainer.global_batch={tokens // context}", f"trainer.micro_batch={tokens // context}", "resume=auto",
            *keys,
        ]  # fmt: skip
        done = subprocess.run(command, check=False)  # noqa: S603  our own command line
        if done.returncode:
            print(f"data.context={context}: the run ended with exit code {done.returncode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
