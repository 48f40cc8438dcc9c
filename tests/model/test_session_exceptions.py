"""What is raised while a session works (an interrupt, a callback, the model itself) costs no token, text or page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from longspan.data.tokenizer import byte_level
from longspan.model.completion import Completion
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.session import Event, Request, Session
from longspan.model.zoo import build

PROMPTS = ("ab", "a longer prompt", "q")
TOKENIZER = byte_level()


@pytest.fixture(scope="module")
def model() -> Decoder:
    built = build("llama-tiny", {"init_std": 0.3, "n_layers": 2, "vocab_size": 257}, seed=0)
    assert isinstance(built, Decoder)
    return built.eval()


def greedy(n: int, first_token: int | None = None) -> Sampling:
    return Sampling(max_new_tokens=n, temperature=0, first_token=first_token)


def session_of(model: Decoder) -> Session:
    return Session(model, pages=32, page_size=4, prefill_chunk=8, tokenizer=TOKENIZER)


def submitted(model: Decoder, on_text: Callable[[str], None] | None = None) -> Session:
    session = session_of(model)
    for prompt in PROMPTS:
        session.submit(Request(prompt=prompt, sampling=greedy(10), on_text=on_text))
    return session


def persistent(
    session: Session, error: type[BaseException], on_event: Callable[[Event], None] | None = None
) -> tuple[dict[int, Completion], int]:
    """`run` until it returns, and how often it raised."""
    for times in range(200):
        with suppress(error):
            return session.run(on_event), times
    raise AssertionError("the session never came to an end")


@pytest.fixture(scope="module")
def expected(model: Decoder) -> list[str | None]:
    """Each prompt's text alone."""
    return [complete(model, [prompt], greedy(10), tokenizer=TOKENIZER)[0].text for prompt in PROMPTS]


@pytest.mark.parametrize("call", [1, 2, 3, 5, 9])
def test_an_interrupt_behind_the_cache_changes_no_text(
    model: Decoder, expected: list[str | None], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The cache has counted the tokens by the time logits are computed; what is interrupted there is done again."""
    session = submitted(model)
    calls, logits = 0, model.logits

    def interrupted(hidden_xD: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return logits(hidden_xD)

    monkeypatch.setattr(model, "logits", interrupted)
    done, times = persistent(session, KeyboardInterrupt)
    assert times == 1
    assert [each.text for each in done.values()] == expected
    assert session.pool.allocator.used == 0


def test_a_text_callback_that_raises_costs_no_completion(model: Decoder, expected: list[str | None]) -> None:
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.append(text)
        raise OSError("the reader is gone")

    session = submitted(model, hear)
    done, times = persistent(session, OSError)
    assert [each.text for each in done.values()] == expected
    assert times == len(heard)  # each text was told once, and every time raised
    assert sorted("".join(heard)) == sorted("".join(text or "" for text in expected))


def test_an_event_callback_that_raises_costs_no_completion(model: Decoder, expected: list[str | None]) -> None:
    def hear(event: Event) -> None:
        raise OSError("the reader is gone")

    done, times = persistent(submitted(model), OSError, hear)
    assert [each.text for each in done.values()] == expected
    assert times > 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.cuda.OutOfMemoryError, RuntimeError])
def test_a_prefix_that_was_not_read_holds_no_pages(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    session = session_of(model)
    hidden, calls = model.hidden, 0

    def second_piece_fails(*arguments: Tensor, cache: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return hidden(*arguments, cache=cache)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "hidden", second_piece_fails)
    with pytest.raises(error):
        session.prefill("more than eight tokens")
    assert session.pool.allocator.used == 0
    with session.prefill("more than eight tokens"):
        assert session.pool.allocator.used == 6


@pytest.mark.parametrize("token", [257, -1])
def test_a_first_token_that_the_model_lacks_is_refused(model: Decoder, token: int) -> None:
    session = session_of(model)
    with pytest.raises(ValueError, match=rf"first_token={token}: a token of the model, 0 … 256"):
        session.submit(Request(prompt="a", sampling=greedy(3, first_token=token)))
    assert session.unfinished == 0
