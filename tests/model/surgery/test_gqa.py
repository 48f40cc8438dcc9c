"""Grouped-query surgery on whole models: what is exact is exact, and the rest is what the definitions say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.spec import AttentionSpec, Window
from longspan.model.accounting import kv_bytes_per_token, parameters
from longspan.model.build import Model, build_from
from longspan.model.cache_plan import cross_cache_bytes
from longspan.model.config import AttentionPlan, DecoderConfig, EncoderConfig, HeadGroup, ModelConfig, Seq2SeqConfig
from longspan.model.surgery import GroupedQuery, LazyTensor, SurgeryError, operate, plan_steps
from longspan.model.surgery.grouping import Groups, contiguous_groups
from longspan.model.surgery.heads import Branch, Heads, reordered
from longspan.model.zoo import configure

DECODER = DecoderConfig(vocab_size=61, n_layers=2, d_model=48, n_heads=6, d_ff=64, max_positions=32)
LLAMA = replace(
    DECODER, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied_head=False, d_model=48, qkv_bias=True
)
CAUSAL = AttentionSpec(causal=True)
INITS = ("mean", "first", "aligned", "svd")
POSITIONS = {
    "learned": DECODER,
    "rope": LLAMA,
    "alibi": replace(DECODER, positions="alibi"),
    "none": replace(DECODER, positions="none"),
    "sinusoidal": replace(DECODER, positions="sinusoidal"),
}
TOKENS_BT = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Everything random, norms and biases too, and large enough that attention is not uniform."""
    model = build_from(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.2 * noise)
    return model.eval()


def converted(
    model: Model, surgery: GroupedQuery, weights: Mapping[str, Tensor] | None = None
) -> tuple[Model, dict[str, object]]:
    """A model after the surgery, and what the surgery reports."""
    state = model.state_dict() if weights is None else weights
    steps = plan_steps(model.config, [surgery])
    lazy, (report,) = operate(steps, {name: LazyTensor.of(tensor) for name, tensor in state.items()})
    after = build_from(steps[-1].after, device="meta")
    after.load_state_dict({name: tensor.read() for name, tensor in lazy.items()}, assign=True)
    return after.eval(), dict(report)


def outputs(model: Model) -> Tensor:
    with torch.no_grad():
        if isinstance(model.config, Seq2SeqConfig):
            flags = torch.zeros(2, 24, dtype=torch.bool)
            flags[:, [0, 5]] = True
            return model(TOKENS_BT, TOKENS_BT[:, :9], is_global_BS=flags if model.config.global_projections else None)
        if isinstance(model.config, EncoderConfig) and model.config.global_projections:
            flags = torch.zeros(2, 24, dtype=torch.bool)
            flags[0, 3] = flags[1, 0] = flags[1, 20] = True
            return model(TOKENS_BT, AttentionContext(is_global=flags))
        return model(TOKENS_BT)


