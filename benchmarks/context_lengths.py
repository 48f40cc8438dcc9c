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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.data.synthetic import recall_text
from longspan.evaluation.files import write_atomically

from .arguments import part, refuse, split_arguments, started, whole, wholes
from .runs import check_keys, is_finished, train_once

OWN = ("contexts", "documents", "share", "words", "again", "tokens", "seed", "runs", "data.path")
# As many tokens of each number of facts: in long texts few questions are near their facts.
FACTS = (1,) * 8 + (2,) * 4 + (4,) * 2 + (8,)
# Keys of `longspan train` that are decided here.
_SAID = {
    "output": "each run has a directory of its own below runs=DIR",
    "resume": "what is there of a run is gone on with, a finished one kept",
    "overwrite": "what is there of a run is gone on with, a finished one kept",
    "dry_run": "keys are tried before anything is made",
    "experiment": "it is experiment=context_lengths that is run",
    "data.context": "contexts= says it",
    "data.sources": "data.path and the made documents are the sources",
    "trainer.global_batch": "tokens= says it",
}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The keys of the command line, as the text above names them; `keys` are those of `longspan train`."""

    text: str
    contexts: tuple[int, ...]
    share: float
    words: tuple[int, ...]
    again: int
    documents: int
    tokens: int
    seed: int
    runs: Path
    keys: tuple[str, ...]

    @property
    def recipe(self) -> str:
        """What made documents are a function of."""
        return f"{'_'.join(map(str, self.words))}-{self.again}-{self.documents}-{self.seed}"

    @property
    def made(self) -> Path:
        return self.runs / f"documents-{self.recipe}.jsonl"

    def run(self, context: int) -> Path:
        return self.runs / f"context-{context}-{self.share:g}-{self.recipe}"

    def settings(self, context: int, sources: Sequence[Mapping[str, object]]) -> list[str]:
        """What a run is asked for."""
        given = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in each.items()) + "}" for each in sources)
        sequences = self.tokens // context
        return [
            f"seed={self.seed}", f"data.sources=[{given}]", f"data.context={context}", f"model.max_positions={context}",
            f"trainer.global_batch={sequences}", f"trainer.micro_batch={sequences}", *self.keys,
        ]  # fmt: skip


def read(arguments: Sequence[str]) -> Asked:
    """Ends the program (exit code 2, one line) for what cannot be meant."""
    own, keys = split_arguments(arguments, OWN)
    if "data.path" not in own:
        refuse("missing: data.path=NOVELS, the text of the mixture")
    for each in keys:
        if (reason := _SAID.get(each.partition("=")[0])) is not None:
            refuse(f"{each}: leave it out; {reason}")
    tokens = whole(own, "tokens", 32768, least=2)
    contexts = wholes(own, "contexts", (512, 2048), least=2)
    asked = f"contexts={own.get('contexts', '512,2048')}"
    for context in contexts:
        if context > tokens:
            refuse(f"{asked}: a sequence of {context} is longer than tokens={tokens}, a step of them")
        if tokens % context:
            refuse(
                f"{asked}: tokens={tokens} are no whole number of sequences of {context}, so steps would differ in "
                "tokens; choose others"
            )
    return Asked(
        text=own["data.path"],
        contexts=contexts,
        share=part(own, "share", 0.5),
        words=wholes(own, "words", (0, 8, 30, 120), least=0),
        again=whole(own, "again", 4, least=0),
        documents=whole(own, "documents", 60_000, least=1),
        tokens=tokens,
        seed=whole(own, "seed", 0, least=0),
        runs=Path(own.get("runs", "runs/context_lengths")),
        keys=tuple(keys),
    )


def main(arguments: Sequence[str]) -> int:
    asked = read(arguments)
    text: dict[str, object] = {"kind": "files", "path": asked.text, "name": "text"}
    for context in asked.contexts:
        if not is_finished(asked.run(context)):  # the made documents are not there yet
            check_keys("context_lengths", asked.settings(context, [text]))
    if not asked.made.is_file():
        write_documents(asked.made, made_documents(asked.documents, asked.words, asked.again, asked.seed))
    made = {"kind": "files", "path": str(asked.made), "name": "made", "weight": asked.share}
    for context in asked.contexts:
        sources = [{**text, "weight": round(1 - asked.share, 6)}, made]
        train_once(asked.run(context), "context_lengths", asked.settings(context, sources))
    return 0


if __name__ == "__main__":
    started(main)
