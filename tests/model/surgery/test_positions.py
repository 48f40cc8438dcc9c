"""More positions: tables against independent computations, rotations against their definitions and transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.model.build import Model
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, RopeScaling, Seq2SeqConfig, StackConfig
from longspan.model.conversion import export_model
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.positions import Rotary
from longspan.model.surgery import ExtendPositions, Longformer, SurgeryError, plan_steps

Source = Callable[[ModelConfig], Model]
Convert = Callable[..., Model]

V, OLD = 61, 24
GPT = DecoderConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=OLD)
LLAMA = replace(
    GPT, n_kv_heads=2, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied_head=False, rope_theta=500.0
)
BERT = EncoderConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=OLD, n_types=2)
ROBERTA = replace(BERT, position_offset=2)
STACK = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=OLD)
BART = Seq2SeqConfig(vocab_size=V, d_model=32, encoder=STACK, decoder=STACK)
TABLE = "position_embedding.weight"


def drawn(n_rows: int, n_tokens: int) -> Tensor:
    return torch.randint(3, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


# -- learned tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [2 * OLD, 3 * OLD, OLD + 1, 2 * OLD + 5])
@pytest.mark.parametrize("config", [GPT, BERT, ROBERTA], ids=["gpt", "bert", "roberta"])
@torch.no_grad()
def test_copies_stand_one_old_length_apart(
    config: DecoderConfig | EncoderConfig, new: int, source: Source, convert: Convert
) -> None:
    before, after = source(config), convert(ExtendPositions(max_positions=new))
    offset = config.position_offset if isinstance(config, EncoderConfig) else 0
    old_rows, rows = before.state_dict()[TABLE], after.state_dict()[TABLE]
    assert len(rows) == new + offset
    assert torch.equal(rows[:offset], old_rows[:offset])
    for p in range(new):
        assert torch.equal(rows[offset + p], old_rows[offset + p % OLD])
    tokens = drawn(2, OLD)
    assert torch.equal(after(tokens), before(tokens))
    # A text that begins one old length later is embedded alike.
    later = torch.arange(new - OLD, new)[None]
    if new % OLD == 0:
        assert torch.equal(after(tokens, positions_BT=later), before(tokens))
    assert after(drawn(1, new)).shape[1] == new
    with pytest.raises(ValueError, match="beyond"):
        after(drawn(1, new + 1))


@pytest.mark.parametrize("config", [GPT, ROBERTA], ids=["gpt", "roberta"])
def test_interpolation_is_numpys(config: DecoderConfig | EncoderConfig, source: Source, convert: Convert) -> None:
    before = source(config)
    after = convert(ExtendPositions(max_positions=67, mode="interpolate"))
    offset = config.position_offset if isinstance(config, EncoderConfig) else 0
    old_rows, rows = (model.state_dict()[TABLE].numpy() for model in (before, after))
    at = np.linspace(0, OLD - 1, 67)
    for column in range(rows.shape[1]):
        expected = np.interp(at, np.arange(OLD), old_rows[offset:, column])
        np.testing.assert_allclose(rows[offset:, column], expected, atol=1e-5)
    assert np.array_equal(rows[:offset], old_rows[:offset])
    assert np.array_equal(rows[[offset, -1]], old_rows[[offset, -1]])  # the ends to the bit


def test_random_rows_follow_the_old_ones(source: Source, convert: Convert) -> None:
    before = source(replace(ROBERTA, init_std=0.5))

    def rows(name: str, seed: int | None) -> Tensor:
        surgery = ExtendPositions(max_positions=40 * OLD, mode="random", seed=seed)
        return convert(surgery, name=name).state_dict()[TABLE]

    found = rows("none", None)
    assert torch.equal(found[: OLD + 2], before.state_dict()[TABLE])
    new = found[OLD + 2 :]
    assert abs(float(new.std()) - 0.5) < 0.02
    assert abs(float(new.mean())) < 0.02
    assert torch.equal(rows("zero", 0), found)
    assert not torch.equal(rows("one", 1)[OLD + 2 :], new)


@torch.no_grad()
def test_an_encoder_decoder_grows_its_source_and_if_asked_its_target(source: Source, convert: Convert) -> None:
    before = source(BART)
    longer = convert(ExtendPositions(max_positions=2 * OLD))
    assert isinstance(longer.config, Seq2SeqConfig)
    assert (longer.config.encoder.max_positions, longer.config.decoder.max_positions) == (2 * OLD, OLD)
    old_rows, rows = before.state_dict(), longer.state_dict()
    assert torch.equal(rows[TABLE], old_rows[TABLE])
    own, grown = old_rows[f"encoder.{TABLE}"], rows[f"encoder.{TABLE}"]
    assert torch.equal(grown, torch.cat([own, own[2:]]))
    tokens, target = drawn(2, OLD), drawn(2, 7)
    assert torch.equal(longer(tokens, target), before(tokens, target))
    both = convert(ExtendPositions(max_positions=2 * OLD, decoder_positions=OLD + 3), name="both").state_dict()
    assert torch.equal(both[TABLE], torch.cat([old_rows[TABLE], old_rows[TABLE][2:5]]))
    target_alone = convert(ExtendPositions(max_positions=OLD, decoder_positions=OLD + 3), name="target").state_dict()
    assert torch.equal(target_alone[TABLE], both[TABLE])
    assert torch.equal(target_alone[f"encoder.{TABLE}"], own)


@pytest.mark.parametrize("config", [ROBERTA, BART], ids=["roberta", "bart"])
def test_with_windows_in_either_order(config: ModelConfig, source: Source, convert: Convert) -> None:
    source(config)
    surgeries = [ExtendPositions(max_positions=3 * OLD - 1), Longformer(window=8)]
    one, other = convert(*surgeries, name="one"), convert(*surgeries[::-1], name="other")
    assert one.config == other.config
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


# -- no tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["sinusoidal", "alibi", "none"])
@torch.no_grad()
def test_without_a_table_only_the_limit_changes(positions: str, source: Source, convert: Convert) -> None:
    before = source(replace(GPT, positions=positions))
    after = convert(ExtendPositions(max_positions=100))
    assert isinstance(after.config, DecoderConfig)
    assert after.config == replace(before.config, max_positions=100)
    assert torch.equal(after(drawn(1, 90)), before(drawn(1, 90)))  # which reads as far without being told


# -- rotations --------------------------------------------------------------------------------------------------------


def angles(config: DecoderConfig, positions: Tensor, length: int = 0) -> Tensor:
    """[P, D/2] of the config's rotation, from its cosines and sines."""
    rotary = Rotary(config.dim_per_head, config.max_positions, config.rope_theta, config.rope_scaling)
    cos, sin = rotary(positions[None], int(positions.max()) + 1, length)
    return torch.atan2(sin, cos)[0, :, 0].double()


