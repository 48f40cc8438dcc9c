"""Readers of texts longer than the model, which go by a strategy of `context_processing` or by fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.model.decoder import Decoder
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq

from ..tasks.task import Answer, Ask, Task, Truncation
from .context_processing import STRATEGIES, LongText, NoRoom, Processed, Selected
from .decoder import DecoderReader
from .fusion import Fused, ModelWriter, long_text
from .prompts import Prompt, TooLong, options_of
from .reader import Reply
from .seq2seq import global_positions, target_room

BY_STRATEGY: Mapping[str, Callable[[LongText, ModelWriter], Processed]] = MappingProxyType(
    {**STRATEGIES, "fused": Fused()}
)


class StrategyReader:
    """A decoder or an encoder–decoder that reads long texts by a strategy, question by question.

    start       tokens that begin a decoder's prompt
    max_tokens  that the model reads; of a decoder, the answer included
    Raises ValueError for a strategy that the model cannot do.
    """

    asks: frozenset[Ask] = frozenset({"generate"})

    def __init__(
        self,
        model: Decoder | Seq2Seq,
        tokenizer: Tokenizer,
        strategy: str,
        *,
        start: Sequence[int],
        max_tokens: int,
        batch: int,
    ) -> None:
        if strategy == "fused" and not isinstance(model, Seq2Seq):
            raise ValueError("long_texts=fused: fuses what an encoder made of each part, and this model is a decoder")
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch = batch
        self._strategy = BY_STRATEGY[strategy]
        frame = tokenizer.frame
        self.start, self._end = (frame.before, frame.after) if isinstance(model, Seq2Seq) else (tuple(start), ())

    def new_tokens(self, task: Task) -> int:
        return target_room(self.model, task) if isinstance(self.model, Seq2Seq) else task.max_new_tokens

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        answer = 0 if isinstance(self.model, Seq2Seq) else task.max_new_tokens
        writer = ModelWriter(
            model=self.model,
            tokenizer=self.tokenizer,
            sampling=Sampling(
                max_new_tokens=self.new_tokens(task),
                temperature=0.0,
                stop_tokens=frozenset({self.tokenizer.eos_id}),
                pad_token=self.tokenizer.eos_id,
            ),
            max_prompt=self.max_tokens - answer,
            batch=self.batch,
            stop_strings=task.stop,
            global_positions=global_positions(self.model) if isinstance(self.model, Seq2Seq) else (),
        )
        for question in questions:
            text = long_text(question, self.tokenizer, start=self.start, end=self._end)
            try:
                done = self._strategy(text, writer)
            except NoRoom as error:
                raise TooLong(f"{task.name}: question {question.id}: {error}") from None
            read = {token for span in done.read for token in span}
            yield Reply(
                question=question,
                answer=Answer(text=done.text),
                prompt_tokens=sum(map(len, done.read)) + done.prompts * (len(text.before) + len(text.after)),
                dropped=len(text.context) - len(read),
            )


class SelectingReader:
    """A decoder that reads, of texts that are too long, the parts which a strategy selects, all of them at once: it can
    be given choices, too. What is to be continued (`force`) cannot be made of parts."""

    asks: frozenset[Ask] = frozenset({"generate", "choose"})

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        selected: Selected,
        *,
        start: Sequence[int],
        max_tokens: int,
        batch: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.start = tuple(start)
        self.max_tokens = max_tokens
        self._selected = selected
        self._reader = DecoderReader(model, tokenizer, start=start, max_tokens=max_tokens, batch=batch)

    def new_tokens(self, task: Task) -> int:
        return self._reader.new_tokens(task)

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        yield from self._reader.answers(task, ask, [self._prompt(task, ask, question) for question in questions])

    def _prompt(self, task: Task, ask: Ask, question: Question) -> Prompt:
        text = long_text(question, self.tokenizer, start=self.start)
        whole = text.prompt((range(len(text.context)),))
        options = () if ask == "generate" else options_of(question, ask, self.tokenizer, whole[len(self.start) :])
        answer = max((len(option.tokens) for option in options), default=task.max_new_tokens)
        try:
            spans = self._selected.spans(text, self.max_tokens - answer, self.tokenizer.decode)
        except NoRoom as error:
            raise TooLong(f"{task.name}: question {question.id}: {error}") from None
        return Prompt(
            question=question,
            tokens=tuple(text.prompt(spans)),
            options=options,
            dropped=len(text.context) - sum(map(len, spans)),
        )
