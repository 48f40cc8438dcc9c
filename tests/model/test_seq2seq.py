"""The encoder–decoder: decoding step by step, padding, shared sources, and what a config refuses. (Parity with
transformers' BART and LED is in test_conversion_seq2seq.)"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longspan.kernels.attention import AttentionContext, AttentionSpec, UnsupportedAttention, Window
from longspan.model import accounting
from longspan.model.cache import ContiguousCache
from longspan.model.cache_plan import cross_cache_bytes
from longspan.model.checkpoint import CheckpointError, load_decoder, load_model, save_model
from longspan.model.config import AttentionPlan, ModelConfigError, Seq2SeqConfig, StackConfig, from_dict, to_dict
from longspan.model.cross_attention import CrossAttention, CrossCache
from longspan.model.encoder import left_padded
from longspan.model.seq2seq import Seq2Seq, from_config
from longspan.model.zoo import SEQ2SEQS, build, configure

V, S, T = 61, 23, 9

STACK = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=40)
BART = Seq2SeqConfig(vocab_size=V, d_model=32, encoder=STACK, decoder=STACK)


def plan(spec: AttentionSpec) -> AttentionPlan:
    return AttentionPlan(patterns={"layer": spec}, layers=("layer",))


LED = replace(
    BART,
    encoder=replace(STACK, attention=plan(AttentionSpec(causal=False, window=Window.symmetric(4), global_tokens=True))),
    decoder=replace(STACK, n_heads=8, n_kv_heads=2),
    position_offset=0,
    global_projections=True,
    scale_embedding=True,
)
WINDOWED = replace(
    LED, decoder=replace(STACK, attention=plan(AttentionSpec(causal=True, window=Window.causal_keys(3))))
)
MODELS = {"bart": BART, "led": LED, "windowed": WINDOWED}


def built(config: Seq2SeqConfig) -> Seq2Seq:
    """Weights large enough that nothing vanishes, norms, biases and the head's among them."""
    model = from_config(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(mean + 0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def drawn(n_rows: int, n_tokens: int, *, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


LENGTHS_B = torch.tensor([S, 5, 13])


def globals_of(config: Seq2SeqConfig) -> Tensor | None:
    if not config.global_projections:
        return None
    is_global_BS = torch.zeros(3, S, dtype=torch.bool)
    is_global_BS[0, 0] = is_global_BS[2, 0] = is_global_BS[2, 7] = True
    return is_global_BS


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def config(request: pytest.FixtureRequest) -> Seq2SeqConfig:
    assert isinstance(request.param, Seq2SeqConfig)
    return request.param


# -- forward ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_of_source_and_target_changes_nothing(config: Seq2SeqConfig) -> None:
    model, source_BS, target_BT = built(config), drawn(3, S), drawn(3, T, seed=2)
    flags_BS, target_lengths = globals_of(config), (T, 4, 6)
    padded = model(
        torch.cat([source_BS, drawn(3, 9, seed=3)], dim=1),
        target_BT,
        source_lengths_B=LENGTHS_B,
        decoder_lengths_B=torch.tensor(target_lengths),
        is_global_BS=None if flags_BS is None else torch.cat([flags_BS, torch.ones(3, 9, dtype=torch.bool)], dim=1),
    )
    for row, (length, target_length) in enumerate(zip(LENGTHS_B.tolist(), target_lengths)):
        flags = None if flags_BS is None else flags_BS[row : row + 1, :length]
        alone = model(source_BS[row : row + 1, :length], target_BT[row : row + 1, :target_length], is_global_BS=flags)
        torch.testing.assert_close(padded[row : row + 1, :target_length], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model, source_BS, target_BT = built(LED), drawn(3, S), drawn(3, 30, seed=2)  # more queries than keys
    flags_BS = globals_of(LED)
    assert flags_BS is not None
    shifts = [S - length for length in LENGTHS_B.tolist()]
    shifted_BS, shifted_flags_BS = (
        torch.stack([row.roll(shift) for row, shift in zip(x, shifts)]) for x in (source_BS, flags_BS)
    )
    context = replace(left_padded(LENGTHS_B, S), is_global=shifted_flags_BS)
    left = model(shifted_BS, target_BT, context)
    right = model(source_BS, target_BT, source_lengths_B=LENGTHS_B, is_global_BS=flags_BS)
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_targets_read_their_source_and_the_flags_count() -> None:
    model, source_BS, target_BT = built(LED), drawn(3, S), drawn(3, T, seed=2)
    plain = model(source_BS, target_BT)
    assert not torch.allclose(model(source_BS.flip(1), target_BT), plain, atol=1e-2)
    assert not torch.allclose(model(source_BS, target_BT, is_global_BS=globals_of(LED))[2], plain[2], atol=1e-2)
    context = AttentionContext(kv_lengths=LENGTHS_B, is_global=globals_of(LED))
    same = model(source_BS, target_BT, source_lengths_B=LENGTHS_B, is_global_BS=globals_of(LED))
    torch.testing.assert_close(model(source_BS, target_BT, context), same)


def test_every_parameter_learns() -> None:
    model = built(LED)
    model(drawn(3, S), drawn(3, T, seed=2), is_global_BS=globals_of(LED)).square().mean().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A bias of keys moves all scores of a query alike, so its gradient is rounding; rows of tables may go unread.
    assert [name for name in still if not name.endswith("k_proj.bias")] == []


def test_blocks_trace_as_one_graph(config: Seq2SeqConfig) -> None:
    model, source_BS, target_BT = built(config), drawn(3, S), drawn(3, T, seed=2)
    with torch.no_grad():
        expected = model(source_BS, target_BT, source_lengths_B=LENGTHS_B, is_global_BS=globals_of(config))
        for block in (*model.encoder.blocks, *model.blocks):
            block.compile(fullgraph=True, backend="eager")
        traced = model(source_BS, target_BT, source_lengths_B=LENGTHS_B, is_global_BS=globals_of(config))
    torch.testing.assert_close(traced, expected, atol=1e-5, rtol=0)


# -- decoding ---------------------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(1, T - 1), max_size=4, unique=True), name=st.sampled_from(sorted(MODELS)))
@settings(max_examples=20, deadline=None)
def test_any_split_of_a_target_equals_the_full_forward(cuts: list[int], name: str) -> None:
    config = MODELS[name]
    model, source_BS, target_BT = built(config), drawn(3, S), drawn(3, T, seed=2)
    context = AttentionContext(kv_lengths=LENGTHS_B, is_global=globals_of(config))
    with torch.no_grad():
        full = model(source_BS, target_BT, context)
        source = model.remember(model.encode(source_BS, context), context)
        cache = ContiguousCache(config.decoder_half, 3, T, rings=True)
        bounds = [0, *sorted(cuts), T]
        pieces = [target_BT[:, start:end] for start, end in pairwise(bounds)]
        parts = [model.logits(model.hidden(piece, source, cache=cache)) for piece in pieces]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_source_is_projected_once_and_shared_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source_BS, target_BT = built(LED), drawn(3, S), drawn(3, T, seed=2)
    calls: Counter[int] = Counter()
    project = CrossAttention.keys_values

    def counted(self: CrossAttention, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
        calls[self.layer] += 1
        return project(self, states_BSD)

    monkeypatch.setattr(CrossAttention, "keys_values", counted)
    context = AttentionContext(kv_lengths=LENGTHS_B)
    full = model(source_BS, target_BT, context).repeat_interleave(2, dim=0)
    calls.clear()

    source = model.remember(model.encode(source_BS, context), context)
    shared = source.shared_by(2)
    assert all(a is b for mine, its in zip(shared.layers, source.layers) for a, b in zip(mine, its))
    cache = ContiguousCache(LED.decoder_half, 6, T)
    twice_BT = target_BT.repeat_interleave(2, dim=0)
    steps = [model.logits(model.hidden(token, shared, cache=cache)) for token in twice_BT.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-5)
    assert calls == {0: 1, 1: 1}


@torch.no_grad()
def test_bytes_of_a_cross_cache_and_sources_chosen_from_it() -> None:
    model, source_BS, target_BT = built(LED), drawn(3, S), drawn(3, T, seed=2)
    context = AttentionContext(kv_lengths=LENGTHS_B)
    source = model.remember(model.encode(source_BS, context), context)
    n_layers, n_kv_heads, head_dim = 2, 2, 4
    assert source.nbytes.keys_values == n_layers * 2 * 3 * S * n_kv_heads * head_dim * 4
    assert source.nbytes == cross_cache_bytes(LED, 3, S, padded=True)
    chosen = source.select([2, 0])
    assert isinstance(chosen, CrossCache)
    expected = model(source_BS, target_BT, context)[[2, 0]]
    actual = model.logits(model.hidden(target_BT[[2, 0]], chosen))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert source.select([0, 1, 2]) is source


# -- what is refused --------------------------------------------------------------------------------------------------


def test_inputs_that_mean_nothing_are_refused() -> None:
    model = built(LED)
    source_BS, target_BT = drawn(2, S), drawn(2, T)
    with pytest.raises(ValueError, match="position 40 of the target is beyond the 40 learned positions"):
        model(source_BS, drawn(2, 41))
    with pytest.raises(ValueError, match="position 40 is beyond the 40 learned positions"):
        model(drawn(2, 41), target_BT)
    with pytest.raises(ValueError, match=r"decoder input has shape \(9,\)"):
        model(source_BS, target_BT[0])
    with pytest.raises(ValueError, match=r"context.kv_lengths and the keyword argument say the same thing"):
        model(source_BS, target_BT, AttentionContext(kv_lengths=LENGTHS_B[:2]), source_lengths_B=LENGTHS_B[:2])
    with pytest.raises(ValueError, match=r"context.q_documents: an encoder–decoder reads one source a row"):
        model(source_BS, target_BT, AttentionContext(q_documents=torch.zeros(2, S, dtype=torch.int64)))
    with pytest.raises(ValueError, match="this model's encoder has no global attention"):
        built(BART)(source_BS, target_BT, is_global_BS=torch.ones(2, S, dtype=torch.bool))
    model.set_backends(decode="flex")
    with pytest.raises(UnsupportedAttention, match="flex"):
        model.check_attention(device="cpu", dtype=torch.float64, phase="decode", needs_grad=True)
    model.check_attention(device="cpu", dtype=torch.float32, phase="train", needs_grad=True)


def test_every_problem_of_a_config_is_told() -> None:
    causal = plan(AttentionSpec(causal=True))
    with pytest.raises(ModelConfigError) as caught:
        Seq2SeqConfig(
            dropout=1.0,
            encoder=StackConfig(n_heads=7, attention=causal),
            decoder=StackConfig(attention=plan(AttentionSpec(causal=False))),
            cross_attention=AttentionSpec(causal=False, window=Window.symmetric(3)),
            forced_bos_token=50265,
        )
    said = [
        "dropout=1.0: a probability",
        "encoder: d_model=768 is not a multiple of n_heads=7",
        "encoder: attention.patterns.layer: causal=true, but an encoder",
        "decoder: attention.patterns.layer: causal=false, but a decoder",
        "cross_attention: it sees the whole source",
        "forced_bos_token=50265: a token of the vocabulary, 0 … 50264",
    ]
    assert len(caught.value.problems) == len(said)
    assert all(words in problem for words, problem in zip(said, caught.value.problems))


# -- configs and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQ2SEQS)
def test_configs_go_through_json_and_back(name: str) -> None:
    config = configure(name)
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ModelConfigError, match=r"encoder.n_layer: unknown key; did you mean 'n_layers'"):
        configure(name, {"encoder": {"n_layer": 3}})


def test_a_stack_can_be_overridden_in_part() -> None:
    config = configure("led-tiny", {"encoder": {"n_layers": 3}})
    assert isinstance(config, Seq2SeqConfig)
    tiny = SEQ2SEQS["led-tiny"]
    assert config == replace(tiny, encoder=replace(tiny.encoder, n_layers=3))


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_gives_the_same_model(tmp_path: Path, config: Seq2SeqConfig, fused: bool) -> None:
    model = built(config)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", fused_qkv=fused)
    assert isinstance(loaded, Seq2Seq)
    assert loaded.config == config
    with torch.no_grad():
        expected, actual = (
            m(drawn(3, S), drawn(3, T, seed=2), is_global_BS=globals_of(config)) for m in (model, loaded)
        )
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckpointError, match="holds an encoder–decoder; this needs a decoder"):
        load_decoder(tmp_path / "model")


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (build("led-tiny", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.embedding.weight"], other["encoder.embedding.weight"])
    assert not first["head.bias"].any()


# -- accounting -------------------------------------------------------------------------------------------------------

# transformers' BartForConditionalGeneration and LEDForConditionalGeneration of the published configs.
PUBLISHED = {"bart-base": 139_420_416, "bart-large": 406_291_456, "led-base": 161_844_480, "led-large": 459_801_600}


@pytest.mark.parametrize("name", [*SEQ2SEQS, *MODELS])
def test_parameters_equal_the_models(name: str) -> None:
    config = MODELS.get(name) or SEQ2SEQS[name]
    model = from_config(config, device="meta")
    count = accounting.parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    stacks = (model.encoder.blocks, model.blocks)
    assert count.blocks == sum(parameter.numel() for stack in stacks for parameter in stack.parameters())
    assert count.total == PUBLISHED.get(name, count.total)


def test_forward_flops_equal_the_counted_matrix_products() -> None:
    """The reference multiplies every pair; full attention lets the formula count all but the causal ones."""
    model = built(BART)
    model.set_backends(train="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(drawn(1, S), drawn(1, T))
    causal = 4 * BART.d_model * BART.decoder.n_layers * (T * T - T * (T + 1) // 2)
    assert accounting.seq2seq_forward_flops(BART, source=S, target=T) == counter.get_total_flops() - causal