def same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def lost(report: Mapping[str, object]) -> set[float]:
    attentions = report["attentions"]
    assert isinstance(attentions, dict)
    return {share for entry in attentions.values() for share in entry["lost"].values()}


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(attention, name, projection)."""
    for module in model.modules():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Linear):
                yield module, name, projection


def tie(model: Model, groups: Groups, *, mean: bool = False) -> None:
    """Key/value heads of a group made equal to its first, or to their mean, in place."""
    with torch.no_grad():
        for _, name, projection in projections(model):
            for tensor in projection.parameters() if name in ("k_proj", "v_proj") else ():
                heads = tensor.unflatten(0, (-1, 8))
                for group in groups:
                    of_group = heads[list(group)]
                    heads[list(group)] = of_group.mean(dim=0) if mean else of_group[0]


def turn_heads(model: Model, *, planes: bool) -> None:
    """Each key/value head turned, and what reads it: keys and queries alike, values and the output projection alike."""
    with torch.no_grad():
        turns_of: dict[int, Tensor] = {}
        for seed, (module, name, projection) in enumerate(projections(model)):
            generator = torch.Generator().manual_seed(seed)
            if name == "q_proj":
                angles = torch.randn(6, 4, generator=generator)
                keys_NKK = torch.linalg.qr(torch.randn(6, 8, 8, generator=generator)).Q
                if planes:
                    cos, sin = angles.cos().diag_embed(), angles.sin().diag_embed()
                    keys_NKK = torch.cat([torch.cat([cos, -sin], dim=2), torch.cat([sin, cos], dim=2)], dim=1)
                turns_of[0] = keys_NKK
            if name == "v_proj" and type(module).__name__ != "GlobalAttention":
                turns_of[1] = torch.linalg.qr(torch.randn(6, 8, 8, generator=generator)).Q
            turn_NKK = turns_of[name in ("v_proj", "o_proj")]
            if name == "o_proj":
                heads = projection.weight.unflatten(1, (6, 8))
                projection.weight.copy_(torch.einsum("nkj,dnj->dnk", turn_NKK, heads).flatten(1))
                continue
            for tensor in projection.parameters():
                tensor.copy_(torch.einsum("nkj,nj...->nk...", turn_NKK, tensor.unflatten(0, (6, 8))).flatten(0, 1))


def longformer(*groups: tuple[int, int]) -> EncoderConfig:
    """Windows of 3 on each side, by (query heads, dilation)."""
    specs = [
        HeadGroup(heads=heads, spec=AttentionSpec(causal=False, window=Window.symmetric(3, d), global_tokens=True))
        for heads, d in groups
    ]
    plan = AttentionPlan(patterns={"x": tuple(specs)}, layers=("x",))
    config = configure("longformer-tiny", {"vocab_size": 61, "d_model": 48, "n_heads": 6, "attention": plan})
    assert isinstance(config, EncoderConfig)
    return config


def seq2seq(name: str = "led-tiny", **changes: object) -> Seq2SeqConfig:
    stacks = {side: {"n_heads": 6, "d_ff": 64} for side in ("encoder", "decoder")}
    config = configure(name, {"vocab_size": 61, "d_model": 48, **stacks, **changes})
    assert isinstance(config, Seq2SeqConfig)
    return config


EVERY: dict[str, ModelConfig] = {
    **POSITIONS,
    "qk_norm": replace(LLAMA, qk_norm=True),
    "sinks": replace(LLAMA, attention=AttentionPlan(patterns={"full": replace(CAUSAL, learned_sink=True)})),
    "bert": configure("bert-tiny", {"vocab_size": 61, "d_model": 48, "n_heads": 6}),
    "rope encoder": configure("bert-tiny", {"vocab_size": 61, "d_model": 48, "n_heads": 6, "positions": "rope"}),
    "longformer": longformer((6, 1)),
    "bart": seq2seq("bart-tiny"),
    "led": seq2seq(),
}
ALL_STACKS = ("decoder_self", "cross", "encoder")


def gqa(config: ModelConfig, kv_heads: int, **keys: object) -> GroupedQuery:
    stacks = {"stacks": ALL_STACKS} if isinstance(config, Seq2SeqConfig) else {}
    return GroupedQuery(kv_heads=kv_heads, **{**stacks, **keys})


# -- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*INITS, "random"])
@pytest.mark.parametrize("family", ["rope", "led"])
def test_as_many_heads_as_before_is_the_identity(init: str, family: str) -> None:
    model = random_model(EVERY[family])
    after, report = converted(model, gqa(model.config, 6, init=init))
    assert after.config == model.config
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert report == {}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("family", [*EVERY])
def test_groups_of_equal_heads_lose_nothing(family: str, init: str) -> None:
    for kv_heads in (3, 1):
        model = random_model(EVERY[family])
        tie(model, contiguous_groups(6, 6 // kv_heads))
        expected = outputs(model)
        after, report = converted(model, gqa(model.config, kv_heads, init=init))
        same(outputs(after), expected)
        assert lost(report) == {0.0}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("family", [name for name in EVERY if name != "alibi"])
def test_equal_heads_are_found_wherever_they_are(family: str, init: str) -> None:
    """So queries, output projection and learned sinks move with the heads, and those of global tokens alike."""
    model = random_model(EVERY[family])
    tie(model, ((0, 3), (1, 4), (2, 5)))
    expected = outputs(model)
    after, report = converted(model, gqa(model.config, 3, init=init, grouping="similar"))
    same(outputs(after), expected)
    assert lost(report) == {0.0}
    apart = outputs(converted(model, gqa(model.config, 3, init=init))[0])
    assert (apart - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("init", ["aligned", "svd"])
@pytest.mark.parametrize("family", [name for name in EVERY if name != "qk_norm"])
def test_heads_that_differ_by_what_the_layer_can_undo_lose_nothing(family: str, init: str) -> None:
    """And what the layer can undo changes nothing by itself: orthogonal turns of keys, within the planes that rotary
    positions rotate or without them of all dimensions; any of values."""
    model = random_model(EVERY[family])
    tie(model, contiguous_groups(6, 3))
    expected = outputs(model)
    turn_heads(model, planes=getattr(model.config, "positions", "") == "rope")
    same(outputs(model), expected)
    after, report = converted(model, gqa(model.config, 2, init=init))
    same(outputs(after), expected)
    assert lost(report) == {0.0}
    mean = outputs(converted(model, gqa(model.config, 2))[0])
    assert (mean - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("init", ["aligned", "svd"])
@pytest.mark.parametrize("family", ["rope", "rope encoder", "learned"])
def test_rotary_queries_are_turned_within_their_planes_alone(family: str, init: str) -> None:
    """Each pair (i, i + K/2) of a query head by one complex number, of size 1 for aligned; without rotation, freely."""
    model = random_model(EVERY[family])
    after, _ = converted(model, gqa(model.config, 2, init=init))
    ratios = []
    for weights in (model.state_dict(), after.state_dict()):
        first, second = weights["blocks.1.attention.q_proj.weight"].double().unflatten(0, (6, 2, 4)).unbind(dim=1)
        ratios.append(torch.complex(first, second))
    ratio_HPD = ratios[1] / ratios[0]
    one_HP1 = ratio_HPD.mean(dim=2, keepdim=True)
    within_planes = bool(torch.allclose(ratio_HPD, one_HP1.expand_as(ratio_HPD), atol=1e-3))
    assert within_planes == (family != "learned")
    if within_planes:
        assert torch.allclose(one_HP1.abs(), torch.ones_like(one_HP1.abs()), atol=1e-3) == (init == "aligned")
        assert one_HP1.angle().abs().max() > 0.1


def test_any_turn_of_keys_would_break_rotary_positions() -> None:
    model = random_model(LLAMA)
    expected = outputs(model)
    turn_heads(model, planes=False)
    assert (outputs(model) - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("family", ["rope", "learned", "led"])
def test_what_mean_first_and_random_leave_alone_is_left_bit_for_bit(family: str) -> None:
    model = random_model(EVERY[family])
    before = model.state_dict()
    for init in ("mean", "first", "random"):
        after = converted(model, gqa(model.config, 2, init=init))[0].state_dict()
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert changed == {name for name in after if ".k_proj." in name or ".v_proj." in name}
        for name in changed:
            of_group = before[name].unflatten(0, (2, 3, 8))
            if init == "first":
                assert torch.equal(after[name], of_group[:, 0].flatten(0, 1))
            elif init == "mean":
                torch.testing.assert_close(after[name], of_group.mean(dim=1).flatten(0, 1))
            elif name.endswith("weight"):
                fresh = build_from(replace(model.config, **_fewer(model.config)), seed=0).state_dict()
                assert torch.equal(after[name], fresh[name])
            else:
                assert not after[name].any()


def _fewer(config: ModelConfig) -> dict[str, object]:
    if isinstance(config, Seq2SeqConfig):
        return {side: replace(getattr(config, side), n_kv_heads=2) for side in ("encoder", "decoder")}
    return {"n_kv_heads": 2}


@pytest.mark.parametrize("family", [name for name in EVERY if name != "qk_norm"])
def test_one_head_is_multi_query_attention(family: str) -> None:
    """Against the multi-head model with each head's projections replaced by the mean of all."""
    model = random_model(EVERY[family])
    after, _ = converted(model, gqa(model.config, 1))
    tie(model, ((0, 1, 2, 3, 4, 5),), mean=True)
    same(outputs(after), outputs(model))


