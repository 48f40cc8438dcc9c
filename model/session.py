"""Continuous batching over pages: requests of any lengths come and go, and share the prefixes they have in common.

    session = Session(model, tokenizer=tokenizer, max_batch=16)
    with session.prefill(document) as prefix:               # read once …
        for question in questions:                          # … shared by all that fork it
            session.submit(Request(prompt=question, prefix=prefix, sampling=Sampling(max_new_tokens=50)))
        completions = session.run()                         # number of the request -> Completion

Legend: B sequences of one call, T tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cache_plan import Storage, pages_for
from .completion import Completion, Output, TextTokenizer
from .decoder import Decoder
from .paging import CachedSequence, OutOfPages, PagedCache, PagePool
from .prompts import EMPTY, check_room, check_special, check_tokenizer, check_tokens, prefill
from .sampling import Sampling, choose, demanded, log_probabilities, no_numbers, seen_tokens, sequence_seeds, unusable
from .session_parts import Event, NoRoom, Prefix, Request, RunningRequest, manner_of, pages_within, unless_raised
from .session_steps import RecordedSteps
from .step import Steps, records

__all__ = ["Event", "NoRoom", "Prefix", "Request", "Session"]


class Session:
    """Continues many requests at once, each as it would be alone.

    Requests are admitted first come, first served, each when the pages of its whole prompt are free. Prompts are read
    in pieces, between which the others go on. When pages run out, the youngest sequence gives its own back, and is
    recomputed later from the tokens it had: its text is the same. What a request draws is a function of its seed.

    pages, page_size   size of the pool: so many pages of so many tokens. `memory` (bytes) says it otherwise; with
                       neither, room for `max_batch` sequences of the model's positions, in at most half of what is free
    max_batch          sequences that run at once
    storage            int8 or float8_e4m3fn: `create_cache`
    prefill_chunk      tokens of prompts that one step reads at most
    steps              as in `generation.stream`; recorded steps are those of any sequences, for as many as run
    """

    def __init__(
        self,
        model: Decoder,
        *,
        pages: int | None = None,
        memory: int | None = None,
        max_batch: int = 16,
        tokenizer: TextTokenizer | None = None,
        page_size: int = 16,
        storage: Storage | None = None,
        prefill_chunk: int = 512,
        steps: Steps = "auto",
    ) -> None:
        """Raises ValueError for sizes below 1, a pool that does not fit into memory, a tokenizer that has more tokens
        than the model, and steps that cannot be recorded."""
        for name, size in (("max_batch", max_batch), ("page_size", page_size), ("prefill_chunk", prefill_chunk)):
            if size < 1:
                raise ValueError(f"{name}={size}: at least 1")
        if tokenizer is not None:
            check_tokenizer(model.config, tokenizer)
        recorded = records(model, steps, paged=True)
        weight = model.head_weight
        if pages is None:
            pages = pages_within(model, memory, page_size=page_size, max_batch=max_batch, storage=storage)
        elif memory is not None:
            raise ValueError(f"pages={pages} and memory={memory} are both given: one of them sizes the pool")
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.pool = PagePool(model.config, pages, page_size, dtype=weight.dtype, device=weight.device, storage=storage)
        self._recorded = RecordedSteps(model, self.pool, max_batch, compiled=steps == "compiled") if recorded else None
        self.preemptions = 0
        self._submitted = 0
        self._prefixes: list[Prefix] = []
        self._waiting: deque[RunningRequest] = deque()
        self._running: list[RunningRequest] = []  # oldest first
        self._decoding: PagedCache | None = None  # of the latest step, for the next one over the same sequences
        # What an exception between here and there must not lose: events before and after their callback, and answers.
        self._untold: deque[tuple[Event, Request]] = deque()
        self._told: list[Event] = []
        self._done: dict[int, Completion] = {}

    # -- asking -------------------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """Requests that wait, run, or have ended without `step` having said so."""
        pending = (*self._told, *(event for event, _ in self._untold))
        return len(self._waiting) + len(self._running) + sum(event.completion is not None for event in pending)

    def prefill(self, prompt: Sequence[int] | str) -> Prefix:
        """Reads tokens that requests can begin with (`Request.prefix`), and keeps their pages until it is freed.

        Raises ValueError for an empty prompt, for more tokens than the model has positions, and when the pages that
        would be left are too few for a request that was accepted; OutOfPages when somebody else has taken the pages.
        """
        tokens = self._tokens(prompt)
        if not tokens:
            raise ValueError(EMPTY)
        check_room(self.model.config, len(tokens), 1)
        needed, held = pages_for(len(tokens), self.pool.page_size), self._held()
        others = max((self._own_pages(each) for each in (*self._waiting, *self._running)), default=0)
        if needed + held + others > self.pool.allocator.total:
            raise ValueError(
                f"a prefix of {len(tokens)} tokens needs {needed} pages of {self.pool.page_size} tokens; of "
                f"{self.pool.allocator.total}, {held} are held by prefixes and {others} may be needed by a request; "
                f"make the session with pages={needed + held + others} or more"
            )
        sequence = self.pool.open()
        tokens_1T = torch.tensor([tokens], device=self.pool.device)
        try:
            logits_1V = self._read(sequence, tokens_1T)
        except BaseException:
            sequence.free()
            raise
        prefix = Prefix(tuple(tokens), sequence, logits_1V)
        self._prefixes.append(prefix)
        return prefix

    def _read(self, sequence: CachedSequence, tokens_1T: Tensor) -> Tensor:
        """Logits [1, V] behind the tokens, preempting for their pages."""
        while True:
            try:
                unread_1T = tokens_1T[:, sequence.length :]
                return prefill(self.model, unread_1T, self.pool.cache([sequence]), chunk=self.prefill_chunk)
            except OutOfPages:
                if not self._idle_pages_freed():
                    if not self._running:
                        raise
                    self._preempt()

    def submit(self, request: Request) -> int:
        """Queues a request; its number. Raises ValueError for one that can never be served, with the numbers."""
        sampling, prefix = request.sampling, request.prefix
        if sampling.num_beams > 1:
            raise ValueError(f"num_beams={sampling.num_beams}: a session has no beam search; use `complete`")
        if prefix is not None and prefix.sequence.pool is not self.pool:
            raise ValueError("the prefix belongs to another session")
        tokens = self._tokens(request.prompt, continues=prefix is not None)
        if not tokens and prefix is None:
            raise ValueError(EMPTY)
        output = Output(
            max_new_tokens=sampling.max_new_tokens,
            stop_tokens=sampling.stop_tokens,
            stop_strings=request.stop_strings,
            tokenizer=self.tokenizer,
        )
        sequence = RunningRequest(
            number=self._submitted,
            request=request,
            prompt=tokens,
            output=output,
            seed=sequence_seeds(sampling, 1)[0],
            manner=manner_of(sampling),
        )
        check_special(self.model.config, sampling)
        check_room(self.model.config, sequence.begins + len(tokens), sampling.max_new_tokens)
        own, held, total = self._own_pages(sequence), self._held(), self.pool.allocator.total
        if own + held > total:
            before = f" after a prefix of {sequence.begins}" if prefix is not None else ""
            raise NoRoom(
                f"a prompt of {len(tokens)} tokens{before} and {sampling.max_new_tokens} new ones need {own} pages of "
                f"{self.pool.page_size} tokens, but the session has {total}, {held} of them held by prefixes",
                pages=own + held,
            )
        if prefix is not None:
            prefix.acquire()
        self._submitted += 1
        self._waiting.append(sequence)
        return sequence.number

    def run(self, on_event: Callable[[Event], None] | None = None) -> dict[int, Completion]:
        """Steps until nothing is left to do; what finished since `run` last returned, by number of the request."""
        while self.unfinished:
            events = self.step()
            self._done.update({each.request: each.completion for each in events if each.completion is not None})
            for event in events:
                if on_event is not None:
                    on_event(event)
        done, self._done = self._done, {}
        return dict(sorted(done.items()))

    def step(self) -> list[Event]:
        """Admits, reads a piece of the prompts that are not read yet, and continues every other sequence by a token.
        The tokens that came of it.

        Whatever is raised meanwhile, by a callback or for want of memory, the next step goes on from there, and returns
        the events that this one could not.
        """
        self._admit()
        decoding = [each for each in self._running if len(each.unread) == 1]
        if not self._replay(decoding):
            self._advance(decoding)
        self._advance(self._next_to_read())
        self._choose([each for each in self._running if each.logits_1V is not None])
        if not self._running:
            self._idle_pages_freed()
        while self._untold:
            event, request = self._untold.popleft()
            self._told.append(event)
            if event.text and request.on_text is not None:
                request.on_text(event.text)
        told, self._told = self._told, []
        return told

    # -- scheduling ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Sequences from the head of the queue, while there is room for all that each has to read."""
        page_size = self.pool.page_size
        promised = sum(map(self._missing_pages, self._running))
        while self._waiting and len(self._running) < self.max_batch:
            head = self._waiting[0]
            if head.output.finish_reason is not None:  # no tokens were asked for
                self._untold.append(self._event(head, None, 0.0, ""))
                continue
            unread = [*head.prompt, *head.output.tokens]
            # One more for the first new token: a sequence that could not even have that would be in vain.
            needed = pages_for(min(head.begins + len(unread) + 1, head.longest), page_size) - head.begins // page_size
            free = self.pool.allocator.free
            if promised + needed > free:
                if self._idle_pages_freed():
                    continue
                if not self._running:  # submit made sure of room: somebody else has the pages
                    raise OutOfPages(needed, free, self.pool.allocator.total)
                break
            promised += needed
            self._waiting.popleft()
            prefix = head.request.prefix
            head.cached = self.pool.open() if prefix is None else prefix.sequence.fork()
            head.unread = unread
            self._running.append(head)
            self._running.sort(key=lambda each: each.number)
            if prefix is not None and not unread:
                head.logits_1V = prefix.logits_1V

    def _next_to_read(self) -> list[RunningRequest]:
        """Sequences with prompts to read, oldest first: as many as fit, with padding, into `prefill_chunk` tokens."""
        batch: list[RunningRequest] = []
        width = 0
        for each in self._running:
            if len(each.unread) > 1:
                width = max(width, min(len(each.unread), self.prefill_chunk))
                if batch and width * (len(batch) + 1) > self.prefill_chunk:
                    break
                batch.append(each)
        return batch

    def _replay(self, batch: list[RunningRequest]) -> bool:
        """One recorded step of sequences that have one token to read. False where there are no recordings, or too few
        pages for this: then the step is taken plainly."""
        if self._recorded is None or not batch:
            return False
        sequences = [each.cached for each in batch if each.cached is not None]
        with unless_raised(sequences):
            try:
                tokens, longest = [each.unread[0] for each in batch], max(each.longest for each in batch)
                logits_BV = self._recorded.advance(sequences, tokens, longest)
            except OutOfPages:
                return False
            for row, each in enumerate(batch):
                each.unread, each.logits_1V = [], logits_BV[row : row + 1]
        return True

    def _advance(self, batch: list[RunningRequest]) -> None:
        """One call of the model over a piece of what each sequence has not read. Preempts the youngest until there are
        pages for the rest."""
        while batch:
            pieces = [each.unread[: self.prefill_chunk] for each in batch]
            counts = [len(piece) for piece in pieces]
            width = max(counts)
            padded = [piece + [0] * (width - len(piece)) for piece in pieces]
            tokens_BT = torch.tensor(padded, device=self.pool.device)
            lengths = None if min(counts) == width else counts
            with unless_raised([each.cached for each in batch if each.cached is not None]):
                try:
                    logits_BV = prefill(self.model, tokens_BT, self._cache(batch), lengths=lengths)
                except OutOfPages:
                    if not self._idle_pages_freed():
                        youngest = self._preempt()
                        batch = [each for each in batch if each is not youngest]
                    continue
                for row, (each, count) in enumerate(zip(batch, counts)):
                    del each.unread[:count]
                    each.logits_1V = None if each.unread else logits_BV[row : row + 1]
            return

    def _cache(self, batch: list[RunningRequest]) -> PagedCache:
        """Over the batch's pages; while sequences decode, the one of the step before as long as they are the same."""
        sequences = tuple(each.cached for each in batch if each.cached is not None)
        length = max(each.longest for each in batch)
        if any(len(each.unread) > 1 for each in batch):
            return self.pool.cache(sequences, length=length)
        if self._decoding is None or self._decoding.sequences != sequences:
            self._decoding = self.pool.cache(sequences, length=length)
        return self._decoding

    def _preempt(self) -> RunningRequest:
        """Takes the pages of the youngest running sequence; it waits again, before all that never ran."""
        youngest = self._running.pop()
        if youngest.cached is not None:
            youngest.cached.free()
        youngest.cached, youngest.unread, youngest.logits_1V = None, [], None
        self._waiting.appendleft(youngest)
        self._decoding = None
        self.preemptions += 1
        return youngest

    def _idle_pages_freed(self) -> bool:
        """Takes back what recordings hold for rows that nobody has, before anybody has to wait."""
        return self._recorded is not None and self._recorded.release()

    def _choose(self, ready: list[RunningRequest]) -> None:
        """The next token of each sequence; those that are chosen alike together."""
        alike: dict[Sampling, list[tuple[RunningRequest, Tensor]]] = {}
        for each in ready:
            if each.logits_1V is not None:
                logits_1V = demanded(each.logits_1V, each.request.sampling, len(each.output.tokens))
                alike.setdefault(each.manner, []).append((each, logits_1V))
        happened: list[tuple[Event, Request]] = []
        for manner, group in alike.items():
            device = self.pool.device
            logits_BV = torch.cat([logits_1V for _, logits_1V in group])
            seeds_B = torch.tensor([each.seed for each, _ in group], device=device)
            steps_B = torch.tensor([len(each.output.tokens) for each, _ in group], device=device)
            seen_BV = torch.cat([self._seen(each) for each, _ in group]) if manner.repetition_penalty != 1.0 else None
            broken_B = unusable(logits_BV)
            token_B = choose(logits_BV, manner, seeds_B=seeds_B, step=steps_B, seen_BV=seen_BV)
            logprob_B = log_probabilities(logits_BV, token_B)
            if broken_B.any():
                raise no_numbers()
            for (each, _), token, logprob in zip(group, token_B.tolist(), logprob_B.tolist()):
                text = each.output.push(token, logprob)
                each.unread, each.logits_1V = [token], None
                if each.seen_1V is not None:
                    each.seen_1V[0, token] = True
                happened.append(self._event(each, token, logprob, text))
        self._untold.extend(sorted(happened, key=lambda pair: pair[0].request))

    def _event(self, sequence: RunningRequest, token: int | None, logprob: float, text: str) -> tuple[Event, Request]:
        """With the completion of a sequence that is finished, which gives its pages back."""
        completion = None
        if sequence.output.finish_reason is not None:
            completion = sequence.output.completion()
            if sequence.cached is not None:
                sequence.cached.free()
                self._running.remove(sequence)
            else:
                self._waiting.remove(sequence)
            if sequence.request.prefix is not None:
                sequence.request.prefix.release()
        event = Event(request=sequence.number, token=token, logprob=logprob, text=text, completion=completion)
        return event, sequence.request

    # -- counting -----------------------------------------------------------------------------------------------------

    def _tokens(self, prompt: Sequence[int] | str, *, continues: bool = False) -> list[int]:
        """`continues`: it follows a prefix, so what a tokenizer puts before every text has no place there."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text: make the session with the tokenizer= that reads it")
            before = len(self.tokenizer.encode("")) if continues else 0
            prompt = self.tokenizer.encode(prompt)[before:]
        tokens = [int(token) for token in prompt]
        if tokens:
            check_tokens(self.model.config, torch.tensor(tokens))
        return tokens

    def _seen(self, sequence: RunningRequest) -> Tensor:
        if sequence.seen_1V is None:
            prefix = sequence.request.prefix
            tokens = [*(prefix.tokens if prefix is not None else ()), *sequence.prompt, *sequence.output.tokens]
            tokens_1T = torch.tensor([tokens], device=self.pool.device)
            sequence.seen_1V = seen_tokens(tokens_1T, self.model.config.vocab_size)
        return sequence.seen_1V

    def _missing_pages(self, sequence: RunningRequest) -> int:
        """Pages that a running sequence will take to hold what it has not read."""
        cached, page_size = sequence.cached, self.pool.page_size
        if cached is None:
            return 0
        copied = cached.length == sequence.begins and cached.length % page_size != 0
        return pages_for(cached.length + len(sequence.unread), page_size) - len(cached.pages) + copied

    def _own_pages(self, sequence: RunningRequest) -> int:
        """Pages that a sequence takes at most beside those it shares; one that it shares in part is copied."""
        page_size = self.pool.page_size
        return pages_for(sequence.longest, page_size) - sequence.begins // page_size

    def _held(self) -> int:
        """Pages of prefixes."""
        self._prefixes = [prefix for prefix in self._prefixes if prefix.sequence.open]
        return sum(len(prefix.sequence.pages) for prefix in self._prefixes)
