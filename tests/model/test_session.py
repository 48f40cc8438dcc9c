"""Continuous batching: every request as if it were alone, whatever runs beside it, however little memory there is."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.tokenizer import byte_level
from longspan.model.completion import Completion, TextStream
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.paging import OutOfPages
from longspan.model.sampling import Sampling
from longspan.model.session import Request, Session
from longspan.model.zoo import build

WINDOWED = {
    "patterns": {"local": {"causal": True, "window": {"left": 9}}, "full": {"causal": True}},
    "layers": ["local", "full"],
}


def decoder(name: str = "llama-tiny", **overrides: object) -> Decoder:
    model = build(name, {"init_std": 0.3, "n_layers": 2, **overrides}, seed=0)
    assert isinstance(model, Decoder)
    return model.eval()


MODEL = decoder(attention=WINDOWED)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def greedy(n: int, **settings: object) -> Sampling:
    return Sampling(max_new_tokens=n, temperature=0, **settings)  # type: ignore[arg-type]


def alone(prompt: list[int], sampling: Sampling) -> tuple[int, ...]:
    return complete(MODEL, [prompt], sampling)[0].tokens


def is_empty(session: Session) -> bool:
    return session.unfinished == 0 and session.pool.allocator.used == 0


# Lengths around pages of 4 and pieces of 8, more requests than run at once, each with settings of its own.
MIXED = [
    (prompt, sampling)
    for prompt, sampling in zip(
        prompts(1, 4, 5, 17, 30, 2, 8, 9),
        [
            greedy(9),
            Sampling(max_new_tokens=12, temperature=0.9, seed=4),
            greedy(20, repetition_penalty=1.5),
            Sampling(max_new_tokens=7, temperature=1.2, top_k=30, seed=4),
            greedy(1),
            Sampling(max_new_tokens=16, temperature=1.0, min_p=0.05, seed=9, repetition_penalty=1.2),
            Sampling(max_new_tokens=5, top_p=0.8, seed=0),
            greedy(11, stop_tokens=frozenset(range(0, 256, 9))),
        ],
        strict=True,
    )
]
ALONE = [alone(prompt, sampling) for prompt, sampling in MIXED]


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(MIXED))),
    max_batch=st.integers(1, 8),
    pages=st.integers(13, 40),
    prefill_chunk=st.sampled_from([1, 5, 8, 64]),
    late=st.integers(0, 6),
)
def test_every_request_is_as_if_it_were_alone(
    order: list[int], max_batch: int, pages: int, prefill_chunk: int, late: int
) -> None:
    session = Session(MODEL, pages=pages, page_size=4, max_batch=max_batch, prefill_chunk=prefill_chunk)
    numbers = {}
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    done: dict[int, Completion] = {}
    for index in order[: len(order) - late]:
        numbers[session.submit(Request(prompt=MIXED[index][0], sampling=MIXED[index][1]))] = index
    arriving = list(order[len(order) - late :])
    while session.unfinished or arriving:
        if arriving:  # others come while these run
            index = arriving.pop(0)
            numbers[session.submit(Request(prompt=MIXED[index][0], sampling=MIXED[index][1]))] = index
        for event in session.step():
            assert event.request not in done
            assert event.token is not None
            tokens[event.request].append(event.token)
            if event.completion is not None:
                done[event.request] = event.completion
        assert session.pool.allocator.used <= pages
    assert sorted(done) == list(range(len(MIXED)))
    for number, index in numbers.items():
        assert done[number].tokens == tuple(tokens[number]) == ALONE[index]
        assert len(done[number].logprobs) == len(ALONE[index])
    assert is_empty(session)


def test_a_pool_too_small_for_all_preempts_and_recomputes() -> None:
    requests = [Request(prompt=prompt, sampling=greedy(24)) for prompt in prompts(8, 8, 8, 8)]
    session = Session(MODEL, pages=17, page_size=4, max_batch=4)  # one needs 8 pages when it is done, two 16
    for request in requests:
        session.submit(request)
    done = session.run()
    assert session.preemptions >= 2
    assert [completion.tokens for completion in done.values()] == [alone(list(r.prompt), greedy(24)) for r in requests]  # type: ignore[arg-type]
    assert is_empty(session)

    ample = Session(MODEL, pages=64, page_size=4, max_batch=4)
    for request in requests:
        ample.submit(request)
    again = ample.run()
    assert ample.preemptions == 0
    assert [each.tokens for each in again.values()] == [each.tokens for each in done.values()]


def test_the_oldest_is_never_the_one_to_wait() -> None:
    session = Session(MODEL, pages=17, page_size=4, max_batch=4)
    for prompt in prompts(8, 8, 8, 8):
        session.submit(Request(prompt=prompt, sampling=greedy(24)))
    finished = []
    while session.unfinished:
        finished += [event.request for event in session.step() if event.completion is not None]
    assert finished == [0, 1, 2, 3]


def test_long_prompts_do_not_hold_up_the_others() -> None:
    session = Session(MODEL, pages=64, page_size=4, max_batch=4, prefill_chunk=8)
    short, long = prompts(3, 100)
    session.submit(Request(prompt=short, sampling=greedy(30)))
    session.submit(Request(prompt=long, sampling=greedy(3)))
    steps = [[event.request for event in session.step()] for _ in range(16)]
    assert all(0 in step for step in steps)  # a token in every step, while the other one is read in pieces
    first = next(n for n, step in enumerate(steps) if 1 in step)
    assert first == 13  # the short prompt first, then 100 tokens in 13 pieces


# -- prefixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 16, 21])  # part of a page, whole pages, both
def test_a_prefix_is_read_once_and_shared(length: int) -> None:
    document, *questions = prompts(length, 2, 7, 5)
    session = Session(MODEL, pages=64, page_size=4, max_batch=8)
    with session.prefill(document) as prefix:
        held = session.pool.allocator.used
        assert held == -(-length // 4)
        for question in questions:
            session.submit(Request(prompt=question, prefix=prefix, sampling=greedy(6)))
        session.submit(Request(prompt=[], prefix=prefix, sampling=greedy(6)))
        session.submit(Request(prompt=[], prefix=prefix, sampling=Sampling(max_new_tokens=6, seed=8)))
        session.step()
        # Of each sequence only what does not lie on the document's whole pages is its own.
        own = [-(-(length + len(question)) // 4) - length // 4 for question in questions]
        assert session.pool.allocator.used == held + sum(own)
        done = list(session.run().values())
        expected = [alone(document + question, greedy(6)) for question in [*questions, []]]
        assert [each.tokens for each in done[:4]] == expected
        assert done[4].tokens == alone(document, Sampling(max_new_tokens=6, seed=8))
        assert session.pool.allocator.used == held
    assert is_empty(session)


def test_a_prefix_freed_early_lasts_as_long_as_it_is_needed() -> None:
    document, question = prompts(21, 4)
    session = Session(MODEL, pages=20, page_size=4)
    prefix = session.prefill(document)
    session.submit(Request(prompt=question, prefix=prefix, sampling=greedy(5)))
    prefix.free()
    with pytest.raises(ValueError, match="this prefix was freed; prefill it again"):
        session.submit(Request(prompt=question, prefix=prefix, sampling=greedy(5)))
    assert session.run()[0].tokens == alone(document + question, greedy(5))
    assert is_empty(session)


def test_requests_with_a_prefix_are_preempted_like_others() -> None:
    document, *questions = prompts(18, 3, 4, 5, 6)
    session = Session(MODEL, pages=16, page_size=4)  # 5 for the document; a question grows by 7 at most
    with session.prefill(document) as prefix:
        for question in questions:
            session.submit(Request(prompt=question, prefix=prefix, sampling=greedy(20)))
        done = session.run()
    assert session.preemptions
    assert [each.tokens for each in done.values()] == [alone(document + q, greedy(20)) for q in questions]
    assert is_empty(session)


def test_a_prefix_may_come_while_others_run() -> None:
    session = Session(MODEL, pages=14, page_size=4)
    (first, second), (document,) = prompts(6, 7), prompts(20)
    for prompt in (first, second):
        session.submit(Request(prompt=prompt, sampling=greedy(25)))
    for _ in range(20):
        session.step()
    with session.prefill(document) as prefix:  # takes the pages of the younger one
        assert session.preemptions == 1
        session.submit(Request(prompt=[1], prefix=prefix, sampling=greedy(3)))
        done = session.run()
    assert [done[n].tokens for n in range(3)] == [
        alone(first, greedy(25)), alone(second, greedy(25)), alone([*document, 1], greedy(3))
    ]  # fmt: skip


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_stop_strings_and_callbacks() -> None:
    model, tokenizer = decoder(vocab_size=257), byte_level()
    (free,) = complete(model, ["ab"], greedy(20), tokenizer=tokenizer)
    assert free.text is not None
    stop = free.text[3:5]
    heard: list[str] = []
    session = Session(model, pages=16, tokenizer=tokenizer)
    session.submit(Request(prompt="ab", sampling=greedy(20), stop_strings=[stop], on_text=heard.append))
    session.submit(Request(prompt="ab", sampling=greedy(20)))
    events = []
    done = session.run(events.append)
    assert done[0].text == "".join(heard) == free.text.partition(stop)[0]
    assert done[0].finish_reason == "stop_string"
    assert (done[1].tokens, done[1].text, done[1].finish_reason) == (free.tokens, free.text, "length")
    assert done[1].logprobs == pytest.approx(free.logprobs, abs=1e-4)
    assert "".join(event.text for event in events if event.request == 1) == free.text


def test_a_callback_that_raises_costs_nobody_a_token() -> None:
    model, tokenizer = decoder(vocab_size=257), byte_level()
    expected = [each.text for each in complete(model, ["ab", "xyz", "q"], greedy(12), tokenizer=tokenizer)]
    session = Session(model, pages=16, tokenizer=tokenizer)
    prefix = session.prefill("q")

    def hear(text: str) -> None:
        raise RuntimeError("no")

    for prompt, shared in (("ab", None), ("xyz", None), ("", prefix)):
        session.submit(Request(prompt=prompt, prefix=shared, sampling=greedy(12), on_text=hear))
    done = {}
    while session.unfinished:
        with suppress(RuntimeError):
            done = session.run()
    assert [completion.text for completion in done.values()] == expected


def test_what_follows_a_prefix_begins_no_text() -> None:
    """A tokenizer that puts a start token before every text puts one before the document only."""

    class Starting:
        vocab_size = 257

        def encode(self, text: str) -> list[int]:
            return [256, *text.encode()]

        def stream(self) -> TextStream:
            return byte_level().stream()

    model = decoder(vocab_size=257)
    session = Session(model, pages=16, tokenizer=Starting())
    with session.prefill("a document") as prefix:
        session.submit(Request(prompt=" and more", prefix=prefix, sampling=greedy(6)))
        session.submit(Request(prompt="a document and more", sampling=greedy(6)))
        done = session.run()
    (expected,) = complete(model, [[256, *b"a document and more"]], greedy(6))
    assert done[0].tokens == done[1].tokens == expected.tokens


def test_demanded_tokens() -> None:
    session = Session(MODEL, pages=8)
    demanding = greedy(5, first_token=17, last_token=3)
    for sampling in (demanding, greedy(5)):
        session.submit(Request(prompt=[1, 2], sampling=sampling))
    done = session.run()
    assert done[0].tokens == alone([1, 2], demanding)
    assert (done[0].tokens[0], done[0].tokens[-1]) == (17, 3)
    assert done[1].tokens == alone([1, 2], greedy(5))


def test_no_tokens_are_a_completion() -> None:
    session = Session(MODEL, pages=4)
    number = session.submit(Request(prompt=[1, 2], sampling=greedy(0)))
    (event,) = session.step()
    assert (event.request, event.token) == (number, None)
    assert event.completion == Completion(tokens=(), logprobs=(), finish_reason="length")
    assert is_empty(session)


# -- sizes and refusals ------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    session = Session(MODEL, pages=10, page_size=4)
    said = "a prompt of 20 tokens and 22 new ones need 11 pages of 4 tokens, but the session has 10, 0 .* pages=11"
    with pytest.raises(ValueError, match=said):
        session.submit(Request(prompt=prompts(20)[0], sampling=greedy(22)))
    assert session.submit(Request(prompt=prompts(20)[0], sampling=greedy(21))) == 0  # the last token is never read
    with pytest.raises(ValueError, match=r"a prefix of 4 tokens needs 1 pages .* of 10, 0 are held by prefixes and 10"):
        session.prefill([1, 2, 3, 4])
    session.run()
    with session.prefill(prompts(17)[0]) as prefix:
        with pytest.raises(
            ValueError, match=r"4 tokens after a prefix of 17 and 21 new ones need 7 pages .* 5 of them"
        ):
            session.submit(Request(prompt=[1] * 4, prefix=prefix, sampling=greedy(21)))
        session.submit(Request(prompt=[1] * 4, prefix=prefix, sampling=greedy(16)))
        session.run()
    assert is_empty(session)


def test_other_refusals() -> None:
    session = Session(MODEL, pages=10)
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.submit(Request(prompt=[], sampling=greedy(2)))
    with pytest.raises(ValueError, match="the prompt is text: make the session with the tokenizer="):
        session.submit(Request(prompt="a", sampling=greedy(2)))
    with pytest.raises(ValueError, match="token 256, but the model's vocabulary"):
        session.submit(Request(prompt=[256], sampling=greedy(2)))
    with pytest.raises(ValueError, match="num_beams=2: a session has no beam search"):
        session.submit(Request(prompt=[1], sampling=greedy(2, num_beams=2)))
    with pytest.raises(ValueError, match="the prefix belongs to another session"):
        session.submit(Request(prompt=[1], prefix=Session(MODEL, pages=4).prefill([1]), sampling=greedy(2)))
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\]: text is found by a tokenizer"):
        session.submit(Request(prompt=[1], sampling=greedy(2), stop_strings=["x"]))
    with pytest.raises(
        ValueError, match="120 tokens and 10 new ones need 129 positions, but the model has learned 128"
    ):
        Session(decoder("gpt-tiny"), pages=20).submit(Request(prompt=[1] * 120, sampling=greedy(10)))
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model 256"):
        Session(MODEL, pages=4, tokenizer=byte_level())
    for name in ("max_batch", "page_size", "prefill_chunk"):
        with pytest.raises(ValueError, match=f"{name}=0: at least 1"):
            Session(MODEL, pages=4, **{name: 0})  # type: ignore[arg-type]
    assert is_empty(session)


def test_the_size_of_a_pool() -> None:
    per_page = 2 * 2 * 16 * MODEL.config.kv_heads * MODEL.config.dim_per_head * 4  # layers, k and v, tokens, fp32
    assert Session(MODEL, memory=10 * per_page + 5).pool.allocator.total == 10
    with pytest.raises(ValueError, match=f"memory=100: a page of 16 tokens takes {per_page} bytes"):
        Session(MODEL, memory=100)
    with pytest.raises(ValueError, match="pages=3 and memory=5 are both given"):
        Session(MODEL, pages=3, memory=5)
    assert Session(MODEL, max_batch=3).pool.allocator.total == 3 * MODEL.config.max_positions // 16


def test_pages_taken_by_somebody_else_are_said() -> None:
    session = Session(MODEL, pages=4, page_size=4)
    stranger = session.pool.open()
    with torch.no_grad():
        MODEL(torch.zeros(1, 16, dtype=torch.int64), cache=session.pool.cache([stranger]))
    session.submit(Request(prompt=[1, 2], sampling=greedy(2)))
    with pytest.raises(OutOfPages, match="1 pages are needed and 0 of 4 are free"):
        session.run()
    with pytest.raises(OutOfPages):
        session.prefill([1])
    stranger.free()
    assert session.run()[0].tokens == alone([1, 2], greedy(2))
