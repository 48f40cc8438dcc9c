"""A task asked of a model, question by question, into a file that the next try goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer

from ..journal import keep, kept_records
from ..names import LongTextRule
from ..tasks.result import QuestionScore, TaskProtocol, TaskResult, summarise_task
from ..tasks.task import Ask, Asked, Task, Truncation
from .reader import Reader, Reply

_DOES: Mapping[Ask, str] = MappingProxyType(
    {
        "generate": "writes answers",
        "choose": "takes one of those given",
        "force": "is held to an answer",
        "classify": "names classes",
        "extract": "points at answers",
    }
)


class CannotAsk(ValueError):  # noqa: N818  # says what is the matter, as its users read it
    """A model that can be asked in none of a task's ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedModel:
    """A model as tasks see it, and what the protocol says of it."""

    reader: Reader
    tokenizer: Tokenizer
    precision: str


def way_of_asking(task: Task, reader: Reader, long_texts: LongTextRule | None = None) -> Ask:
    """The first of the task's ways that the model can do. Raises CannotAsk, saying what would be needed.

    long_texts   the strategy that the reader goes by, if any
    """
    for ask in task.asks:
        if ask in reader.asks:
            return ask
    needs = {
        "generate": "a decoder or an encoder–decoder",
        "choose": "a decoder",
        "force": "a decoder",
        "classify": "an encoder with a classification head (head=classification, fine-tuned for this task)",
        "extract": "an encoder with a head for answers (head=qa, fine-tuned for this task)",
    }
    needed = " or ".join(needs[ask] for ask in task.asks)
    if long_texts is not None and as_truncation(long_texts) is None:
        parts = "bm25, word_overlap, " if "choose" in task.asks else ""
        raise CannotAsk(
            f"{task.name} cannot be asked with long_texts={long_texts}, by which a model "
            f"{' or '.join(_DOES[ask] for ask in sorted(reader.asks))}: it needs {needed}, with "
            f"{parts}keep_head, keep_tail, cut_middle or refuse"
        )
    raise CannotAsk(f"{task.name} cannot be asked of this model: it needs {needed}")


def run_task(
    task: Task,
    model: AskedModel,
    asked: Asked,
    *,
    samples: Path,
    long_texts: LongTextRule | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskResult, tuple[QuestionScore, ...]]:
    """Asks every question that `samples` does not answer yet, and sums all of them up; and each question's scores.

    samples     file of one JSON line a question, appended to as answers come. It begins with the protocol: another one
                is refused
    long_texts  instead of the task's own rule for texts that are too long; a strategy beyond truncation is the reader's
    progress    called with (questions answered, questions in all)

    Raises CannotAsk, `prompts.TooLong`, and ValueError for questions that cannot be had.
    """
    ask = way_of_asking(task, model.reader, long_texts)
    questions = asked.questions
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"{task.name}: two questions have the same id; ids tell answers apart")
    if not questions:
        raise ValueError(f"{task.name} has no questions")
    protocol = TaskProtocol(
        task=task.name,
        version=task.version,
        ask=ask,
        long_texts=long_texts or task.truncation,
        max_tokens=model.reader.max_tokens,
        start=model.reader.start,
        max_new_tokens=model.reader.new_tokens(task) if ask == "generate" else 0,
        lengths=asked.lengths,
        depths=asked.depths,
        samples=asked.samples,
        seed=asked.seed,
        questions=len(questions),
        questions_sha256=_digest(questions),
        files=dict(asked.files),
        n_refused=asked.n_refused,
        tokenizer_sha256=model.tokenizer.sha256,
        precision=model.precision,
    )
    header = asdict(protocol)
    found = {each.id: each for each in map(_read, kept_records(samples, header))}
    # Whole documents: how much of a text is read depends on all questions about it.
    open_documents = {question.document for question in questions if question.id not in found}
    left = [question for question in questions if question.document in open_documents]
    if progress is not None:
        progress(len(found), len(questions))
    for reply in model.reader.replies(task, ask, left, as_truncation(long_texts)) if left else ():
        score = _scored(task, reply)
        if score.id in found:
            continue
        keep(samples, header, asdict(score))
        found[score.id] = score
        if progress is not None:
            progress(len(found), len(questions))
    scores = tuple(found[question.id] for question in questions)
    return summarise_task(task, protocol, scores, seed=asked.seed), scores


def as_truncation(long_texts: LongTextRule | None) -> Truncation | None:
    """The rule, where it is one: a strategy is what the reader goes by."""
    rules: dict[str, Truncation] = {rule: rule for rule in get_args(Truncation)}
    return None if long_texts is None else rules.get(long_texts)


def _scored(task: Task, reply: Reply) -> QuestionScore:
    question = reply.question
    return QuestionScore(
        id=question.id,
        document=question.document,
        groups=dict(question.groups),
        scores=dict(task.score(question, reply.answer)),
        answer=reply.answer.text,
        references=question.references,
        prompt_tokens=reply.prompt_tokens,
        dropped=reply.dropped,
    )


def _digest(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(asdict(question), sort_keys=True).encode())
    return digest.hexdigest()


def _read(record: Mapping[str, Any]) -> QuestionScore:
    return QuestionScore(**{**record, "references": tuple(record["references"])})
