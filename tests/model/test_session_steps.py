"""Sessions by recorded steps, as on CUDA, run here with fixed shapes: rows that sequences move in and out of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.model import step
from longspan.model.decoder import Decoder
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.session import Request, Session
from longspan.model.step import DecodeStep
from longspan.model.zoo import build

WINDOWED = {
    "patterns": {"local": {"causal": True, "window": {"left": 9}}, "full": {"causal": True}},
    "layers": ["local", "full"],
}
SMALL = {"init_std": 0.4, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "vocab_size": 64}


def decoder(name: str = "llama-tiny", **overrides: object) -> Decoder:
    model = build(name, {**SMALL, **overrides}, seed=0)
    assert isinstance(model, Decoder)
    return model.eval()


MODEL = decoder(attention=WINDOWED)
LENGTHS, NEW = (1, 4, 5, 17, 30, 2, 8), (9, 12, 20, 7, 2, 16, 3)
PROMPTS = [
    torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
]
SETTINGS = [
    Sampling(max_new_tokens=n, temperature=0.9 * (n % 2), seed=n, repetition_penalty=1.3 if n > 10 else 1.0)
    for n in NEW
]
ALONE = [complete(MODEL, [prompt], sampling)[0].tokens for prompt, sampling in zip(PROMPTS, SETTINGS, strict=True)]


@pytest.fixture(autouse=True, scope="module")
def _recordable() -> Iterator[None]:
    """A CPU records nothing; `DecodeStep` runs there all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "why_not_recorded", lambda model, paged: None)
        yield


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step that was taken as recorded steps are."""
    seen: list[int] = []
    call = DecodeStep.__call__

    def counted(self: DecodeStep, token_B: Tensor) -> Tensor:
        seen.append(token_B.shape[0])
        return call(self, token_B)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return seen


@settings(max_examples=10, deadline=None)
@given(
    order=st.permutations(range(len(PROMPTS))),
    max_batch=st.integers(1, 7),
    pages=st.integers(13, 40),
    late=st.integers(0, 5),
)
def test_every_request_is_as_if_it_were_alone(order: list[int], max_batch: int, pages: int, late: int) -> None:
    """With pages for everybody and with so few that rows without a sequence have none."""
    session = Session(MODEL, pages=pages, page_size=4, max_batch=max_batch, prefill_chunk=8)
    arriving, numbers, done = list(order), {}, {}
    while session.unfinished or arriving:
        if arriving and (len(arriving) > late or not session.unfinished or len(arriving) % 2):
            index = arriving.pop(0)
            numbers[session.submit(Request(prompt=PROMPTS[index], sampling=SETTINGS[index]))] = index
            continue
        done |= {event.request: event.completion for event in session.step() if event.completion is not None}
        if len(arriving) <= late and arriving:
            index = arriving.pop(0)
            numbers[session.submit(Request(prompt=PROMPTS[index], sampling=SETTINGS[index]))] = index
    assert {numbers[n]: completion.tokens for n, completion in done.items()} == dict(enumerate(ALONE))
    assert session.pool.allocator.used == 0


def test_few_sequences_have_few_rows(rows: list[int]) -> None:
    session = Session(MODEL, pages=64, page_size=4, max_batch=6)
    for prompt in PROMPTS[:5]:
        session.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=4, temperature=0)))
    session.submit(Request(prompt=PROMPTS[0], sampling=Sampling(max_new_tokens=12, temperature=0)))
    session.run()
    assert rows[:4] == [2, 6, 6, 6]  # prompts of one token have no other to read, then all of them
    assert set(rows[4:]) == {1}  # the one that is left


def test_without_pages_for_idle_rows_steps_are_plain(rows: list[int]) -> None:
    """Three sequences in four rows; the pool has a page for each of the three."""
    session = Session(MODEL, pages=3, page_size=8, max_batch=4)
    for prompt in PROMPTS[1:3] + PROMPTS[:1]:
        session.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=3, temperature=0)))
    done = session.run()
    assert session.preemptions == 0
    assert len(done) == 3
    assert session.pool.allocator.used == 0


def test_an_interrupted_step_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(MODEL, pages=40, page_size=4, max_batch=3)
    for prompt, sampling in zip(PROMPTS[:3], SETTINGS, strict=False):
        session.submit(Request(prompt=prompt, sampling=sampling))
    calls, call = 0, DecodeStep.__call__

    def interrupted(self: DecodeStep, token_B: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits_BV = call(self, token_B)
        if calls % 4 == 0:  # the cache has counted the tokens
            raise KeyboardInterrupt
        return logits_BV

    monkeypatch.setattr(DecodeStep, "__call__", interrupted)
    done = {}
    for _ in range(20):
        try:
            done = session.run()
            break
        except KeyboardInterrupt:
            continue
    assert [done[n].tokens for n in range(3)] == ALONE[:3]
    assert calls > 12


def test_learned_positions_bound_what_is_recorded() -> None:
    """Rows are as wide as a power of two, and no wider than the model's positions."""
    model = decoder("gpt-tiny", n_kv_heads=None, max_positions=24)
    session = Session(model, page_size=4, max_batch=2)
    session.submit(Request(prompt=[1] * 15, sampling=Sampling(max_new_tokens=10, temperature=0)))
    (expected,) = complete(model, [[1] * 15], Sampling(max_new_tokens=10, temperature=0), steps="plain")
    assert session.run()[0].tokens == expected.tokens
