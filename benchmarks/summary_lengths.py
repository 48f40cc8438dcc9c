"""What an encoder–decoder's summaries gain from reading more: ROUGE by the number of tokens read.

    python -m longspan.benchmarks.summary_lengths checkpoint=DIR [lengths=128,256,512,1024] [samples=100] [batch=8]
        [output=DIR]

`checkpoint` is a run of `longspan train experiment=summarise_led`, or any other trained on such pairs. It is given the
first tokens of held-out reports (`longspan.data.synthetic.main_points`), writes greedily, and is compared with the
summary of the whole report. Beside it stands a perfect reader of the same tokens, who writes every main point that
they hold and nothing else.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import numpy as np
import torch

from longspan.data.synthetic.main_points import main_points, points_of
from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.bootstrap import ratio_interval
from longspan.evaluation.metrics.rouge import rouge
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.model.checkpoint_files import fingerprint
from longspan.model.generation import complete
from longspan.model.prompts import fitting
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq

from .arguments import read_arguments, started, whole
from .environment import append, facts_of_run, output_directory
from .runs import told

KEYS = ("checkpoint", "lengths", "samples", "batch", "output")
ROUGE = ("rouge1", "rouge2", "rougeL")


def summaries(model: Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str], *, length: int, batch: int) -> list[str]:
    """What the model writes for the first `length` tokens of each text, special ones included."""
    frame = tokenizer.frame
    room = length - len(frame.before) - len(frame.after)
    sampling = Sampling(
        max_new_tokens=fitting(model.config.decoder_half, 1, model.config.decoder.max_positions),
        temperature=0.0,
        stop_tokens=frozenset({tokenizer.eos_id}),
        pad_token=tokenizer.eos_id,
    )
    specs = model.config.encoder_half.attention.specs().values()
    has_globals = any(spec.global_tokens for of_pattern in specs for spec in of_pattern)
    written: list[str] = []
    for first in range(0, len(texts), batch):
        sources = [
            [*frame.before, *tokenizer.encode(text)[:room], *frame.after] for text in texts[first : first + batch]
        ]
        found = complete(model, sources, sampling, tokenizer=tokenizer, global_positions=(0,) if has_globals else ())
        written += [each.text or "" for each in found]
    return written


def first_words(tokenizer: Tokenizer, text: str, length: int) -> str:
    """The text of its first `length` tokens, less those that frame it."""
    room = length - len(tokenizer.frame.before) - len(tokenizer.frame.after)
    return tokenizer.decode(tokenizer.encode(text)[:room])


def scores(guesses: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Mean F1 of each ROUGE in percent, with its 95 % interval over texts (nan: fewer than ten)."""
    rows = [rouge(guess, [reference]).as_dict() for guess, reference in zip(guesses, references, strict=True)]
    found: dict[str, tuple[float, float, float]] = {}
    for name in ROUGE:
        values = np.array([100 * row[name] for row in rows])
        low, high = ratio_interval(values, np.ones(len(values)), seed=0) or (float("nan"), float("nan"))
        found[name] = (float(values.mean()), low, high)
    return found


def main(arguments: Sequence[str]) -> int:
    given = read_arguments(arguments, KEYS, required=("checkpoint",))
    samples, batch = whole(given, "samples", 100, least=1), whole(given, "batch", 8, least=1)
    checkpoint = resolve_checkpoint(given["checkpoint"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(checkpoint, device=device, dtype=torch.float32), Tokenizer.load(checkpoint)
    if not isinstance(model, Seq2Seq):
        raise ValueError(f"checkpoint={given['checkpoint']}: holds no encoder–decoder")
    reports = [main_points("validation", index) for index in range(samples)]
    references = [report.target for report in reports]
    output = output_directory(given.get("output"), smoke=False)
    command = told("summary_lengths", arguments)
    print(f"{'tokens read':>11}  " + "  ".join(f"{name:>20}" for name in ROUGE) + "  a perfect reader", flush=True)
    for length in [int(each) for each in given.get("lengths", "128,256,512,1024").split(",")]:
        texts = [report.source for report in reports]
        ours = scores(summaries(model, tokenizer, texts, length=length, batch=batch), references)
        perfect = scores([points_of(first_words(tokenizer, text, length)) for text in texts], references)
        row: dict[str, object] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": command,
            "checkpoint": fingerprint(checkpoint)[:12],
            "tokens_read": length,
            "samples": samples,
        }
        for name in ROUGE:
            mean, low, high = ours[name]
            row |= {name: round(mean, 2), f"{name}_low": round(low, 2), f"{name}_high": round(high, 2)}
            row[f"{name}_perfect"] = round(perfect[name][0], 2)
        append("summary_lengths.csv", [{**row, **facts_of_run()}], output)
        columns = [f"{mean:6.1f} ({low:.1f} – {high:.1f})" for mean, low, high in ours.values()]
        best = " ".join(f"{mean:.1f}" for mean, _, _ in perfect.values())
        print(f"{length:11,d}  " + "  ".join(f"{column:>20}" for column in columns) + f"  {best}", flush=True)
    return 0


if __name__ == "__main__":
    started(main)
