"""The encoder against a dense computation of its own, and what padding, packing and global tokens must not change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, UnsupportedAttention, Window
from longspan.model import global_attention
from longspan.model.attention import Attention
from longspan.model.checkpoint import CheckpointError, load_decoder, load_model, save_model
from longspan.model.config import AttentionPlan, EncoderConfig, HeadGroup
from longspan.model.encoder import Encoder, from_config, left_padded
from longspan.model.zoo import ENCODERS

V, T = 61, 23

LOCAL = AttentionSpec(causal=False, window=Window.symmetric(3), global_tokens=True)
TINY = EncoderConfig(
    vocab_size=V,
    n_layers=2,
    d_model=32,
    n_heads=4,
    d_ff=48,
    max_positions=40,
    n_types=2,
    head="none",
    attention=AttentionPlan(patterns={"local": LOCAL}, layers=("local",)),
)
LONGFORMER = replace(TINY, global_projections=True, position_offset=2)
DILATED = replace(
    LONGFORMER,
    attention=AttentionPlan(
        patterns={
            "dilated": (
                HeadGroup(heads=2, spec=replace(LOCAL, window=Window.symmetric(2, dilation=3))),
                HeadGroup(heads=2, spec=LOCAL),
            )
        },
        layers=("dilated",),
    ),
)


def built(config: EncoderConfig) -> Encoder:
    """Weights large enough that nothing vanishes, norms and biases among them."""
    model = from_config(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def drawn(n_rows: int, *, n_tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def flags(*rows: tuple[int, ...], n_tokens: int = T) -> Tensor:
    is_global = torch.zeros(len(rows), n_tokens, dtype=torch.bool)
    for row, indices in enumerate(rows):
        is_global[row, list(indices)] = True
    return is_global


# -- the definition, dense --------------------------------------------------------------------------------------------


def dense(
    state: Mapping[str, Tensor], config: EncoderConfig, tokens_T: Tensor, is_global_T: Tensor, types_T: Tensor
) -> Tensor:
    """Hidden states of one row: Longformer as its paper's code computes it (Beltagy et al. 2020, §3), with masks."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], config.norm_eps)

    def heads(name: str, x: Tensor) -> Tensor:
        return linear(name, x).unflatten(-1, (config.n_heads, -1)).transpose(0, 1)

    n, width = len(tokens_T), config.d_model // config.n_heads
    apart = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs()
    x = state["embedding.weight"][tokens_T] + state["type_embedding.weight"][types_T]
    x = x + state["position_embedding.weight"][config.position_offset : config.position_offset + n]
    x = normed("embedding_norm", x)
    for layer in range(config.n_layers):
        name = f"blocks.{layer}"
        windows = [g.spec.window for g in config.head_groups(layer) for _ in range(g.heads)]
        near = torch.stack([(apart <= w.left * w.dilation) & (apart % w.dilation == 0) for w in windows])  # type: ignore[operator]
        q, k, v = (heads(f"{name}.attention.{part}_proj", x) for part in "qkv")
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~(near | is_global_T), -torch.inf)
        out = scores.softmax(-1) @ v
        q, k, v = (heads(f"{name}.global_attention.{part}_proj", x) for part in "qkv")
        asked = (q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ v
        out = torch.where(is_global_T[None, :, None], asked, out)
        x = normed(f"{name}.attention_norm", x + linear(f"{name}.attention.o_proj", out.transpose(0, 1).flatten(1)))
        up = F.gelu(linear(f"{name}.mlp.up_proj", x))
        x = normed(f"{name}.mlp_norm", x + linear(f"{name}.mlp.down_proj", up))
    return x


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("config", [LONGFORMER, DILATED], ids=["plain", "dilated"])
def test_longformer_is_the_dense_definition_with_varying_globals_and_padding(
    config: EncoderConfig, backend: str
) -> None:
    model = built(config)
    model.set_backend(backend)
    tokens, lengths = drawn(4), torch.tensor([T, 17, 9, 1])
    is_global = flags((0,), (0, 5, 16, 20), (), (0,))  # 20 is padding: no global token
    types = (torch.arange(T)[None] >= 6).long().expand(4, -1)
    with torch.no_grad():
        found = model(tokens, AttentionContext(is_global=is_global), lengths_B=lengths, token_types_BT=types)
        for row, length in enumerate(lengths.tolist()):
            expected = dense(
                model.state_dict(), config, tokens[row, :length], is_global[row, :length], types[row, :length]
            )
            torch.testing.assert_close(found[row, :length], expected, atol=2e-5, rtol=0)


def test_the_reference_notices_wrong_projections() -> None:
    """The comparison above is no tautology: with the local projections in their place the rows differ."""
    model, is_global = built(LONGFORMER), flags((3,))
    state = dict(model.state_dict())
    for name in list(state):
        if "global_attention" in name:
            state[name] = state[name.replace("global_attention", "attention")]
    tokens = drawn(1)
    with torch.no_grad():
        found = model(tokens, AttentionContext(is_global=is_global))
        wrong = dense(state, LONGFORMER, tokens[0], is_global[0], torch.zeros(T, dtype=torch.long))
    assert (found - wrong).abs().max() > 0.1


def test_no_flags_means_no_globals() -> None:
    model, tokens = built(LONGFORMER), drawn(2)
    none = AttentionContext(is_global=flags((), ()))
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens, none))
        assert (model(tokens) - model(tokens, AttentionContext(is_global=flags((0,), ())))).abs().max() > 0.1


