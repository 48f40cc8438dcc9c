"""Effective context: windows by hand, curves with a known answer, and simulated ones whose answer is uncertain."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longspan.evaluation.context import plots as context_plots
from longspan.evaluation.context.effective import (
    ContextCurve,
    EffectiveContext,
    doubling_lengths,
    effective_context,
    measure_context_curve,
    retrieval_context,
)
from longspan.evaluation.perplexity.documents import EvalDocument
from longspan.evaluation.reporting.plots import png


class Forgetful(nn.Module):
    """The nll of token 1 after n tokens is 1 + 1 / min(n, memory): more than `memory` of them change nothing."""

    def __init__(self, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self.head_weight = torch.eye(2)
        self.read: list[int] = []

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        self.read += [tokens_BT.shape[1]] * len(tokens_BT)
        nll_T = 1 + 1 / torch.arange(1, tokens_BT.shape[1] + 1, dtype=torch.float64).clamp(max=self.memory)
        logits_T2 = torch.stack([torch.zeros_like(nll_T), -torch.log(torch.expm1(nll_T))], dim=-1).float()
        return logits_T2.expand(len(tokens_BT), -1, -1)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(11, 6, generator=g) * 2
        self.head_weight = torch.randn(11, 6, generator=g)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embedding[tokens_BT]
        return embedded_BTD.cumsum(1) / torch.arange(1, tokens_BT.shape[1] + 1)[:, None] + embedded_BTD


def ones(*lengths: int) -> list[EvalDocument]:
    return [EvalDocument(tokens=np.ones(n, dtype=int), n_bytes=n, id=str(i)) for i, n in enumerate(lengths)]


def measure(model, documents, lengths, **more) -> ContextCurve:
    return measure_context_curve(
        model, documents, lengths=lengths, **({"batch": 3, "device": "cpu", "targets": 2} | more)
    )


def test_windows_by_hand() -> None:
    """Windows of 4 and 8: the two targets are predicted from 3, 4 and from 7, 8 tokens."""
    model = Forgetful(100)
    curve = measure(model, ones(9, 8, 20), [8, 4], batch=1)
    assert curve.lengths == (4, 8)
    np.testing.assert_allclose(curve.nll_dL, [[2 + 1 / 3 + 1 / 4, 2 + 1 / 7 + 1 / 8]] * 2, rtol=1e-5)
    assert (curve.units, curve.left_out, curve.count_d.tolist()) == (("/0", "/2"), 1, [2, 2])
    assert sorted(model.read) == [4, 4, 8, 8]


def test_documents_with_prompts_are_left_out_and_counted() -> None:
    """What stands at their beginning is not to be scored, and a block may reach into it."""
    documents = [replace(each, prompt=3 * (i % 2)) for i, each in enumerate(ones(*[20] * 24, 8))]
    curve = measure(Forgetful(100), documents, [4, 8])
    assert curve.units == tuple(f"/{i}" for i in range(0, 24, 2))
    assert curve.left_out == 13
    found = effective_context(curve)
    assert (found.documents, found.left_out) == (12, 13)
    assert "13 documents left out, no longer than the longest window or with a prompt" in found.words
    with pytest.raises(
        ValueError, match=r"no document without a prompt is longer than that \(the longest has 8 tokens"
    ):
        measure(Forgetful(100), [each for each in documents if each.prompt or len(each.tokens) == 8], [4, 8])
    with pytest.raises(ValueError, match=r"the longest has 0 tokens"):
        measure(Forgetful(100), [each for each in documents if each.prompt], [4, 8])


def test_targets_are_the_same_tokens_at_every_length() -> None:
    """Against single forward passes over what precedes each of them; several blocks in a document, apart."""
    rng = np.random.default_rng(0)
    documents = [EvalDocument(tokens=rng.integers(0, 11, n), n_bytes=n, id=str(n)) for n in (30, 17, 13)]
    model = RunningMean()
    curve = measure(model, documents, [6, 12], targets=3, blocks=3)
    ends = [[13, 21, 30], [13, 17], [13]]
    assert curve.count_d.tolist() == [9, 6, 3]
    for row, document, mine in zip(curve.nll_dL, documents, ends):
        for column, length in enumerate((6, 12)):
            expected = 0.0
            for end in mine:
                for target in range(end - 3, end):
                    before = document.tokens[end - 1 - length : target]
                    logits_V = model.hidden(torch.from_numpy(before)[None])[0, -1] @ model.head_weight.T
                    expected -= float(torch.log_softmax(logits_V.double(), dim=-1)[document.tokens[target]])
            assert row[column] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("memory", "effective"), [(64, 64), (33, 64), (32, 32), (8, 8), (1000, 128)])
def test_a_model_with_a_known_memory(memory: int, effective: int) -> None:
    curve = measure(Forgetful(memory), ones(*[140] * 12), [8, 16, 32, 64, 128], targets=1)
    found = effective_context(curve)
    assert found.length == effective
    assert found.interval == (effective, effective)
    assert dict(found.distribution)[effective] == 1
    assert found.longest == (effective == 128)
    assert found.points[0].improvement is None
    at = [1 + 1 / min(length, memory) for length in (8, 16)]
    assert found.points[1].loss == pytest.approx(at[1], rel=1e-5)
    assert found.points[1].improvement == pytest.approx(at[0] - at[1], abs=1e-5)


def simulated(losses: list[float], *, noise: float, n: int = 40, seed: int = 0) -> ContextCurve:
    rng = np.random.default_rng(seed)
    hard_d1 = rng.normal(0, 0.5, (n, 1))
    return ContextCurve(
        lengths=tuple(256 * 2**i for i in range(len(losses))),
        targets=128,
        blocks=1,
        nll_dL=128 * (np.array(losses) + hard_d1 + rng.normal(0, noise, (n, len(losses)))),
        count_d=np.full(n, 128),
        units=tuple(map(str, range(n))),
        left_out=3,
        precision="fp32",
    )


def test_pairing_finds_gains_far_below_the_spread_between_documents() -> None:
    """Documents differ by 0.5, the windows by 0.02: without pairing no interval of forty documents would tell."""
    found = effective_context(simulated([3.0, 2.98, 2.96, 2.96], noise=0.01))
    assert found.length == 1024
    assert [point.helps for point in found.points] == [False, True, True, False]
    interval = found.points[1].improvement_interval
    assert interval is not None
    assert 0.01 < interval[0] < 0.02 < interval[1] < 0.03
    assert found.points[1].interval is not None
    assert found.points[1].interval[1] - found.points[1].interval[0] > 0.2


def test_a_collapse_is_not_undone_by_a_smaller_one() -> None:
    """4096 is better than the collapsed 2048, but worse than 1024."""
    assert effective_context(simulated([3.0, 2.9, 2.8, 5.0, 4.0], noise=0.01)).length == 1024
    assert effective_context(simulated([3.0, 3.2, 3.4], noise=0.01)).length == 256


def test_an_uncertain_length_has_a_distribution() -> None:
    found = effective_context(simulated([3.0, 2.9, 2.9025], noise=0.01))  # drawn: 0.004 better, give or take 0.002
    shares = dict(found.distribution)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[256] == 0
    assert 0.1 < shares[512] < 0.9
    assert found.interval == (512, 1024)
    assert effective_context(simulated([3.0, 2.9, 2.9025], noise=0.01), seed=0) == found


def test_too_few_documents_have_a_curve_and_no_figure() -> None:
    found = effective_context(simulated([3.0, 2.0], noise=0.01, n=9))
    assert (found.length, found.interval, found.distribution) == (None, None, ())
    assert found.points[1].loss == pytest.approx(2.0, abs=0.6)
    assert found.points[1].improvement == pytest.approx(1.0, abs=0.05)
    assert found.points[1].improvement_interval is None


def test_words_and_lengths() -> None:
    found = effective_context(simulated([3.0, 2.9], noise=0.01))
    assert found.words.startswith(
        "The longest of the windows 256, 512 that lowers the loss of the same tokens (at most 1 blocks of 128 in a "
        "document, each at the end of its window) below"
    )
    assert "over 40 documents above zero; 3 documents left out," in found.words
    assert doubling_lengths(1024) == (256, 512, 1024)
    assert doubling_lengths(3000, shortest=500) == (500, 1000, 2000, 3000)
    with pytest.raises(ValueError, match="nothing to compare"):
        doubling_lengths(256)


@pytest.mark.parametrize(
    ("lengths", "more", "message"),
    [
        ([8, 8], {}, "compares at least two lengths"),
        ([4, 8], {"targets": 3}, "targets=3 with a shortest window of 4"),
        ([4, 8], {"blocks": 0}, "blocks=0"),
        ([4, 20], {}, "lengths up to 20 tokens: no document without a prompt is longer than that (the longest has 20 "),
    ],
)
def test_requests_that_are_refused(lengths: list[int], more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(Forgetful(4), ones(20), lengths, **more)


# -- retrieval -------------------------------------------------------------------------------------------------------


def answers(*shares: tuple[int, float], n: int = 40) -> tuple[list[int], list[float]]:
    lengths = [length for length, _ in shares for _ in range(n)]
    return lengths, [float(i < round(share * n)) for _, share in shares for i in range(n)]


@pytest.mark.parametrize(
    ("shares", "threshold", "length"),
    [
        ([(1, 1.0), (2, 0.9), (4, 0.8), (8, 0.1)], 0.85, 2),
        ([(1, 1.0), (2, 0.85), (4, 0.8)], 0.85, 2),  # at least: equality passes
        ([(1, 1.0), (2, 0.85)], 0.856, 1),  # RULER's
        ([(1, 0.5), (2, 1.0)], 0.85, None),
        ([(1, 1.0), (2, 0.5), (4, 1.0)], 0.85, 1),  # what passes after a failure doesn't count
        ([(1, 0.9), (2, 0.9)], 0.85, 2),
    ],
)
def test_the_longest_length_that_still_retrieves(shares, threshold: float, length: int | None) -> None:
    found = retrieval_context(*answers(*shares), threshold=threshold)
    assert found.length == length
    assert {length: share for length, share, _ in found.by_length} == pytest.approx(dict(shares))
    assert found.longest == (length == shares[-1][0])
    assert sum(share for _, share in found.distribution) == pytest.approx(1)


def test_uncertain_retrieval() -> None:
    found = retrieval_context(*answers((1, 1.0), (2, 0.9), (4, 0.2)))
    passes = 1 - sum(math.comb(40, k) * 0.9**k * 0.1 ** (40 - k) for k in range(34))  # at least 34 of 40 draws
    assert dict(found.distribution)[2] == pytest.approx(passes, abs=0.04)
    assert found.interval == (1, 2)
    certain = retrieval_context(*answers((1, 1.0), (2, 0.0)))
    assert (certain.interval, dict(certain.distribution)[1]) == ((1, 1), 1)
    assert "at least 85 % of the answers are right" in certain.words


def test_questions_about_one_text_are_drawn_together() -> None:
    """Forty questions about four texts are four draws: no interval."""
    lengths, scores = answers((1, 1.0), (2, 0.9))
    found = retrieval_context(lengths, scores, [str(i // 10) for i in range(80)])
    assert found.interval is None
    assert found.length == 2
    with pytest.raises(ValueError, match="threshold=0"):
        retrieval_context(lengths, scores, threshold=0)
    with pytest.raises(ValueError, match="80 lengths, 1 scores"):
        retrieval_context(lengths, [1.0])


# -- figures ---------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    curves = {name: effective_context(simulated([3.0, 2.9 - i, 2.8 - i], noise=0.01)) for i, name in enumerate("ab")}
    figure = context_plots.loss_by_context(curves)
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines if not str(line.get_label()).startswith("_")] == ["a", "b"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512", "1,024"]
    ring = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in ring] == [1024, 1024]  # pyright: ignore[reportIndexIssue] (an array)
    assert png(figure).startswith(b"\x89PNG")
    assert context_plots.loss_by_context({}) is None


def test_the_map_has_lengths_across_and_depths_down() -> None:
    figure = context_plots.retrieval_map({(256, 0.0): 1.0, (512, 0.0): 0.25, (256, 0.5): 0.5}, title="passkey")
    assert figure is not None
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0 %", "50 %"]
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {
        (0, 0, "100"),
        (1, 0, "25"),
        (0, 1, "50"),
    }
    assert png(figure).startswith(b"\x89PNG")
    assert context_plots.retrieval_map({}) is None


def test_a_figure_without_a_figure(tmp_path) -> None:
    """Too few documents: a line without band or ring."""
    found: EffectiveContext = effective_context(simulated([3.0, 2.0], noise=0.01, n=4))
    figure = context_plots.loss_by_context({"a": found})
    assert figure is not None
    assert len(figure.axes[0].lines) == 1
