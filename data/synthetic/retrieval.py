"""Pairs of pieces of text: are both from the same document? A stand-in for Long Range Arena's byte-level retrieval.

Long Range Arena (Tay et al. 2020, arXiv 2011.04006, §2.2.3) asks whether one paper cites the other, of pairs from the
ACL Anthology Network, which are not to be had everywhere, and encodes the two texts apart. Here documents are any there
are, the question is whether two pieces are from the same one, and a model reads both in one sequence with a separator
between: a task of the same form and length, whose numbers are not comparable with the published ones.

Documents, not pieces, are divided between training and validation: no document is on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..example_records import ExampleRecord
from .fill import generator

SEPARATOR = "\n\n=====\n\n"
SAME, DIFFERENT = "same", "different"
PIECE_BYTES = 4000


@dataclass(frozen=True, slots=True)
class Document:
    """A text, and a name that no other document has."""

    name: str
    text: str


def pair_records(
    documents: Iterable[Document], *, n: int, piece_bytes: int = PIECE_BYTES, seed: int = 0
) -> Iterator[ExampleRecord]:
    """n pairs, in turn of the same document and of different ones: `text` holds both pieces, SEPARATOR between them.

    documents    those shorter than two pieces are left out
    piece_bytes  of each piece at most, in UTF-8; pieces of one document do not overlap

    Raises ValueError where fewer than two documents are long enough.
    """
    long = [(each.name, each.text.encode()) for each in documents]
    long = [(name, text) for name, text in long if len(text) >= 2 * piece_bytes]
    if len(long) < 2:
        raise ValueError(f"{len(long)} documents have {2 * piece_bytes:,} bytes or more: pairs take 2 at least")
    for index in range(n):
        rng = generator(seed, "pairs", index)
        label = SAME if index % 2 == 0 else DIFFERENT
        first, other = rng.permutation(len(long))[:2].tolist()
        second = first if label == SAME else other
        starts = _starts(len(long[first][1]), len(long[second][1]), piece_bytes, first == second, rng)
        pieces = [
            long[place][1][start : start + piece_bytes].decode(errors="ignore")  # a character cut in half is left out
            for place, start in zip((first, second), starts, strict=True)
        ]
        yield ExampleRecord(
            place=f"pair {index} of {long[first][0]} and {long[second][0]}",
            texts={"text": SEPARATOR.join(pieces)},
            label=label,
        )


def _starts(first: int, second: int, piece: int, same: bool, rng: np.random.Generator) -> tuple[int, int]:
    """Where the pieces begin; of one document they do not overlap, and either may come first."""
    if not same:
        return int(rng.integers(first - piece + 1)), int(rng.integers(second - piece + 1))
    early, late = sorted(rng.integers(first - 2 * piece + 1, size=2).tolist())
    starts = (early, late + piece)
    return starts if rng.integers(2) else starts[::-1]


def write_pairs(
    documents: Sequence[Document],
    directory: Path | str,
    *,
    n_train: int,
    n_validation: int,
    held_out: float = 0.1,
    piece_bytes: int = PIECE_BYTES,
    seed: int = 0,
) -> tuple[Path, Path]:
    """train.jsonl and validation.jsonl in `directory`, a line {"text": …, "label": "same" or "different"} each.

    held_out  share of the documents that validation pairs are of, at random; two at least

    Raises ValueError where either side has fewer than two documents that are long enough, FileExistsError for files
    that are there.
    """
    order = generator(seed, "pairs split").permutation(len(documents)).tolist()
    n_held = max(2, round(held_out * len(documents)))
    sides = {
        "train": ([documents[place] for place in order[n_held:]], n_train),
        "validation": ([documents[place] for place in order[:n_held]], n_validation),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (chosen, n) in sides.items():
        records = list(pair_records(chosen, n=n, piece_bytes=piece_bytes, seed=seed))
        path = directory / f"{name}.jsonl"
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": each.texts["text"], "label": each.label}) + "\n" for each in records)
        paths.append(path)
    return paths[0], paths[1]