def planned(config: DecoderConfig, surgery: ExtendPositions) -> DecoderConfig:
    after = plan_steps(config, [surgery])[-1].after
    assert isinstance(after, DecoderConfig)
    return after


@torch.no_grad()
def test_linear_scaling_divides_positions(source: Source, convert: Convert) -> None:
    before, after = source(LLAMA), convert(ExtendPositions(max_positions=3 * OLD, mode="linear"))
    tokens = drawn(2, OLD)
    spread = (3 * torch.arange(OLD))[None]
    torch.testing.assert_close(after(tokens, positions_BT=spread), before(tokens), atol=1e-5, rtol=0)
    assert (after(tokens) - before(tokens)).abs().max() > 1e-3


def test_ntk_divides_the_lowest_frequency_and_keeps_the_highest() -> None:
    after = planned(LLAMA, ExtendPositions(max_positions=4 * OLD, mode="ntk"))
    rates = angles(after, torch.tensor([1]))[0]
    was = 500.0 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(rates[0], was[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(rates[-1], was[-1] / 4, atol=1e-8, rtol=0)
    assert (rates[1:-1] < was[1:-1]).all()
    assert (rates[1:-1] > was[1:-1] / 4).all()


@torch.no_grad()
def test_dynamic_scaling_leaves_the_old_length_alone(source: Source, convert: Convert) -> None:
    before, after = source(LLAMA), convert(ExtendPositions(max_positions=4 * OLD, mode="dynamic"))
    assert torch.equal(after(drawn(2, OLD)), before(drawn(2, OLD)))
    assert isinstance(after.config, DecoderConfig)
    rates = angles(after.config, torch.tensor([1]), length=3 * OLD)[0]
    base = 500.0 * (4 * 3 - (4 - 1)) ** (8 / 6)  # by factor 4, for three times the old length
    torch.testing.assert_close(rates, base ** -(torch.arange(4).double() / 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["linear", "yarn", "llama3"])
@torch.no_grad()
def test_transformers_rotates_alike(mode: str, source: Source, convert: Convert, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source(LLAMA)
    keys = {"factor": 3.5, "original_positions": 20} if mode in ("yarn", "llama3") else {}
    after = convert(ExtendPositions(max_positions=4 * OLD, mode=mode, **keys))
    assert isinstance(after, Decoder)
    scaling = after.config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == (mode, 3.5 if keys else 4.0)
    back = export_model(tmp_path / "converted", tmp_path / "back")
    theirs = transformers.LlamaForCausalLM.from_pretrained(back).eval()
    tokens = drawn(2, 4 * OLD)
    torch.testing.assert_close(after(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_scaling_goes_on_from_where_it_was() -> None:
    once = planned(LLAMA, ExtendPositions(max_positions=2 * OLD, mode="yarn"))
    assert once.rope_scaling == RopeScaling(kind="yarn", factor=2.0, original_positions=OLD)
    twice = planned(once, ExtendPositions(max_positions=8 * OLD, mode="yarn"))
    assert twice == planned(LLAMA, ExtendPositions(max_positions=8 * OLD, mode="yarn"))
    kept = planned(once, ExtendPositions(max_positions=8 * OLD, mode="keep"))
    assert (kept.rope_scaling, kept.max_positions) == (once.rope_scaling, 8 * OLD)
    given = planned(LLAMA, ExtendPositions(max_positions=8 * OLD, mode="linear", original_positions=OLD // 2))
    assert given.rope_scaling == RopeScaling(kind="linear", factor=16.0)


# -- what cannot be ---------------------------------------------------------------------------------------------------

YARN = replace(LLAMA, rope_scaling=RopeScaling(kind="yarn", factor=2.0, original_positions=12))
KINDS = "linear, ntk, dynamic, yarn, llama3"
REFUSED = [
    (GPT, {"max_positions": OLD}, f"max_positions={OLD}: this model has 24 positions already; the new length"),
    (LLAMA, {"mode": "copy"}, f"mode=copy: this model has positions=rope, for which mode is one of {KINDS}, keep"),
    (LLAMA, {}, f"mode: is required for a model with positions=rope: {KINDS}, keep"),
    (GPT, {"mode": "yarn"}, "mode=yarn: this model has positions=learned, for which mode is one of copy, interpolate,"),
    (GPT, {"mode": "keep"}, "mode=keep: this model has positions=learned"),
    (BART, {"mode": "ntk"}, "mode=ntk: this model has positions=learned"),
    (replace(GPT, positions="alibi"), {"mode": "copy"}, "mode=copy: this model has positions=alibi, for which"),
    (replace(BERT, positions="rope"), {"mode": "ntk"}, "mode=ntk: this model has positions=rope, for which mode"),
    (GPT, {"factor": 2.0}, f"factor=2.0: is read with rope's scaling alone ({KINDS})"),
    (LLAMA, {"mode": "keep", "factor": 2.0}, "factor=2.0: is read with rope's scaling alone"),
    (GPT, {"seed": 1}, "seed=1: only mode=random draws numbers"),
    (GPT, {"decoder_positions": 99}, "decoder_positions=99: is of an encoder–decoder; write max_positions"),
    (BART, {"decoder_positions": 9}, "decoder_positions=9: this model has 24 positions already"),
    (LLAMA, {"mode": "yarn", "factor": 0.5}, "rope_scaling.factor=0.5: how many times longer"),
    (
        LLAMA,
        {"mode": "linear", "factor": 2.0, "original_positions": 12},
        "original_positions=12: mode=linear asks for the factor alone",
    ),
    (YARN, {"mode": "ntk"}, "mode=ntk: this model's rotation is scaled already (yarn by 2); mode is yarn, "),
    (YARN, {"mode": "yarn", "original_positions": 24}, "original_positions=24: this model's scaling starts from 12"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "keys", "line"), REFUSED, ids=[line[:30] for _, _, line in REFUSED])
def test_what_a_model_cannot_have(config: ModelConfig, keys: dict[str, object], line: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        plan_steps(config, [ExtendPositions(**{"max_positions": 96, **keys})])  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.startswith(line)


@torch.no_grad()
def test_a_long_text_runs_with_globals(source: Source, convert: Convert) -> None:
    source(ROBERTA)
    model = convert(ExtendPositions(max_positions=40 * OLD), Longformer(window=16))
    assert isinstance(model, Encoder)
    tokens = drawn(1, 40 * OLD)
    flags = torch.zeros_like(tokens, dtype=torch.bool)
    flags[:, 0] = True
    assert model.hidden(tokens, AttentionContext(is_global=flags)).isfinite().all()
