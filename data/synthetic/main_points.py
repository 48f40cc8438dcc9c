"""Long reports whose main points are spread over all of their length, and their summaries.

A report is made of parts. Each part has one main point, anywhere in it, and equally many asides:

    Anna first sold lamps .          a point: of all sentences of its part, the one that is numbered
    Otto mended boats .              an aside: the same words, no number

The summary is the points in order, behind their numbers: `first Anna sold lamps . second Otto found maps . …`. Nothing
in a part tells what another part's point is, and every word is drawn evenly, so what was not read cannot be written: of
a report whose beginning alone is read, a reader who is always right has as large a share of the summary as was read.

Report n of a split depends on (seed, split, n) alone. Held-out reports are the longest, eight parts of thirty asides:
1,000 words and stops. Training reports are read in this order: they come in runs of 16 of one shape, so that batches
need no padding; parts become more from run to run, because a model that begins with eight numbers at once learns for
a long time nothing but how often each word is used; and most have few asides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from .fill import generator

PointsSplit = Literal["train", "validation"]

SIZES: Mapping[PointsSplit, int] = MappingProxyType({"train": 11_200, "validation": 200})
MOST_POINTS = 8
ASIDES: Mapping[int, float] = MappingProxyType({2: 0.7, 6: 0.15, 14: 0.1, 30: 0.05})
"""How many asides the parts of a training report have, and with which probability."""
MOST_ASIDES = max(ASIDES)
RUN = 16  # training reports one after the other with equally many parts and asides
_MOST = 0.5  # share of runs with as many parts as there may be; the others have any number up to that
GROWS_IN = 40  # runs, after which training reports have one more part, until they have the most

_NUMBERS = "first second third fourth fifth sixth seventh eighth"
_NAMES = (
    "Anna Ben Clara David Emma Frank Greta Hugo Ida Jonas Karin Leo Mona Nils Olga Paul Rosa Sven Tina Uwe Vera Willi "
    "Xaver Yara Zoe Otto"
)
_VERBS = (
    "sold bought found lost mended painted counted carried washed weighed hid stole drew burned cleaned moved opened "
    "sorted traded kept"
)
_THINGS = (
    "lamps boats maps coins books chairs clocks plates ropes hats shoes knives bells cups keys drums flags masks nets "
    "pens rings sacks tents tools toys vases wheels baskets candles mirrors"
)
NUMBERS, NAMES, VERBS, THINGS = (tuple(words.split()) for words in (_NUMBERS, _NAMES, _VERBS, _THINGS))


@dataclass(frozen=True, slots=True)
class Report:
    """source, target  texts of words with spaces between them
    n_points           main points, one a part of the source
    """

    source: str
    target: str
    n_points: int


def main_points(split: PointsSplit, index: int, *, seed: int = 0) -> Report:
    """Report `index` of a split."""
    n_points, sentences = MOST_POINTS, MOST_ASIDES + 1
    if split == "train":
        shape = generator(seed, "main points of a run", index // RUN)
        most = min(MOST_POINTS, 1 + index // RUN // GROWS_IN)
        n_points = most if shape.random() < _MOST else int(shape.integers(1, most + 1))
        sentences = int(shape.choice(list(ASIDES), p=list(ASIDES.values()))) + 1
    rng = generator(seed, f"main points {split}", index)
    names, verbs, things = (rng.integers(len(words), size=(n_points, sentences)) for words in (NAMES, VERBS, THINGS))
    places = rng.integers(sentences, size=n_points)
    source: list[str] = []
    target: list[str] = []
    for part, place in enumerate(places):
        for sentence in range(sentences):
            who, did = NAMES[names[part, sentence]], VERBS[verbs[part, sentence]]
            what = THINGS[things[part, sentence]]
            if sentence == place:
                source.append(f"{who} {NUMBERS[part]} {did} {what} .")
                target.append(f"{NUMBERS[part]} {who} {did} {what} .")
            else:
                source.append(f"{who} {did} {what} .")
    return Report(" ".join(source), " ".join(target), n_points)


def points_of(text: str) -> str:
    """The summary of a report, or of the part of one that was read: of its whole sentences, those that are numbered."""
    kept = [words for words in map(str.split, text.split(".")[:-1]) if len(words) == 4 and words[1] in NUMBERS]
    return " ".join(f"{number} {who} {did} {what} ." for who, number, did, what in kept)
