"""Generation: against a loop without a cache, ragged batches against each prompt alone, completions, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.data.tokenizer import byte_level
from longspan.model.cache import ContiguousCache
from longspan.model.decoder import Decoder
from longspan.model.generation import complete, generate, stream
from longspan.model.sampling import Sampling, log_probabilities
from longspan.model.zoo import build

PROMPT = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["gpt-tiny", "llama-tiny"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return decoder(request.param, {"init_std": 0.2})


def decoder(name: str, overrides: dict[str, object] | None = None) -> Decoder:
    model = build(name, overrides, seed=0)
    assert isinstance(model, Decoder)
    return model.eval()


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
    model = decoder("gpt-tiny", {"dropout": 0.5, "init_std": 0.2}).train()
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
    model = decoder("gpt-tiny")
    with pytest.raises(ValueError, match=said):
        stream(model, tokens, **{"max_new_tokens": 4, **settings})  # before the first step


def test_learned_positions_end_and_rotary_ones_do_not() -> None:
    prompt = torch.zeros(1, 120, dtype=torch.int64)
    gpt, llama = decoder("gpt-tiny"), decoder("llama-tiny")
    assert generate(gpt, prompt, max_new_tokens=9, temperature=0).shape == (1, 129)  # the last one is never read
    with pytest.raises(
        ValueError, match=r"120 tokens and 10 new ones need 129 positions, but the model has learned 128"
    ):
        generate(gpt, prompt, max_new_tokens=10)
    assert torch.equal(generate(llama, prompt, max_new_tokens=20, temperature=0), without_cache(llama, prompt, 20))


def test_a_full_cache_says_so() -> None:
    model = decoder("llama-tiny")
    cache = ContiguousCache(model.config, 1, 8)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="cache for 1 sequences of 8 tokens: 1 sequences of 9 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_a_cache_can_forget_its_end() -> None:
    model = decoder("llama-tiny", {"init_std": 0.2})
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
    model = decoder("llama-tiny", {"init_std": 0.2})
    cache = ContiguousCache(model.config, 3, 9, dtype=torch.bfloat16)
    with torch.no_grad():
        found = torch.cat([model(PROMPT[:, :5], cache=cache), model(PROMPT[:, 5:], cache=cache)], dim=1)
        expected = model(PROMPT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.std()), rtol=0)


# -- prompts of different lengths --------------------------------------------------------------------------------------

# One windowed layer (a ring), one that sees everything, sinks; past the window in every prompt but one.
LOCAL_AND_FULL = {
    "patterns": {"local": {"causal": True, "window": {"left": 5}, "sink_tokens": 1}, "full": {"causal": True}},
    "layers": ["local", "full"],
}
LENGTHS = (3, 14, 9, 20)


def ragged(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Padded rows, their mask, and the prompts alone. Padding is a token that no vocabulary has."""
    generator = torch.Generator().manual_seed(4)
    alone = [torch.randint(0, 256, (1, length), generator=generator) for length in LENGTHS]
    width = max(LENGTHS) + 2
    rows = torch.full((len(LENGTHS), width), -100)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for row, prompt in enumerate(alone):
        before = {"left": width - prompt.shape[1], "right": 0, "both": row % 3}[side]
        rows[row, before : before + prompt.shape[1]] = prompt
        mask[row, before : before + prompt.shape[1]] = True
    return rows, mask, alone


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("positions", ["rope", "learned", "none"])
def test_a_padded_batch_is_each_prompt_alone(side: str, positions: str) -> None:
    overrides = {"attention": LOCAL_AND_FULL, "n_layers": 2, "positions": positions, "init_std": 0.3}
    model = decoder("llama-tiny", overrides)
    rows, mask, alone = ragged(side)
    for settings in (
        {"temperature": 0},
        {"temperature": 0, "prefill_chunk": 4},  # rows end in different pieces, and some have none in the last
        {"temperature": 0, "cache": "contiguous"},
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 1.2, "top_k": 40, "min_p": 0.01, "seeds": [5, 6, 7, 8]},
    ):
        together = generate(model, rows, prompt_mask_BT=mask, max_new_tokens=12, **settings)  # type: ignore[arg-type]
        assert torch.equal(together[:, : rows.shape[1]], rows)
        for row, prompt in enumerate(alone):
            own = {**settings, "seeds": settings["seeds"][row : row + 1]} if "seeds" in settings else settings  # type: ignore[index]
            expected = generate(model, prompt, max_new_tokens=12, **own)  # type: ignore[arg-type]
            assert torch.equal(together[row, rows.shape[1] :], expected[0, prompt.shape[1] :]), (settings, row)


def test_rows_that_stop_leave_the_others_going() -> None:
    model = decoder("llama-tiny", {"init_std": 0.3})
    rows, mask, _ = ragged("left")
    free = generate(model, rows, prompt_mask_BT=mask, max_new_tokens=10, temperature=0)[:, rows.shape[1] :]
    stop = int(free[2, 3])
    stopped = generate(
        model, rows, prompt_mask_BT=mask, max_new_tokens=10, temperature=0, stop_tokens=[stop], pad_token=7
    )[:, rows.shape[1] :]
    for row in range(4):
        tokens = free[row].tolist()
        end = tokens.index(stop) + 1 if stop in tokens else 10
        assert stopped[row].tolist() == tokens[:end] + [7] * (10 - end)


