"""One decoder, one budget of tokens, two context lengths: what the longer one is worth.

    python -m longspan.benchmarks.context_lengths data.path=NOVELS [contexts=1024,4096] [questions=8000] [share=0.15]
        [tokens=65536] [seed=0] [runs=DIR] [any key of `longspan train`]

Each context is a run of `longspan train experiment=heads_46m` with equally many tokens a step, on the same mixture:
`share` of it are made questions with their answers (`longspan.data.synthetic`: pass keys, needles among other needles;
256 to 4,096 tokens each at about four characters a token), the rest is the text of `data.path`. A run that is finished
already in `runs` is not trained again. Measured afterwards by `longspan evaluate checkpoints=[…]`, whose questions are
drawn from other seeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from longspan.data import synthetic
from longspan.data.questions import Question

from .arguments import split_arguments

OWN = ("contexts", "questions", "share", "tokens", "seed", "runs", "data.path")
LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = 16  # evenly spaced from the beginning of a text to its end
FIRST_SEED = 1_000_000  # far from the seeds that evaluations draw from


def about_four_characters(text: str) -> int:
    """Tokens of a text before there is a tokenizer: documents are made first, the tokenizer learns from them."""
    return -(-len(text) // 4)


def made_questions(number: int, seed: int) -> Iterator[Question]:
    """Pass keys and needles in turn (the needle among three others), of every length and depth alike."""
    depths = [place / (DEPTHS - 1) for place in range(DEPTHS)]
    samples = -(-number // (2 * len(LENGTHS) * DEPTHS))
    asked = {"count": about_four_characters, "lengths": LENGTHS, "depths": depths, "samples": samples}
    keys = synthetic.passkey(**asked, seed=FIRST_SEED + seed)
    needles = synthetic.needle(**asked, seed=FIRST_SEED + seed, distractors=3)
    for pair in zip(keys, needles, strict=True):
        yield from pair


def write_questions(path: Path, questions: Iterator[Question]) -> int:
    """A document each: the prompt and its answer, as JSON lines. Gives how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": each.before + each.context + each.after + each.joint + each.references[0] + "\n"})
        for each in questions
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    if "data.path" not in own:
        print("missing: data.path=NOVELS, the text that is most of the mixture", file=sys.stderr)
        return 2
    runs = Path(own.get("runs", "runs/context_lengths"))
    seed, share, tokens = int(own.get("seed", "0")), float(own.get("share", "0.15")), int(own.get("tokens", "65536"))
    asked = runs / "questions.jsonl"
    if not asked.is_file():
        print(f"{asked}: {write_questions(asked, made_questions(int(own.get('questions', '8000')), seed)):,} questions")
    sources = [
        {"kind": "files", "path": own["data.path"], "name": "text", "weight": round(1 - share, 6)},
        {"kind": "files", "path": str(asked), "name": "questions", "weight": share},
    ]
    given = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in source.items()) + "}" for source in sources)
    for context in map(int, own.get("contexts", "1024,4096").split(",")):
        run = runs / f"context-{context}"
        if (run / "summary.json").is_file():
            continue
        sequences = tokens // context
        command = [
            sys.executable, "-m", "longspan.scripts.cli", "train", "experiment=heads_46m", f"data.sources=[{given}]",
            f"seed={seed}", f"data.context={context}", f"model.max_positions={context}", f"output={run}",
            f"trainer.global_batch={sequences}", f"trainer.micro_batch={sequences}", "resume=auto", *keys,
        ]  # fmt: skip
        done = subprocess.run(command, check=False)  # noqa: S603  our own command line
        if done.returncode:
            print(f"data.context={context}: the run ended with exit code {done.returncode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
