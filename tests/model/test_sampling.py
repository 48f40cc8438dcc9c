"""Choosing a token: distributions by hand and by their plain definitions, draws by frequency, seeds, and refusals."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.model.sampling import (
    Sampling,
    choose,
    distribution,
    draw,
    log_probabilities,
    penalise,
    seen_tokens,
    sequence_seeds,
    uniform,
)

LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()


def test_distribution_by_hand() -> None:
    def of(**settings: float) -> list[list[float]]:
        return [[round(p, 6) for p in row] for row in distribution(LOGITS, **settings).tolist()]  # type: ignore[arg-type]

    assert of() == [[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]
    assert of(temperature=0.5)[1] == [round(p * p / 0.3, 6) for p in (0.1, 0.2, 0.3, 0.4)]
    assert of(top_k=2) == [[round(2 / 3, 6), round(1 / 3, 6), 0, 0], [0, 0, round(3 / 7, 6), round(4 / 7, 6)]]
    assert of(top_k=3)[0] in ([round(p / 7, 6) for p in (4, 2, 1, 0)], [round(p / 7, 6) for p in (4, 2, 0, 1)])
    assert of(top_k=9) == of()
    assert of(top_p=0.3) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    # The smallest set that reaches p: 0.5 alone reaches 0.5; for 0.51 the next one is needed.
    assert of(top_p=0.49)[0] == of(top_p=0.4999)[0] == [1, 0, 0, 0]
    assert of(top_p=0.51)[0] == [round(2 / 3, 6), round(1 / 3, 6), 0, 0]
    assert of(top_p=0.71)[1] == [0, round(2 / 9, 6), round(3 / 9, 6), round(4 / 9, 6)]
    assert of(top_p=0.69)[1] == [0, 0, round(3 / 7, 6), round(4 / 7, 6)]
    assert distribution(torch.zeros(1, 4), top_p=0.5).tolist() == [[0.5, 0.5, 0, 0]]  # two quarters reach a half
    assert of(top_p=1.0) == of(min_p=0.0) == of()
    # min-p is a share of the likeliest: 0.25 is half of 0.5, and so is 0.2 of 0.4.
    assert of(min_p=0.49) == [[round(2 / 3, 6), round(1 / 3, 6), 0, 0], [0, *(round(p / 9, 6) for p in (2, 3, 4))]]
    assert of(min_p=0.51) == [[1, 0, 0, 0], [0, 0, round(3 / 7, 6), round(4 / 7, 6)]]
    assert of(min_p=1.0) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    # After temperature: squared, 0.25 is a quarter of the likeliest.
    assert of(temperature=0.5, min_p=0.26)[0] == [1, 0, 0, 0]
    # top-p counts what top-k left: of {0.5, 0.25} the first is two thirds.
    assert of(top_k=2, top_p=0.6)[0] == [1, 0, 0, 0]
    assert of(top_k=2, top_p=0.7)[0] == [round(2 / 3, 6), round(1 / 3, 6), 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda tenths: tenths / 10), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_kept_tokens_are_those_of_the_plain_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    by_weight = sorted(weights, key=lambda token: -weights[token])
    kept = by_weight[:top_k]
    if top_p is not None:
        total = sum(weights[token] for token in kept)
        wanted = next(
            n for n in range(1, len(kept) + 1) if _reaches(kept[:n], weights, top_p * total) or n == len(kept)
        )
        kept = kept[:wanted]
    if min_p is not None:
        kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]] * (1 - 1e-12)]
    mass = sum(weights[token] for token in kept)
    expected = [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]
    found = distribution(
        torch.tensor([logits], dtype=torch.float64), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)


def _reaches(tokens: list[int], weights: dict[int, float], mass: float) -> bool:
    return sum(weights[token] for token in tokens) >= mass * (1 - 1e-12)


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    below_one = 1 - 2**-32
    for number, token in [(0.0, 1), (0.49, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (below_one, 4)]:
        assert draw(probabilities, torch.tensor([number], dtype=torch.float64)).item() == token


def test_samples_follow_the_distribution() -> None:
    evenly = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = draw(distribution(LOGITS[1:]).expand(1000, -1), evenly).bincount(minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63 - 1), st.sampled_from([{}, {"top_k": 2}, {"min_p": 0.6}, {"temperature": 3.0}]))
def test_frequencies_of_drawn_tokens_are_the_probabilities(seed: int, kept: dict[str, float]) -> None:
    n = 4000
    sampling = Sampling(max_new_tokens=n, **kept)  # type: ignore[arg-type]
    drawn = choose(LOGITS[1:].expand(n, -1), sampling, seeds_B=torch.tensor([seed]).expand(n), step=torch.arange(n))
    expected = distribution(LOGITS[1:], **kept)[0]  # type: ignore[arg-type]
    found = drawn.bincount(minlength=4) / n
    assert float((found - expected).abs().max()) < 5 * 0.5 / n**0.5  # five standard deviations of the likeliest kind
    assert found[expected == 0].sum() == 0


# -- noise -------------------------------------------------------------------------------------------------------------


def splitmix(seed: int, step: int) -> float:
    """The same generator on Python's integers."""

    def mixed(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return word ^ (word >> 31)

    return (mixed((mixed(seed) + (step + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32) / 2**32


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6)), min_size=1, max_size=5))
def test_noise_is_splitmix64_of_seed_and_step_alone(pairs: list[tuple[int, int]]) -> None:
    found = uniform(torch.tensor([seed for seed, _ in pairs]), torch.tensor([step for _, step in pairs]))
    assert found.tolist() == [splitmix(seed, step) for seed, step in pairs]
    assert all(0 <= number < 1 for number in found.tolist())


