"""Windows for full attention: nothing changes for inputs that fit, and what is beyond is what the definition says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.spec import AttentionSpec, BlockLayout, Window
from longspan.model.build import Model
from longspan.model.checkpoint import save_model
from longspan.model.config import (
    AttentionPlan,
    DecoderConfig,
    EncoderConfig,
    HeadGroup,
    ModelConfig,
    Seq2SeqConfig,
    StackConfig,
)
from longspan.model.conversion import export_model, import_model
from longspan.model.decoder import Decoder
from longspan.model.encoder import Encoder
from longspan.model.generation import generate
from longspan.model.seq2seq import Seq2Seq
from longspan.model.surgery import CopyGlobal, ExtendPositions, Longformer, SurgeryError, plan_steps

transformers = pytest.importorskip("transformers")

Source = Callable[[ModelConfig], Model]
Convert = Callable[..., Model]

V, OLD, PAD = 61, 32, 1
GPT = DecoderConfig(vocab_size=V, n_layers=3, d_model=32, n_heads=4, d_ff=48, max_positions=OLD)
LLAMA = replace(
    GPT, n_kv_heads=2, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied_head=False, rope_theta=500.0
)
ODD = AttentionSpec(causal=True, softcap=3.0, learned_sink=True, scale=0.3)
DECODERS = {
    "learned": GPT,
    "rope": LLAMA,
    "alibi": replace(GPT, positions="alibi"),
    "sinusoidal": replace(GPT, positions="sinusoidal"),
    "none": replace(GPT, positions="none", attention=AttentionPlan(patterns={"odd": ODD}, layers=("odd",))),
}
BERT = EncoderConfig(
    vocab_size=V, n_layers=3, d_model=32, n_heads=4, d_ff=48, max_positions=OLD, n_types=2, pooler=True
)
ROBERTA = replace(BERT, position_offset=2, n_types=1, norm_eps=1e-5)
ENCODERS = {
    "bert": BERT,
    "roberta": ROBERTA,
    "pre-norm rope": replace(BERT, positions="rope", norm_order="pre", bias=False, head="none"),
    "alibi": replace(BERT, positions="alibi"),
    "classifier": replace(ROBERTA, head="classification", labels=("no", "yes")),
    "answers": replace(BERT, head="qa", pooler=False),
}
STACK = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=OLD)
BART = Seq2SeqConfig(vocab_size=V, d_model=32, encoder=STACK, decoder=replace(STACK, n_heads=2))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers says on which windows it pads; nothing here is about that."""
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def drawn(n_rows: int, n_tokens: int) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def padded(lengths: list[int], n_tokens: int, pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and which are real."""
    real = torch.arange(n_tokens)[None] < torch.tensor(lengths)[:, None]
    return torch.where(real, drawn(len(lengths), n_tokens), pad), real


def some_globals(n_rows: int, n_tokens: int) -> Tensor:
    is_global = torch.zeros(n_rows, n_tokens, dtype=torch.bool)
    is_global[:, 0] = True
    is_global[0, 9] = True
    return is_global


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -- decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("keys", [{}, {"sink_tokens": 2}, {"full_every": 2}, {"sink_tokens": 2, "full_every": 3}])
@torch.no_grad()
def test_a_decoder_that_fits_its_window_is_unchanged(
    kind: str, keys: dict[str, int], source: Source, convert: Convert
) -> None:
    before, after = source(DECODERS[kind]), convert(Longformer(window=20, **keys))
    tokens = drawn(2, 20)
    close(after(tokens), before(tokens))
    assert (after(drawn(2, 24)) - before(drawn(2, 24)))[:, -1].abs().max() > 1e-3  # and one token further is not


def influence(model: Model, n_tokens: int) -> Tensor:
    """[T]: whether the last token's logits depend on each token's embedding."""
    assert isinstance(model, Decoder)
    embedded: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.embedding.register_forward_hook(keep)
    model(drawn(1, n_tokens))[0, -1].square().sum().backward()
    handle.remove()
    assert embedded[0].grad is not None
    return embedded[0].grad[0].abs().sum(dim=-1) > 0


@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_a_causal_window_reaches_that_far_in_each_layer(kind: str, source: Source, convert: Convert) -> None:
    source(DECODERS[kind])
    back = torch.arange(OLD - 1, -1, -1)  # how far each token lies behind the last
    alone = convert(Longformer(window=4), name="alone")
    assert influence(alone, OLD).equal(back <= 3 * 3)  # three layers, the token itself and three before it in each
    uneven = convert(Longformer(window=(2, 3, 6)), name="uneven")
    assert influence(uneven, OLD).equal(back <= 1 + 2 + 5)
    sinks = convert(Longformer(window=4, sink_tokens=2), name="sinks")
    assert influence(sinks, OLD).equal((back <= 9) | (back >= OLD - 2))
    mixed = convert(Longformer(window=4, full_every=3), name="mixed")
    assert influence(mixed, OLD).all()
    assert [mixed.config.head_groups(layer)[0].spec.window for layer in range(3)] == [
        Window.causal_keys(4),
        Window.causal_keys(4),
        Window(),
    ]


# -- encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_an_encoder_that_fits_its_window_is_unchanged(kind: str, source: Source, convert: Convert) -> None:
    config = ENCODERS[kind]
    before, after = source(config), convert(Longformer(window=2 * (OLD - 1)))  # from the first token to the last
    assert isinstance(before, Encoder)
    assert isinstance(after, Encoder)
    lengths = [OLD, 17, 2]
    tokens, real = padded(lengths, OLD)
    lengths_B = torch.tensor(lengths)
    types = torch.ones_like(tokens) if config.n_types > 1 else None
    expected = before.hidden(tokens, lengths_B=lengths_B, token_types_BT=types)
    # With every window as long as the input a global token sees what it saw before, by its own copied projections.
    for flags in (None, some_globals(3, OLD) & real):
        context = AttentionContext(is_global=flags)
        close(after.hidden(tokens, context, lengths_B=lengths_B, token_types_BT=types)[real], expected[real])
    if config.head != "none":
        found = after(tokens, lengths_B=lengths_B, token_types_BT=types)
        wanted = before(tokens, lengths_B=lengths_B, token_types_BT=types)
        close(found if config.head == "classification" else found[real], wanted if wanted.dim() == 2 else wanted[real])


@torch.no_grad()
def test_global_projections_are_the_local_ones(source: Source, convert: Convert) -> None:
    """With one layer, a narrow window and one global token: its row is the full attention's (and no other row is)."""
    before, after = source(replace(ROBERTA, n_layers=1)), convert(Longformer(window=4))
    state = after.state_dict()
    pairs = [name for name in state if ".global_attention." in name]
    assert len(pairs) == 6
    assert all(torch.equal(state[name], state[name.replace("global_attention", "attention")]) for name in pairs)
    assert isinstance(before, Encoder)
    assert isinstance(after, Encoder)
    tokens = drawn(2, OLD)
    is_global = torch.zeros(2, OLD, dtype=torch.bool)
    is_global[0, 11], is_global[1, 0] = True, True
    found, full = after.hidden(tokens, AttentionContext(is_global=is_global)), before.hidden(tokens)
    close(found[is_global], full[is_global])
    assert ((found - full).abs().amax(dim=-1) > 1e-3)[~is_global].all()


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@torch.no_grad()
def test_transformers_reads_it_as_a_longformer(kind: str, head: str, convert: Convert, tmp_path: Path) -> None:
    """From a directory of transformers' to one: the numbers of its BERT where all fits, and ours otherwise."""
    pad = {"Bert": 0, "Roberta": PAD}[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(vocab_size=V, max_position_embeddings=34, pad_token_id=pad, **sizes)
    theirs = getattr(transformers, f"{kind}{head}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        scale = "norm" in name.lower() and name.endswith("weight")
        parameter.normal_(1.0 if scale else 0.0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "source")

    lengths = [30, 17, 2]
    tokens, real = padded(lengths, 30, pad)
    told = {"attention_mask": real.long()}
    expected = theirs(tokens, **told)[0]
    for window, atol in ((60, 1e-5), (4, 1e-4)):
        ours = convert(Longformer(window=window), name=f"ours{window}")
        back = export_model(tmp_path / f"ours{window}", tmp_path / f"back{window}")
        again, report = getattr(transformers, f"Longformer{head}").from_pretrained(back, output_loading_info=True)
        assert not any(report.values())
        is_global = some_globals(3, 30) & real
        found = again.eval()(tokens, **told, global_attention_mask=is_global.long())[0]
        mine = ours(tokens, AttentionContext(is_global=is_global), lengths_B=torch.tensor(lengths))
        wanted = expected if window == 60 else mine
        if found.dim() == 3:
            found, wanted, mine = found[real], wanted[real], mine[real]
        close(found, wanted, atol)
        close(mine, wanted, atol)
    assert (found - (expected[real] if expected.dim() == 3 else expected)).abs().max() > 1e-2  # narrow windows matter


@torch.no_grad()
def test_bert_gets_the_row_that_longformer_has_for_padding(source: Source, convert: Convert) -> None:
    before, after = source(BERT), convert(Longformer(window=8))
    table, grown = (model.state_dict()["position_embedding.weight"] for model in (before, after))
    assert torch.equal(grown[1:], table)
    assert not grown[0].any()
    assert isinstance(after.config, EncoderConfig)
    assert after.config.position_offset == 1
    plain = convert(Longformer(window=8, global_projections=False), name="plain")  # which transformers has not
    assert isinstance(plain.config, EncoderConfig)
    assert plain.config.position_offset == 0
    assert not any("global_attention" in name for name in plain.state_dict())


# -- encoder–decoders -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bart_becomes_led(source: Source, convert: Convert) -> None:
    before, after = source(BART), convert(Longformer(window=2 * (OLD - 1)))
    assert isinstance(before, Seq2Seq)
    assert isinstance(after, Seq2Seq)
    assert (after.config.position_offset, after.config.global_projections) == (0, True)
    lengths = [OLD, 17, 2]
    tokens, real = padded(lengths, OLD)
    target, lengths_B = drawn(3, OLD), torch.tensor(lengths)
    context = AttentionContext(kv_lengths=lengths_B)
    states = before.encode(tokens, context)
    close(after.encode(tokens, context)[real], states[real])
    close(after.encode(tokens, replace(context, is_global=some_globals(3, OLD) & real, derived={}))[real], states[real])
    expected = before(tokens, target, source_lengths_B=lengths_B)
    close(after(tokens, target, source_lengths_B=lengths_B), expected)
    windowed = convert(Longformer(window=2 * OLD, decoder_window=OLD), name="windowed")
    close(windowed(tokens, target, source_lengths_B=lengths_B), expected)
    narrow = convert(Longformer(window=2 * OLD, decoder_window=3), name="narrow")
    found = narrow(tokens, target, source_lengths_B=lengths_B)
    close(found[:, :3], expected[:, :3])
    assert (found - expected)[:, 8:].abs().amax(dim=-1).min() > 1e-3


def lively_bart() -> nn.Module:
    """One that writes more than a few words: token embeddings have one length, lest the longest of them be all text,
    and the last norm turns around, lest every token be repeated."""
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        max_position_embeddings=OLD,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                last = name.endswith("decoder.layers.1.final_layer_norm.weight")
                tensor.fill_(-1.0 if last else float(name.endswith("weight")))
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                std = 0.1 if "encoder_attn" in name else 1.0 if "embed_positions" in name else 0.6
                tensor.normal_(0.0, std, generator=generator)
        embedding = model.get_input_embeddings().weight
        embedding.mul_(3.0 / embedding.norm(dim=1, keepdim=True))
    return model


@torch.no_grad()
def test_transformers_reads_it_as_an_led(convert: Convert, tmp_path: Path) -> None:
    bart = lively_bart()
    bart.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    import_model(tmp_path / "hf", tmp_path / "source")
    # Positions first: transformers pads a source to a multiple of the window, and needs a row for each slot.
    ours = convert(ExtendPositions(max_positions=2 * OLD), Longformer(window=2 * OLD))
    back = export_model(tmp_path / "converted", tmp_path / "back")
    led, report = transformers.LEDForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(report.values())
    tokens, real = padded([OLD, 17, 2], OLD)
    told = {"attention_mask": real.long()}
    target, is_global = drawn(3, OLD), some_globals(3, OLD) & real
    expected = bart(tokens, decoder_input_ids=target, **told).logits
    found = led.eval()(tokens, decoder_input_ids=target, **told, global_attention_mask=is_global.long()).logits
    close(found, expected, 1e-4)  # logits of this model are of size 8
    close(ours(tokens, target, source_lengths_B=real.sum(dim=1), is_global_BS=is_global), expected, 1e-4)
    texts = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1}
    for model in (bart, led):
        model.generation_config.eos_token_id = None  # all of them to the end
    written = bart.generate(tokens, **told, **texts)[:, -24:]  # type: ignore[operator]
    assert len(written.unique()) > 8
    assert torch.equal(led.generate(tokens, **told, **texts)[:, -24:], written)
    mine = generate(ours, tokens, max_new_tokens=24, temperature=0.0, prompt_mask_BT=real)
    assert torch.equal(mine[:, -24:], written)


# -- global projections again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ROBERTA, BART], ids=["encoder", "encoder-decoder"])
@torch.no_grad()
def test_copy_global_after_the_local_ones_moved(
    config: ModelConfig, source: Source, convert: Convert, tmp_path: Path
) -> None:
    source(config)
    moved = convert(Longformer(window=8))
    for name, tensor in moved.state_dict().items():
        if ".attention.v_proj" in name:
            tensor.add_(1.0)
    save_model(moved, tmp_path / "moved")
    before, after = moved.state_dict(), convert(CopyGlobal(), of="moved", name="copied").state_dict()
    for name, tensor in after.items():
        wanted = name.replace("global_attention", "attention")
        assert torch.equal(tensor, before[wanted])
        assert torch.equal(tensor, before[name]) == (".global_attention.v_proj" not in name)


# -- what cannot be ---------------------------------------------------------------------------------------------------

TWO_WINDOWS = (
    HeadGroup(heads=2, spec=AttentionSpec(causal=False)),
    HeadGroup(heads=2, spec=AttentionSpec(causal=False, window=Window.symmetric(2))),
)
DILATED = AttentionPlan(patterns={"two": TWO_WINDOWS}, layers=("two",))
BLOCKS = AttentionSpec(causal=True, block_sparse=BlockLayout.from_rows([[1]], q_block=OLD, kv_block=OLD))
REFUSED = [
    (BERT, Longformer(window=5), "window=5: counts both sides of a token together, so it is even; 6 is"),
    (BERT, Longformer(window=0), "window=0: has a neighbour on either side at least, so it is 2 or more"),
    (
        BERT,
        Longformer(window=66),
        "window=66: reaches 33 to either side, further than the model's 32 positions; at most 64, or more positions "
        "first: surgery=[positions,longformer]",
    ),
    (BERT, Longformer(window=(4, 6)), "window=[4, 6]: is one number, or one for each of 3 layers, not 2"),
    (
        GPT,
        Longformer(window=33),
        "window=33: is wider than the model's 32 positions; at most that, or more positions first: "
        "surgery=[positions,longformer]",
    ),
    (GPT, Longformer(window=0), "window=0: the token itself is in it, so it is 1 or more"),
    (
        GPT,
        Longformer(window=8, global_projections=True),
        "global_projections=true: is for encoders; a decoder keeps tokens in sight by sink_tokens",
    ),
    (
        GPT,
        Longformer(window=8, global_tokens=False),
        "global_tokens=false: is for encoders; a decoder keeps tokens in sight by sink_tokens",
    ),
    (GPT, Longformer(window=8, decoder_window=8), "decoder_window=8: is of an encoder–decoder; write window"),
    (
        GPT,
        Longformer(window=8, full_every=4),
        "full_every=4: every so many layers one stays full, so it is 2 to the model's 3 layers",
    ),
    (
        BERT,
        Longformer(window=8, sink_tokens=4),
        "sink_tokens=4: is for decoders; an encoder keeps tokens in sight by global_tokens",
    ),
    (
        BART,
        Longformer(window=8, full_every=2),
        "full_every=2: is for decoders; every layer of an encoder has its window",
    ),
    (
        BART,
        Longformer(window=8, decoder_window=40),
        "decoder_window=40: is wider than the model's 32 positions; at most that, or more positions first: "
        "surgery=[positions,longformer]",
    ),
    (
        BERT,
        Longformer(window=8, global_tokens=False, global_projections=True),
        "global_projections=true: nobody would use them without global_tokens=true",
    ),
    (
        replace(BERT, attention=DILATED),
        Longformer(window=8),
        "attention.patterns.two: its heads differ, and one window for all would lose that",
    ),
    (
        replace(GPT, attention=AttentionPlan(patterns={"blocks": BLOCKS}, layers=("blocks",))),
        Longformer(window=8),
        "attention.patterns.blocks: its block_sparse layout thins what a window would see",
    ),
    (
        GPT,
        CopyGlobal(),
        "surgery=copy-global: this model has no projections for global tokens to copy over; surgery=longformer makes "
        "them",
    ),
]


@pytest.mark.parametrize(("config", "surgery", "line"), REFUSED, ids=[line[:40] for _, _, line in REFUSED])
def test_what_a_model_cannot_have(config: ModelConfig, surgery: Longformer | CopyGlobal, line: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        plan_steps(config, [surgery])
    assert caught.value.problems == (line,)


def test_more_positions_first_make_room_for_a_wider_window() -> None:
    wider = [ExtendPositions(max_positions=64), Longformer(window=64)]
    assert plan_steps(GPT, wider)[-1].after.head_groups(0)[0].spec.window == Window.causal_keys(64)
    with pytest.raises(SurgeryError, match="more positions first"):
        plan_steps(GPT, wider[::-1])
