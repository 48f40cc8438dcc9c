"""Which tokens of a long text each strategy reads: by hand, and as properties of any text, room, size and overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.evaluation.readers.context_processing import (
    STRATEGIES,
    BestChunk,
    LongText,
    MapReduce,
    Selected,
    Written,
    best_in_order,
    bm25,
    chunk_spans,
    kept_spans,
    truncate,
    word_overlap,
)
from longspan.evaluation.tasks.task import Truncation

few = settings(max_examples=25, deadline=None)
CUTS: tuple[Truncation, ...] = ("keep_head", "keep_tail", "cut_middle")


class Scribe:
    """A writer whose tokens are characters. It keeps its prompts, and answers with the first `n` capital letters that
    it reads, surer the more exclamation marks there are."""

    def __init__(self, max_prompt: int, n: int = 3) -> None:
        self.max_prompt = max_prompt
        self.n = n
        self.prompts: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))

    def write(self, prompts: Sequence[Sequence[int]]) -> list[Written]:
        texts = [self.decode(prompt) for prompt in prompts]
        self.prompts += texts
        return [
            Written("".join(filter(str.isupper, text))[: self.n], (text.count("!") - 9.0,) * (1 + len(text) % 3))
            for text in texts
        ]


def long_text(text: str, query: str = "") -> LongText:
    return LongText(before=[ord("<")], context=[ord(each) for each in text], after=[ord(">")], query=query)


def tokens_of(spans: Sequence[range]) -> list[int]:
    return [token for span in spans for token in span]


class TestTruncation:
    def test_by_hand(self):
        tokens = [10, 11, 12, 13, 14, 15]
        assert truncate(tokens, 3, "keep_head") == [10, 11, 12]
        assert truncate(tokens, 3, "keep_tail") == [13, 14, 15]
        assert truncate(tokens, 3, "cut_middle") == [10, 11, 15]
        assert truncate(tokens, 4, "cut_middle") == [10, 11, 14, 15]
        assert truncate(tokens, 1, "cut_middle") == [10]
        assert truncate(tokens, 6, "refuse") == tokens
        assert [truncate(tokens, 0, rule) for rule in CUTS] == [[], [], []]

    def test_refuses(self):
        with pytest.raises(ValueError, match="6 tokens where 5 fit, and the rule 'refuse' leaves nothing out"):
            truncate(range(6), 5, "refuse")
        with pytest.raises(ValueError, match="room=-1"):
            kept_spans(6, -1, "keep_head")

    @few
    @given(st.integers(0, 300), st.integers(0, 300), st.sampled_from(CUTS))
    def test_room_is_used_and_never_exceeded(self, n: int, room: int, rule: Truncation):
        read = tokens_of(kept_spans(n, room, rule))
        assert len(read) == min(n, room)
        assert read == sorted(set(read))
        assert all(0 <= token < n for token in read)


class TestChunks:
    def test_by_hand(self):
        assert chunk_spans(10, 4, 1) == (range(4), range(3, 7), range(6, 10))
        assert chunk_spans(8, 4, 1) == (range(4), range(3, 7), range(6, 8))
        assert chunk_spans(7, 4, 1) == (range(4), range(3, 7))
        assert chunk_spans(3, 4, 3) == (range(3),)
        assert chunk_spans(0, 4) == ()
        with pytest.raises(ValueError, match="overlap=4 with size=4"):
            chunk_spans(9, 4, 4)

    @few
    @given(st.integers(0, 400), st.integers(1, 60), st.data())
    def test_cover_overlap_and_fit(self, n: int, size: int, data: st.DataObject):
        overlap = data.draw(st.integers(0, size - 1))
        spans = chunk_spans(n, size, overlap)
        assert set(tokens_of(spans)) == set(range(n))  # every token in at least one
        assert all(0 < len(span) <= size for span in spans)
        assert all(len(span) == size for span in spans[:-1])
        for one, other in pairwise(spans):
            assert len(set(one) & set(other)) == overlap
            assert not set(other) <= set(one)


class TestSelection:
    def test_bm25_by_hand(self):
        # Two parts of two words, mean 2: tf 1 weighs 2.2 / 2.2 = 1 and tf 2 weighs 4.4 / 3.2. "a" is in both parts,
        # idf ln(1 + 0.5 / 2.5); "b" in one, idf ln(1 + 1.5 / 1.5).
        common, rare = math.log(1.2), math.log(2)
        assert bm25("B a?", ["a b", "A a"]) == pytest.approx([common + rare, common * 4.4 / 3.2])
        assert bm25("z", ["a", ""]) == [0.0, 0.0]
        assert bm25("z", []) == []

    def test_longer_parts_are_held_back(self):
        short, long = bm25("a", ["a b", "a b c d e f"])
        assert short > long > 0

    def test_word_overlap(self):
        assert word_overlap("the cat, the hat", ["cat hat the", "a cat", "dog"]) == pytest.approx([1, 1 / 3, 0])

    def test_the_best_in_the_order_of_the_text(self):
        assert best_in_order([1, 5, 3, 5], [2, 2, 2, 2], room=6) == [1, 2, 3]
        assert best_in_order([1, 5, 3, 5], [2, 2, 2, 2], room=3) == [1]
        assert best_in_order([1, 5, 3], [2, 4, 2], room=3) == [2]  # what does not fit is passed over

    @few
    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), max_size=12), st.integers(0, 40))
    def test_never_beyond_the_room(self, parts: list[tuple[float, int]], room: int):
        scores, sizes = [score for score, _ in parts], [size for _, size in parts]
        chosen = best_in_order(scores, sizes, room)
        left = room - sum(sizes[part] for part in chosen)
        assert left >= 0
        assert chosen == sorted(set(chosen))
        assert all(sizes[part] > left for part in set(range(len(parts))) - set(chosen))


class TestStrategies:
    def test_selected_parts_stand_in_their_order(self):
        scribe = Scribe(max_prompt=2 + 8)
        found = Selected(bm25, size=4)(long_text("one two cat dog six cat", query="cat"), scribe)
        assert scribe.prompts == ["<cat cat>"]
        assert found.read == (range(8, 12), range(20, 23))

    def test_the_surest_chunk_answers(self):
        scribe = Scribe(max_prompt=2 + 6)
        found = BestChunk(overlap=2)(long_text("A...B!!..C.!"), scribe)
        assert scribe.prompts == ["<A...B!>", "<B!!..C>", "<.C.!>"]
        assert (found.text, found.prompts) == ("BC", 3)
        assert found.read == (range(6), range(4, 10), range(8, 12))

    def test_nothing_is_no_answer_as_long_as_there_is_another(self):
        """Saying nothing takes one stop token, and what is not in a part of the text is often said with near
        certainty."""

        class Unsure(Scribe):
            def write(self, prompts: Sequence[Sequence[int]]) -> list[Written]:
                return [Written(each.text, (-7.0, -5.0) if each.text else (-1e-4,)) for each in super().write(prompts)]

        found = BestChunk(overlap=0)(long_text("....A..."), Unsure(max_prompt=2 + 4))
        assert (found.text, found.prompts) == ("A", 2)
        assert Written("", (-1e-4,)).confidence < Written("A", (-7.0, -5.0)).confidence == -6.0
        assert BestChunk(overlap=0)(long_text("........"), Unsure(max_prompt=2 + 4)).text == ""

    def test_overlap_is_at_most_half_a_part(self):
        found = BestChunk(overlap=100)(long_text("abcdef"), Scribe(max_prompt=2 + 4))
        assert found.read == (range(4), range(2, 6))

    def test_answers_are_summarised_until_they_fit(self):
        scribe = Scribe(max_prompt=2 + 6)
        found = MapReduce("+")(long_text("A....BC....DE....FG....H"), scribe)
        assert scribe.prompts == [
            *("<A....B>", "<C....D>", "<E....F>", "<G....H>"),
            *("<AB+CD+>", "<EF+GH>"),
            "<AB+EF>",
        ]
        assert (found.text, found.prompts) == ("ABE", 7)
        assert tokens_of(found.read) == list(range(24))

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_what_fits_is_read_whole_and_once(self, name: str):
        scribe = Scribe(max_prompt=12)
        found = STRATEGIES[name](long_text("A short on", query="q"), scribe)
        assert scribe.prompts == ["<A short on>"]
        assert (tokens_of(found.read), found.prompts) == (list(range(10)), 1)

    @few
    @given(st.sampled_from(sorted(STRATEGIES)), st.integers(1, 3000), st.integers(8, 900), st.integers(0, 900))
    def test_any_text(self, name: str, n: int, room: int, answer: int):
        scribe = Scribe(max_prompt=room + 2, n=answer)
        found = STRATEGIES[name](long_text("Ab Cd!"[:6] * (n // 6) + "x" * (n % 6), query="ab"), scribe)
        assert all(len(prompt) <= scribe.max_prompt for prompt in scribe.prompts)  # nothing beyond the room
        assert len(scribe.prompts) == found.prompts
        read = tokens_of(found.read)
        assert all(0 <= token < n for token in read)
        if name in ("best_chunk", "map_reduce"):
            assert set(read) == set(range(n))
        elif n > room:
            assert len(read) == len(set(read)) <= room

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_no_room(self, name: str):
        with pytest.raises(ValueError, match="reads 2 tokens, of which instructions and question alone take 2"):
            STRATEGIES[name](long_text("text"), Scribe(max_prompt=2))

    def test_too_little_room_to_reduce(self):
        with pytest.raises(ValueError, match="room for 3 tokens of text, too few to hold two answers"):
            MapReduce("+")(long_text("text"), Scribe(max_prompt=5))