def test_everything_global_with_equal_projections_is_full_attention() -> None:
    model, tokens = built(LONGFORMER), drawn(2)
    for block in model.blocks:
        for part in ("q_proj", "k_proj", "v_proj"):
            ours, local = getattr(block.global_attention, part), getattr(block.attention, part)
            ours.load_state_dict(local.state_dict())
    full = from_config(replace(LONGFORMER, global_projections=False, attention=ENCODERS["bert-tiny"].attention), seed=0)
    full.load_state_dict({k: v for k, v in model.state_dict().items() if "global_attention" not in k})
    with torch.no_grad():
        found = model(tokens, AttentionContext(is_global=torch.ones(2, T, dtype=torch.bool)))
        torch.testing.assert_close(found, full.eval()(tokens), atol=1e-5, rtol=0)


def test_without_projections_of_their_own_global_tokens_use_the_local_ones() -> None:
    """The same numbers as a model whose global projections are copies of the local ones."""
    model = built(TINY)
    twice = from_config(replace(TINY, global_projections=True), seed=0).eval()
    state = model.state_dict()
    twice.load_state_dict({name: state[name.replace("global_attention", "attention")] for name in twice.state_dict()})
    tokens, context = drawn(2), AttentionContext(is_global=flags((0, 4), (9,)))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, context), twice(tokens, context), atol=1e-5, rtol=0)


