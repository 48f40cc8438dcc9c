"""Pages: the allocator under any program, forks that never see each other, admission of all or none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec
from longspan.model.cache import cache_bytes, create_cache
from longspan.model.cache_plan import pool_bytes
from longspan.model.config import AttentionPlan, DecoderConfig
from longspan.model.decoder import Decoder
from longspan.model.paging import CachedSequence, OutOfPages, PageAllocator, PagePool
from longspan.model.zoo import build

PAGE = 4
CONFIG = DecoderConfig(
    vocab_size=16, n_layers=2, d_model=4, n_heads=2, n_kv_heads=1, d_ff=4, max_positions=512, positions="none"
)
MARKED = AttentionPlan(patterns={"m": AttentionSpec(causal=True, documents=True, global_tokens=True)}, layers=("m",))


# -- the allocator ----------------------------------------------------------------------------------------------------


class AnyProgram(RuleBasedStateMachine):
    """Allocating, sharing and releasing in any order, beside a list of who holds which page."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(7)
        self.holders: list[list[int]] = []

    @rule(n=st.integers(0, 9))
    def allocate(self, n: int) -> None:
        free = self.pages.free
        if n > free:
            with pytest.raises(OutOfPages, match=f"{n} pages are needed and {free} of 7 are free"):
                self.pages.allocate(n)
            return
        got = self.pages.allocate(n)
        assert len(set(got)) == n
        assert not set(got) & {page for held in self.holders for page in held}
        self.holders.append(got)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.holders))
        part = held[: data.draw(st.integers(0, len(held)))]
        self.pages.share(part)
        self.holders.append(list(part))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pages.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @invariant()
    def used_and_free_are_all(self) -> None:
        users = Counter(page for held in self.holders for page in held)
        assert self.pages.used + self.pages.free == self.pages.total == 7
        assert self.pages.used == len(users)
        assert all(self.pages.users(page) == users[page] for page in range(7))


AnyProgram.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestAnyProgram = AnyProgram.TestCase


@pytest.mark.parametrize("pages", [[3], [0, 0], [-1], [99]])
def test_pages_that_are_not_held_are_refused(pages: list[int]) -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(1) == [0]
    for change in (allocator.release, allocator.share):
        with pytest.raises(ValueError, match=rf"page {pages[0]} has \d users, of pages 0 … 3"):
            change(pages)
    assert (allocator.used, allocator.free, allocator.users(0)) == (1, 3, 1)


# -- sequences ---------------------------------------------------------------------------------------------------------


def append(pool: PagePool, sequences: list[CachedSequence], tokens_BT: Tensor, counts: list[int] | None = None) -> None:
    """Writes numbers that tell whose they are, as keys of layer 0; layer 1 and values hold multiples of them."""
    cache = pool.cache(sequences)
    context = AttentionContext(kv_lengths=None if counts is None else torch.tensor(counts))
    step = cache.begin(tokens_BT.shape[1], context)
    x_BTGK = tokens_BT[:, :, None, None].float().expand(-1, -1, 1, 2)
    for layer in (0, 1):
        step.append(layer, (layer + 1) * x_BTGK, -(layer + 1) * x_BTGK)
    step.finish()


def held(pool: PagePool, sequence: CachedSequence) -> list[int]:
    """What layer 0's keys say; the other tensors say the same."""
    assert len(sequence.pages) == -(-sequence.length // pool.page_size)
    table = torch.tensor(sequence.pages, dtype=torch.int64)
    rows = [(pool.store.keys, 0, 1), (pool.store.keys, 1, 2), (pool.store.values, 0, -1), (pool.store.values, 1, -2)]
    found = [x[layer][table, 0, :, 1].flatten()[: sequence.length] / factor for x, layer, factor in rows]
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0].int().tolist()


