"""An encoder–decoder answers the questions of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.model.generation import complete
from longspan.model.prompts import fitting
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq

from ..tasks.task import Answer, Ask, Task, Truncation
from .prompts import prompts_of
from .reader import Reply


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
