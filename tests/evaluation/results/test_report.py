"""results.md and results.html: what numbers look like, and that nothing found is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longspan.evaluation.context.effective import retrieval_context
from longspan.evaluation.perplexity.result import DocumentScore
from longspan.evaluation.reporting import plots
from longspan.evaluation.results.compare import Comparison, compare, measured_figure, measured_loss, measured_scores
from longspan.evaluation.results.directory import CheckpointResults
from longspan.evaluation.results.report import Results, html, markdown, write_results
from longspan.evaluation.tasks.registry import TASKS
from longspan.evaluation.tasks.result import QuestionScore, TaskProtocol, TaskResult, summarise_task
from longspan.evaluation.tasks.task import Ask


def result(task: str, ask: Ask, scores: Mapping[str, list[float]], *, dropped: int = 0) -> TaskResult:
    """One question about each of so many documents; of the first `dropped` the text was shortened."""
    n = len(next(iter(scores.values())))
    protocol = TaskProtocol(
        task=task,
        version=1,
        ask=ask,
        long_texts="keep_tail",
        max_tokens=512,
        start=(256,),
        max_new_tokens=0,
        lengths=(),
        depths=(),
        samples=None,
        seed=0,
        questions=n,
        questions_sha256="0",
        files={},
        n_refused=0,
        tokenizer_sha256="0",
        precision="fp32",
    )
    found = [
        QuestionScore(
            id=str(i),
            document=str(i),
            groups={},
            scores={name: values[i] for name, values in scores.items()},
            answer="",
            references=("a",),
            prompt_tokens=9,
            dropped=int(i < dropped),
        )
        for i in range(n)
    ]
    return summarise_task(TASKS[task], protocol, found)


LAMBADA = result("lambada", "force", {"accuracy": [1.0, 0.0, 0.0, 0.0], "nll": [0.25, 0.5, 1.0, 0.25]}, dropped=3)
QMSUM = result("qmsum", "generate", {"rouge1": [0.5, 0.25], "rouge2": [0.125, 0.0], "rougeL": [0.25, 0.25]})
HARNESS = {
    "harness": {"lm_eval": "0"},
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "sample_len": 32,
            "acc,none": 0.3125,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.5,
        },
        "wiki": {"word_perplexity,none": 1234.5, "word_perplexity_stderr,none": "N/A"},
    },
}


def results(*measured: CheckpointResults, comparisons: tuple[Comparison, ...] = ()) -> Results:
    return Results(about={}, request={}, measured=measured, comparisons=comparisons)


def rows_of(page: str, title: str) -> list[list[str]]:
    """The cells of a table of results.md, without its head and rule."""
    (section,) = [part for part in page.split("\n## ") if part.startswith(title)]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def cells_of(page: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>.*?</td>", page)]


def test_shares_are_per_cent_and_other_numbers_are_as_they_are() -> None:
    """An nll of half a nat is no share, nor is a perplexity, however small; ROUGE is one."""
    page = results(CheckpointResults(name="model", facts={}, tasks={"lambada": LAMBADA, "qmsum": QMSUM}))
    assert rows_of(markdown(page), "Scores") == [
        ["lambada", "accuracy", "4", "3", "25.0"],
        ["qmsum", "geometric_mean", "2", "0", "18.0"],  # (0.375 · 0.0625 · 0.25) ** (1/3), of means
    ]
    cells = cells_of(html(page))
    all_metrics = {cells[i]: cells[i + 1] for i in range(len(cells) - 1)}
    assert [all_metrics[name] for name in ("accuracy", "nll", "perplexity")] == ["25.0", "0.5", "1.65"]
    assert [all_metrics[name] for name in ("rouge1", "rouge2", "rougeL")] == ["37.5", "6.2", "25.0"]


def test_intervals_are_in_the_unit_of_their_number() -> None:
    many = result("lambada", "force", {"accuracy": [1.0, 0.0] * 10, "nll": [0.2, 0.6] * 10})
    cells = cells_of(html(results(CheckpointResults(name="model", facts={}, tasks={"lambada": many}))))
    (accuracy,) = {cell for cell in cells if cell.startswith("50.0 (")}
    (nll,) = {cell for cell in cells if cell.startswith("0.4 (")}
    low, high = (float(each) for each in re.findall(r"[\d.]+", accuracy)[1:])
    assert 20 < low < 50 < high < 80
    low, high = (float(each) for each in re.findall(r"[\d.]+", nll)[1:])
    assert 0.2 < low < 0.4 < high < 0.6


def test_differences_are_in_the_unit_of_what_was_compared() -> None:
    documents = [str(i) for i in range(3)]
    of_task = {
        metric: compare(
            measured_scores("a", f"lambada, {metric}", {}, documents, [0.5, 0.5, 0.5]),
            measured_scores("b", f"lambada, {metric}", {}, documents, [0.25, 0.5, 0.5]),
        )
        for metric in ("accuracy", "nll")
    }
    losses = [
        measured_loss(name, [DocumentScore(id="1", source="", nll=nll, tokens=4, bytes=9)], {"bos": 0})
        for name, nll in (("a", 1.0), ("b", 1.5))
    ]
    forced = replace(compare(*losses), differing=("window",))
    page = results(CheckpointResults(name="a", facts={}), comparisons=(*of_task.values(), forced))
    assert [row[:2] for row in rows_of(markdown(page), "Comparison")] == [
        ["lambada, accuracy: a less b", "+8.3"],
        ["lambada, nll: a less b", "+0.0833"],
        ["loss (nats per token): a less b (forced)", "-0.1250"],
    ]


def test_what_the_harness_says_is_shown_as_it_counts() -> None:
    page = results(
        CheckpointResults(name="one", facts={}, harness=HARNESS),
        CheckpointResults(name="two", facts={}, harness={"results": {"arc_easy": {"acc,none": 0.25}}}),
        CheckpointResults(name="three", facts={}),
    )
    expected = [
        ["one", "arc_easy", "acc", "0.3125"],
        ["one", "arc_easy", "acc_norm", "0.5000"],
        ["one", "wiki", "word_perplexity", "1,234.5000"],
        ["two", "arc_easy", "acc", "0.2500"],
    ]
    assert rows_of(markdown(page), "lm-evaluation-harness") == expected
    cells = cells_of(html(page))
    start = cells.index("one")
    assert cells[start : start + 16] == [cell for row in expected for cell in row]
    assert "lm-evaluation-harness" not in markdown(results(CheckpointResults(name="three", facts={})))


def test_the_harness_has_a_protocol_too() -> None:
    """An evaluation by nothing else says how it was measured; one of nothing has no empty section."""
    asked = {"lm_eval": "0.4.9", "limit": 1000, "num_fewshot": None, "seed": 3, "max_length": 2048, "precision": "fp32"}
    one = CheckpointResults(name="one", facts={}, harness={**HARNESS, "harness": asked})
    words = (
        "lm-evaluation-harness 0.4.9: at most 1,000 documents of each task, examples as each task has them, 2,048 "
        "tokens at most, fp32, seed 3"
    )
    assert markdown(results(one)).endswith(f"## Protocols\n\n* {words}\n")
    assert words in html(results(one))
    nothing = results(CheckpointResults(name="one", facts={}, refused={"passkey": "no"}))
    assert "Protocols" not in markdown(nothing)
    assert "<ul></ul>" not in html(nothing)


def test_the_test_behind_a_p_value_is_said() -> None:
    documents = [str(i) for i in range(12)]
    flipped = compare(*(measured_scores(name, "lambada, accuracy", {}, documents, [0.5] * 12) for name in "ab"))
    means = [{"x": i / 12, "y": 0.5} for i in range(12)]
    of_two = [
        measured_figure(name, "qmsum, geometric_mean", {}, documents, means, lambda mean: mean["x"] * mean["y"])
        for name in "ab"
    ]
    exchanged = compare(*of_two)
    flips = "p, two-sided: signs of the documents' differences flipped"
    exchange = "the two checkpoints exchanged on documents (qmsum geometric_mean: made of several means)."
    one = CheckpointResults(name="a", facts={})
    assert f"{flips}.\n" in markdown(results(one, comparisons=(flipped,)))
    assert f"p, two-sided: {exchange}\n" in markdown(results(one, comparisons=(exchanged,)))
    assert f"{flips}, or {exchange}\n" in markdown(results(one, comparisons=(flipped, exchanged, flipped)))


def test_a_small_p_value_is_read_as_it_is() -> None:
    documents = [str(i) for i in range(40)]
    found = compare(
        measured_scores("a", "lambada, accuracy", {}, documents, [1.0] * 40),
        measured_scores("b <i>", "lambada, accuracy", {}, documents, [0.0] * 40),
    )
    page = markdown(results(CheckpointResults(name="a", facts={}), comparisons=(found,)))
    assert "| +100.0 … +100.0 | < 0.001 | – | 40 |" in page
    assert "a less b &lt;i>" in page  # what could be a tag is none


def test_an_interval_that_has_no_length_says_so() -> None:
    def found(*shares: float) -> list[str]:
        lengths = [length for length in (512, 1024) for _ in range(20)]
        scores = [float(i < 20 * share) for share in shares for i in range(20)]
        of = retrieval_context(lengths, scores)
        one = CheckpointResults(name="one", facts={}, retrieves={"passkey": of})
        ((*_, length, interval),) = rows_of(markdown(results(one)), "Effective context")
        return [length, interval]

    assert found(0.0, 0.0) == ["below 512", "none of the lengths"]
    assert found(1.0, 0.0) == ["512", "512 – 512"]
    assert found(0.85, 0.0) == ["512", "below 512 – 512"]


def test_curves_by_position_beside_each_other_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(name: str, loss: float, error: float | None) -> CheckpointResults:
        ends = [(0, 1, loss + 2), (1, 2, loss)]
        buckets = [
            {"start": start, "end": end, "loss": each, "standard_error": error, "tokens": 4, "documents": 2}
            for start, end, each in ends
        ]
        perplexity = {"by_position": buckets, "perplexity": 1.0, "protocol": {"words": ""}}
        numbers = dict.fromkeys(("loss", "bits_per_byte", "bits_per_character"), 1.0) | {"tokens": 4}
        return CheckpointResults(name=name, facts={}, perplexity={"perplexity": {**perplexity, **numbers}})

    drawn, draw = [], plots.loss_by_position

    def watched(*arguments: object, **named: object) -> object:
        figure = draw(*arguments, **named)  # pyright: ignore[reportArgumentType]: passed through
        assert figure is not None
        drawn.append(figure.axes[0].get_ylim())
        return figure

    monkeypatch.setattr(plots, "loss_by_position", watched)
    html(results(one("a", 2.0, None), one("b", 5.0, 0.5)))
    assert len(drawn) == 4  # wide and narrow
    ((low, high),) = set(drawn)
    assert low == pytest.approx(2.0 - 0.3)  # from 2 to 7 + 2 · 0.5, and a twentieth of that
    assert high == pytest.approx(8.0 + 0.3)


def test_a_task_that_one_checkpoint_was_not_asked_has_a_gap() -> None:
    one = CheckpointResults(name="one", facts={}, tasks={"qmsum": QMSUM}, refused={"lambada": "too long | by far"})
    two = CheckpointResults(name="two", facts={}, tasks={"lambada": LAMBADA})
    page = results(one, two)
    assert rows_of(markdown(page), "Scores") == [
        ["qmsum", "geometric_mean", "2", "0", "18.0", "–"],
        ["lambada", "accuracy", "4", "3", "–", "25.0"],
    ]
    assert "* one, lambada: too long | by far" in markdown(page)
    assert "one, lambada: too long | by far" in html(page)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_null(value: float, tmp_path: Path) -> None:
    worst = result("lambada", "force", {"accuracy": [0.0], "nll": [value]})
    page = results(
        CheckpointResults(name="m", facts={}, tasks={"lambada": worst}, harness={"results": {"t": {"x": np.nan}}})
    )
    write_results(page, tmp_path)
    (found,) = json.loads((tmp_path / "results.json").read_text())["checkpoints"]
    assert found["tasks"]["lambada"]["metrics"]["nll"]["mean"] is None
    assert found["harness"]["results"]["t"]["x"] is None
    assert (tmp_path / "results.html").is_file()
