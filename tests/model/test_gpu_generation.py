"""Decoding methods on CUDA: the tokens that the CPU chooses, from padded batches, beams and sessions alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from longspan.model.decoder import Decoder
from longspan.model.generation import complete, generate
from longspan.model.sampling import Sampling, uniform
from longspan.model.session import Request, Session
from longspan.model.step import Steps
from longspan.model.zoo import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

PATTERNS = {
    "patterns": {"local": {"causal": True, "window": {"left": 20}}, "full": {"causal": True}},
    "layers": ["local", "full"],
}
LENGTHS = (3, 70, 33, 16)


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    model = build("llama-tiny", {"attention": PATTERNS, "n_layers": 2, "init_std": 0.2, "vocab_size": 256}, seed=0)
    assert isinstance(model, Decoder)
    return model.eval(), copy.deepcopy(model).cuda()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


SETTINGS = [
    Sampling(max_new_tokens=30, temperature=0),
    Sampling(max_new_tokens=30, temperature=0, repetition_penalty=1.3, prefill_chunk=16),
    Sampling(max_new_tokens=30, temperature=0.9, top_k=40, min_p=0.02, seed=5),
    Sampling(max_new_tokens=20, temperature=0, num_beams=4, stop_tokens=frozenset(range(0, 256, 20))),
]


def test_noise_has_the_same_bits() -> None:
    seeds, steps = torch.arange(1000) * 2**50 + 7, torch.arange(1000)
    assert torch.equal(uniform(seeds.cuda(), steps.cuda()).cpu(), uniform(seeds, steps))


@pytest.mark.parametrize("sampling", SETTINGS, ids=["greedy", "penalty", "sampled", "beams"])
def test_completions_are_those_of_the_cpu(models: tuple[Decoder, Decoder], sampling: Sampling) -> None:
    on_cpu, on_gpu = (complete(model, prompts(), sampling) for model in models)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


@pytest.mark.parametrize("pages", [200, 14])  # the second is too few for all: some are preempted
@pytest.mark.parametrize("steps", ["recorded", "plain"])
def test_a_session_is_each_prompt_alone(models: tuple[Decoder, Decoder], pages: int, steps: Steps) -> None:
    _, model = models
    session = Session(model, pages=pages, max_batch=4, prefill_chunk=32, steps=steps)
    with session.prefill(prompts()[2]) as prefix:
        for prompt in prompts():
            session.submit(Request(prompt=prompt, sampling=SETTINGS[0]))
            session.submit(Request(prompt=prompt[:2], prefix=prefix, sampling=SETTINGS[2]))
        done = session.run()
    assert (session.preemptions > 0) == (pages == 14)
    for n, prompt in enumerate(prompts()):
        assert done[2 * n].tokens == complete(model, [prompt], SETTINGS[0])[0].tokens
        assert done[2 * n + 1].tokens == complete(model, [prompts()[2] + prompt[:2]], SETTINGS[2])[0].tokens
    assert session.pool.allocator.used == 0


@pytest.mark.parametrize("cache", ["auto", "contiguous", "paged"])
@pytest.mark.parametrize("storage", [None, "int8"])
def test_bf16_runs_over_every_cache(models: tuple[Decoder, Decoder], cache: str, storage: str | None) -> None:
    """Greedy texts, each token near the likeliest one that the full pass in fp32, without a cache, would choose: no
    further from it than bf16 itself moves logits, with room for eight bits."""
    model = copy.deepcopy(models[1]).bfloat16()
    exact = copy.deepcopy(model).float()
    rows = torch.randint(0, 256, (3, 50), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[1, :20] = False
    where: dict[str, Any] = {"cache": cache, "storage": storage}
    out = generate(model, rows, prompt_mask_BT=mask, max_new_tokens=30, temperature=0, **where)
    assert out.shape == (3, 80)
    texts = [out[row, 20 if row == 1 else 0 :] for row in range(3)]
    for text in texts:
        with torch.no_grad():
            logits_TV, plain_TV = exact(text[None])[0, -31:-1], model(text[None])[0, -31:-1].float()
        moved = float((plain_TV - logits_TV).abs().max())
        chosen_T = logits_TV.gather(1, text[-30:, None])[:, 0]
        behind = float((logits_TV.amax(dim=1) - chosen_T).max())
        assert behind <= (4 if storage is None else 12) * moved, (behind, moved)
