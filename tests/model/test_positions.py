"""Rotary scaling and sinusoids: the formulas of transformers on the same config, and what holds whatever the formula."""
# ruff: noqa: E501 (what a user reads is quoted whole)

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.model.cache import ContiguousCache, create_cache
from longspan.model.config import DecoderConfig, ModelConfigError, RopeScaling, from_dict, to_dict
from longspan.model.decoder import Decoder, from_config
from longspan.model.generation import generate
from longspan.model.positions import Rotary, Sinusoids, rope_rates, rotate

HEAD_DIM, THETA, ORIGINAL = 32, 10_000.0, 64

SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "ntk": RopeScaling(kind="ntk", factor=4.0),
    "dynamic": RopeScaling(kind="dynamic", factor=4.0, original_positions=ORIGINAL),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_positions=ORIGINAL, beta_fast=4.0),
    "yarn, no whole dimensions": RopeScaling(kind="yarn", factor=8.0, original_positions=ORIGINAL, truncate=False),
    "yarn, its own temperature": RopeScaling(
        kind="yarn", factor=8.0, original_positions=ORIGINAL, attention_factor=1.7, beta_slow=2.0
    ),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_positions=ORIGINAL),
    "llama3, other bounds": RopeScaling(
        kind="llama3", factor=3.0, original_positions=ORIGINAL, low_freq_factor=0.5, high_freq_factor=9.0
    ),
}


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [40, 64, 65, 300])
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "ntk"])
def test_rates_are_those_of_transformers(name: str, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from longspan.model.conversion.rope import write_rope

    parameters = write_rope(THETA, SCALINGS[name], head_dim=HEAD_DIM, max_positions=ORIGINAL)["rope_parameters"]
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=ORIGINAL, rope_parameters=parameters
    )
    expected, temperature = ROPE_INIT_FUNCTIONS[SCALINGS[name].kind](config, torch.device("cpu"), seq_len=length)
    rates, ours = rope_rates(HEAD_DIM, THETA, SCALINGS[name], length)
    torch.testing.assert_close(rates.float(), expected, atol=0, rtol=1e-6)
    assert ours == pytest.approx(temperature, rel=1e-12)


# -- by definition ----------------------------------------------------------------------------------------------------


def test_linear_divides_positions() -> None:
    plain, stretched = Rotary(HEAD_DIM, 8, THETA), Rotary(HEAD_DIM, 8, THETA, SCALINGS["linear"])
    fine, coarse = torch.arange(25)[None], 4 * torch.arange(25)[None]
    for one, other in zip(plain(fine, 25), stretched(coarse, 100), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest() -> None:
    plain, _ = rope_rates(HEAD_DIM, THETA)
    stretched, _ = rope_rates(HEAD_DIM, THETA, SCALINGS["ntk"])
    assert stretched[0] == plain[0] == 1.0
    assert float(plain[-1] / stretched[-1]) == pytest.approx(4.0)
    assert torch.all(stretched.diff() < 0)


def test_dynamic_is_plain_up_to_the_original_length_and_ntk_beyond() -> None:
    scaling = SCALINGS["dynamic"]
    plain, _ = rope_rates(HEAD_DIM, THETA)
    assert torch.equal(rope_rates(HEAD_DIM, THETA, scaling, ORIGINAL)[0], plain)
    # At factor · L the stretch is factor · factor − (factor − 1).
    expected, _ = rope_rates(HEAD_DIM, THETA, RopeScaling(kind="ntk", factor=13.0))
    torch.testing.assert_close(rope_rates(HEAD_DIM, THETA, scaling, 4 * ORIGINAL)[0], expected)


def test_yarn_keeps_fast_turns_divides_slow_ones_and_sharpens_scores() -> None:
    plain, _ = rope_rates(128, THETA)
    scaling = RopeScaling(kind="yarn", factor=16.0, original_positions=4096)
    stretched, temperature = rope_rates(128, THETA, scaling)
    turns = 4096 * plain / (2 * math.pi)
    assert torch.equal(stretched[turns > 40], plain[turns > 40])
    torch.testing.assert_close(stretched[turns < 0.9], plain[turns < 0.9] / 16)
    assert temperature == pytest.approx(0.1 * math.log(16) + 1)
    assert torch.all((plain / stretched).diff() >= -1e-9)


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    plain, _ = rope_rates(128, 500_000.0)
    scaling = RopeScaling(kind="llama3", factor=8.0, original_positions=8192)
    stretched, _ = rope_rates(128, 500_000.0, scaling)
    waves = 2 * math.pi / plain
    assert torch.equal(stretched[waves < 2048], plain[waves < 2048])
    torch.testing.assert_close(stretched[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 2048) & (waves < 8192)
    assert torch.all(stretched[between] < plain[between])
    assert torch.all(stretched[between] > plain[between] / 8)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "dynamic"])