def test_normalised_keys_are_pooled_by_direction() -> None:
    """Under QK-norm a head's size means nothing: heads that differ by it alone are equal, in every init."""
    config = EVERY["qk_norm"]
    assert isinstance(config, DecoderConfig)
    model = random_model(replace(config, norm_eps=1e-12))
    tie(model, contiguous_groups(6, 3))
    expected = outputs(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".k_proj." in name:
                tensor.unflatten(0, (6, 8)).mul_(
                    torch.linspace(0.5, 3, 6).reshape(6, 1, *(1 for _ in tensor.shape[1:]))
                )
    same(outputs(model), expected)
    for init in INITS:
        same(outputs(converted(model, gqa(model.config, 2, init=init))[0]), expected)


def test_grouped_models_are_grouped_further() -> None:
    """Six to two at once is six to two by way of... three would not divide: twelve to six to two."""
    config = replace(LLAMA, n_heads=12, head_dim=8)
    model = random_model(config)
    for init in ("mean", "first"):
        at_once = converted(model, gqa(config, 2, init=init))[0]
        halfway = converted(model, gqa(config, 6, init=init))[0]
        after = converted(halfway, gqa(halfway.config, 2, init=init))[0]
        assert after.config == at_once.config
        for name, tensor in at_once.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], tensor)
    halfway = random_model(replace(config, n_kv_heads=6))
    tie(halfway, ((0, 2), (1, 5), (3, 4)))
    expected = outputs(halfway)
    after, report = converted(halfway, gqa(halfway.config, 3, init="svd", grouping="similar"))
    assert next(iter(report["attentions"].values()))["groups"] == [[0, 2], [1, 5], [3, 4]]  # pyright: ignore[reportAttributeAccessIssue]: plain data
    same(outputs(after), expected)