class AnyProgramOfSequences(RuleBasedStateMachine):
    """open, append (one sequence or several, ragged), fork, truncate, free — beside plain lists of what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CONFIG, 9, PAGE)
        for keys in self.pool.store.keys:
            keys.fill_(torch.nan)
        self.sequences: list[tuple[CachedSequence, list[int]]] = []
        self.next = 1

    @rule()
    def open(self) -> None:
        self.sequences.append((self.pool.open(), []))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), n_tokens=st.integers(1, 11))
    def append(self, data: st.DataObject, n_tokens: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.sequences))), min_size=1, max_size=4, unique=True))
        counts = [data.draw(st.integers(0, n_tokens)) for _ in chosen]
        tokens = torch.arange(self.next, self.next + len(chosen) * n_tokens).view(len(chosen), n_tokens)
        self.next += tokens.numel()
        rows = [self.sequences[i] for i in chosen]
        before = [(list(s.pages), s.length) for s, _ in self.sequences]
        grown = sum(-(-(s.length + n) // PAGE) - len(s.pages) for (s, _), n in zip(rows, counts, strict=True))
        writers = Counter(s.pages[-1] for (s, _), n in zip(rows, counts, strict=True) if n and s.length % PAGE)
        copies = sum(n - (n == self.pool.allocator.users(page)) for page, n in writers.items())
        longest = max(s.length + n for (s, _), n in zip(rows, counts, strict=True))
        if longest > 9 * PAGE or grown + copies > self.pool.allocator.free:
            said = "tokens do not fit" if longest > 9 * PAGE else f"{grown + copies} pages are needed"
            with pytest.raises((ValueError, OutOfPages), match=said):
                append(self.pool, [sequence for sequence, _ in rows], tokens, counts)
            assert before == [(list(s.pages), s.length) for s, _ in self.sequences]
            return
        append(self.pool, [sequence for sequence, _ in rows], tokens, counts)
        for (_, written), row, count in zip(rows, tokens.tolist(), counts, strict=True):
            written.extend(row[:count])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence, written = data.draw(st.sampled_from(self.sequences))
        length = data.draw(st.none() | st.integers(0, len(written)))
        free = self.pool.allocator.free
        self.sequences.append((sequence.fork(length), written[:length]))
        assert self.pool.allocator.free == free

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence, written = data.draw(st.sampled_from(self.sequences))
        length = data.draw(st.integers(0, len(written)))
        sequence.truncate(length)
        del written[length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence, _ = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        sequence.free()
        sequence.free()

    @invariant()
    def every_sequence_holds_what_was_written_to_it(self) -> None:
        for sequence, written in self.sequences:
            assert sequence.length == len(written)
            assert held(self.pool, sequence) == written

    @invariant()
    def no_page_is_lost_and_none_wasted(self) -> None:
        pages = self.pool.allocator
        users = Counter(page for sequence, _ in self.sequences for page in sequence.pages)
        assert pages.used + pages.free == pages.total == 9
        assert {page: pages.users(page) for page in users} == dict(users)
        assert pages.used == len(users)
        for sequence, _ in self.sequences:
            assert 0 <= len(sequence.pages) * PAGE - sequence.length <= PAGE - 1


AnyProgramOfSequences.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestAnyProgramOfSequences = AnyProgramOfSequences.TestCase


def test_writing_to_a_fork_copies_the_page_and_nothing_else() -> None:
    pool = PagePool(CONFIG, 8, PAGE)
    parent = pool.open()
    append(pool, [parent], torch.arange(6)[None])  # a full page and half of one
    forks = [parent.fork() for _ in range(3)]
    assert pool.allocator.used == 2
    append(pool, [parent, *forks], torch.tensor([[10], [11], [12], [13]]))
    assert pool.allocator.used == 5  # the full page for all, the half one kept by the last and copied by three
    assert [held(pool, s)[6:] for s in (parent, *forks)] == [[10], [11], [12], [13]]
    assert {s.pages[0] for s in (parent, *forks)} == {parent.pages[0]}


def test_admission_is_for_all_or_for_none() -> None:
    pool = PagePool(CONFIG, 4, PAGE)
    first, second = pool.open(), pool.open()
    append(pool, [first], torch.arange(6)[None])
    fork = first.fork()
    pages = [list(s.pages) for s in (first, second, fork)]
    with pytest.raises(OutOfPages, match=r"3 pages are needed and 2 of 4 are free; free a sequence, or make a larger"):
        append(pool, [first, second, fork], torch.zeros(3, 5, dtype=torch.int64), [1, 5, 1])
    assert pages == [list(s.pages) for s in (first, second, fork)]
    assert pool.allocator.free == 2
    append(pool, [first, second, fork], torch.zeros(3, 4, dtype=torch.int64), [1, 4, 1])
    assert pool.allocator.free == 0


def test_sequences_leave_their_pages_behind() -> None:
    pool = PagePool(CONFIG, 4, PAGE)
    with pool.open() as sequence:
        append(pool, [sequence], torch.arange(9)[None])
        assert pool.allocator.used == 3
    assert pool.allocator.used == 0
    for use in (sequence.fork, lambda: sequence.truncate(0), lambda: pool.cache([sequence])):
        with pytest.raises(ValueError, match="this sequence was freed"):
            use()


def test_wrong_rows_are_refused() -> None:
    pool, other = PagePool(CONFIG, 4, PAGE), PagePool(CONFIG, 4, PAGE)
    sequence = pool.open()
    for rows, said in (([], "no sequences"), ([sequence, sequence], "in two rows"), ([other.open()], "another pool")):
        with pytest.raises(ValueError, match=said):
            pool.cache(rows)
    append(pool, [sequence], torch.arange(3)[None])
    for length in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot fork after {length} tokens of a sequence that holds 3"):
            sequence.fork(length)
        with pytest.raises(ValueError, match=f"cannot keep {length} tokens of a sequence that holds 3"):
            sequence.truncate(length)
    with pytest.raises(ValueError, match="cache for 1 sequences of 5 tokens: 1 sequences of 6 tokens do not fit"):
        pool.cache([sequence], length=5).begin(3, AttentionContext())


@pytest.mark.parametrize("page", [-1, 4])
def test_a_table_that_leaves_the_pool_is_refused(page: int) -> None:
    pool = PagePool(CONFIG, 4, PAGE)
    sequence = pool.open()
    append(pool, [sequence], torch.arange(3)[None])
    sequence.pages = [page]
    with pytest.raises(ValueError, match=rf"page {page} has 0 users, of pages 0 … 3"):
        pool.cache([sequence]).begin(1, AttentionContext())


# -- through a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build("llama-tiny", {"init_std": 0.2, "attention": MARKED}, seed=0).eval()


TOKENS = torch.randint(0, 256, (3, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(12)), page_size=st.sampled_from([3, 8]), split=st.integers(1, 29))
def test_where_the_pages_lie_changes_nothing(model: Decoder, order: list[int], page_size: int, split: int) -> None:
    outputs = []
    for free in (list(range(30)), [*(i + 18 for i in order), *range(18)]):
        pool = PagePool(model.config, 30, page_size)
        pool.allocator._free = list(free)
        cache = pool.cache([pool.open() for _ in range(3 if page_size == 8 else 2)], length=30)
        rows = TOKENS[: cache.batch]
        outputs.append(torch.cat([model(rows[:, :split], cache=cache), model(rows[:, split:], cache=cache)], dim=1))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], model(rows), atol=1e-4, rtol=0)


@torch.no_grad()
def test_continuations_of_one_document_read_it_once(model: Decoder) -> None:
    """Forks of a prefilled prompt, with its documents and flags, continue as sequences of their own would."""
    documents = torch.tensor([[0] * 9 + [1] * 12])
    flags = torch.zeros(1, 21, dtype=torch.bool)
    flags[0, [0, 10]] = True
    pool = PagePool(model.config, 10, 8)
    prompt = pool.open()
    model(TOKENS[:1, :21], AttentionContext(q_documents=documents, is_global=flags), cache=pool.cache([prompt]))
    rows = [prompt.fork() for _ in range(3)]
    assert pool.allocator.used == 3
    cache = pool.cache(rows)
    found = [
        model(
            TOKENS[:, i : i + 1],
            AttentionContext(q_documents=torch.full((3, 1), 1), is_global=torch.full((3, 1), i == 22)),
            cache=cache,
        )
        for i in range(21, 27)
    ]
    assert pool.allocator.used == 2 + 1 + 3 * 2  # two full pages for all, the prompt's last, two for each row
    whole = torch.cat([TOKENS[:1, :21].expand(3, -1), TOKENS[:, 21:27]], dim=1)
    context = AttentionContext(
        q_documents=torch.cat([documents, torch.full((1, 6), 1)], dim=1).expand(3, -1),
        is_global=torch.cat([flags, torch.tensor([[False, True, *[False] * 4]])], dim=1).expand(3, -1),
    )
    torch.testing.assert_close(torch.cat(found, dim=1), model(whole, context)[:, 21:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("storage", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_bytes_are_known_beforehand(model: Decoder, storage: str | None, page_size: int) -> None:
    cache = create_cache(model, 3, 50, kind="paged", page_size=page_size, storage=storage)  # type: ignore[arg-type]
    expected = cache_bytes(model.config, 3, 50, "float32", kind="paged", page_size=page_size, storage=storage)  # type: ignore[arg-type]
    assert cache.nbytes == expected
    pages = 3 * -(-50 // page_size)
    element, scale = (4, 0) if storage is None else (1, 4)
    G, K = model.config.kv_heads, model.config.dim_per_head
    assert expected.keys_values == 2 * 2 * pages * page_size * G * K * element
    assert expected.scales == 2 * 2 * pages * page_size * G * scale
    assert expected.bookkeeping == 3 * 8 + pages * 8 + pages * page_size * 9
    pool = PagePool(model.config, 7, page_size, storage=storage)  # type: ignore[arg-type]
    assert pool.nbytes == pool_bytes(model.config, 7, page_size, storage=storage)  # type: ignore[arg-type]
