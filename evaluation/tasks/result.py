"""From the scores of single questions to the numbers of a task, each with the protocol that it was measured by.

Legend: N questions, d documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from longspan.data.questions import GroupValue

from ..bootstrap import figure_interval, ratio_interval
from ..names import LongTextRule
from .task import Ask, Combine, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProtocol:
    """How a task was measured: numbers of different protocols are not comparable.

    ask               how the model was asked (`tasks.task.Ask`)
    long_texts        what became of texts that the model cannot read whole
    max_tokens        that the model read at most, a decoder with its answer
    start             tokens that begin all that it read
    questions         how many
    questions_sha256  of their texts and answers, in order: equal means that models were asked the same
    files             name → sha256 of the local files that they were made of; `n_refused` rows could not be used
    tokenizer_sha256  of the tokenizer.json; of tasks that are made to length it decides about the questions too
    precision         of the weights that computed
    """

    task: str
    version: int
    ask: Ask
    long_texts: LongTextRule
    max_tokens: int
    start: tuple[int, ...]
    max_new_tokens: int
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int | None
    seed: int
    questions: int
    questions_sha256: str
    files: Mapping[str, str]
    n_refused: int
    tokenizer_sha256: str
    precision: str

    @property
    def words(self) -> str:
        """One sentence that lets somebody else reproduce the number."""
        how = {
            "generate": f"answers of at most {self.max_new_tokens} tokens, written greedily",
            "choose": "the choice with the highest log-probability (summed over its tokens) behind the prompt",
            "force": "the reference's tokens, each the likeliest given those before it",
            "classify": "the classification head's likeliest class",
            "extract": "the part of the text that the head for answers points at",
        }[self.ask]
        rule = {
            "refuse": "no text shortened",
            "keep_head": "of texts that are too long the beginning",
            "keep_tail": "of texts that are too long the end",
            "cut_middle": "of texts that are too long the beginning and the end, half each",
            "bm25": "of texts that are too long the parts with the highest BM25 score for the question",
            "word_overlap": "of texts that are too long the parts that share most words with the question",
            "best_chunk": "texts that are too long in overlapping parts, of whose answers the most confident counts",
            "map_reduce": "texts that are too long in parts, whose answers are read in turn",
            "fused": "texts that are too long encoded in overlapping parts, all of which the decoder attends to",
        }[self.long_texts]
        made = f", made to {', '.join(f'{length:,}' for length in self.lengths)} tokens" if self.lengths else ""
        return (
            f"{self.task} version {self.version}: {self.questions:,} questions{made} (seed {self.seed}); {how}; "
            f"at most {self.max_tokens:,} tokens read, {rule}; {self.precision}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionScore:
    """One question's numbers, as samples/<task>.jsonl keeps them."""

    id: str
    document: str
    groups: Mapping[str, GroupValue]
    scores: Mapping[str, float]
    answer: str
    references: tuple[str, ...]
    prompt_tokens: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """mean over questions, or what is made of several means, with its 95 % bootstrap interval over documents; None with
    fewer than ten of them"""

    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The questions with one value of each group that it names."""

    groups: Mapping[str, GroupValue]
    questions: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """headline   the metric that stands for the task
    truncated  questions whose text was shortened
    cells      by each group, and by length and depth together where questions have both
    """

    protocol: TaskProtocol
    headline: str
    metrics: Mapping[str, Metric]
    questions: int
    documents: int
    truncated: int
    cells: tuple[Cell, ...]

    @property
    def score(self) -> Metric:
        return self.metrics[self.headline]

    def by(self, *groups: str) -> tuple[Cell, ...]:
        """The cells of these groups, in order of their values."""
        chosen = [cell for cell in self.cells if tuple(cell.groups) == groups]
        return tuple(sorted(chosen, key=lambda cell: [_sortable(value) for value in cell.groups.values()]))

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON, with the protocol in words beside its fields."""
        record = asdict(self)
        record["protocol"]["words"] = self.protocol.words
        return record


def summarise_task(task: Task, protocol: TaskProtocol, found: Sequence[QuestionScore], *, seed: int = 0) -> TaskResult:
    """The task's numbers; `seed` is the bootstrap's. Raises ValueError for no questions."""
    if not found:
        raise ValueError(f"{task.name}: no questions were answered")
    metrics = {name: _metric(found, name, seed) for name in found[0].scores}
    if task.combine is not None:
        metrics |= _combined(task.combine, found, seed)
    names = sorted({name for each in found for name in each.groups})
    breakdowns: list[tuple[str, ...]] = [(name,) for name in names]
    if {"length", "depth"} <= set(names):
        breakdowns.append(("length", "depth"))
    return TaskResult(
        protocol=protocol,
        headline=task.headline,
        metrics=metrics,
        questions=len(found),
        documents=len({each.document for each in found}),
        truncated=sum(each.dropped > 0 for each in found),
        cells=tuple(cell for breakdown in breakdowns for cell in _cells(task, found, breakdown)),
    )


def _metric(found: Sequence[QuestionScore], name: str, seed: int) -> Metric:
    _, total_dK, count_d = by_document([each.document for each in found], [[each.scores[name]] for each in found])
    return Metric(
        mean=float(np.mean([each.scores[name] for each in found])),
        interval=ratio_interval(total_dK[:, 0], count_d, seed=seed),
    )


def _combined(combine: Combine, found: Sequence[QuestionScore], seed: int) -> dict[str, Metric]:
    """What is made of means, with the intervals of what is made of the means over other draws of documents."""
    names = list(found[0].scores)
    score_NK = np.array([[each.scores[name] for name in names] for each in found], dtype=np.float64)
    _, total_dK, count_d = by_document([each.document for each in found], score_NK)
    mean_K = score_NK.mean(axis=0)
    return {
        name: Metric(
            mean=value,
            interval=figure_interval(
                total_dK, count_d, lambda of_K, of=name: combine(dict(zip(names, of_K.tolist())))[of], seed=seed
            ),
        )
        for name, value in combine(dict(zip(names, mean_K.tolist()))).items()
    }


def by_document(documents: Sequence[str], score_NK: ArrayLike) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """(names, float64 [d, K], int64 [d]): the documents in the order of their names, sums of the scores of each one's
    questions, and how many those are."""
    units, unit_N = np.unique(np.asarray(documents, dtype=object).astype(str), return_inverse=True)
    total_dK = np.zeros((len(units), np.shape(score_NK)[1]))
    np.add.at(total_dK, unit_N, np.asarray(score_NK, dtype=np.float64))
    return tuple(units.tolist()), total_dK, np.bincount(unit_N)


def _cells(task: Task, found: Sequence[QuestionScore], breakdown: tuple[str, ...]) -> list[Cell]:
    members: dict[tuple[GroupValue, ...], list[QuestionScore]] = {}
    for each in found:
        if all(name in each.groups for name in breakdown):
            members.setdefault(tuple(each.groups[name] for name in breakdown), []).append(each)
    cells = []
    for values, inside in members.items():
        means = {name: sum(each.scores[name] for each in inside) / len(inside) for name in inside[0].scores}
        combined = {} if task.combine is None else dict(task.combine(means))
        cells.append(Cell(groups=dict(zip(breakdown, values)), questions=len(inside), metrics=means | combined))
    return cells


def _sortable(value: GroupValue) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, value)
