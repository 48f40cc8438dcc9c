"""An encoder with a head answers the questions of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.model.encoder import Encoder

from ..tasks.task import Answer, Ask, Task, Truncation
from .predictions import predict_answers, predict_classes
from .prompts import TooLong
from .reader import Reply


class EncoderReader:
    """An encoder with a classification head names the class of a text; one with a head for answers points at a part of
    it, reading long texts in windows that overlap. Of a text to classify that is too long, the beginning is read."""

    def __init__(self, model: Encoder, tokenizer: Tokenizer, *, max_tokens: int, batch: int) -> None:
        by_head: dict[str | None, frozenset[Ask]] = {
            "classification": frozenset({"classify"}),
            "qa": frozenset({"extract"}),
        }
        self.asks = by_head.get(model.config.head, frozenset())
        self.start = tokenizer.frame.before
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch = batch

    def new_tokens(self, task: Task) -> int:
        return 0

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        rule = task.truncation if truncation is None else truncation
        if ask == "classify" and rule not in ("refuse", "keep_head"):
            raise TooLong(
                f"{task.name}: long_texts={rule}: of a text to classify an encoder reads the beginning; say "
                "keep_head, or refuse"
            )
        frame = self.tokenizer.frame
        room = self.max_tokens - len(frame.before) - len(frame.after)
        if ask == "classify" and rule == "refuse":
            for question in questions:
                if (tokens := len(self.tokenizer.encode(question.context))) > room:
                    raise TooLong(
                        f"{task.name}: the text of question {question.id} has {tokens:,} tokens and the model reads "
                        f"{room:,}; long_texts=keep_head reads its beginning"
                    )
        of_size = self.batch * 8  # as many texts are sorted by length
        for first in range(0, len(questions), of_size):
            some = questions[first : first + of_size]
            for question, text in zip(some, self._answers(task, ask, some), strict=True):
                tokens = len(self.tokenizer.encode(question.context))
                read = min(tokens, room) if ask == "classify" else tokens
                yield Reply(question=question, answer=Answer(text=text), prompt_tokens=read, dropped=tokens - read)

    def _answers(self, task: Task, ask: Ask, questions: Sequence[Question]) -> list[str]:
        if ask == "classify":
            texts = [question.context for question in questions]
            found = predict_classes(self.model, self.tokenizer, texts, context=self.max_tokens, batch=self.batch)
            return [each.label for each in found]
        pairs = [(question.query or question.after, question.context) for question in questions]
        spans = predict_answers(
            self.model,
            self.tokenizer,
            pairs,
            context=self.max_tokens,
            may_be_missing=task.unanswerable,
            batch=self.batch,
        )
        return [each.text for each in spans]
