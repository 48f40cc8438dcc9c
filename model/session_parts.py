"""What a session deals in: requests, the prefixes they share, and what comes of them token by token.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

from torch import Tensor

from .cache_layers import free_memory
from .cache_plan import Storage, pages_for, pool_bytes
from .completion import Completion, Output
from .decoder import Decoder
from .paging import CachedSequence
from .sampling import Sampling


class NoRoom(ValueError):  # noqa: N818  # says what is the matter, as its users read it
    """A request that the session's pool can never hold. `needs` says what it needs and what there is; the message says
    how large a session would do."""

    def __init__(self, needs: str, pages: int) -> None:
        self.needs = needs
        super().__init__(f"{needs}; ask for fewer tokens, or make it with pages={pages}")


class Prefix:
    """Tokens that a session has read and holds for requests to begin with. `free` (or leaving a `with` block) gives its
    pages back once no request needs them."""

    def __init__(self, tokens: tuple[int, ...], sequence: CachedSequence, logits_1V: Tensor) -> None:
        self.tokens = tokens
        self.sequence = sequence
        self.logits_1V = logits_1V  # after the last token, for requests that add none
        self._users = 0
        self._wanted = True

    def free(self) -> None:
        self._wanted = False
        self._settle()

    def acquire(self) -> None:
        """One more request begins with it. Raises ValueError when it was freed."""
        if not self._wanted:
            raise ValueError("this prefix was freed; prefill it again")
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        self._settle()

    def _settle(self) -> None:
        if not self._wanted and not self._users:
            self.sequence.free()

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how it is continued, as if it were alone.

    prompt         token ids, or text for a session that has a tokenizer; with a prefix, what follows it
    sampling       its prefill_chunk and pad_token play no part: the session has a chunk of its own, and no rectangles
    stop_strings   the text is cut before the first of these; for a session that has a tokenizer
    on_text        called with further text as soon as it is certain
    """

    prompt: Sequence[int] | str
    sampling: Sampling
    stop_strings: Sequence[str] = ()
    prefix: Prefix | None = None
    on_text: Callable[[str], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A token of a request. `text` is what became certain with it; `completion` comes with the last one."""

    request: int
    token: int | None  # None: a request for no tokens
    logprob: float
    text: str
    completion: Completion | None


@dataclass(slots=True, eq=False, kw_only=True)
class RunningRequest:
    """A request on its way.

    manner      what sequences whose tokens are chosen together have in common
    cached      its tokens in the pool; None while it waits
    unread      its tokens that are not there yet
    logits_1V   of its next token, once everything is read
    """

    number: int
    request: Request
    prompt: list[int]
    output: Output
    seed: int
    manner: Sampling
    unread: list[int] = field(default_factory=list)
    cached: CachedSequence | None = None
    logits_1V: Tensor | None = None
    seen_1V: Tensor | None = None

    @property
    def begins(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.request.prefix is None else len(self.request.prefix.tokens)

    @property
    def longest(self) -> int:
        """Tokens that the cache holds at most: the last one is never read back."""
        return self.begins + len(self.prompt) + max(self.request.sampling.max_new_tokens - 1, 0)


def manner_of(sampling: Sampling) -> Sampling:
    """What sequences that are chosen together have in common."""
    alike = replace(
        sampling,
        max_new_tokens=0,
        seed=None,
        seeds=None,
        stop_tokens=frozenset(),
        pad_token=0,
        prefill_chunk=None,
        first_token=None,
        last_token=None,
    )
    return replace(alike, top_k=None, top_p=None, min_p=None) if alike.greedy else alike


def pages_within(model: Decoder, memory: int | None, *, page_size: int, max_batch: int, storage: Storage | None) -> int:
    """How many pages a session gets: what fits into `memory` bytes, or as `Session` says; ValueError for none."""
    page = pool_bytes(model.config, 1, page_size, model.head_weight.dtype, storage=storage).total
    if memory is not None:
        if memory < page:
            raise ValueError(f"memory={memory}: a page of {page_size} tokens takes {page} bytes in this model")
        return memory // page
    wanted = max_batch * pages_for(model.config.max_positions, page_size)
    free = free_memory(model.head_weight.device)
    return wanted if free is None else max(1, min(wanted, free // 2 // page))


@contextmanager
def unless_raised(sequences: Sequence[CachedSequence]) -> Iterator[None]:
    """If something is raised here, tokens that are in the cache already are taken out again: they would be read
    twice."""
    before = [sequence.length for sequence in sequences]
    try:
        yield
    except BaseException:
        for sequence, length in zip(sequences, before, strict=True):
            sequence.truncate(min(length, sequence.length))
        raise
