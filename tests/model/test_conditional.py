"""Generation from sources: against a loop without caches, each source alone, and every continuation there is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, Window
from longspan.model import conditional
from longspan.model.beam import search
from longspan.model.cache import create_cache
from longspan.model.conditional import condition
from longspan.model.config import AttentionPlan, Seq2SeqConfig, StackConfig
from longspan.model.cross_attention import CrossAttention
from longspan.model.encoder import Encoder
from longspan.model.generation import complete, generate, stream
from longspan.model.prompts import Prompts, prefill
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq, from_config
from longspan.model.zoo import build

V, S = 37, 19

STACK = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=64)
BART = Seq2SeqConfig(vocab_size=V, d_model=32, encoder=STACK, decoder=STACK, forced_bos_token=0, forced_eos_token=2)


def plan(spec: AttentionSpec) -> AttentionPlan:
    return AttentionPlan(patterns={"layer": spec}, layers=("layer",))


LED = Seq2SeqConfig(
    vocab_size=V,
    d_model=32,
    encoder=replace(STACK, attention=plan(AttentionSpec(causal=False, window=Window.symmetric(3), global_tokens=True))),
    decoder=replace(STACK, n_kv_heads=2, attention=plan(AttentionSpec(causal=True, window=Window.causal_keys(5)))),
    position_offset=0,
    global_projections=True,
)
MODELS = {"bart": BART, "led": LED}


def built(config: Seq2SeqConfig) -> Seq2Seq:
    """Weights large enough that texts differ, and token embeddings of one length, lest the longest be all text."""
    model = from_config(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name and not name.endswith("bias"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        embedding_VD = model.encoder.embedding.weight
        embedding_VD.div_(embedding_VD.norm(dim=1, keepdim=True))
    return model


SOURCE_BS = torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(1))
LENGTHS = (11, S, 6)
IS_GLOBAL_BS = torch.zeros(3, S, dtype=torch.bool)
IS_GLOBAL_BS[:, 0] = IS_GLOBAL_BS[1, 8] = True


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> Seq2Seq:
    assert isinstance(request.param, Seq2SeqConfig)
    return built(request.param)


def flags(model: Seq2Seq, row: int) -> Tensor | None:
    return IS_GLOBAL_BS[row : row + 1, : LENGTHS[row]] if model.config.global_projections else None


@torch.no_grad()
def without_cache(model: Seq2Seq, row: int, steps: int) -> Tensor:
    """Greedy continuation of one source, everything computed again for each token."""
    source_BS = SOURCE_BS[row : row + 1, : LENGTHS[row]]
    target_BT = torch.tensor([[model.config.decoder_start_token]])
    for step in range(steps):
        token = model(source_BS, target_BT, is_global_BS=flags(model, row))[:, -1:].argmax(-1)
        if step == 0 and model.config.forced_bos_token is not None:
            token = torch.full_like(token, model.config.forced_bos_token)
        if step == steps - 1 and model.config.forced_eos_token is not None:
            token = torch.full_like(token, model.config.forced_eos_token)
        target_BT = torch.cat([target_BT, token], dim=1)
    return target_BT


def padded(*, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, mask and flags with the padding on one side."""
    mask_BS = torch.arange(S)[None] < torch.tensor(LENGTHS)[:, None]
    shifts = [S - length if left else 0 for length in LENGTHS]
    source_BS, mask_BS, is_global_BS = (
        torch.stack([row.roll(shift) for row, shift in zip(x, shifts)]) for x in (SOURCE_BS, mask_BS, IS_GLOBAL_BS)
    )
    return source_BS, mask_BS, is_global_BS


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("cache", ["auto", "paged"])
def test_greedy_with_caches_is_the_loop_without(model: Seq2Seq, cache: str, left: bool) -> None:
    expected = torch.cat([without_cache(model, row, 20) for row in range(3)])
    assert len(expected.unique()) > 8
    assert len(expected.unique(dim=0)) == 3
    source_BS, mask_BS, is_global_BS = padded(left=left)
    actual = generate(
        model,
        source_BS,
        max_new_tokens=20,
        temperature=0,
        prompt_mask_BT=mask_BS,
        is_global_BT=is_global_BS if model.config.global_projections else None,
        cache="paged" if cache == "paged" else "auto",
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_source_is_encoded_and_projected_once(monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    model, calls = built(LED), Counter[str]()
    project, encode = CrossAttention.keys_values, Encoder.hidden

    def projected(self: CrossAttention, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        calls[f"layer {self.layer}"] += 1
        return project(self, states_BSD)

    def encoded(self: Encoder, tokens_BT: Tensor, context: AttentionContext) -> Tensor:
        calls["encoder"] += 1
        return encode(self, tokens_BT, context)

    monkeypatch.setattr(CrossAttention, "keys_values", projected)
    monkeypatch.setattr(Encoder, "hidden", encoded)
    generate(model, SOURCE_BS, max_new_tokens=9, temperature=0, num_beams=num_beams)
    assert calls == {"encoder": 1, "layer 0": 1, "layer 1": 1}


def test_samples_are_a_function_of_their_seed_and_source(model: Seq2Seq) -> None:
    together = generate(model, SOURCE_BS, max_new_tokens=12, temperature=1.5, seeds=[5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        alone = generate(model, SOURCE_BS[row : row + 1], max_new_tokens=12, temperature=1.5, seed=seed)
        assert torch.equal(alone, together[row : row + 1])
    other = generate(model, SOURCE_BS.flip(1), max_new_tokens=12, temperature=1.5, seeds=[5, 6, 7])
    assert not torch.equal(other, together)
    streamed = torch.stack(list(stream(model, SOURCE_BS, max_new_tokens=12, temperature=1.5, seeds=[5, 6, 7])), dim=1)
    assert torch.equal(streamed, together[:, 1:])


# -- beams ------------------------------------------------------------------------------------------------------------

BEAMS = Sampling(max_new_tokens=3, temperature=0, num_beams=60, stop_tokens=frozenset([2]))
SMALL = replace(LED, vocab_size=5)


def test_enough_beams_find_the_likeliest_target_of_every_source() -> None:
    model = built(SMALL)
    source_BS = SOURCE_BS % 5
    bound = condition(model, source_BS, lengths_B=torch.tensor(LENGTHS))
    found = search(bound, Prompts(model.start(3), (1, 1, 1)), BEAMS)
    for row in range(3):
        scores = {}
        for tokens in product(range(5), repeat=3):
            length = tokens.index(2) + 1 if 2 in tokens else 3
            target = torch.tensor([[2, *tokens[:length]]])
            with torch.no_grad():
                logits = model(source_BS[row : row + 1, : LENGTHS[row]], target[:, :-1])
            logprobs = logits.log_softmax(-1)[0].gather(-1, target[0, 1:, None])
            scores[tokens[:length]] = float(logprobs.sum()) / length
        best = max(scores, key=scores.__getitem__)
        assert found[row][0].tokens == best
        assert found[row][0].score == pytest.approx(scores[best], abs=1e-5)


def test_beams_of_a_batch_are_those_of_each_source_alone(model: Seq2Seq) -> None:
    def best(source_BS: Tensor) -> Tensor:
        return generate(model, source_BS, max_new_tokens=12, temperature=0, num_beams=3, stop_tokens=[4, 5, 9, 11])

    together = best(SOURCE_BS)
    assert torch.equal(together, torch.cat([best(SOURCE_BS[row : row + 1]) for row in range(3)]))
    assert not torch.equal(together, generate(model, SOURCE_BS, max_new_tokens=12, temperature=0))


def test_rows_of_any_sources_read_theirs() -> None:
    """Side by side and as many of each: nothing is copied. Anything else is right all the same."""
    model = built(BART)
    bound = condition(model, SOURCE_BS)
    target_BT = torch.randint(0, V, (3, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        each = model(SOURCE_BS, target_BT)
        for sources in ([0, 1, 2], [0, 0, 1, 1, 2, 2], [1, 1, 2, 2], [2, 0, 2], [0, 0, 1]):
            chosen = bound.for_rows(sources)
            actual = chosen.logits(chosen.hidden(target_BT[sources]))
            torch.testing.assert_close(actual, each[sources], atol=1e-5, rtol=1e-5)
    assert bound.for_rows([0, 0, 1, 1, 2, 2]).source.layers[0][0] is bound.source.layers[0][0]


# -- the rest of the interface ----------------------------------------------------------------------------------------


def test_completions_begin_and_end_as_the_config_says() -> None:
    model = built(BART)
    sources = [row[:length] for row, length in zip(SOURCE_BS.tolist(), LENGTHS)]
    sampling = Sampling(max_new_tokens=7, temperature=0)
    texts = complete(model, sources, sampling)
    assert [list(text.tokens) for text in texts] == [without_cache(model, row, 7)[0, 1:].tolist() for row in range(3)]
    assert {text.tokens[0] for text in texts} == {0}
    assert {text.tokens[-1] for text in texts} == {2}
    assert {complete(model, sources, replace(sampling, first_token=9))[row].tokens[0] for row in range(3)} == {9}


def test_a_target_can_be_continued() -> None:
    """Bound to its sources, the model is prompted like any decoder."""
    model = built(LED)
    whole = generate(model, SOURCE_BS, max_new_tokens=10, temperature=0)
    bound = condition(model, SOURCE_BS)
    assert torch.equal(generate(bound, whole[:, :5], max_new_tokens=6, temperature=0), whole)
    logits_BV = prefill(bound, whole[:, :5], create_cache(bound, 3, 5))
    assert torch.equal(logits_BV.argmax(-1), whole[:, 5])


def test_the_model_is_left_in_its_mode() -> None:
    model = built(replace(BART, dropout=0.5))
    expected = generate(model, SOURCE_BS, max_new_tokens=6, temperature=0)
    model.train()
    assert torch.equal(generate(model, SOURCE_BS, max_new_tokens=6, temperature=0), expected)
    assert model.training
    assert model.encoder.training


def test_requests_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(BART)
    with pytest.raises(ValueError, match="the source has token 37, but the model's vocabulary is 0 … 36"):
        generate(model, torch.full((1, 4), 37), max_new_tokens=1)
    with pytest.raises(ValueError, match="a prompt of 1 tokens and 65 new ones need 65 positions"):
        generate(model, SOURCE_BS, max_new_tokens=65)
    with pytest.raises(ValueError, match="position 69 is beyond the 64 learned positions"):
        generate(model, torch.zeros(1, 70, dtype=torch.int64), max_new_tokens=1)
    with pytest.raises(ValueError, match="this model's encoder has no global attention"):
        generate(model, SOURCE_BS, max_new_tokens=1, is_global_BT=IS_GLOBAL_BS)
    with pytest.raises(ValueError, match=r"is_global_BT is torch.bool of shape \(3, 1\)"):
        generate(built(LED), SOURCE_BS, max_new_tokens=1, is_global_BT=IS_GLOBAL_BS[:, :1])
    with pytest.raises(ValueError, match="first_token=37: a token of the model, 0 … 36"):
        complete(model, SOURCE_BS.tolist(), Sampling(max_new_tokens=1, first_token=37))
    decoder = build("gpt-tiny", seed=0)
    assert not isinstance(decoder, Encoder)
    with pytest.raises(ValueError, match="only sources have global tokens here"):
        generate(decoder, SOURCE_BS, max_new_tokens=1, is_global_BT=IS_GLOBAL_BS)

    def no_memory(n_bytes: int, device: torch.device, what: str) -> None:
        raise ValueError(f"{what} takes {n_bytes} bytes")

    monkeypatch.setattr(conditional, "check_memory", no_memory)
    with pytest.raises(ValueError, match=r"cross-attention's cache of 3 sources of 19 tokens takes 29184 bytes"):
        generate(model, SOURCE_BS, max_new_tokens=1)
