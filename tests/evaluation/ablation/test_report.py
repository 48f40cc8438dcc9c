"""The report of an ablation: its numbers recomputed by hand from the cells' files, and what it says of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from longspan.evaluation.ablation.report import write_ablation
from longspan.evaluation.ablation.summary import CellResult, read_cells, student, summarise
from longspan.evaluation.ablation.tables import figures_of, read_grid

LOSSES = {
    # (heads, init, alpha): by seed; None: all heads
    (None, None, 0.0): {None: 3.0},
    (None, None, 0.02): {0: 2.95, 1: 2.97},
    (None, None, 0.05): {0: 2.90, 1: 2.94},
    (4, "mean", 0.0): {None: 3.5},
    (4, "mean", 0.02): {0: 3.00, 1: 3.03},
    (4, "mean", 0.05): {0: 2.91, 1: 2.955},
    (4, "first", 0.0): {None: 3.6},
    (4, "first", 0.02): {0: 3.05, 1: 3.06},
    (4, "first", 0.05): {0: 2.915, 1: 2.95},
    (1, "mean", 0.0): {None: 5.0},
    (1, "mean", 0.02): {0: 3.30, 1: 3.31},
    (1, "mean", 0.05): {0: 3.10, 1: 3.15},
    (1, "first", 0.0): {None: 5.5},
    (1, "first", 0.02): {0: 3.50, 1: 3.55},
    (1, "first", 0.05): {0: 3.20, 1: 3.26},
}


def cells(losses: dict = LOSSES) -> list[CellResult]:
    found = []
    for (heads, init, alpha), by_seed in losses.items():
        for seed, loss in by_seed.items():
            name = f"{heads}-{init}-{alpha}-{seed}"
            found.append(CellResult(name, heads, init, alpha, seed, round(1000 * alpha), loss, {"loss": loss}))
    return found


def test_gaps_and_what_was_recovered() -> None:
    found = summarise(cells(), tolerance=0.03)
    row = found.row(4, "mean", 0.05)
    assert row is not None
    assert row.loss == pytest.approx((2.91 + 2.955) / 2)
    assert row.gap == pytest.approx((2.91 + 2.955) / 2 - 2.92)
    assert row.recovered == pytest.approx((3.5 - 2.9325) / (3.5 - 2.92))
    assert (row.low, row.high, row.n) == (2.91, 2.955, 2)
    conversion = found.row(4, "mean", 0.0)
    assert conversion is not None
    assert conversion.gap == pytest.approx(0.5)  # to the parent as it was
    assert conversion.recovered is None
    assert conversion.interval is None


def test_the_noise_of_differences_is_that_of_randomised_blocks() -> None:
    """By least squares on indicators of points and seeds, alpha by alpha."""
    squares, df = 0.0, 0
    plain, plain_df = 0.0, 0
    for alpha in (0.02, 0.05):
        table = np.array([list(by_seed.values()) for (_, _, at), by_seed in LOSSES.items() if at == alpha])
        points, seeds = table.shape
        columns = [np.repeat(np.eye(points)[:, i], seeds) for i in range(points)] + [np.tile([1.0, -1.0], points)]
        design = np.stack(columns, axis=1)
        fitted, *_ = np.linalg.lstsq(design, table.ravel(), rcond=None)
        squares += float(np.sum((table.ravel() - design @ fitted) ** 2))
        df += points * seeds - design.shape[1]
        plain += float(np.sum((table - table.mean(axis=1, keepdims=True)) ** 2))
        plain_df += points * (seeds - 1)
    noise = summarise(cells(), tolerance=0.03).noise
    assert (noise.difference_df, noise.loss_df) == (df, plain_df) == (8, 10)
    assert noise.difference == pytest.approx(math.sqrt(squares / df))
    assert noise.loss == pytest.approx(math.sqrt(plain / plain_df))
    # 2.306 and 2.228: Student's t for 8 and 10 degrees of freedom.
    assert noise.of_difference(2) == pytest.approx(2.306 * math.sqrt(squares / df), abs=1e-6)
    assert noise.of_loss(2) == pytest.approx(2.228 * math.sqrt(plain / plain_df) / math.sqrt(2), abs=1e-6)
    assert noise.of_difference(1) is None


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.303), (30, 2.042), (40, 2.021), (120, 1.980)])
def test_students_t(df: int, t: float) -> None:
    assert student(df) == pytest.approx(t, abs=0.002)


def test_what_is_within_noise_is_said() -> None:
    found = summarise(cells(), tolerance=0.03)
    width = found.noise.of_difference(2)
    assert width is not None
    assert 0.0125 < width < 0.06  # mean and first of 4 heads differ by 0.00, 4 heads from the control by 0.0125
    text = " ".join(found.findings)
    assert "4 key/value heads: mean, first are within noise of each other" in text or (
        "4 key/value heads: first, mean are within noise of each other" in text
    )
    assert "is within noise of the control" in text
    assert "1 key/value head: mean is best; worse: first (+0.1050)" in text
    assert "1 key/value head: the best (mean) is worse than the control, +0.2050" in text


def test_one_seed_says_that_noise_is_not_known() -> None:
    found = summarise(cells(one_seed()), tolerance=0.03)
    assert found.noise.difference is None
    row = found.row(4, "mean", 0.05)
    assert row is not None
    assert row.gap_interval is None
    assert row.distinguishable is None
    assert found.findings[0].startswith("One seed: how much of a difference is noise is not known.")


@pytest.mark.parametrize(
    ("tolerance", "heads", "init", "met"),
    [(0.03, 4, "first", True), (0.3, 1, "mean", True), (0.0, 4, "first", False)],
)
def test_the_rule(tolerance: float, heads: int, init: str, met: bool) -> None:
    chosen = summarise(cells(), tolerance=tolerance).recommended
    # 4 heads: both means are 2.9325 up to rounding.
    assert chosen.kv_heads == heads
    assert chosen.met is met
    assert chosen.init in (("mean", "first") if heads == 4 else (init,))
    assert f"at most {tolerance:g} nats per token above the control's" in chosen.why
    if not met:
        assert "None meets it." in chosen.why


def one_seed(losses: dict = LOSSES) -> dict:
    return {key: {seed: loss for seed, loss in each.items() if seed in (None, 0)} for key, each in losses.items()}


def test_a_control_that_ended_worse_than_its_parent_is_said() -> None:
    assert "worse than the parent" not in summarise(cells(), tolerance=0.03).recommended.why
    worse = LOSSES | {(None, None, 0.0): {None: 2.91}}  # the control's mean at alpha=0.05 is 2.92, four heads' 2.9325
    found = summarise(cells(worse), tolerance=0.03)
    control = found.row(None, None, 0.05)
    assert control is not None
    assert control.interval is not None
    said = "The control, with all heads and trained as long, ended worse than the parent, "
    assert found.recommended.why.endswith(
        f"{said}+0.0100 ± {control.interval:.4f}; to the parent the difference is +0.0225."
    )
    assert (
        f"{said}+0.0100; to the"
        in summarise(cells({**one_seed(worse), (None, None, 0.0): {None: 2.89}}), tolerance=0.03).recommended.why
    )  # 2.90 with seed 0
    # Of several alphas the largest is what is recommended from; a distance is never below the parent's 0.
    early = LOSSES | {(None, None, 0.02): {0: 3.95, 1: 3.97}}
    assert "worse than the parent" not in summarise(cells(early), tolerance=0.03).recommended.why


def test_the_reason_of_a_recommendation_from_one_seed_says_so() -> None:
    assert "noise" not in summarise(cells(), tolerance=0.03).recommended.why
    for tolerance in (0.03, 0.0):
        why = summarise(cells(one_seed()), tolerance=tolerance).recommended.why
        assert why.endswith(" One seed: how much of it is noise is not known.")
    conversions = {key: each for key, each in LOSSES.items() if key[2] == 0}
    found = summarise(cells(conversions), tolerance=0.03)  # no seed makes a difference to those
    assert "seed" not in found.recommended.why
    assert "above the parent's" in found.recommended.why
    # Two seeds, and nothing beside them that would tell the data from the noise.
    alone = {(None, None, 0.0): {None: 3.0}, (4, "mean", 0.0): {None: 3.5}, (4, "mean", 0.05): {0: 2.91, 1: 2.955}}
    found = summarise(cells(alone), tolerance=0.03)
    assert found.recommended.why.endswith(" How much of it is noise is not known.")
    assert "One seed" not in found.findings[0]


def test_without_a_control_the_parent_is_the_measure() -> None:
    alone = {key: each for key, each in LOSSES.items() if key[0] is not None or key[2] == 0}
    found = summarise(cells(alone), tolerance=0.03)
    assert found.recommended.kv_heads == 4
    assert "above the parent's" in found.recommended.why
    row = found.row(4, "mean", 0.05)
    assert row is not None
    assert row.gap is None
    with pytest.raises(ValueError, match="the parent was not measured"):
        summarise([cell for cell in cells(alone) if cell.kv_heads is not None], tolerance=0.03)


def test_a_distance_is_held_against_the_parent() -> None:
    losses = {(None, None, 0.0): {None: 0.0}, (2, "mean", 0.0): {None: 0.4}, (2, "mean", 0.05): {0: 0.1, 1: 0.12}}
    row = summarise(cells(losses), tolerance=0.03, measure="distance").row(2, "mean", 0.05)
    assert row is not None
    assert row.gap == pytest.approx(0.11)
    assert row.recovered == pytest.approx((0.4 - 0.11) / 0.4)


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    for cell in cells():
        directory = tmp_path / "cells" / cell.name
        directory.mkdir(parents=True)
        key = {
            "kv_heads": cell.kv_heads,
            "init": cell.init,
            "alpha": cell.alpha,
            "seed": cell.seed,
            "steps": cell.steps,
        }
        buckets = [
            {"start": start, "end": end, "loss": cell.loss + shift, "standard_error": 0.1, "tokens": 10, "documents": 2}
            for start, end, shift in ((0, 1, 1.0), (1, 8, -0.1))
        ]
        record = {
            "cell": key,
            "loss": cell.loss,
            "model_kv_heads": cell.kv_heads or 8,
            "kv_bytes_per_token": 100 * (cell.kv_heads or 8),
            "perplexity": {"loss": cell.loss, "by_position": buckets, "protocol": {"words": "Each <b> token & all."}},
            "retrieval": [{"length": 64, "trials": 4, "found": 0.5 + (cell.seed or 0) / 4, "guessed": 0.125}],
        }
        (directory / "result.json").write_text(json.dumps(record))
    shape = {
        "batch": 2,
        "context": 100,
        "prefill_ms": 5.0,
        "weight_bytes": 10,
        "copy_gb_per_s": 9.0,
        "dtype": "float32",
    }
    shape |= {"device": "cpu", "repetitions": 3, "steps": 8}
    rows = [
        {
            **shape,
            "kv_heads": heads,
            "decode_ms": ms,
            "decode_low_ms": ms - 0.1,
            "decode_high_ms": ms + 0.2,
            "limit_ms": ms / 2,
            "kv_bytes": heads * 2**20,
        }
        for heads, ms in ((8, 4.0), (4, 3.0), (1, 2.0))
    ]
    (tmp_path / "speed.json").write_text(json.dumps(rows))
    (tmp_path / "grid.json").write_text(
        json.dumps(
            {
                "measure": "loss",
                "request": {"tolerance": 0.03, "schedule": "constant", "lr_fraction": 0.3},
                "parent": {"checkpoint": "<parent>", "steps": 1000, "kv_heads": 8},
                "lr": 3e-4,
                "tokens_per_step": 512,
                "cells": {cell.name: {} for cell in cells()},
            }
        )
    )
    return tmp_path


def test_the_report_in_every_form(grid: Path) -> None:
    page = write_ablation(grid)
    record = json.loads((grid / "report.json").read_text())
    rows = {(row["kv_heads"], row["init"], row["alpha"]): row for row in record["rows"]}
    files = [json.loads(path.read_text()) for path in sorted(grid.glob("cells/*/result.json"))]
    for (heads, init, alpha), row in rows.items():
        mine = [
            each["loss"]
            for each in files
            if (each["cell"]["kv_heads"], each["cell"]["init"], each["cell"]["alpha"]) == (heads, init, alpha)
        ]
        assert row["loss"] == pytest.approx(sum(mine) / len(mine))
    assert len(rows) == len(LOSSES)
    assert record["kv_bytes_per_token"] == {"8": 800, "4": 400, "1": 100}
    assert record["retrieval"]["control"] == [{"length": 64.0, "found": 0.625, "guessed": 0.125}]
    assert record["by_position"]["parent"] == [
        {"positions": "0", "loss": 4.0},
        {"positions": "1 – 7", "loss": 2.9},
    ]
    text = (grid / "report.md").read_text()
    assert "| 1 | mean | 0.05 | 50 | 2 | 3.1250 |" in text
    assert "| 2 | 100 | 1 | 5.00 | 2.000 | 1.900 – 2.200 | 1.000 | 2.0 | 2.00× | 1.00 |" in text
    assert "| 4 | 400 | 0.500 |" in text
    assert "The parent finds up to 38 % more of them" in text
    html = page.read_text()
    assert "&lt;parent&gt;" in html
    assert "Each &lt;b&gt; token" in html
    assert not re.search(r"https?://|<script|src=", html)
    assert html.count("<svg") == 10  # five drawings, each for a page and for a phone
    for name in ("alpha", "heads", "position", "retrieval", "speed"):
        assert (grid / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_recommendation_from_one_seed_says_so(grid: Path) -> None:
    write_ablation(grid)
    assert re.search(r"\*\*Recommended: .*, init=\w+\*\*", (grid / "report.md").read_text())
    kept = json.loads((grid / "grid.json").read_text())
    kept["cells"] = {cell.name: {} for cell in cells() if cell.seed != 1}
    (grid / "grid.json").write_text(json.dumps(kept))
    write_ablation(grid)
    said = "(one seed: how much of it is noise is not known)**"
    assert said in (grid / "report.md").read_text()
    assert said[:-2] in (grid / "report.html").read_text()
    section = (grid / "report.html").read_text().partition('id="recommendation"')[2].partition("</section>")[0]
    assert "One seed: how much of it is noise is not known." in section


def test_captions_speak_of_bars_where_there_are_some(grid: Path) -> None:
    def shown() -> tuple[dict[str, str], list[bool]]:
        figures = figures_of(read_grid(grid), width=8.0)
        drawn = [figures[name][0] for name in ("alpha", "heads")]
        bars = [each for figure in drawn if figure for axes in figure.axes for each in axes.containers]
        assert bars
        captions = {name: figures[name][1] for name in ("alpha", "heads")}
        return captions, [isinstance(bar, ErrorbarContainer) and bar.has_yerr for bar in bars]

    captions, bars = shown()
    assert captions == {
        "alpha": "Loss against alpha (bars: 95 % over seeds)",
        "heads": "Gap to the control (bars: 95 % of the difference)",
    }
    assert all(bars)
    kept = json.loads((grid / "grid.json").read_text())
    kept["cells"] = {cell.name: {} for cell in cells() if cell.seed != 1}
    (grid / "grid.json").write_text(json.dumps(kept))
    captions, bars = shown()
    assert captions == {
        "alpha": "Loss against alpha (one seed, so without intervals)",
        "heads": "Gap to the control (one seed, so without intervals)",
    }
    assert not any(bars)


def test_cells_of_an_earlier_request_stay_out(grid: Path) -> None:
    kept = json.loads((grid / "grid.json").read_text())
    kept["cells"] = {name: {} for name in kept["cells"] if not name.startswith("1-")}
    (grid / "grid.json").write_text(json.dumps(kept))
    write_ablation(grid)
    assert {row["kv_heads"] for row in json.loads((grid / "report.json").read_text())["rows"]} == {None, 4}
    assert len(read_cells(grid / "cells")) == len(cells())
