"""Keys and values in pages that sequences share: a pool, sequences that fork, and a cache over some of them.

    pool = PagePool(model.config, n_pages=512)
    document = pool.open()
    prefill(model, tokens_1T, pool.cache([document]))
    questions = [document.fork() for _ in range(8)]         # no copy: pages are shared until somebody writes to one
    logits = model(token_81, cache=pool.cache(questions))

The layout of Kwon et al. 2023 (arXiv 2309.06180): a sequence is a list of pages, of which only the last has empty
slots; a page that is shared is copied when one of its sequences appends to it.

Legend: B rows, T new tokens, P pages of a row, n_pages of the pool, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.caching import AS_STORED, CachedKeys

from .cache_layers import EVERYTHING, ContextReader, Exchange, Marks, NewTokens, Read, Store, check_memory, ring_writes
from .cache_plan import CacheBytes, Storage, check_kind, layer_kinds, pages_for, pool_bytes
from .config import DecoderConfig


class OutOfPages(RuntimeError):  # noqa: N818  # says what happened, as its users read it
    """A pool has fewer free pages than a call needs; nothing was changed."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.needed, self.free, self.total = needed, free, total
        super().__init__(
            f"{needed} pages are needed and {free} of {total} are free; free a sequence, or make a larger pool"
        )


class PageAllocator:
    """Which pages are in use, and by how many sequences: `used + free == total`, always."""

    def __init__(self, n_pages: int) -> None:
        if n_pages < 1:
            raise ValueError(f"a pool of {n_pages} pages: it has at least one")
        self.total = n_pages
        self._free = list(range(n_pages))[::-1]
        self._users: Counter[int] = Counter()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._users)

    def users(self, page: int) -> int:
        return self._users.get(page, 0)

    def allocate(self, n_pages: int) -> list[int]:
        """`n_pages` pages with one user each. Raises OutOfPages, and takes none, when fewer are free."""
        if n_pages > self.free:
            raise OutOfPages(n_pages, self.free, self.total)
        pages = [self._free.pop() for _ in range(n_pages)]
        self._users.update(pages)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each page. Raises ValueError for a page that nobody uses."""
        pages = list(pages)
        self.must_be_used(pages)
        self._users.update(pages)

    def release(self, pages: Iterable[int]) -> None:
        """One user fewer for each page; a page without users is free. Raises ValueError for one that is already."""
        pages = list(pages)
        self.must_be_used(pages)
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)

    def must_be_used(self, pages: Iterable[int]) -> None:
        """Raises ValueError for a page that is outside the pool, free, or named more often than it has users."""
        for page, times in Counter(pages).items():
            if times > self.users(page):
                raise ValueError(f"page {page} has {self.users(page)} users, of pages 0 … {self.total - 1}")


class PagePool:
    """Pages for the sequences of one model: `n_pages` of `page_size` tokens each, in every layer.

    Raises ValueError when the device has no memory for it, before anything is allocated.
    """

    def __init__(
        self,
        config: DecoderConfig,
        n_pages: int,
        page_size: int = 16,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: Storage | None = None,
    ) -> None:
        check_kind("paged", storage, page_size)
        scaling = config.rope_scaling if isinstance(config, DecoderConfig) else None
        if scaling is not None and scaling.kind == "dynamic":
            raise ValueError(
                "rope_scaling.kind=dynamic rotates keys by the length that one request declares, and pages outlive "
                "requests: use cache=contiguous or auto, or a kind of scaling that knows no lengths (yarn, ntk)"
            )
        self.allocator = PageAllocator(n_pages)
        self.page_size = page_size
        self.device = torch.device(device)
        (kind,) = layer_kinds(config, n_pages * page_size)  # without rings, all layers are of one kind
        weight = pool_bytes(config, n_pages, page_size, dtype, storage=storage)
        check_memory(weight.total, self.device, f"a pool of {n_pages} pages of {page_size} tokens")
        self.store = Store(
            config.n_layers,
            n_pages,
            page_size,
            config.kv_heads,
            config.dim_per_head,
            dtype=dtype,
            storage=storage,
            device=device,
        )
        self.marks = Marks(
            n_pages, page_size, documents=kind.documents, global_tokens=kind.global_tokens, device=device
        )
        self.reader = ContextReader(config)
        self.longest = n_pages * page_size
        if config.positions == "learned":
            self.longest = min(self.longest, config.max_positions)

    @property
    def nbytes(self) -> CacheBytes:
        """Counted from the tensors that exist."""
        return self.store.nbytes(*self.marks.tensors())

    def open(self) -> CachedSequence:
        """An empty sequence."""
        return CachedSequence(self, [], 0, None)

    def cache(self, sequences: Sequence[CachedSequence], *, length: int | None = None) -> PagedCache:
        """A cache whose rows are these sequences, for up to `length` tokens each (None: as many as the pool holds)."""
        return PagedCache(self, sequences, self.longest if length is None else length)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Everything that is stored in some pages, to others."""
        source, target = (torch.tensor(pages, device=self.device) for pages in (sources, targets))
        for tensor in (*self.store.tensors(), *self.marks.tensors()):
            tensor[target] = tensor[source]


