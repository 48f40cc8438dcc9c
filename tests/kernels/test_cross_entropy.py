"""The chunked head loss against F.cross_entropy on materialised logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernels import cross_entropy
from longspan.kernels.cross_entropy import linear_cross_entropy, token_nll

N, D, V = 13, 5, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, D), (V, D), (V,))
    )
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 6]] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk", [1, 4, 13, 100, None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients_are_exact(chunk: int | None, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    given = bias if with_bias else None
    expected = F.cross_entropy(F.linear(hidden, weight, given), targets, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets, bias_V=given, chunk=chunk)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    scale = 0.37  # the loss is divided by the number of tokens afterwards
    for x, y in zip(torch.autograd.grad(ours * scale, leaves), torch.autograd.grad(expected * scale, leaves)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


def test_all_ignored_and_empty() -> None:
    hidden, weight, _, targets = inputs()
    for rows in (slice(0, N), slice(0, 0)):
        loss = linear_cross_entropy(hidden[rows], weight, torch.full_like(targets, 7)[rows], ignore_index=7, chunk=4)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert bool((gradient == 0).all())


def test_a_hidden_row_without_a_target_may_be_anything_finite() -> None:
    hidden, weight, _, targets = inputs()
    spoiled = hidden.detach().clone()
    spoiled[targets == -100] = 1e6
    spoiled.requires_grad_()
    a = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    b = torch.autograd.grad(linear_cross_entropy(spoiled, weight, targets), weight)[0]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_token_nll() -> None:
    hidden, weight, bias, targets = inputs()
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    for chunk in (1, 5, None):
        ours = token_nll(hidden, weight, targets, bias_V=bias, chunk=chunk)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-14)
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    torch.testing.assert_close(total, expected.sum().detach(), rtol=0, atol=1e-13)


def test_bf16_sums_in_fp32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16().requires_grad_() for n in (600, 50))
    targets = torch.randint(0, 50, (600,), generator=generator)
    exact_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = F.cross_entropy(F.linear(*exact_leaves), targets, reduction="sum")
    twin = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, targets, chunk=100)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact.item()) <= 2 * abs(twin.item() - exact.item()) + 1e-3 * exact.item()
    gradients = [
        torch.autograd.grad(loss, leaves) for loss, leaves in ((exact, exact_leaves), (ours, (hidden, weight)))
    ]
    for x, y in zip(*gradients):
        assert y.dtype == torch.bfloat16
        assert (x - y.double()).abs().max() <= 0.02 * x.abs().max()


def test_autocast_uses_master_weights() -> None:
    hidden, weight, bias, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (hidden, hidden.bfloat16()):
            loss = linear_cross_entropy(given, weight, targets, bias_V=bias)
            expected = F.cross_entropy(F.linear(given, weight, bias), targets, reduction="sum")
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected.float(), rtol=5e-3, atol=0)
            for x, y in zip(*(torch.autograd.grad(each, (hidden, weight, bias)) for each in (loss, expected))):
                assert x.dtype == torch.float32
                torch.testing.assert_close(x, y, rtol=0, atol=0.03)


def test_compiles_whole() -> None:
    hidden, weight, bias, targets = inputs()

    def mean_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets, bias_V=bias, chunk=4) / N

    torch._dynamo.reset()
    eager, compiled = (
        mean_loss(hidden, weight),
        torch.compile(mean_loss, fullgraph=True, backend="aot_eager")(hidden, weight),
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-14, atol=0)
    leaves = (hidden, weight, bias)
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


def test_the_function_for_the_compiler_is_the_same_and_ignores_padding() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(6, 7, dtype=torch.float64), torch.tensor([[0], [3], [6], [2], [2], [1]])
    padded = torch.cat([logits, torch.full((6, 3), 1e3, dtype=torch.float64)], dim=1)
    nll, gradient = cross_entropy._nll_and_gradient_functional(padded, targets, 7)
    expected_nll, expected = cross_entropy._nll_and_gradient(logits, targets, 7)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradient[:, :7], expected, rtol=0, atol=1e-14)
    assert (gradient[:, 7:] == 0).all()


def test_rows_are_aligned_where_the_device_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    nll = cross_entropy.token_nll(hidden, weight, targets, bias_V=bias)
    monkeypatch.setitem(cross_entropy.ALIGN, "cpu", 16)
    assert cross_entropy._aligned(weight, weight.dtype).shape == (-(-V // 16) * 16, weight.shape[1])
    monkeypatch.setattr(cross_entropy, "_nll_and_gradient", cross_entropy._nll_and_gradient_functional)
    padded = linear_cross_entropy(hidden, weight, targets, bias_V=bias)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(padded, expected, rtol=1e-14, atol=0)
    for x, y in zip(torch.autograd.grad(padded, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(cross_entropy.token_nll(hidden, weight, targets, bias_V=bias), nll, rtol=1e-14, atol=0)


@pytest.mark.parametrize("chunk", [None, 300])
def test_batches_of_any_size_have_few_graphs(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    """The last chunk is filled up with rows that count for nothing."""
    sizes: set[int] = set()

    def compiled(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        sizes.add(len(logits))
        return cross_entropy._nll_and_gradient_functional(logits, targets, vocabulary)

    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((900, 6), (11, 6), (11,))
    )
    targets = torch.randint(11, (900,))
    targets[::7] = -100
    for n in (1, 100, 128, 129, 300, 301, 555, 899):
        results = []
        for fused in (False, True):
            monkeypatch.setattr(cross_entropy, "_has_compiler", lambda _, fused=fused: fused)
            monkeypatch.setattr(cross_entropy, "_compiled", lambda: compiled)
            loss = linear_cross_entropy(hidden[:n], weight, targets[:n], bias_V=bias, chunk=chunk)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
        for x, y in zip(*results):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    assert sizes == ({128, 256, 512, 1024} if chunk is None else {128, 256, 300})


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compute = cross_entropy._nll_and_gradient

    def watched(logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        seen.append(logits)
        return compute(logits, targets, vocabulary)

    monkeypatch.setattr(cross_entropy, "_nll_and_gradient", watched)
    hidden, weight = torch.randn(50, 4), torch.randn(1000, 4, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(50, dtype=torch.long), chunk=16).backward()
    assert [list(logits.shape) for logits in seen] == [[16, 1000]] * 3 + [[2, 1000]]


def test_the_default_chunk_is_bounded_by_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 2 * V)
    hidden, weight, _, targets = inputs()
    assert cross_entropy._check(hidden, weight, targets, None, -100, None)[1] == 2


def test_there_is_no_second_derivative() -> None:
    hidden, weight, _, targets = inputs()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_VD": torch.zeros(V, D + 1, dtype=torch.float64)}, "with one D"),
        ({"targets_N": torch.zeros(N - 1, dtype=torch.long)}, r"targets have shape \[12\]; they must be \[13\]"),
        ({"targets_N": torch.full((N,), V)}, "target 11 is outside the vocabulary 0 … 10"),
        ({"targets_N": torch.full((N,), -1)}, "target -1 is outside"),
        ({"bias_V": torch.zeros(V + 1)}, r"bias has shape \[12\]"),
        ({"chunk": 0}, "chunk=0"),
        ({"weight_VD": torch.zeros(V, D)}, "one dtype, or autocast"),
    ],
)
def test_wrong_inputs(change: dict[str, Tensor], match: str) -> None:
    hidden, weight, _, targets = inputs()
    for function in (linear_cross_entropy, token_nll):
        given = {"hidden_ND": hidden, "weight_VD": weight, "targets_N": targets, **change}
        with pytest.raises(ValueError, match=match):
            function(**given)  # pyright: ignore[reportArgumentType]