def test_prompts_longer_than_the_window_go_past_the_ring() -> None:
    model = decoder("llama-tiny", {"attention": LOCAL_AND_FULL, "n_layers": 2, "init_std": 0.3})
    prompt = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = without_cache(model, prompt, 30)
    for settings in ({}, {"prefill_chunk": 3}, {"cache": "contiguous"}, {"prefill_chunk": 17, "cache": "contiguous"}):
        found = generate(model, prompt, max_new_tokens=30, temperature=0, **settings)  # type: ignore[arg-type]
        assert torch.equal(found, expected), settings


def test_a_penalty_is_of_prompt_and_output() -> None:
    model = decoder("llama-tiny", {"init_std": 0.3})
    found = generate(model, PROMPT[:1], max_new_tokens=40, temperature=0, repetition_penalty=1e9)[0].tolist()
    assert len(set(found[9:])) == 40
    assert not set(found[9:]) & set(found[:9])


def test_eight_bits_change_little() -> None:
    model = decoder("llama-tiny", {"init_std": 0.1})
    greedy = Sampling(max_new_tokens=2, temperature=0)
    exact = [each.logprobs[1] for each in complete(model, PROMPT.tolist(), greedy)]
    for storage in ("int8", "float8_e4m3fn"):
        rough = complete(model, PROMPT.tolist(), greedy, storage=storage)
        assert [each.logprobs[1] for each in rough] != exact
        assert [each.logprobs[1] for each in rough] == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[True, True]], r"prompt_mask_BT is torch.bool of shape \(1, 2\); it is bool of the tokens' shape \(1, 3\)"),
        ([[1, 1, 1]], "prompt_mask_BT is torch.int64"),
        ([[False, False, False]], "row 0: the prompt is empty"),
        ([[True, False, True]], "prompt_mask_BT: row 0 has padding between its tokens"),
    ],
)
def test_masks_that_are_refused(mask: list[list[bool]], said: str) -> None:
    model = decoder("gpt-tiny")
    with pytest.raises(ValueError, match=said):
        generate(model, PROMPT[:1, :3], max_new_tokens=2, prompt_mask_BT=torch.tensor(mask))


# -- completions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_completions_are_the_tokens_with_their_log_probabilities(model: Decoder) -> None:
    sampling = Sampling(max_new_tokens=9, temperature=1.5, top_k=30, repetition_penalty=1.3, seed=2)
    prompts = [PROMPT[0].tolist(), PROMPT[1, :4].tolist()]
    rows, mask = PROMPT[:2].clone(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    expected = generate(
        model, rows, prompt_mask_BT=mask, max_new_tokens=9, temperature=1.5, top_k=30, repetition_penalty=1.3, seed=2
    )
    for row, completion in enumerate(complete(model, prompts, sampling)):
        assert list(completion.tokens) == expected[row, 9:].tolist()
        assert (completion.finish_reason, completion.text) == ("length", None)
        whole = torch.tensor([[*prompts[row], *completion.tokens]])
        logits = model(whole)[0, len(prompts[row]) - 1 : -1]
        own = log_probabilities(logits, torch.tensor(completion.tokens))  # of the model, not of what was drawn from
        torch.testing.assert_close(torch.tensor(completion.logprobs), own, atol=1e-4, rtol=0)


def test_texts_are_cut_and_streamed(model: Decoder) -> None:
    tokenizer = ByteText()
    greedy = Sampling(max_new_tokens=20, temperature=0)
    free = complete(model, ["ab", "xyz"], greedy, tokenizer=tokenizer)
    assert free[0].text is not None
    assert free[0].text == "".join(map(chr, free[0].tokens))
    stop = free[0].text[6:8]
    heard: dict[int, str] = {0: "", 1: ""}

    def hear(row: int, text: str) -> None:
        heard[row] += text

    cut = complete(model, ["ab", "xyz"], greedy, tokenizer=tokenizer, stop_strings=[stop], on_text=hear)
    for row in range(2):
        whole = free[row].text
        assert whole is not None
        assert cut[row].text == heard[row] == whole.partition(stop)[0]
        assert cut[row].finish_reason == ("stop_string" if stop in whole else "length")
    assert cut[0].tokens == free[0].tokens[: len(cut[0].tokens)]
    assert len(cut[0].tokens) == free[0].text.index(stop) + 2


class ByteText:
    """256 tokens, a character each."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def stream(self) -> ByteText:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


def test_what_complete_refuses(model: Decoder) -> None:
    sampling = Sampling(max_new_tokens=2, temperature=0)
    with pytest.raises(ValueError, match="no prompts"):
        complete(model, [], sampling)
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        complete(model, [[1], []], sampling)
    with pytest.raises(ValueError, match="prompts are texts: pass the tokenizer="):
        complete(model, ["a"], sampling)
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\]: text is found by a tokenizer"):
        complete(model, [[1]], sampling, stop_strings=["x"])
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model 256: they do not belong together"):
        complete(model, ["a"], sampling, tokenizer=byte_level())
    with pytest.raises(ValueError, match="3 seeds for 1 sequences"):
        complete(model, [[1]], Sampling(max_new_tokens=2, seeds=(1, 2, 3)))


def test_what_is_no_prompt_is_refused() -> None:
    model = decoder("gpt-tiny")
    with pytest.raises(ValueError, match=r"prompts are a list: \['hello'\]"):
        complete(model, "hello", Sampling(max_new_tokens=1))
    with pytest.raises(ValueError, match=r"an integer tensor \[batch, time\], not list"):
        generate(model, [[1, 2]], max_new_tokens=1)  # pyright: ignore[reportArgumentType]  # that is the mistake
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        generate(model, torch.ones(1, 2), max_new_tokens=1)