class CachedSequence:
    """The tokens of one sequence in a pool. Made by `PagePool.open` and `fork`; `free` (or leaving a `with` block)
    gives its pages back.

    length   tokens held
    pages    where they lie, in order
    given    whether document ids and flags came with them
    """

    def __init__(self, pool: PagePool, pages: list[int], length: int, given: tuple[bool, bool] | None) -> None:
        self.pool = pool
        self.pages = pages
        self.length = length
        self.given = given
        self.open = True

    def fork(self, length: int | None = None) -> CachedSequence:
        """Another sequence that begins with the first `length` tokens of this one (None: with all). Nothing is copied
        until one of the two appends to a page that both have."""
        self.must_be_open()
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork after {length} tokens of a sequence that holds {self.length}")
        shared = self.pages[: pages_for(length, self.pool.page_size)]
        self.pool.allocator.share(shared)
        return CachedSequence(self.pool, list(shared), length, self.given if length else None)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self.must_be_open()
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of a sequence that holds {self.length}")
        kept = pages_for(length, self.pool.page_size)
        self.pool.allocator.release(self.pages[kept:])
        self.pages = self.pages[:kept]
        self.length, self.given = length, self.given if length else None

    def free(self) -> None:
        """Gives the pages back; a second time does nothing."""
        if self.open:
            self.pool.allocator.release(self.pages)
            self.pages, self.length, self.open = [], 0, False

    def must_be_open(self) -> None:
        if not self.open:
            raise ValueError("this sequence was freed; open another one")

    def __enter__(self) -> CachedSequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


