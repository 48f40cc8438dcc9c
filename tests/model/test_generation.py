"""Sampling: against a loop without a cache, against distributions computed by hand, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.model.cache import ContiguousCache
from longspan.model.decoder import Decoder
from longspan.model.generation import distribution, draw, generate, stream
from longspan.model.zoo import build

PROMPT = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))
LOGITS = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()


@pytest.fixture(scope="module", params=["gpt-tiny", "llama-tiny"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return build(request.param, {"init_std": 0.2}, seed=0).eval()


@torch.no_grad()
def without_cache(model: Decoder, tokens_BT: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        tokens_BT = torch.cat([tokens_BT, model(tokens_BT)[:, -1:].argmax(-1)], dim=1)
    return tokens_BT


def test_greedy_is_the_argmax_loop(model: Decoder) -> None:
    expected = without_cache(model, PROMPT, 24)
    assert len(expected[0, 9:].unique()) > 5
    assert torch.equal(generate(model, PROMPT, max_new_tokens=24, temperature=0), expected)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=24, temperature=0, prefill_chunk=4), expected)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=24, top_k=1, seed=3), expected)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=24, top_p=1e-9, seed=3), expected)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=24, temperature=1e-6, seed=3), expected)


def test_a_seed_is_a_sample_whatever_the_batch(model: Decoder) -> None:
    def sample(tokens: Tensor, seed: int | None) -> Tensor:
        return generate(model, tokens, max_new_tokens=16, temperature=1.3, top_k=50, seed=seed)

    first = sample(PROMPT, 7)
    assert torch.equal(sample(PROMPT, 7), first)
    assert torch.equal(sample(PROMPT[:1], 7), first[:1])
    assert not torch.equal(sample(PROMPT, 8), first)
    same = sample(PROMPT[:1].repeat(3, 1), 7)
    assert not torch.equal(same[0], same[1])
    torch.manual_seed(1)
    drawn = sample(PROMPT, None)
    assert not torch.equal(sample(PROMPT, None), drawn)
    torch.manual_seed(1)
    assert torch.equal(sample(PROMPT, None), drawn)
    state = torch.get_rng_state()
    sample(PROMPT, 7)
    assert torch.equal(torch.get_rng_state(), state)  # a seeded sample leaves torch's generator alone


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
    assert of(top_p=1.0) == of()
    # top-p counts what top-k left: of {0.5, 0.25} the first is two thirds.
    assert of(top_k=2, top_p=0.6)[0] == [1, 0, 0, 0]
    assert of(top_k=2, top_p=0.7)[0] == [round(2 / 3, 6), round(1 / 3, 6), 0, 0]


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]], dtype=torch.float64)
    below_one = 1 - 2**-24
    for uniform, token in [(0.0, 1), (0.49, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (below_one, 4)]:
        assert draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_samples_follow_the_distribution() -> None:
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = draw(distribution(LOGITS[1:]).expand(1000, -1), uniform).bincount(minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


def test_stop_tokens_finish_rows_one_by_one(model: Decoder) -> None:
    free = generate(model, PROMPT, max_new_tokens=12, temperature=0)
    stop = int(free[1, 9 + 4])
    stopped = generate(model, PROMPT, max_new_tokens=12, temperature=0, stop_tokens=[stop], pad_token=255)
    assert stopped.shape == (3, 9 + 12)
    for row in range(3):
        new = free[row, 9:].tolist()
        end = new.index(stop) + 1 if stop in new else 12
        assert stopped[row, 9:].tolist() == new[:end] + [255] * (12 - end)
    steps = list(stream(model, PROMPT[1:2], max_new_tokens=12, temperature=0, stop_tokens={stop}))
    assert len(steps) == free[1, 9:].tolist().index(stop) + 1  # the stream ends; only `generate` pads
    alone = generate(model, PROMPT[1:2], max_new_tokens=12, temperature=0, stop_tokens={stop}, pad_token=255)
    assert torch.equal(alone, stopped[1:2])


def test_shape_and_callback(model: Decoder) -> None:
    seen: list[Tensor] = []
    out = generate(model, PROMPT, max_new_tokens=5, seed=0, on_token=seen.append)
    assert out.shape == (3, 14)
    assert out.dtype == torch.int64
    assert torch.equal(torch.stack(seen, dim=1), out[:, 9:])
    assert torch.equal(out[:, :9], PROMPT)
    assert torch.equal(generate(model, PROMPT, max_new_tokens=0), PROMPT)
    assert not out.requires_grad


def test_training_mode_is_suspended_and_restored() -> None:
    model = build("gpt-tiny", {"dropout": 0.5, "init_std": 0.2}, seed=0).train()
    calm = generate(model.eval(), PROMPT, max_new_tokens=8, temperature=0)
    assert torch.equal(generate(model.train(), PROMPT, max_new_tokens=8, temperature=0), calm)
    assert model.training
    assert torch.is_grad_enabled()
    for _ in stream(model, PROMPT, max_new_tokens=3, seed=0):
        assert torch.is_grad_enabled()  # nothing leaks out between steps
        assert model.training


@pytest.mark.parametrize(
    ("tokens", "settings", "said"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "the prompt is empty"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "the prompt is empty"),
        (torch.zeros(4, dtype=torch.int64), {}, r"shape \(4,\); generation reads \[batch, time\]"),
        (torch.tensor([[1, 256]]), {}, "token 256, but the model's vocabulary is 0 … 255"),
        (torch.tensor([[1, -1]]), {}, "token -1"),
        (PROMPT, {"temperature": -0.1}, "temperature=-0.1"),
        (PROMPT, {"temperature": math.nan}, "temperature=nan"),
        (PROMPT, {"top_k": 0}, "top_k=0"),
        (PROMPT, {"top_p": 0.0}, "top_p=0.0"),
        (PROMPT, {"top_p": 1.1}, "top_p=1.1"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (PROMPT, {"prefill_chunk": 0}, "prefill_chunk=0"),
        (PROMPT, {"pad_token": -1}, "pad_token=-1: a token of the model, 0 … 255"),
    ],
)
def test_refusals(tokens: Tensor, settings: dict[str, float], said: str) -> None:
    model = build("gpt-tiny", seed=0)
    with pytest.raises(ValueError, match=said):
        stream(model, tokens, **{"max_new_tokens": 4, **settings})  # type: ignore[arg-type]  # before the first step


def test_learned_positions_end_and_rotary_ones_do_not() -> None:
    prompt = torch.zeros(1, 120, dtype=torch.int64)
    gpt, llama = build("gpt-tiny", seed=0), build("llama-tiny", seed=0)
    assert generate(gpt, prompt, max_new_tokens=9, temperature=0).shape == (1, 129)  # the last one is never read
    with pytest.raises(
        ValueError, match=r"120 tokens and 10 new ones need 129 positions, but the model has learned 128"
    ):
        generate(gpt, prompt, max_new_tokens=10)
    assert torch.equal(generate(llama, prompt, max_new_tokens=20, temperature=0), without_cache(llama, prompt, 20))


def test_a_full_cache_says_so() -> None:
    model = build("llama-tiny", seed=0)
    cache = ContiguousCache(model.config, 1, 8)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cache for 1 sequences of 8 tokens: 1 sequences of 9 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_a_cache_can_forget_its_end() -> None:
    model = build("llama-tiny", {"init_std": 0.2}, seed=0).eval()
    tokens = PROMPT[:1]
    cache = ContiguousCache(model.config, 1, 9)
    with torch.no_grad():
        model(tokens[:, :7].flip(1), cache=cache)
        cache.truncate(0)
        model(tokens[:, :5], cache=cache)
        model(tokens[:, :2], cache=cache)
        cache.truncate(5)
        found = model(tokens[:, 5:], cache=cache)
        torch.testing.assert_close(found, model(tokens)[:, 5:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="cannot keep 10 tokens of a cache that holds 9"):
        cache.truncate(10)


def test_a_narrow_cache_serves_a_wide_model() -> None:
    model = build("llama-tiny", {"init_std": 0.2}, seed=0).eval()
    cache = ContiguousCache(model.config, 3, 9, dtype=torch.bfloat16)
    with torch.no_grad():
        found = torch.cat([model(PROMPT[:, :5], cache=cache), model(PROMPT[:, 5:], cache=cache)], dim=1)
        expected = model(PROMPT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.std()), rtol=0)
