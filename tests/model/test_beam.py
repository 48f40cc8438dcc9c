"""Beam search: against every sequence there is, against a transcription of its rule, and its lengths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.data.tokenizer import byte_level
from longspan.model.beam import Hypothesis, beam_search, search
from longspan.model.decoder import Decoder
from longspan.model.generation import complete, generate
from longspan.model.paging import PagePool
from longspan.model.prompts import from_sequences
from longspan.model.sampling import Sampling
from longspan.model.zoo import build

STOP = 2


class Toy:
    """Logits that depend on the whole past: drawn from a generator seeded by it."""

    def __init__(self, seeds: Sequence[int], vocab_size: int = 3) -> None:
        self.seeds, self.vocab_size = seeds, vocab_size
        self.rows: list[tuple[int, ...]] = [(seed,) for seed in seeds]
        self.calls = 0

    def of(self, past: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash(past) % 2**31)
        return torch.randn(self.vocab_size, generator=generator) * 2

    def start(self) -> Tensor:
        return torch.stack([self.of(row) for row in self.rows])

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.calls += 1
        self.rows = [(*self.rows[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        return self.start()

    def logprob(self, tokens: Sequence[int], seed: int) -> float:
        pasts = [(seed, *tokens[:n]) for n in range(len(tokens))]
        return sum(float(self.of(past).log_softmax(-1)[token]) for past, token in zip(pasts, tokens))


def every_sequence(vocab_size: int, longest: int) -> list[tuple[int, ...]]:
    going = [token for token in range(vocab_size) if token != STOP]
    ended = [(*past, STOP) for n in range(longest) for past in itertools.product(going, repeat=n)]
    return ended + list(itertools.product(going, repeat=longest))


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    longest=st.integers(1, 4),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.6, 1.0, 3.0]),
)
def test_with_room_for_all_it_finds_the_best_there_is(seeds: list[int], longest: int, length_penalty: float) -> None:
    toy = Toy(seeds)
    found = beam_search(
        toy.start(),
        toy.advance,
        num_beams=40,
        max_new_tokens=longest,
        stop_tokens={STOP},
        length_penalty=length_penalty,
    )
    for seed, hypotheses in zip(seeds, found, strict=True):
        scores = {
            tokens: toy.logprob(tokens, seed) / len(tokens) ** length_penalty for tokens in every_sequence(3, longest)
        }
        ranked = sorted(scores, key=lambda tokens: -scores[tokens])
        assert [hypothesis.tokens for hypothesis in hypotheses] == ranked[:40]
        for hypothesis in hypotheses:
            assert hypothesis.score == pytest.approx(scores[hypothesis.tokens], abs=1e-5)
            assert sum(hypothesis.logprobs) == pytest.approx(toy.logprob(hypothesis.tokens, seed), abs=1e-5)
            assert hypothesis.stopped == (hypothesis.tokens[-1] == STOP)


def by_the_rule(toy: Toy, seed: int, beams: int, longest: int, penalty: float) -> list[tuple[int, ...]]:
    """Step by step as the docstring says, without stopping early."""
    running: list[tuple[int, ...]] = [()]
    finished: dict[tuple[int, ...], float] = {}
    for length in range(1, longest + 1):
        grown = [(*past, token) for past in running for token in range(toy.vocab_size)]
        grown.sort(key=lambda tokens: -toy.logprob(tokens, seed))
        for tokens in grown[:beams]:
            if tokens[-1] == STOP or length == longest:
                finished[tokens] = toy.logprob(tokens, seed) / length**penalty
        running = [tokens for tokens in grown if tokens[-1] != STOP][:beams]
    return sorted(finished, key=lambda tokens: -finished[tokens])[:beams]


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    beams=st.integers(1, 4),
    penalty=st.sampled_from([-0.5, 0.0, 1.0, 2.0]),
)
def test_it_follows_its_rule_and_stops_early_without_changing_the_result(
    seeds: list[int], beams: int, penalty: float
) -> None:
    toy = Toy(seeds, vocab_size=5)
    found = beam_search(
        toy.start(), toy.advance, num_beams=beams, max_new_tokens=6, stop_tokens={STOP}, length_penalty=penalty
    )
    for seed, hypotheses in zip(seeds, found, strict=True):
        assert [each.tokens for each in hypotheses] == by_the_rule(Toy([seed], 5), seed, beams, 6, penalty)


def test_one_beam_is_greedy() -> None:
    toy = Toy([5], vocab_size=6)
    tokens: list[int] = []
    while len(tokens) < 8 and STOP not in tokens:
        tokens.append(int(toy.of((5, *tokens)).argmax()))
    ((hypothesis,),) = beam_search(toy.start(), toy.advance, num_beams=1, max_new_tokens=8, stop_tokens={STOP})
    assert hypothesis.tokens == tuple(tokens)


def chain(tokens: Sequence[int]) -> Tensor:
    """0 → likely 1; after 1, the stop token is likely but a long way of sure steps starts with 0."""
    probabilities = {(): [0.1, 0.9, 0.0], (1,): [0.45, 0.0, 0.55]}.get(tuple(tokens), [0.99, 0.0, 0.01])
    return torch.tensor(probabilities).clamp(min=1e-6).log()


@pytest.mark.parametrize(("length_penalty", "length"), [(0.0, 2), (1.0, 6)])
def test_the_penalty_decides_between_short_and_long(length_penalty: float, length: int) -> None:
    rows: list[tuple[int, ...]] = [()]

    def advance(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        rows[:] = [(*rows[parent], token) for parent, token in zip(parents, tokens)]
        return torch.stack([chain(row) for row in rows])

    (hypotheses,) = beam_search(
        chain(())[None], advance, num_beams=2, max_new_tokens=6, stop_tokens={2}, length_penalty=length_penalty
    )
    assert len(hypotheses[0].tokens) == length
    assert hypotheses[0].stopped == (length == 2)


def test_a_search_that_cannot_improve_stops() -> None:
    """Stopping is nearly certain at once; nothing that runs can catch up, and the model is not asked again."""
    calls = 0

    def advance(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor([[-9.0, -9.0, 9.0]]).expand(len(tokens), -1)

    (hypotheses,) = beam_search(
        torch.tensor([[-9.0, -9.5, 9.0]]), advance, num_beams=2, max_new_tokens=50, stop_tokens={2}, length_penalty=0.0
    )
    assert calls == 1  # the second finished hypothesis needs one step
    assert hypotheses[0] == Hypothesis((2,), hypotheses[0].logprobs, hypotheses[0].score, True)


def test_no_new_tokens_are_an_empty_hypothesis() -> None:
    found = beam_search(torch.zeros(2, 3), lambda *_: torch.zeros(0, 3), num_beams=2, max_new_tokens=0)
    assert found == [[Hypothesis((), (), 0.0, False)]] * 2


# -- on a decoder ------------------------------------------------------------------------------------------------------


def model_of(**overrides: object) -> Decoder:
    model = build("gpt-tiny", {"init_std": 0.3, "vocab_size": 40, **overrides}, seed=1)
    assert isinstance(model, Decoder)
    return model.eval()


@torch.no_grad()
def without_pages(model: Decoder, prompt: list[int], **settings: object) -> list[Hypothesis]:
    """The same search, every hypothesis read from its beginning at every step."""
    rows = [prompt]

    def logits() -> Tensor:
        return model(torch.tensor(rows))[:, -1]

    def advance(parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        rows[:] = [[*rows[parent], token] for parent, token in zip(parents, tokens)]
        return logits()

    return beam_search(logits(), advance, **settings)[0]  # type: ignore[arg-type]


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], list(range(20))]  # shorter and longer than a page


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_forked_pages_hold_what_their_hypotheses_read(length_penalty: float) -> None:
    model = model_of()
    settings = {"num_beams": 4, "max_new_tokens": 24, "stop_tokens": {5, 11}, "length_penalty": length_penalty}
    sampling = Sampling(temperature=0, **{**settings, "stop_tokens": frozenset({5, 11})})
    prompts = from_sequences(PROMPTS, None, torch.device("cpu"))
    for chunked in (sampling, replace(sampling, prefill_chunk=5)):
        found = search(model, prompts, chunked)
        for prompt, hypotheses in zip(PROMPTS, found, strict=True):
            expected = without_pages(model, prompt, **settings)
            assert [each.tokens for each in hypotheses] == [each.tokens for each in expected]
            for one, other in zip(hypotheses, expected, strict=True):
                assert one.score == pytest.approx(other.score, abs=1e-4)


def test_generate_and_complete_give_the_best() -> None:
    model = model_of()
    best = without_pages(model, PROMPTS[0], num_beams=3, max_new_tokens=10, stop_tokens={5})[0]
    sampling = Sampling(max_new_tokens=10, temperature=0, num_beams=3, stop_tokens=frozenset({5}))
    (completion,) = complete(model, [PROMPTS[0]], sampling)
    assert completion.tokens == best.tokens
    assert completion.logprobs == pytest.approx(best.logprobs, abs=1e-4)
    assert completion.finish_reason == ("stop_token" if best.stopped else "length")
    out = generate(
        model, torch.tensor(PROMPTS[:1]), max_new_tokens=10, temperature=0, num_beams=3, stop_tokens={5}, pad_token=39
    )
    assert out[0].tolist() == [*PROMPTS[0], *best.tokens, *[39] * (10 - len(best.tokens))]
    assert generate(model, torch.tensor(PROMPTS[:1]), max_new_tokens=0, temperature=0, num_beams=3).shape == (1, 8)


def test_what_beams_refuse() -> None:
    model, prompt = model_of(), torch.tensor(PROMPTS[:1])
    with pytest.raises(ValueError, match="num_beams=2 with on_token: a beam search knows its tokens only at the end"):
        generate(model, prompt, max_new_tokens=2, temperature=0, num_beams=2, on_token=print)
    with pytest.raises(ValueError, match="num_beams=2 with cache='contiguous': hypotheses share pages"):
        generate(model, prompt, max_new_tokens=2, temperature=0, num_beams=2, cache="contiguous")
    sampling = Sampling(max_new_tokens=2, temperature=0, num_beams=2)
    with pytest.raises(ValueError, match="num_beams=2 with stop_strings"):
        complete(model_of(vocab_size=257), ["a"], sampling, tokenizer=byte_level(), stop_strings=["x"])


def test_no_key_is_copied_to_follow_another_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a prompt of whole pages nothing is copied; later one page at most for each hypothesis and step."""
    copied: list[int] = []
    real = PagePool.copy_pages

    def spy(pool: PagePool, sources: Sequence[int], targets: Sequence[int]) -> None:
        copied.append(len(sources))
        real(pool, sources, targets)

    monkeypatch.setattr(PagePool, "copy_pages", spy)
    prompts = from_sequences([list(range(32))], None, torch.device("cpu"))
    search(model_of(), prompts, Sampling(max_new_tokens=2, temperature=0, num_beams=4))
    assert sum(copied) == 0
    search(model_of(), prompts, Sampling(max_new_tokens=20, temperature=0, num_beams=4))
    assert 0 < max(copied) < 4