def test_global_rows_cost_their_number_times_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    attend = global_attention.attend

    def counting(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> object:
        asked.append((q.shape[0], q.shape[1], k.shape[1]))
        return attend(q, k, v, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(global_attention, "attend", counting)
    model, tokens = built(DILATED), drawn(3)
    with torch.no_grad():
        model(tokens, AttentionContext(is_global=flags((0, 9, 11), (2,), ())))
        assert asked == [(3, 16, T)] * 2  # once a layer (three as 16): heads that differ in window alone are one call
        model(tokens, AttentionContext(is_global=flags((), (), ())))
        model(tokens)
    assert len(asked) == 2


# -- what must not change ---------------------------------------------------------------------------------------------

KINDS = {
    "longformer": LONGFORMER,
    "dilated": DILATED,
    "pre-norm": replace(LONGFORMER, norm_order="pre"),
    "rope": replace(LONGFORMER, positions="rope", position_offset=0, norm="rmsnorm", mlp="swiglu", bias=False),
    "alibi": replace(LONGFORMER, positions="alibi", position_offset=0, n_kv_heads=2),
    "none": replace(LONGFORMER, positions="none", position_offset=0, n_types=0),
    "full": replace(TINY, attention=ENCODERS["bert-tiny"].attention),
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    model, lengths = built(KINDS[kind]), [T, 14, 5]
    tokens, is_global = drawn(3), flags((0, 8), (0, 13), (4,))
    left_tokens, left_global = torch.zeros_like(tokens), torch.zeros_like(is_global)
    for row, length in enumerate(lengths):
        left_tokens[row, T - length :] = tokens[row, :length]
        left_global[row, T - length :] = is_global[row, :length]
    lengths_B = torch.tensor(lengths)
    with torch.no_grad():
        right = model(tokens, AttentionContext(is_global=is_global), lengths_B=lengths_B)
        left = model(left_tokens, replace(left_padded(lengths_B, T), is_global=left_global, derived={}))
        for row, length in enumerate(lengths):
            context = AttentionContext(is_global=is_global[row : row + 1, :length])
            alone = model(tokens[row : row + 1, :length], context)[0]
            torch.testing.assert_close(right[row, :length], alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(left[row, T - length :], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    config = KINDS[kind]
    patterns = {
        name: tuple(replace(g, spec=replace(g.spec, documents=True)) for g in groups)
        for name, groups in config.pattern_groups().items()
    }
    config = replace(config, attention=AttentionPlan(patterns=patterns, layers=tuple(patterns)))
    model, tokens, is_global = built(config), drawn(1), flags((0, 3, 10, 12))
    documents = torch.tensor([[7] * 9 + [2] * (T - 9)])
    positions = torch.cat([torch.arange(9), torch.arange(T - 9)])[None]
    with torch.no_grad():
        context = AttentionContext(is_global=is_global, q_documents=documents)
        packed = model(tokens, context, positions_BT=positions)[0]
        first = model(tokens[:, :9], AttentionContext(is_global=is_global[:, :9]))[0]
        second = model(tokens[:, 9:], AttentionContext(is_global=is_global[:, 9:]))[0]
    torch.testing.assert_close(packed, torch.cat([first, second]), atol=1e-5, rtol=0)


def test_a_token_reaches_no_further_than_layers_times_window() -> None:
    model = built(LONGFORMER)
    embedded = model.embedding.weight.detach()[drawn(1)].requires_grad_()
    x = embedded
    for block in model.blocks:
        x = block(x, None, AttentionContext(), None)
    x[0, 10].square().sum().backward()
    reached = embedded.grad.abs().sum(-1)[0] > 0  # type: ignore[union-attr]
    assert reached.nonzero().flatten().tolist() == list(range(10 - 6, 10 + 6 + 1))


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(model: Encoder, is_global: Tensor, *, rows: list[int]) -> dict[str, float]:
    model.zero_grad()
    hidden = model(drawn(1), AttentionContext(is_global=is_global))
    hidden[:, rows].square().sum().backward()
    return {
        name: 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        for name, parameter in model.named_parameters()
    }


def test_gradients_reach_global_projections_through_global_rows_alone() -> None:
    model = built(replace(LONGFORMER, n_layers=1))
    names = [name for name, _ in model.named_parameters() if "global_attention" in name]
    assert len(names) == 6
    through_globals = gradients(model, flags((4,)), rows=[4])
    # A key's bias adds the same to all scores of a query: the softmax does not see it.
    assert all(through_globals[name] > 1e-4 for name in names if name != "blocks.0.global_attention.k_proj.bias")
    assert through_globals["blocks.0.attention.q_proj.weight"] == 0.0
    through_others = gradients(model, flags((4,)), rows=[3, 5])
    assert all(through_others[name] == 0.0 for name in names)
    assert through_others["blocks.0.attention.k_proj.weight"] > 1e-4
    assert all(gradients(model, flags(()), rows=[4])[name] == 0.0 for name in names)


def test_gradients_agree_between_backends() -> None:
    model, is_global = built(DILATED), flags((0, 7))
    found = {}
    for backend in ("reference", "sdpa"):
        model.set_backend(backend)
        model.zero_grad()
        model(drawn(1), AttentionContext(is_global=is_global)).square().sum().backward()
        found[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found["reference"].items():
        torch.testing.assert_close(found["sdpa"][name], gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("lengths", [None, (T, 9)])
def test_blocks_trace_as_one_graph(lengths: tuple[int, int] | None) -> None:
    model, tokens = built(DILATED), drawn(2)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    with torch.no_grad():
        expected = model(tokens, AttentionContext(is_global=flags((0, 4), (2,)), kv_lengths=lengths_B))
        context = AttentionContext(is_global=flags((0, 4), (2,)), kv_lengths=lengths_B)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(tokens, context), expected, atol=1e-6, rtol=0)


# -- heads ------------------------------------------------------------------------------------------------------------


def test_the_masked_lm_head_is_tied_unless_told() -> None:
    tied, untied = built(replace(TINY, head="mlm")), built(replace(TINY, head="mlm", tied_head=False))
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (V, 32)
    tokens = drawn(2)
    with torch.no_grad():
        assert tied(tokens).shape == (2, T, V)
        before = tied(tokens)
        tied.embedding.weight[5] += 1.0
        moved = (tied(tokens) - before).abs().amax(dim=(0, 1))
    assert moved[5] > 0.1


def test_the_classifier_reads_the_first_real_token() -> None:
    config = replace(TINY, head="classification", pooler=True, labels=("a", "b", "c"), head_dropout=0.5)
    model, tokens, lengths = built(config), drawn(2), torch.tensor([T, 6])
    left = torch.cat([tokens[:1], torch.cat([torch.zeros(1, T - 6, dtype=torch.long), tokens[1:, :6]], dim=1)])
    with torch.no_grad():
        found = model(tokens, lengths_B=lengths)
        assert found.shape == (2, 3)
        torch.testing.assert_close(model(left, left_padded(lengths, T)), found, atol=1e-5, rtol=0)
        pooled = torch.tanh(model.pooler(model.hidden(tokens, lengths_B=lengths)[:, 0]))  # type: ignore[misc]
        torch.testing.assert_close(found, model.head.out_proj(pooled), atol=1e-6, rtol=0)  # type: ignore[union-attr,operator]


def test_the_span_head_gives_start_and_end() -> None:
    assert built(replace(TINY, head="qa"))(drawn(2)).shape == (2, T, 2)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, tokens = built(TINY), drawn(1)
    with pytest.raises(ValueError, match=r"shape \(23,\); the model reads"):
        model(tokens[0])
    with pytest.raises(ValueError, match="token type 2: this model has types 0 to 1"):
        model(tokens, token_types_BT=torch.full_like(tokens, 2))
    with pytest.raises(ValueError, match="no token types"):
        built(replace(TINY, n_types=0))(tokens, token_types_BT=torch.zeros_like(tokens))
    with pytest.raises(ValueError, match="position 40 is beyond the 40 learned positions"):
        model(drawn(1, n_tokens=41))
    with pytest.raises(ValueError, match="position 40 is beyond the 40 learned positions"):
        built(LONGFORMER)(drawn(1, n_tokens=41))
    with pytest.raises(ValueError, match=r"lengths_B and context\.kv_lengths say the same"):
        model(tokens, AttentionContext(kv_lengths=torch.tensor([3])), lengths_B=torch.tensor([3]))
    with pytest.raises(ValueError, match="no pooler"):
        model.pooled(model(tokens))
    model.set_backend("flex")
    with pytest.raises(UnsupportedAttention, match="layer pattern 'local'"):
        model.check_attention(device="cpu", dtype=torch.float32, needs_grad=True)


# -- weights and checkpoints ------------------------------------------------------------------------------------------


def test_weights_are_a_function_of_the_seed_for_every_layout() -> None:
    one, fused = from_config(LONGFORMER, seed=3), from_config(LONGFORMER, seed=3, fused_qkv=True)
    assert any("qkv_proj" in name for name, _ in fused.named_parameters())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name])
    assert not torch.equal(one.embedding.weight, from_config(LONGFORMER, seed=4).embedding.weight)
    assert not any(m.o_proj.bias.any() for m in one.modules() if isinstance(m, Attention))


def test_checkpoints_hold_encoders(tmp_path: Path) -> None:
    model = built(replace(DILATED, head="classification", pooler=True, labels=("no", "yes")))
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert isinstance(loaded, Encoder)
    assert loaded.config == model.config
    tokens, context = drawn(2), AttentionContext(is_global=flags((0,), (0, 3)))
    with torch.no_grad():
        assert torch.equal(loaded(tokens, context), model(tokens, context))
    with pytest.raises(CheckpointError, match="holds an encoder; this needs a decoder"):
        load_decoder(tmp_path / "m")
