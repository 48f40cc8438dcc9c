"""Text of a growing continuation: stop strings wherever tokens are cut, reasons for ending, and what is held back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.tokenizer import byte_level
from longspan.model.completion import Output, StopStrings

TEXT = st.text("abc", max_size=12)


def first_completed(text: str, stops: list[str]) -> str | None:
    """What stands before the stop string that is complete first, reading character by character."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return None


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    before = first_completed(text, stops)
    cut = StopStrings(stops)
    shown = read = ""
    for piece in pieces:
        shown += cut.push(piece)
        assert text.startswith(shown)
        read += piece
        held = read[len(shown) :]
        # What is held back is the beginning of a stop string, and nothing more.
        assert cut.found or not held or any(stop != held and stop.startswith(held) for stop in stops)
    shown += cut.finish()
    assert shown == (text if before is None else before)
    assert cut.found == (before is not None)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "c"], ["bc"], ["a", ""]),
        (["ab", "d"], ["bc"], ["a", "bd"]),
        (["aaa", "b"], ["aab"], ["a", ""]),
        (["a", "b", "c"], ["abd", "bc"], ["", "", "a"]),
        (["abc"], ["b", "abc"], ["a"]),  # b is complete first
        (["xabc"], ["bc", "abc"], ["x"]),  # both end together: the longer one
        (["abc"], [], ["abc"]),
    ],
)
def test_what_is_shown_when(pieces: list[str], stops: list[str], shown: list[str]) -> None:
    cut = StopStrings(stops)
    assert [cut.push(piece) for piece in pieces] == shown


def output(limit: int, **settings: object) -> Output:
    return Output(max_new_tokens=limit, tokenizer=byte_level(), **settings)  # type: ignore[arg-type]


def feed(grown: Output, data: bytes | list[int]) -> list[str]:
    return [grown.push(token, -0.5) for token in data]


def test_length_ends_it_and_releases_what_was_held() -> None:
    grown = output(3, stop_strings=["cd"])
    assert feed(grown, b"abc") == ["a", "b", "c"]
    done = grown.completion()
    assert (done.tokens, done.logprobs, done.finish_reason, done.text) == ((97, 98, 99), (-0.5,) * 3, "length", "abc")


def test_a_stop_token_is_a_token_but_no_text() -> None:
    grown = output(9, stop_tokens={98, 256})
    feed(grown, b"ab")
    assert (grown.completion().tokens, grown.completion().text) == ((97, 98), "a")
    assert grown.completion().finish_reason == "stop_token"


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens() -> None:
    grown = output(9, stop_strings=["bc", "x"])
    assert feed(grown, b"abc") == ["a", "", ""]
    done = grown.completion()
    assert (len(done.tokens), done.finish_reason, done.text) == (3, "stop_string", "a")


def test_the_last_token_may_complete_a_stop_string() -> None:
    grown = output(2, stop_strings=["b"])
    feed(grown, b"ab")
    assert (grown.completion().finish_reason, grown.completion().text) == ("stop_string", "a")


def test_characters_come_whole() -> None:
    grown = output(5, stop_strings=["é"])
    assert feed(grown, "aü".encode()) == ["a", "", "ü"]
    assert feed(grown, "é".encode()) == ["", ""]
    assert grown.completion().finish_reason == "stop_string"
    broken = output(2)
    feed(broken, b"a\xc3")
    assert broken.completion().text == "a�"


def test_without_a_tokenizer_there_is_no_text() -> None:
    grown = Output(max_new_tokens=2, stop_tokens={7})
    assert [grown.push(token, 0.0) for token in (5, 7)] == ["", ""]
    assert grown.completion().text is None
    assert Output(max_new_tokens=0).completion().tokens == ()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\]: text is found by a tokenizer"):
        Output(max_new_tokens=1, stop_strings=["x"])
    with pytest.raises(ValueError, match="an empty text would stop before the first token"):
        StopStrings(["x", ""])
    with pytest.raises(RuntimeError, match="is not finished"):
        Output(max_new_tokens=1).completion()
