"""From questions to token ids: prompts that fit the model, and the tokens of what may be answered.

A prompt is tokenised as one text, so that it has the tokens that training would have given it. So is a prompt with an
answer behind it: the answer has the tokens from the first on that differs from the prompt's own, and where a tokenizer
merges over the place where the two meet, it stands for the prompt's last ones as well. Only tokens of a question's
context are ever left out. The room for it is what the longest question of the document leaves: all of them read the
same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer

from ..tasks.task import Ask, Task, Truncation
from .context_processing import context_span, truncate

_TAIL = 200  # characters of a prompt that are enough to know how an answer behind it is tokenised


class TooLong(ValueError):  # noqa: N818  # says what is the matter, as its users read it
    """A question whose text the model cannot read whole, under a rule that leaves nothing out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Something that may be answered: its tokens, and how many of the prompt's last ones they stand for as well."""

    tokens: tuple[int, ...]
    replaces: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question as a model reads it.

    tokens   what is read, start tokens included
    options  each choice, or the reference; (): an answer is generated
    dropped  tokens of the text that were left out
    """

    question: Question
    tokens: tuple[int, ...]
    options: tuple[Option, ...] = ()
    dropped: int = 0

    @property
    def rows(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What is read before each option, and the option's tokens."""
        return [(self.tokens[: len(self.tokens) - each.replaces], each.tokens) for each in self.options]


def prompts_of(
    task: Task,
    ask: Ask,
    questions: Iterable[Question],
    tokenizer: Tokenizer,
    *,
    start: Sequence[int],
    max_tokens: int,
    truncation: Truncation | None = None,
    answer_apart: bool = False,
) -> list[Prompt]:
    """A prompt for each question, questions of a document side by side. How much of a text is read depends on all
    questions about it that are given.

    start         tokens that begin every prompt
    max_tokens    that the model reads, the answer included (`answer_apart`: without it, as an encoder–decoder does)
    truncation    instead of the task's own rule
    Raises TooLong where nothing may be left out, or too little can be.
    """
    rule = task.truncation if truncation is None else truncation
    prompts: list[Prompt] = []
    documents: dict[str, list[Question]] = {}
    for question in questions:
        documents.setdefault(question.document, []).append(question)
    for of_document in documents.values():
        prompts += _of_document(
            task, ask, of_document, tokenizer, start=start, max_tokens=max_tokens, rule=rule, answer_apart=answer_apart
        )
    return prompts


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows have in common."""
    shortest = min(map(len, rows))
    first = np.asarray(rows[0][:shortest])
    common = shortest
    for row in rows[1:]:
        differing = np.flatnonzero(first[:common] != np.asarray(row[:common]))
        if len(differing):
            common = int(differing[0])
    return common


def _of_document(
    task: Task,
    ask: Ask,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    start: Sequence[int],
    max_tokens: int,
    rule: Truncation,
    answer_apart: bool,
) -> list[Prompt]:
    encoded = tokenizer.encode_offsets([question.before + question.context + question.after for question in questions])
    options = [
        () if ask == "generate" else options_of(question, ask, tokenizer, ids_T.tolist())
        for question, (ids_T, _) in zip(questions, encoded)
    ]
    spans = [context_span(question, chars_T2) for question, (_, chars_T2) in zip(questions, encoded)]
    rooms = []
    for (ids_T, _), (first, last), of_question in zip(encoded, spans, options):
        answer = task.max_new_tokens if ask == "generate" else max(len(option.tokens) for option in of_question)
        rest = len(start) + len(ids_T) - (last - first) + (0 if answer_apart else answer)
        rooms.append(max_tokens - rest)
    room = min(rooms)
    longest = max(last - first for first, last in spans)
    if longest > room and (rule == "refuse" or room < 1):
        worst = questions[int(np.argmin(rooms))]
        needed = max_tokens - room + longest
        raise TooLong(
            f"{task.name}: question {worst.id} needs {needed:,} tokens with its answer and the model reads "
            f"{max_tokens:,}"
            + (
                "; ask for shorter ones (lengths), shorten its text (long_texts=cut_middle), or ask another model"
                if room > 0
                else f", of which instructions, question and answer alone take {max_tokens - room:,}; "
                + ("limit the answer (answer_tokens), or " if ask == "generate" else "")
                + "ask a model that reads more"
            )
        )
    prompts = []
    for question, (ids_T, _), (first, last), of_question in zip(questions, encoded, spans, options):
        ids = ids_T.tolist()
        kept = truncate(ids[first:last], room, rule) if last - first > room else ids[first:last]
        prompts.append(
            Prompt(
                question=question,
                tokens=(*start, *ids[:first], *kept, *ids[last:]),
                options=of_question,
                dropped=last - first - len(kept),
            )
        )
    return prompts


def options_of(question: Question, ask: Ask, tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[Option, ...]:
    """The choices of a question, or its reference, behind a prompt of these tokens. Raises ValueError for one that has
    no tokens of its own."""
    texts = question.choices if ask == "choose" else question.references[:1]
    tail = (question.after or question.context)[-_TAIL:]
    before = tokenizer.encode(tail)
    found = []
    for text in texts:
        whole = tokenizer.encode(tail + question.joint + text)
        common = common_prefix([before, whole])
        replaces = len(before) - common
        if not whole[common:] or list(prompt[len(prompt) - replaces :]) != before[common:]:
            # The tail by itself has other tokens than at the end of the prompt: the whole of it does not.
            text_of_prompt = question.before + question.context + question.after
            whole, common = tokenizer.encode(text_of_prompt + question.joint + text), 0
            common = common_prefix([prompt, whole])
            replaces = len(prompt) - common
        if not whole[common:]:
            raise ValueError(f"question {question.id}: the tokenizer has no tokens for the answer {text!r}")
        found.append(Option(tokens=tuple(whole[common:]), replaces=replaces))
    return tuple(found)