def test_noise_is_the_published_sequence() -> None:
    """The first outputs of SplitMix64 from state 0, which the finaliser maps to itself."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = uniform(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert found.tolist() == [(word >> 32) / 2**32 for word in published]


def test_noise_is_even_and_its_streams_unrelated() -> None:
    numbers = torch.stack([uniform(torch.arange(500), step) for step in range(40)], dim=1)
    assert numbers.unique().numel() > 0.9999 * numbers.numel()
    counts = (numbers.flatten() * 20).long().bincount(minlength=20)
    assert float((counts - 1000).abs().max()) < 5 * 1000**0.5
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):  # neighbouring seeds, neighbouring steps
        assert abs(float((centred * other).mean())) < 5 / 12 / numbers.numel() ** 0.5


def test_seeds_of_a_batch() -> None:
    five = sequence_seeds(Sampling(max_new_tokens=1, seed=7), 5)
    assert five[0] == 7
    assert five[:2] == sequence_seeds(Sampling(max_new_tokens=1, seed=7), 2)
    assert not set(five) & set(sequence_seeds(Sampling(max_new_tokens=1, seed=8), 5))
    assert sequence_seeds(Sampling(max_new_tokens=1, seeds=(3, 3)), 2) == [3, 3]
    assert sequence_seeds(Sampling(max_new_tokens=1, seed=7), 0) == []
    with pytest.raises(ValueError, match="2 seeds for 3 sequences"):
        sequence_seeds(Sampling(max_new_tokens=1, seeds=(1, 2)), 3)
    state = torch.get_rng_state()
    sequence_seeds(Sampling(max_new_tokens=1, seed=7), 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert sequence_seeds(Sampling(max_new_tokens=1), 1) != sequence_seeds(Sampling(max_new_tokens=1), 1)


# -- penalty, log-probabilities ----------------------------------------------------------------------------------------


def test_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, 0.0]]
    assert penalise(logits, seen, 0.5).tolist() == [[4.0, -1.0, 3.0, 0.0]]  # below 1 it asks for repetition


def test_seen_tokens() -> None:
    tokens = torch.tensor([[1, 1, 3], [0, 2, 2]])
    assert seen_tokens(tokens, 4).int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    real = torch.tensor([[True, False, True], [False, True, True]])
    assert seen_tokens(tokens, 4, real).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_a_penalty_changes_the_greedy_choice() -> None:
    greedy = Sampling(max_new_tokens=1, temperature=0, repetition_penalty=2.0)
    logits, seeds = torch.tensor([[2.0, 1.5, -1.0]]), torch.zeros(1, dtype=torch.int64)
    seen = torch.tensor([[True, False, False]])
    assert choose(logits, greedy, seeds_B=seeds, step=0, seen_BV=seen).item() == 1
    assert choose(logits, greedy, seeds_B=seeds, step=0, seen_BV=~seen).item() == 0
    with pytest.raises(ValueError, match="needs the tokens seen so far"):
        choose(logits, greedy, seeds_B=seeds, step=0)


def test_a_choice_is_its_rows_own() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(6) * 977
    sampling = Sampling(max_new_tokens=9, top_k=20, top_p=0.9, min_p=0.01, temperature=1.7)
    together = choose(logits, sampling, seeds_B=seeds, step=torch.arange(6))
    for row in range(6):
        alone = choose(logits[row : row + 1], sampling, seeds_B=seeds[row : row + 1], step=row)
        assert alone.item() == together[row].item()
    assert Counter(together.tolist()).most_common(1)[0][1] < 6


def test_log_probabilities_are_the_models_own() -> None:
    found = log_probabilities(LOGITS, torch.tensor([1, 3]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.4]).log())
    torch.testing.assert_close(log_probabilities(LOGITS + 100, torch.tensor([1, 3])), found, atol=1e-5, rtol=0)
    assert log_probabilities(LOGITS.bfloat16(), torch.tensor([1, 3])).dtype == torch.float32


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1: a count"),
        ({"temperature": -0.1}, "temperature=-0.1: 0 is greedy"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: above 0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"seed": 1, "seeds": (1,)}, "seed=1 and seeds are both given"),
        ({"seed": -1}, "seed=-1: a whole number from 0"),
        ({"seeds": (0, 2**63)}, "seed=9223372036854775808"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2}, r"num_beams=2 with temperature=1.0: beam search .* set temperature=0, or num_beams=1"),
        ({"num_beams": 2, "temperature": 0, "repetition_penalty": 1.2}, "num_beams=2 with repetition_penalty=1.2"),
        ({"length_penalty": 2.0}, "length_penalty=2.0: compares the hypotheses"),
        ({"num_beams": 2, "temperature": 0, "length_penalty": math.inf}, "length_penalty=inf"),
    ],
)
def test_refusals(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**{"max_new_tokens": 4, **settings})


def test_greedy_has_no_use_for_the_rest_and_takes_it() -> None:
    """Settings of sampling stay where they are when temperature=0 turns it off: the likeliest token is in every set."""
    logits, seeds = torch.randn(5, 30, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    wanted: Tensor = logits.argmax(-1)
    for kept in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"seed": 3}):
        sampling = Sampling(max_new_tokens=1, temperature=0, **kept)  # type: ignore[arg-type]
        assert torch.equal(choose(logits, sampling, seeds_B=seeds, step=0), wanted)
