"""What copying position embeddings is worth when an encoder is made long: the experiment of Longformer's Table 5.

    python -m longspan.benchmarks.position_copy [seeds=0,1] [steps=0,100,300] [length=4096] [window=512]
        [lr=3e-4] [batches=16] [runs=DIR] [output=DIR] [any key of `longspan train`]

For each seed an encoder learns to guess hidden tokens at 512 positions (`longspan train experiment=position_copy`, the
parent), is given windows and `length` positions by `longspan convert`, and trains on at that length. The new positions
are copies of the old ones, old ones stretched, or noise (Beltagy et al. 2020, arXiv 2004.05150, §5 and Table 5). The
row `parent` is the model as it was, in the inputs it was made for. Keys of `longspan train` hold for parent and
children; what a child needs (context, batch, schedule, `lr`) this module sets. Runs that are finished in `runs` stay.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from longspan.data.loader import PackedDataset
from longspan.data.masking import Masking, TokenMasker
from longspan.data.tokenizer import Tokenizer
from longspan.model.checkpoint import load_config, load_model, resolve_checkpoint
from longspan.model.config import EncoderConfig
from longspan.model.encoder import Encoder
from longspan.model.surgery import ExtendPositions, Longformer, convert_model
from longspan.training.held_out import training_store
from longspan.training.objectives import MaskedTokenLoss

from .arguments import split_arguments, started, whole, wholes
from .environment import append, facts_of_run, output_directory
from .runs import told, train_once

OWN = ("seeds", "steps", "length", "window", "lr", "batches", "runs", "output")
ARMS = ("random", "interpolate", "copy")
MASKING = Masking()  # of the evaluation, whatever training hid: 15 %, 80/10/10
TOKENS = 16_384  # of a step and of an evaluation batch: sequences get fewer as they get longer


@torch.no_grad()
def masked_loss(checkpoint: Path, *, context: int, batches: int, device: str) -> tuple[float, int]:
    """Nats per hidden token of held-out documents in sequences of `context` tokens, and how many tokens were hidden.
    The store is the one that the checkpoint, or the one it was made of, was trained on; the same tokens of it are
    hidden whatever the model. Raises ValueError for a model without a masked-LM head."""
    model = load_model(checkpoint, device=device, dtype=torch.float32)
    if not isinstance(model, Encoder) or model.config.head != "mlm":
        raise ValueError(f"{checkpoint} holds no encoder with a masked-LM head")
    tokenizer = Tokenizer.load(checkpoint)
    data = PackedDataset(
        training_store(checkpoint, tokenizer),
        "validation",
        context=context,
        single_pass=True,
        masker=TokenMasker(MASKING, tokenizer, seed=0),
    )
    objective = MaskedTokenLoss(model)
    rows = max(1, TOKENS // context)
    total, count = 0.0, 0
    for first in range(0, min(data.n_sequences, batches * rows), rows):
        indices = range(first, min(first + rows, data.n_sequences, batches * rows))
        batch = data.batch(indices).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            total += float(objective(batch))
        count += int(batch.n_loss_tokens)
    return total / count, count


def trained(directory: Path, keys: Sequence[str]) -> Path:
    """The checkpoint of a run that is trained unless it is finished."""
    train_once(directory, "position_copy", keys)
    return resolve_checkpoint(directory)


def children(parent: Path, directory: Path, *, length: int, window: int) -> dict[str, Path]:
    """The parent with windows and `length` positions, once for each way to fill them."""
    made: dict[str, Path] = {}
    for arm in ARMS:
        made[arm] = directory / f"converted-{arm}"
        if not made[arm].is_dir():
            positions = ExtendPositions(max_positions=length, mode=arm)
            convert_model(parent, made[arm], [Longformer(window=window), positions])
    return made


def main(arguments: Sequence[str]) -> int:
    own, keys = split_arguments(arguments, OWN)
    length, window = whole(own, "length", 4096, least=1), whole(own, "window", 512, least=1)
    batches, steps = whole(own, "batches", 16, least=1), wholes(own, "steps", (0, 100, 300), least=0)
    seeds = wholes(own, "seeds", (0, 1), least=0)
    runs, output = Path(own.get("runs", "runs/position_copy")), output_directory(own.get("output"), smoke=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = told("position_copy", arguments)

    def note(seed: int, arm: str, step: int, checkpoint: Path, context: int) -> None:
        loss, hidden = masked_loss(checkpoint, context=context, batches=batches, device=device)
        row = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": command,
            "seed": seed,
            "arm": arm,
            "steps": step,
            "context": context,
            "window": "" if arm == "parent" else window,
            "loss": round(loss, 5),
            "bits_per_token": round(loss / math.log(2), 5),
            "hidden_tokens": hidden,
            **facts_of_run(),
        }
        append("position_copy.csv", [row], output)
        print(f"seed {seed}  {arm:12s} after {step:5,d} steps, {context:6,d} tokens: loss {loss:.3f}", flush=True)

    keys_of_children = [key for key in keys if not key.startswith("data.tokenizer")]  # the parent's comes with it
    for seed in seeds:
        home = runs / f"seed-{seed}"
        parent = trained(home / "parent", [f"seed={seed}", *keys])
        config = load_config(parent)
        if not isinstance(config, EncoderConfig):
            raise ValueError(f"experiment=position_copy trained a {config.architecture}; this compares encoders")
        note(seed, "parent", 0, parent, config.max_positions)
        for arm, converted in children(parent, home, length=length, window=window).items():
            for step in steps:
                found = converted
                if step:
                    rows = max(1, TOKENS // length)
                    found = trained(
                        home / f"{arm}-{step}",
                        [
                            *(f"seed={seed}", *keys_of_children, f"checkpoint={converted}"),
                            *(f"data.context={length}", f"trainer.steps={step}"),
                            *(f"trainer.global_batch={rows}", f"trainer.micro_batch={rows}"),
                            *(f"trainer.val_every={step}", f"trainer.save_every={step}"),  # its last is its best
                            *(f"optimizer.lr={own.get('lr', '3e-4')}", "schedule=linear", "schedule.warmup=0.1"),
                        ],
                    )
                note(seed, arm, step, found, length)
    return 0


if __name__ == "__main__":
    started(main)
