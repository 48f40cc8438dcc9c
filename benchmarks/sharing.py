"""What grouped-query surgery costs before any training: every number of key/value heads, initialisation and grouping.

    python -m longspan.benchmarks.sharing checkpoint=DIR data=PATH kv_heads=4,2,1
        [inits=mean,first,random,aligned,svd] [groupings=contiguous,similar] [statistics=PATH] [texts=8] [length=512]
        [output=DIR]

A decoder is scored by its loss on windows of the data, an encoder by the cosine between its embeddings (mean over
tokens) and those of the model that it was. `statistics` names other texts; what heads compute on them is then compared
as well as their weights. The tensors are converted in memory; no checkpoint is written.

Legend: B texts, T tokens, D model width.
"""

from __future__ import annotations

import datetime
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.surgery.calibration import input_moments, text_windows
from longspan.kernels.cross_entropy import token_nll
from longspan.model.build import Model, build_from
from longspan.model.checkpoint import load_model, resolve_checkpoint
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.surgery import (
    GroupedQuery,
    LazyTensor,
    operate,
    plan_steps,
    save_moments,
)
from longspan.model.surgery.gqa import Grouping
from longspan.model.surgery.heads import Init

from .arguments import read_arguments, refuse, started, whole, wholes
from .environment import append, facts_of_run, output_directory

KEYS = ("checkpoint", "data", "kv_heads", "inits", "groupings", "statistics", "texts", "length", "output")


@dataclass(frozen=True, slots=True)
class Sharing:
    """Of one conversion: loss in nats a token (decoders) or cosine (encoders), the mean over texts and its standard
    error. `surgery=None`: of the model as it was."""

    surgery: GroupedQuery | None
    score: float
    error: float


@torch.no_grad()
def scores(model: Model, tokens_BT: Tensor, original_BD: Tensor | None) -> Tensor:
    """Of each text, fp64 [B]: loss per token, or cosine to the original's embedding."""
    if isinstance(model, Decoder):
        losses = [token_nll(model.hidden(row[None, :-1])[0], model.head_weight, row[1:]).mean() for row in tokens_BT]
        return torch.stack(losses).double()
    assert original_BD is not None
    return F.cosine_similarity(embeddings(model, tokens_BT), original_BD).double()


@torch.no_grad()
def embeddings(model: Model, tokens_BT: Tensor) -> Tensor:
    """[B, D]: the mean of the hidden states."""
    assert isinstance(model, Encoder)
    return torch.stack([model.hidden(row[None])[0].mean(dim=0) for row in tokens_BT])


def measure(model: Model, tokens_BT: Tensor, surgeries: Sequence[GroupedQuery]) -> Iterator[Sharing]:
    """The model as it is, then after each surgery."""
    original_BD = embeddings(model, tokens_BT) if isinstance(model, Encoder) else None
    yield _sharing(None, scores(model, tokens_BT, original_BD))
    weights = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    for surgery in surgeries:
        (step,) = plan_steps(model.config, [surgery])
        made, _ = operate([step], weights)
        other = build_from(step.after, device="meta")
        other.load_state_dict({name: lazy.read() for name, lazy in made.items()}, assign=True)
        yield _sharing(surgery, scores(other.eval(), tokens_BT, original_BD))


def _sharing(surgery: GroupedQuery | None, scores_B: Tensor) -> Sharing:
    error = float(scores_B.std() / len(scores_B) ** 0.5) if len(scores_B) > 1 else math.nan
    return Sharing(surgery, float(scores_B.mean()), error)


def surgeries_of(
    kv_heads: Sequence[int], inits: Sequence[str], groupings: Sequence[str], statistics: str | None
) -> list[GroupedQuery]:
    """Every combination that there is; statistics where heads are compared."""
    found: list[GroupedQuery] = []
    for count, init, grouping in product(kv_heads, get_args(Init), get_args(Grouping)):
        if init not in inits or grouping not in groupings or (init == "random" and grouping == "similar"):
            continue
        if grouping == "similar" and count == 1:
            continue  # one group of all heads, in whatever order
        found.append(GroupedQuery(kv_heads=count, init=init, grouping=grouping))
        if statistics is not None and (init in ("aligned", "svd") or grouping == "similar"):
            found.append(GroupedQuery(kv_heads=count, init=init, grouping=grouping, statistics=statistics))
    return found


def main(arguments: Sequence[str]) -> int:
    given = read_arguments(arguments, KEYS, required=("checkpoint", "data", "kv_heads"))
    length, texts = whole(given, "length", 512, least=1), whole(given, "texts", 8, least=1)
    kv_heads = wholes(given, "kv_heads", (), least=1)
    for key, known in (("inits", get_args(Init)), ("groupings", get_args(Grouping))):
        if key in given and not set(given[key].split(",")) <= set(known):
            refuse(f"{key}={given[key]}: expected some of {','.join(known)}")
    directory = resolve_checkpoint(given["checkpoint"])
    model = load_model(directory, dtype=torch.float32)
    if not isinstance(model, Decoder | Encoder):
        print(f"checkpoint={given['checkpoint']}: this measures decoders and encoders alone", file=sys.stderr)
        return 2
    tokenizer, framed = Tokenizer.load(directory), isinstance(model, Encoder)
    tokens_BT = text_windows(given["data"], tokenizer, length=length, count=texts, framed=framed)
    output = output_directory(given.get("output"), smoke=False)
    command = "python -m longspan.benchmarks.sharing " + " ".join(
        f"{name}={Path(value).name if name in ('checkpoint', 'data', 'statistics') else value}"
        for name, value in given.items()
        if name != "output"
    )
    with tempfile.TemporaryDirectory() as scratch:
        moments = None
        if "statistics" in given:
            moments = str(save_moments(input_moments(model, tokenizer, given["statistics"]), f"{scratch}/moments"))
        surgeries = surgeries_of(
            kv_heads,
            given.get("inits", ",".join(get_args(Init))).split(","),
            given.get("groupings", ",".join(get_args(Grouping))).split(","),
            moments,
        )
        for sharing in measure(model, tokens_BT, surgeries):
            surgery = sharing.surgery
            row = {
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "command": command,
                "checkpoint": Path(given["checkpoint"]).name,
                "heads": model.config.n_heads,
                "kv_heads": model.config.kv_heads if surgery is None else surgery.kv_heads,
                "init": "" if surgery is None else surgery.init,
                "grouping": "" if surgery is None else surgery.grouping,
                "compared_by": "" if surgery is None else "text" if surgery.statistics else "weights",
                "texts": texts,
                "length": length,
                "measure": "cosine" if framed else "loss",
                "score": round(sharing.score, 5),
                "standard_error": "" if math.isnan(sharing.error) else round(sharing.error, 5),
                **facts_of_run(),
            }
            append("sharing.csv", [row], output)
            shown = " ".join(str(row[key]) for key in ("kv_heads", "init", "grouping", "compared_by"))
            print(f"{shown:36s} {row['measure']} {sharing.score:.4f} ± {sharing.error:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    started(main)