def test_groups_stay_inside_heads_that_see_the_same() -> None:
    """Longformer's dilation on two heads: alike as heads of different patterns may be, they share nothing."""
    model = random_model(longformer((4, 1), (2, 2)))
    tie(model, ((0, 4), (1, 5), (2, 3)))
    after, report = converted(model, gqa(model.config, 3, grouping="similar"))
    groups = [entry["groups"] for entry in report["attentions"].values()]  # pyright: ignore[reportAttributeAccessIssue]: plain data
    assert groups == [[[0, 1], [2, 3], [4, 5]]] * 2
    tie(model, ((0, 2), (1, 3), (4, 5)))
    expected = outputs(model)
    after, report = converted(model, gqa(model.config, 3, grouping="similar"))
    same(outputs(after), expected)


def test_values_of_global_tokens_share_the_turns_of_the_others() -> None:
    """One output projection reads both, so one turn has to serve both: what is fitted to both loses less of both."""
    model = random_model(EVERY["longformer"])
    before = {name: tensor.double() for name, tensor in model.state_dict().items()}
    after = converted(model, gqa(model.config, 2, init="svd"))[0].state_dict()
    o_HKD = before["blocks.0.attention.o_proj.weight"].T.unflatten(0, (6, 8))
    new_HKD = after["blocks.0.attention.o_proj.weight"].double().T.unflatten(0, (6, 8))

    def products(o_HKD: Tensor, weights: Mapping[str, Tensor], kv_heads: int) -> Tensor:
        both = torch.cat(
            [weights[f"blocks.0.{module}.v_proj.weight"] for module in ("attention", "global_attention")]
            + [weights[f"blocks.0.{module}.v_proj.bias"][:, None] for module in ("attention", "global_attention")],
            dim=1,
        ).double()
        v_HKC = both.unflatten(0, (kv_heads, 8)).repeat_interleave(6 // kv_heads, dim=0)
        return (o_HKD.mT @ v_HKC).unflatten(0, (2, 3)).flatten(1, 2)  # [group, heads * D, C]

    whole, near = products(o_HKD, before, 6), products(new_HKD, after, 2)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    best = u[..., :8] * s[:, None, :8] @ vh[:, :8]
    torch.testing.assert_close(near, best, atol=1e-5 * float(whole.abs().max()), rtol=0)


# -- what it costs, and what is lost ----------------------------------------------------------------------------------


@given(
    heads=st.sampled_from([2, 4, 6]), kv_heads=st.sampled_from([1, 2, 3]), bias=st.booleans(), layers=st.integers(1, 3)
)
@settings(max_examples=20, deadline=None)
def test_parameters_and_bytes_shrink_by_the_formula(heads: int, kv_heads: int, bias: bool, layers: int) -> None:
    if heads % kv_heads:
        return
    config = replace(DECODER, n_layers=layers, n_heads=heads, bias=bias)
    (step,) = plan_steps(config, [gqa(config, kv_heads)])
    assert isinstance(step.after, DecoderConfig)
    D, K = config.d_model, config.dim_per_head
    saved = 2 * layers * (D + bias) * (heads - kv_heads) * K
    assert parameters(config).total - parameters(step.after).total == saved
    held = sum(tensor.numel() for tensor in build_from(step.after, device="meta").parameters())
    assert parameters(step.after).total == held
    assert kv_bytes_per_token(step.after) * heads == kv_bytes_per_token(config) * kv_heads


def test_what_is_lost_is_what_is_said() -> None:
    model = random_model(LLAMA)
    after, report = converted(model, gqa(LLAMA, 2))
    for layer in range(2):
        for name, what in (("k_proj", "keys"), ("v_proj", "values")):
            module = f"blocks.{layer}.attention"
            before, now = (
                torch.cat([s[f"{module}.{name}.weight"], s[f"{module}.{name}.bias"][:, None]], dim=1).unflatten(
                    0, (-1, 8)
                )
                for s in (model.state_dict(), after.state_dict())
            )
            share = (before - now.repeat_interleave(3, dim=0)).square().sum() / before.square().sum()
            told = report["attentions"][module]["lost"][what]  # pyright: ignore[reportIndexIssue]: plain data
            assert told == pytest.approx(float(share), abs=1e-5)


def test_each_init_loses_less_than_the_one_before() -> None:
    """By the measure of each: a mean loses less than a head of the group, a turned mean less than a mean. (What that
    does to a model's loss is another question: docs/gqa.md.)"""
    for family in ("learned", "rope", "led"):
        model = random_model(EVERY[family])
        by_init = {init: converted(model, gqa(model.config, 2, init=init))[1] for init in ("first", "mean", "aligned")}
        for module in by_init["mean"]["attentions"]:  # pyright: ignore[reportGeneralTypeIssues]: plain data
            for what in ("keys", "values"):
                losses = [report["attentions"][module]["lost"][what] for report in by_init.values()]  # pyright: ignore[reportIndexIssue]: plain data
                assert losses[0] > losses[1] > losses[2] > 0


# -- stacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stacks", "counts"),
    [
        (None, (2, 2, 6)),
        (("decoder_self",), (2, 6, 6)),
        (("cross",), (6, 2, 6)),
        (("encoder",), (6, 6, 2)),
        (("cross", "encoder", "decoder_self"), (2, 2, 2)),
    ],
)
def test_each_stack_by_itself(stacks: tuple[str, ...] | None, counts: tuple[int, int, int]) -> None:
    config = seq2seq()
    model = random_model(config)
    tie(model, contiguous_groups(6, 3))
    after, _ = converted(model, GroupedQuery(kv_heads=2, stacks=stacks))  # pyright: ignore[reportArgumentType]: names as texts
    assert isinstance(after.config, Seq2SeqConfig)
    found = (after.config.decoder_half.kv_heads, after.config.cross_heads, after.config.encoder_half.kv_heads)
    assert found == counts
    assert parameters(after.config).total == sum(tensor.numel() for tensor in after.parameters())
    same(outputs(after), outputs(model))
    assert cross_cache_bytes(after.config, 1, 10).total * 6 == cross_cache_bytes(config, 1, 10).total * counts[1]
    with torch.no_grad():
        kept = after.remember(after.encode(TOKENS_BT[:1, :10]))  # pyright: ignore[reportCallIssue]: an encoder–decoder
    assert kept.nbytes.total == cross_cache_bytes(after.config, 1, 10).total


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "keys", "words"),
    [
        (DECODER, {"kv_heads": 4}, "kv_heads=4: the 6 key/value heads are shared out evenly; choose one of 6, 3, 2, 1"),
        (DECODER, {"kv_heads": 0}, "kv_heads=0: the 6 key/value heads are shared out evenly; choose one of 6, 3, 2, 1"),
        (replace(DECODER, n_kv_heads=2), {"kv_heads": 6}, "and heads can only be made fewer; choose one of 2, 1"),
        (
            replace(DECODER, n_kv_heads=3),
            {"kv_heads": 2},
            "the 3 key/value heads are shared out evenly; choose one of 3, 1",
        ),
        (DECODER, {"kv_heads": 3, "init": "median"}, "init=median: it is one of mean, first, random, aligned, svd"),
        (DECODER, {"kv_heads": 3, "grouping": "kmeans"}, "grouping=kmeans: it is one of contiguous, similar"),
        (DECODER, {"kv_heads": 3, "stacks": ("cross",)}, "only an encoder–decoder has several; leave it out"),
        (seq2seq(), {"kv_heads": 3, "stacks": ("self",)}, "stacks=self: they are of decoder_self, cross, encoder"),
        (seq2seq(), {"kv_heads": 3, "stacks": ()}, "stacks=[]: names at least one of"),
        (
            replace(seq2seq(), cross_kv_heads=2),
            {"kv_heads": 3},
            "kv_heads=3: the 2 key/value heads of cross are shared out evenly, and heads can only be made fewer",
        ),
        (  # what the other stack can have as well
            replace(seq2seq(), cross_kv_heads=2),
            {"kv_heads": 4},
            "decoder_self are shared out evenly; choose one of 2, 1",
        ),
        (POSITIONS["alibi"], {"kv_heads": 3, "grouping": "similar"}, "a query head's slope goes by its place"),
        (DECODER, {"kv_heads": 3, "grouping": "similar", "init": "random"}, "new heads are like no others"),
        (DECODER, {"kv_heads": 3, "statistics": "x"}, "init=mean with grouping=contiguous compares no heads"),
        (longformer((4, 1), (2, 2)), {"kv_heads": 1}, "groups of [4, 2] heads split a key/value head"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals_say_what_to_do(config: ModelConfig, keys: dict[str, object], words: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        plan_steps(config, [GroupedQuery(**keys)])  # pyright: ignore[reportArgumentType]: keys of tests
    assert words in str(caught.value)


def test_alibi_keeps_its_heads_where_they_are_when_nothing_is_shared() -> None:
    config = POSITIONS["alibi"]
    assert plan_steps(config, [GroupedQuery(kv_heads=6, grouping="similar")])[0].after == config


# -- reordering alone -------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(3)), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_reordered_heads_compute_the_same(order: Sequence[int], seed: int) -> None:
    """Three key/value heads of two query heads each; sinks among the scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = Heads((Branch(normal(6, 4, 9), normal(3, 4, 9), normal(3, 4, 9)),), normal(6, 4, 7), normal(6))
    x_TC = normal(11, 9)

    def attention(heads: Heads) -> Tensor:
        (branch,) = heads.branches
        assert heads.sinks_H is not None
        q, k, v = (torch.einsum("hkc,tc->htk", w, x_TC) for w in (branch.q_HKC, branch.k_GKC, branch.v_GKC))
        k, v = (x.repeat_interleave(2, dim=0) for x in (k, v))
        scores = torch.cat([q @ k.mT, heads.sinks_H[:, None, None].expand(6, 11, 1)], dim=2)
        return torch.einsum("htk,hkd->td", scores.softmax(dim=2)[..., :-1] @ v, heads.out_HKD)

    torch.testing.assert_close(attention(reordered(heads, order)), attention(heads))