class PagedCache:
    """A `KeyValueCache` whose rows are sequences of a pool; rows may have different lengths. A call takes the pages
    that it needs, for all rows or for none."""

    def __init__(self, pool: PagePool, sequences: Sequence[CachedSequence], length: int) -> None:
        self.pool = pool
        self.sequences = tuple(sequences)
        self.batch = len(self.sequences)
        self.capacity = length
        self._fixed = False
        self._check_rows()
        width = pages_for(length, pool.page_size)
        self._lengths_B = torch.zeros(self.batch, dtype=torch.int64, device=pool.device)
        self._table_BP = torch.zeros(self.batch, width, dtype=torch.int64, device=pool.device)
        self._lengths_shown = [0] * self.batch  # what the device's tensors say
        self._pages_shown: list[list[int]] = [[] for _ in self.sequences]
        # Of steps with fixed shapes, whether ids and flags came with the tokens held, and with the latest token: a
        # replay brings what came when the step was recorded.
        self._held: tuple[bool, bool] | None = None
        self._given: tuple[bool, bool] | None = None

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(sequence.length for sequence in self.sequences)

    @property
    def nbytes(self) -> CacheBytes:
        """Counted from the tensors that exist, those of the whole pool among them."""
        return self.pool.nbytes + CacheBytes(0, bookkeeping=self._lengths_B.nbytes + self._table_BP.nbytes)

    def begin(self, n_tokens: int, context: AttentionContext) -> _Step:
        """Raises OutOfPages, and leaves everything as it was, when the pool has too few free pages."""
        given = self.pool.reader.read(n_tokens, context, self.batch, fixed_shapes=self._fixed)
        if self._fixed:
            given.must_continue(self._held)
            self._given = given.kinds
            return _Step(self, NewTokens(n_tokens, (), given, self._lengths_B))
        for sequence in self.sequences:
            sequence.must_be_open()
            given.must_continue(sequence.given)
        self._admit(given.counts)
        return _Step(self, NewTokens(n_tokens, self.lengths, given, self._lengths_B))

    def hold(self, sequences: Sequence[CachedSequence]) -> None:
        """Other sequences in the rows; the tensors on the device keep their place. Raises ValueError for another number
        of them."""
        if len(sequences) != self.batch:
            raise ValueError(f"{len(sequences)} sequences for the {self.batch} rows of a cache")
        self.sequences = tuple(sequences)
        self._check_rows()

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each row."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        for sequence in self.sequences:
            sequence.truncate(min(length, sequence.length))

    @contextmanager
    def fixed_step(self) -> Iterator[None]:
        """As `ContiguousCache.fixed_step`; takes the pages of one more token in every row, and shows them to the
        device. Raises as `begin`."""
        for sequence in self.sequences:
            sequence.must_be_open()
        self._admit((1,) * self.batch)
        held = {sequence.given for sequence in self.sequences if sequence.length}
        if len(held) > 1:
            raise ValueError("some rows were read with document ids or global flags and others without")
        self._held = next(iter(held), None)
        self._fixed = True
        try:
            yield
        except BaseException:
            self._lengths_shown = [-1] * self.batch  # the device may have counted: it is told again
            raise
        finally:
            self._fixed = False
        for row, sequence in enumerate(self.sequences):
            sequence.length += 1
            sequence.given = self._given
            self._lengths_shown[row] += 1

    # -- pages --------------------------------------------------------------------------------------------------------

    def _check_rows(self) -> None:
        if not self.sequences:
            raise ValueError("a cache over no sequences")
        for sequence in self.sequences:
            sequence.must_be_open()
            if sequence.pool is not self.pool:
                raise ValueError("a sequence of another pool")
        if len({id(sequence) for sequence in self.sequences}) < self.batch:
            raise ValueError("a sequence stands in two rows: fork it")

    def _admit(self, counts: Sequence[int]) -> None:
        """Pages for `counts` more tokens, none of them shared where they will be written; all rows or none."""
        pool, page_size = self.pool, self.pool.page_size
        longest = max(s.length + count for s, count in zip(self.sequences, counts, strict=True))
        if longest > self.capacity:
            raise ValueError(
                f"cache for {self.batch} sequences of {self.capacity} tokens: {self.batch} sequences of {longest} "
                "tokens do not fit"
            )
        for row, sequence in enumerate(self.sequences):
            if self._pages_shown[row] is not sequence.pages:
                pool.allocator.must_be_used(sequence.pages)
        grow, writers = [], Counter[int]()
        for sequence, count in zip(self.sequences, counts, strict=True):
            grow.append(max(0, pages_for(sequence.length + count, page_size) - len(sequence.pages)))
            if count and sequence.length % page_size:
                writers[sequence.pages[sequence.length // page_size]] += 1
        # Of those who write to a page that nobody else has, the last one keeps it.
        copies = {page: n - (pool.allocator.users(page) == n) for page, n in writers.items()}
        new = pool.allocator.allocate(sum(grow) + sum(copies.values()))
        sources, targets = [], []
        for sequence, count, n_pages in zip(self.sequences, counts, grow, strict=True):
            place = sequence.length // page_size
            if count and sequence.length % page_size and copies[sequence.pages[place]]:
                old, page = sequence.pages[place], new.pop()
                copies[old] -= 1
                sources.append(old)
                targets.append(page)
                sequence.pages = [*sequence.pages[:place], page, *sequence.pages[place + 1 :]]
            if n_pages:
                sequence.pages = sequence.pages + [new.pop() for _ in range(n_pages)]
        if sources:
            pool.copy_pages(sources, targets)
            pool.allocator.release(sources)
        self._show()

    def _show(self) -> None:
        """Brings the device's lengths and page table up to date, in place."""
        if self._lengths_shown != list(self.lengths):
            self._lengths_shown = list(self.lengths)
            self._lengths_B.copy_(torch.tensor(self._lengths_shown))
        for row, sequence in enumerate(self.sequences):
            if self._pages_shown[row] is not sequence.pages:  # a sequence never changes its list, it makes another one
                self._pages_shown[row] = sequence.pages
                shown = torch.zeros(self._table_BP.shape[1], dtype=torch.int64)
                pages = sequence.pages[
                    : len(shown)
                ]  # a call that failed may have left more than this cache has use for
                shown[: len(pages)] = torch.tensor(pages, dtype=torch.int64)
                self._table_BP[row].copy_(shown)


class _Step:
    """One call of the model over a `PagedCache`."""

    def __init__(self, cache: PagedCache, new: NewTokens) -> None:
        self._cache, self._new = cache, new
        self.positions_BT = new.positions_BT
        self.capacity = cache.capacity
        self.reach = cache.capacity if new.fixed else new.reach
        page_size, table_BP = cache.pool.page_size, cache._table_BP
        if new.uniform:
            rows = torch.arange(cache.batch, device=table_BP.device)[:, None]
            source, slots = EVERYTHING, new.positions_BT
        else:
            source, (rows, slots) = ring_writes(new, cache.capacity)
        target = (table_BP[rows, slots // page_size], slots % page_size)
        if not new.fixed:
            table_BP = table_BP[:, : pages_for(new.reach, page_size)]
        if new.n_tokens <= AS_STORED:
            self._exchange = Exchange(source, target)
            marks = Exchange(source, target, read=Read.PAGES, table_BP=table_BP)
            context = new.context(kv_lengths=new.ends_B)
            context.page_table = table_BP
        else:
            self._exchange = marks = Exchange(source, target, read=Read.PAGES, limit=new.reach, table_BP=table_BP)
            context = AttentionContext() if new.uniform else new.context(kv_lengths=new.ends_B)
        self._context = cache.pool.marks.write(new, marks, context)

    def append(self, layer: int, k_BTGD: Tensor, v_BTGE: Tensor) -> CachedKeys:
        if k_BTGD.shape[0] != self._cache.batch:
            raise ValueError(f"{k_BTGD.shape[0]} rows of tokens for a cache over {self._cache.batch} sequences")
        return self._cache.pool.store.append(layer, k_BTGD, v_BTGE, self._exchange, self._context)

    def finish(self) -> None:
        cache, new = self._cache, self._new
        cache._lengths_B.copy_(new.ends_B)
        if not new.fixed:
            cache._lengths_shown = list(new.ends)
            for sequence, end in zip(cache.sequences, new.ends, strict=True):
                sequence.length = end
                sequence.given = new.given.kinds if end else None