def test_factor_one_is_plain_rotation(name: str) -> None:
    unscaled = replace(SCALINGS[name], factor=1.0, attention_factor=None)
    positions = torch.arange(300)[None]
    plain = Rotary(HEAD_DIM, 8, THETA)(positions, 300)
    for one, other in zip(plain, Rotary(HEAD_DIM, 8, THETA, unscaled)(positions, 300, 300), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [None, *SCALINGS])
def test_scores_depend_on_distance_alone(name: str | None) -> None:
    rotary = Rotary(HEAD_DIM, 8, THETA, SCALINGS[name] if name else None)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, HEAD_DIM, generator=generator) for _ in range(2))

    def score(i: int, j: int) -> Tensor:
        q_at, k_at = (rotate(x, rotary(torch.tensor([[at]]), 300, 300)) for x, at in ((q, i), (k, j)))
        return (q_at * k_at).sum()

    torch.testing.assert_close(score(150, 130), score(20, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(score(7, 290), score(12, 295), atol=1e-4, rtol=0)
    assert abs(score(150, 130) - score(150, 100)) > 0.01


def test_sinusoids() -> None:
    table = Sinusoids(16, 4)
    positions = torch.tensor([[0, 1, 37]])
    found = table(positions, 38)[0]
    for row, position in enumerate((0, 1, 37)):
        for pair in range(8):
            angle = position / 10_000 ** (2 * pair / 16)
            assert float(found[row, 2 * pair]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(found[row, 2 * pair + 1]) == pytest.approx(math.cos(angle), abs=1e-6)
    assert not list(table.state_dict())
    assert Sinusoids(5, 4)(positions[:, :2], 2).shape == (1, 2, 5)


# -- in a model -------------------------------------------------------------------------------------------------------

SHORT = 24
KINDS = {
    "sinusoidal": {"positions": "sinusoidal"},
    **{
        f"rope {name}": {
            "positions": "rope",
            "rope_scaling": scaling
            if scaling.original_positions is None
            else replace(scaling, original_positions=SHORT),
        }
        for name, scaling in SCALINGS.items()
    },
}


def model(**changes: object) -> Decoder:
    config = DecoderConfig(vocab_size=61, n_layers=2, d_model=64, n_heads=2, d_ff=96, max_positions=SHORT, init_std=0.2)
    return from_config(from_dict({**to_dict(config), **changes}), seed=0).eval()


TOKENS_BT = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decoded(decoder: Decoder, cache: ContiguousCache, *, prefill: int) -> Tensor:
    """Logits of teacher-forced decoding: a prefill in two pieces, then single tokens."""
    pieces = [TOKENS_BT[:, : prefill // 2], TOKENS_BT[:, prefill // 2 : prefill]]
    pieces += TOKENS_BT[:, prefill:].split(1, dim=1)
    return torch.cat([decoder(piece, cache=cache) for piece in pieces], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_the_full_forward_pass(kind: str) -> None:
    """Twice as long as the model was trained: also where the scale comes from the length."""
    decoder = model(**KINDS[kind])
    with torch.no_grad():
        expected = decoder(TOKENS_BT)
    cache = create_cache(decoder, 2, TOKENS_BT.shape[1])
    torch.testing.assert_close(decoded(decoder, cache, prefill=20), expected, atol=2e-5, rtol=0)
    assert expected.std() > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_positions_matter(kind: str) -> None:
    """A model that ignored them, or a setting, would pass everything above."""
    swapped = TOKENS_BT.clone()
    swapped[:, [10, 30]] = swapped[:, [30, 10]]
    with torch.no_grad():
        decoder = model(**KINDS[kind])
        assert (decoder(TOKENS_BT)[:, -1] - decoder(swapped)[:, -1]).abs().max() > 1e-3
        plain = model(positions="rope" if kind.startswith("rope") else "none")
        assert (decoder(TOKENS_BT)[:, -1] - plain(TOKENS_BT)[:, -1]).abs().max() > 1e-3


def test_dynamic_scaling_keeps_the_scale_that_was_declared() -> None:
    """A cache for more tokens rotates by that length from the first token on; a full pass by its own."""
    decoder = model(**KINDS["rope dynamic"])
    with torch.no_grad():
        whole = decoder(TOKENS_BT)
        wide = decoded(decoder, create_cache(decoder, 2, 200), prefill=20)
        assert (wide - whole).abs().max() > 1e-3
        within = create_cache(decoder, 2, SHORT)
        torch.testing.assert_close(
            decoder(TOKENS_BT[:, :SHORT], cache=within), decoder(TOKENS_BT[:, :SHORT]), atol=1e-5, rtol=0
        )


def test_dynamic_scaling_generates_by_the_length_of_the_request() -> None:
    decoder = model(**KINDS["rope dynamic"])
    out_BT = generate(decoder, TOKENS_BT[:1, :20], max_new_tokens=31, temperature=0)
    with torch.no_grad():
        greedy = decoder(out_BT[:, :-1]).argmax(dim=-1)  # 50 tokens: what the cache was made for
    assert torch.equal(greedy[:, 19:], out_BT[:, 20:])


def test_dynamic_scaling_and_pages() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling.kind=dynamic .* pages outlive requests: use cache=contiguous"):
        create_cache(model(**KINDS["rope dynamic"]), 1, 50, kind="paged")
    create_cache(model(**KINDS["rope yarn"]), 1, 50, kind="paged")


def test_windows_and_sinks_under_scaling() -> None:
    """Rings keep rotated keys; what they keep is what a full pass attends to."""
    pattern = {"local": {"causal": True, "window": {"left": 9}, "sink_tokens": 2}}
    decoder = model(**KINDS["rope yarn"], attention={"patterns": pattern, "layers": ["local"]})
    with torch.no_grad():
        expected = decoder(TOKENS_BT)
    torch.testing.assert_close(decoded(decoder, create_cache(decoder, 2, 50), prefill=20), expected, atol=2e-5, rtol=0)


def test_document_positions_reset_under_sinusoids() -> None:
    decoder = model(positions="sinusoidal", attention={"patterns": {"d": {"causal": True, "documents": True}}, "layers": ["d"]})  # fmt: skip
    documents = torch.tensor([[0] * 20 + [1] * 30])
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        packed = decoder(TOKENS_BT[:1], AttentionContext(q_documents=documents), positions_BT=positions)
        alone = decoder(TOKENS_BT[:1, 20:])
    torch.testing.assert_close(packed[:, 20:], alone, atol=1e-5, rtol=0)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "magic", "factor": 2}, "rope_scaling.kind='magic': it is one of linear, ntk, dynamic, yarn, llama3"),
        ({"kind": "linear"}, "rope_scaling: 'factor' is missing"),
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor=0.5: how many times longer sequences may be is at least 1"),
        ({"kind": "yarn", "factor": 2}, "rope_scaling.original_positions: is required by kind=yarn"),
        ({"kind": "ntk", "factor": 2, "beta_fast": 9.0}, "rope_scaling.beta_fast=9.0: kind=ntk has no such setting"),
        (
            {"kind": "yarn", "factor": 2, "original_positions": 8, "beta_fast": 1.0, "beta_slow": 2.0},
            "rope_scaling.beta_fast=1.0: is above beta_slow=2.0",
        ),
        (
            {"kind": "llama3", "factor": 2, "original_positions": 8, "low_freq_factor": -1.0},
            "rope_scaling.low_freq_factor=-1.0: it is a positive number",
        ),
        ({"kind": "linear", "factr": 2, "factor": 2}, "rope_scaling.factr: unknown key; did you mean 'factor'?"),
    ],
)  # fmt: skip
def test_impossible_scalings_are_refused(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        from_dict({"positions": "rope", "rope_scaling": fields})
    assert caught.value.problems == (problem,)


def test_scaling_needs_a_rotation() -> None:
    with pytest.raises(ModelConfigError, match="positions=learned has no rotation to stretch"):
        DecoderConfig(rope_scaling=RopeScaling(kind="linear", factor=2.0))


def test_a_config_goes_through_plain_dicts() -> None:
    config = DecoderConfig(positions="rope", rope_scaling=SCALINGS["yarn"])
    assert from_dict(to_dict(config)) == config
