"""What answers the questions of a task: a decoder (`decoder_reader`), an encoder–decoder, or an encoder with a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.generation import complete
from longspan.model.prompts import fitting
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq

from .asking import TooLong, prompts_of
from .decoder_reader import DecoderReader
from .predictions import predict_answers, predict_classes
from .reader import Reader, Reply
from .tasks.task import Answer, Ask, Task, Truncation

# -- encoder–decoder --------------------------------------------------------------------------------------------------


class Seq2SeqReader:
    """An encoder–decoder reads the prompt as its source, framed by its tokenizer's template, and writes the answer.
    Where its encoder has global attention, the source's first token is global."""

    asks: frozenset[Ask] = frozenset({"generate"})

    def __init__(self, model: Seq2Seq, tokenizer: Tokenizer, *, max_tokens: int, batch: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch = batch
        self.start = tokenizer.frame.before

    def new_tokens(self, task: Task) -> int:
        return target_room(self.model, task)

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        frame = self.tokenizer.frame
        prompts = prompts_of(
            task,
            ask,
            questions,
            self.tokenizer,
            start=frame.before,
            max_tokens=self.max_tokens - len(frame.after),
            truncation=truncation,
            answer_apart=True,
        )
        prompts.sort(key=lambda prompt: -len(prompt.tokens))
        sampling = Sampling(
            max_new_tokens=self.new_tokens(task),
            temperature=0.0,
            stop_tokens=frozenset({self.tokenizer.eos_id}),
            pad_token=self.tokenizer.eos_id,
        )
        for first in range(0, len(prompts), self.batch):
            rows = prompts[first : first + self.batch]
            completions = complete(
                self.model,
                [[*row.tokens, *frame.after] for row in rows],
                sampling,
                tokenizer=self.tokenizer,
                stop_strings=task.stop,
                global_positions=global_positions(self.model),
            )
            for row, completion in zip(rows, completions, strict=True):
                yield Reply.to(row, Answer(text=completion.text or ""))


def target_room(model: Seq2Seq, task: Task) -> int:
    """Tokens of an answer that the decoder has positions for, behind its start token."""
    return fitting(model.config.decoder_half, 1, task.max_new_tokens)


def global_positions(model: Seq2Seq) -> tuple[int, ...]:
    """Which tokens of a source are global: the first, where the encoder has global attention."""
    specs = model.config.encoder_half.attention.specs().values()
    return (0,) if any(spec.global_tokens for of_pattern in specs for spec in of_pattern) else ()


# -- encoder ----------------------------------------------------------------------------------------------------------


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


def reader_of(
    model: Decoder | Encoder | Seq2Seq,
    tokenizer: Tokenizer,
    *,
    start: Sequence[int],
    max_tokens: int,
    batch: int,
) -> Reader:
    """The reader of a model; `start` is a decoder's."""
    if isinstance(model, Decoder):
        return DecoderReader(model, tokenizer, start=start, max_tokens=max_tokens, batch=batch)
    if isinstance(model, Seq2Seq):
        return Seq2SeqReader(model, tokenizer, max_tokens=max_tokens, batch=batch)
    return EncoderReader(model, tokenizer, max_tokens=max_tokens, batch=batch)
