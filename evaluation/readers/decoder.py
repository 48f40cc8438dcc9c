"""A decoder answers the questions of a task.

It reads what the questions of a document have in common once, into pages that all of them (and all the choices of each)
begin with. Where little is shared, whole prompts are read in batches instead: the same numbers up to rounding. Where
the length of a sequence rotates its keys (dynamic RoPE scaling), each prompt is read alone.

Legend: B rows, T new tokens of the longest of them, N option tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from longspan.data.questions import Question
from longspan.data.tokenizer import Tokenizer
from longspan.kernels.attention import AttentionContext
from longspan.model.cache_layers import free_memory
from longspan.model.cache_plan import pages_for, pool_bytes
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.paging import CachedSequence, PagePool
from longspan.model.prompts import prefill
from longspan.model.sampling import Sampling
from longspan.model.session import Request, Session

from ..passes import rotates_by_length
from ..tasks.task import Answer, Ask, Task, Truncation
from .prompts import Prompt, common_prefix, prompts_of
from .reader import Reply

_PAGE = 32  # tokens
_WORTH_SHARING = 128  # tokens: below that, one batch of whole prompts is as fast
_CHUNK = 4096  # tokens of a prompt that are read at a time
_SHARE_OF_MEMORY = 0.6  # of what is free, for keys and values


class DecoderReader:
    """A decoder and its tokenizer.

    start       tokens that begin a prompt: what a document begins with in training
    max_tokens  of a prompt with its answer
    batch       rows that are computed together at most
    """

    asks: frozenset[Ask] = frozenset({"generate", "choose", "force"})

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, start: Sequence[int], max_tokens: int, batch: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.start = tuple(start)
        self.max_tokens = max_tokens
        # Keys that are rotated by the length of their sequence cannot be shared, nor read beside longer ones.
        self._pages = not rotates_by_length(model)
        self.batch = batch if self._pages else 1

    def replies(
        self, task: Task, ask: Ask, questions: Sequence[Question], truncation: Truncation | None = None
    ) -> Iterator[Reply]:
        prompts = prompts_of(
            task,
            ask,
            questions,
            self.tokenizer,
            start=self.start,
            max_tokens=self.max_tokens,
            truncation=truncation,
        )
        yield from self.answers(task, ask, prompts)

    def answers(self, task: Task, ask: Ask, prompts: Sequence[Prompt]) -> Iterator[Reply]:
        """A reply to each prompt, those of a document side by side, in any order."""
        documents = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.question.document)]
        documents.sort(key=lambda group: -max(len(prompt.tokens) for prompt in group))  # alike lengths side by side
        was_training = self.model.training
        self.model.eval()
        try:
            yield from self._generated(task, documents) if ask == "generate" else self._judged(ask, documents)
        finally:
            self.model.train(was_training)

    def new_tokens(self, task: Task) -> int:
        return task.max_new_tokens

    # -- generation

    def _generated(self, task: Task, documents: Sequence[Sequence[Prompt]]) -> Iterator[Reply]:
        sampling = Sampling(
            max_new_tokens=task.max_new_tokens,
            temperature=0.0,
            stop_tokens=frozenset({self.tokenizer.eos_id}),
            pad_token=self.tokenizer.eos_id,
        )
        if not self._pages:
            prompts = [prompt for group in documents for prompt in group]
            for first in range(0, len(prompts), self.batch):
                rows = prompts[first : first + self.batch]
                tokens = [row.tokens for row in rows]
                completions = complete(self.model, tokens, sampling, tokenizer=self.tokenizer, stop_strings=task.stop)
                for row, completion in zip(rows, completions, strict=True):
                    yield Reply.to(row, Answer(text=completion.text or ""))
            return
        session = self._session(documents, task.max_new_tokens)
        running: dict[int, Prompt] = {}
        for group in documents:
            shared = common_prefix([prompt.tokens[:-1] for prompt in group]) if len(group) > 1 else 0
            prefix = session.prefill(group[0].tokens[:shared]) if shared >= _WORTH_SHARING else None
            begins = 0 if prefix is None else shared
            for prompt in group:
                request = Request(
                    prompt=prompt.tokens[begins:], sampling=sampling, stop_strings=task.stop, prefix=prefix
                )
                running[session.submit(request)] = prompt
            if prefix is not None:
                prefix.free()  # its pages stay until its questions are answered
            while session.unfinished >= session.max_batch or (running and group is documents[-1]):
                for event in session.step():
                    if event.completion is not None:
                        yield Reply.to(running.pop(event.request), Answer(text=event.completion.text or ""))

    def _session(self, documents: Sequence[Sequence[Prompt]], max_new_tokens: int) -> Session:
        """With pages for as many of the longest prompts as there is memory for, `batch` at most."""
        longest = pages_for(max(len(p.tokens) for group in documents for p in group) + max_new_tokens, _PAGE)
        rows = self._rows_that_fit(longest)
        return Session(
            self.model,
            tokenizer=self.tokenizer,
            max_batch=rows,
            pages=(rows + 1) * longest,  # and a prefix
            page_size=_PAGE,
            prefill_chunk=_CHUNK,
        )

    def _rows_that_fit(self, pages: int) -> int:
        weight = self.model.head_weight
        free = free_memory(weight.device)
        rows = self.batch
        while rows > 1 and free is not None:
            needed = pool_bytes(self.model.config, (rows + 1) * pages, _PAGE, weight.dtype).total
            if needed <= _SHARE_OF_MEMORY * free:
                break
            rows //= 2
        return rows

    # -- likelihood of given answers

    @torch.no_grad()
    def _judged(self, ask: Ask, documents: Sequence[Sequence[Prompt]]) -> Iterator[Reply]:
        waiting: list[Prompt] = []  # whose prompts are read whole
        for group in documents:
            rows = [row for prompt in group for row in prompt.rows]
            shared = common_prefix([tokens[:-1] for tokens, _ in rows])
            if self._pages and len(rows) > 1 and shared >= _WORTH_SHARING:
                for prompt, found in zip(group, self._after_prefix(group, shared)):
                    yield _judged(ask, prompt, found)
                continue
            waiting += group
            while sum(len(prompt.options) for prompt in waiting) >= self.batch:
                yield from self._whole(ask, waiting)
                waiting = []
        if waiting:
            yield from self._whole(ask, waiting)

    def _whole(self, ask: Ask, prompts: Sequence[Prompt]) -> Iterator[Reply]:
        rows = [row for prompt in prompts for row in prompt.rows]
        found: list[_Judged] = []
        for first in range(0, len(rows), self.batch):
            found += self._read(rows[first : first + self.batch])
        for prompt in prompts:
            yield _judged(ask, prompt, found[: len(prompt.options)])
            del found[: len(prompt.options)]

    def _after_prefix(self, prompts: Sequence[Prompt], shared: int) -> list[list[_Judged]]:
        """The options of prompts that begin with the same `shared` tokens."""
        rows = [(tokens[shared:], option) for prompt in prompts for tokens, option in prompt.rows]
        own = max(len(tokens) + len(option) for tokens, option in rows)
        per_row = pages_for(own + _PAGE, _PAGE)
        width = min(self.batch, len(rows))
        weight = self.model.head_weight
        pool = PagePool(
            self.model.config,
            pages_for(shared, _PAGE) + width * per_row,
            _PAGE,
            dtype=weight.dtype,
            device=weight.device,
        )
        found: list[_Judged] = []
        with pool.open() as document:
            tokens_1T = torch.tensor([prompts[0].tokens[:shared]], device=weight.device)
            prefill(self.model, tokens_1T, pool.cache([document]), chunk=_CHUNK)
            for first in range(0, len(rows), width):
                batch = rows[first : first + width]
                forks = [document.fork() for _ in batch]
                try:
                    found += self._read(batch, pool, forks)
                finally:
                    for fork in forks:
                        fork.free()
        sizes = [len(prompt.options) for prompt in prompts]
        return [[found.pop(0) for _ in range(size)] for size in sizes]

    def _read(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        pool: PagePool | None = None,
        sequences: Sequence[CachedSequence] = (),
    ) -> list[_Judged]:
        """What the model holds of each row's option behind the row's tokens (and behind what its sequence holds)."""
        device = self.model.head_weight.device
        lengths = [len(tokens) + len(option) - 1 for tokens, option in rows]
        tokens_BT = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        asked_BT = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
        for row, (tokens, option) in enumerate(rows):
            tokens_BT[row, : lengths[row]] = torch.tensor([*tokens, *option[:-1]])
            asked_BT[row, len(tokens) - 1 : lengths[row]] = True
        context = AttentionContext(kv_lengths=torch.tensor(lengths, device=device))
        cache = None if pool is None else pool.cache(sequences)
        hidden_BTD = self.model.hidden(tokens_BT.to(device), context, cache=cache)
        logits_NV = self.model.logits(hidden_BTD[asked_BT.to(device)]).float()
        targets_N = torch.tensor([token for _, option in rows for token in option], device=device)
        logprob_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
        right_N = logits_NV.argmax(-1) == targets_N
        sizes = [len(option) for _, option in rows]
        return [
            _Judged(logprob_n, right_n)
            for logprob_n, right_n in zip(logprob_N.cpu().split(sizes), right_N.cpu().split(sizes))
        ]


@dataclass(frozen=True, slots=True)
class _Judged:
    """Of each token of an option: its log-probability, and whether it was the likeliest."""

    logprob_n: Tensor
    right_n: Tensor


def _judged(ask: Ask, prompt: Prompt, found: Sequence[_Judged]) -> Reply:
    logprobs = tuple(float(each.logprob_n.double().sum()) for each in found)
    if ask == "choose":
        likeliest = max(range(len(logprobs)), key=logprobs.__getitem__)
        return Reply.to(prompt, Answer(text=prompt.question.choices[likeliest], logprobs=logprobs))
    right = tuple(found[0].right_n.tolist())
    text = prompt.question.references[0] if all(right) else ""
    return Reply.to(prompt, Answer(text=text, logprobs=logprobs, right=right))
