"""Numbers that are made of several means: their intervals, and how two checkpoints are compared by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from longspan.evaluation.bootstrap import figure_interval, ratio_interval
from longspan.evaluation.results.compare import compare, measured_figure, measured_scores
from longspan.evaluation.results.directory import CheckpointResults
from longspan.evaluation.results.pairs import compare_checkpoints
from longspan.evaluation.tasks.registry import TASKS
from longspan.evaluation.tasks.result import QuestionScore, TaskProtocol, summarise_task

ROUGE = ("rouge1", "rouge2", "rougeL")


def geometric(means: Mapping[str, float | np.floating]) -> float:
    return float(means["rouge1"] * means["rouge2"] * means["rougeL"]) ** (1 / 3)


def rouge_scores(n: int, *, seed: int, better: float = 0.0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    return [dict(zip(ROUGE, (rng.uniform(0, 0.5, 3) + better).tolist())) for _ in range(n)]


@pytest.fixture
def written(answers: TaskProtocol) -> TaskProtocol:
    return replace(answers, task="qmsum", ask="generate", long_texts="cut_middle", max_new_tokens=64)


def samples_of(scores: Sequence[Mapping[str, float]], documents: Sequence[str]) -> tuple[QuestionScore, ...]:
    return tuple(
        QuestionScore(
            id=str(number),
            document=document,
            groups={},
            scores=each,
            answer="",
            references=("a",),
            prompt_tokens=9,
            dropped=0,
        )
        for number, (each, document) in enumerate(zip(scores, documents, strict=True))
    )


def checkpoint(name: str, protocol: TaskProtocol, scores: Sequence[Mapping[str, float]], documents: Sequence[str]):
    samples = samples_of(scores, documents)
    result = summarise_task(TASKS[protocol.task], protocol, samples)
    return CheckpointResults(name=name, facts={}, tasks={protocol.task: result}, samples={protocol.task: samples})


def test_the_interval_is_of_the_geometric_mean_over_other_documents(written: TaskProtocol) -> None:
    """Against a bootstrap by loops with draws of its own: questions of a document are drawn together."""
    scores, documents = rouge_scores(60, seed=1), [str(i // 3) for i in range(60)]
    result = summarise_task(TASKS["qmsum"], written, samples_of(scores, documents))
    metric = result.score
    assert result.headline == "geometric_mean"
    assert metric.mean == pytest.approx(geometric({name: np.mean([s[name] for s in scores]) for name in ROUGE}))
    rng = np.random.default_rng(99)
    drawn = []
    for _ in range(4000):
        chosen = [3 * int(d) + k for d in rng.integers(0, 20, 20) for k in range(3)]
        drawn.append(geometric({name: np.mean([scores[i][name] for i in chosen]) for name in ROUGE}))
    assert metric.interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.004)
    assert metric.interval is not None
    assert metric.interval[1] - metric.interval[0] > 0.03, "or the tolerance shows nothing"


def test_an_interval_of_one_mean_is_the_ratio_s() -> None:
    rng = np.random.default_rng(0)
    total_d, count_d = rng.normal(3, 1, 30), rng.integers(1, 5, 30)
    of_two = figure_interval(np.stack([total_d, total_d], 1), count_d, lambda mean_K: mean_K[1], seed=5)
    assert of_two == ratio_interval(total_d, count_d, seed=5)
    assert figure_interval(np.ones((9, 2)), np.ones(9), lambda mean_K: mean_K[0], seed=0) is None


def test_few_documents_have_no_interval_and_f1_without_positives_is_zero(written: TaskProtocol) -> None:
    few = summarise_task(TASKS["qmsum"], written, samples_of(rouge_scores(30, seed=0), ["a", "b", "c"] * 10))
    assert few.score.interval is None
    negative = {"accuracy": 1.0, "true_positive": 0.0, "false_positive": 0.0, "false_negative": 0.0}
    f1 = summarise_task(
        TASKS["hyperpartisan"],
        replace(written, task="hyperpartisan"),
        samples_of([negative] * 12, [str(i) for i in range(12)]),
    )
    assert (f1.score.mean, f1.score.interval) == (0.0, (0.0, 0.0))


def test_an_exchange_is_counted_over_all_patterns() -> None:
    """By brute force over eight documents, of which some have two questions."""
    documents = ["a", "b", "b", "c", "d", "e", "f", "f", "g", "h"]
    ours, theirs = rouge_scores(10, seed=2, better=0.06), rouge_scores(10, seed=3)
    first, second = (
        measured_figure(name, "m", {}, documents, s, geometric) for name, s in (("a", ours), ("b", theirs))
    )
    found = compare(first, second)

    def figure(scores: Sequence[Mapping[str, float]]) -> float:
        return geometric({name: np.mean([each[name] for each in scores]) for name in ROUGE})

    def difference(exchanged: Mapping[str, bool]) -> float:
        one = [b if exchanged[d] else a for a, b, d in zip(ours, theirs, documents)]
        other = [a if exchanged[d] else b for a, b, d in zip(ours, theirs, documents)]
        return figure(one) - figure(other)

    seen = figure(ours) - figure(theirs)
    every = [difference(dict(zip("abcdefgh", flips))) for flips in product([False, True], repeat=8)]
    assert found.difference == pytest.approx(seen)
    assert (found.first_value, found.second_value) == pytest.approx((figure(ours), figure(theirs)))
    assert found.p_value == pytest.approx(np.mean([abs(each) >= abs(seen) - 1e-12 for each in every]))
    assert 0.01 < found.p_value < 0.5
    assert "exchange test over all exchanges" in found.method


@pytest.mark.parametrize("n", [12, 40])
def test_a_figure_that_is_one_mean_is_compared_as_the_mean(n: int) -> None:
    a, b = (rouge_scores(n, seed=seed, better=0.04 * seed) for seed in (0, 1))
    documents = [str(i) for i in range(n)]
    plain = compare(
        *(measured_scores(name, "m", {}, documents, [s["rouge2"] for s in of]) for name, of in (("a", a), ("b", b))),
        resamples=2000,
    )
    figured = compare(
        *(
            measured_figure(name, "m", {}, documents, of, lambda means: means["rouge2"])
            for name, of in (("a", a), ("b", b))
        ),
        resamples=2000,
    )
    assert figured.interval == pytest.approx(plain.interval)
    assert figured.p_value == pytest.approx(plain.p_value, abs=0.03)
    assert figured.difference == pytest.approx(plain.difference)


def test_checkpoints_are_compared_by_the_headline(written: TaskProtocol) -> None:
    """Where one is better by ROUGE-1 alone and worse by what counts."""
    documents = [str(i) for i in range(20)]
    ours, theirs = rouge_scores(20, seed=0, better=0.05), rouge_scores(20, seed=0, better=0.2)
    ours = [{**each, "rouge1": each["rouge1"] + 0.4} for each in ours]
    (found,), refused = compare_checkpoints(
        [checkpoint("ours", written, ours, documents), checkpoint("theirs", written, theirs, documents)],
        seed=0,
        force=False,
    )
    assert (found.measure, refused) == ("qmsum, geometric_mean", ())
    assert found.first_value == pytest.approx(checkpoint("ours", written, ours, documents).tasks["qmsum"].score.mean)
    assert found.difference == pytest.approx(found.first_value - found.second_value)
    assert np.mean([each["rouge1"] for each in ours]) > np.mean([each["rouge1"] for each in theirs])
    assert found.difference < 0
    assert found.interval is not None
    assert found.interval[0] < found.difference < found.interval[1] < 0
    assert found.p_value < 0.01


def test_scores_that_are_no_numbers_are_named(written: TaskProtocol) -> None:
    scores = [{**each, "rouge2": float("nan") if i == 3 else 0.1} for i, each in enumerate(rouge_scores(5, seed=0))]
    with pytest.raises(ValueError, match="document d has a score that is not a number"):
        measured_figure("a", "m", {}, list("abcde"), scores, geometric)
    first, second = (checkpoint(name, written, rouge_scores(2, seed=0), ["a", "b"]) for name in ("one", "other"))
    other = replace(second.tasks["qmsum"], protocol=replace(written, max_new_tokens=32))
    found, (refused,) = compare_checkpoints([first, replace(second, tasks={"qmsum": other})], seed=0, force=False)
    assert found == ()
    assert (
        "qmsum, geometric_mean: one and other were measured by different protocols: max_new_tokens is 64 and 32"
        in refused
    )
