"""The report: complete, self-contained, escaped, and never stopped by a missing or damaged file."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from longspan.evaluation.perplexity.result import PositionBucket
from longspan.evaluation.reporting import plots
from longspan.evaluation.reporting.page import duration, quantity, short
from longspan.evaluation.reporting.run_files import Series, read_run, stages
from longspan.evaluation.reporting.run_report import write_report

COLUMNS = ["step", "tokens", "loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"]
EVIL = "<script>alert(1)</script>\"'&<img src=https://example.org/x onerror=alert(1)>"

ID, REFERENCE = r' id="([^"]+)"', r'(?:href="#|url\(#)([^")]+)'


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def write_run(directory: Path, *, rows: int = 50, extra: str = "", mfu: bool = True) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, rows + 1):
            loss = 2 + 7 * math.exp(-8 * step / rows)
            validation = repr(loss + 0.1) if step % max(1, rows // 5) == 0 else ""
            row = [step, step * 4096, repr(loss), validation, repr(1e-3 / step), repr(1.5), repr(3e4)]
            writer.writerow([*row, repr(0.3125) if mfu else "", repr(step * 0.5)])
    buckets = [
        {"start": 2**i, "end": 2 ** (i + 1), "loss": 5 - i, "standard_error": None, "tokens": 2**i, "documents": 3}
        for i in range(4)
    ]
    source = {"loss": 2.5, "perplexity": 12.2, "bits_per_byte": 1.9, "tokens": 900, "documents": 3}
    perplexity = {
        "protocol": {"words": f"Each document alone.{extra}"},
        "loss": 2.25,
        "loss_interval": [2.125, 2.375],
        "perplexity": 9.4877,
        "bits_per_byte": 1.75,
        "by_position": buckets,
        "by_source": {f"books{extra}": source, "code": source},
    }
    baseline = {"name": f"order-2 byte n-gram{extra}", "order": 2, "bits_per_byte": 3.5, "trained_bytes": 10}
    for name, value in {
        "evaluation.json": {"perplexity": perplexity, "baseline": baseline},
        "summary.json": {"name": f"my run{extra}", "final_step": rows, "tokens": rows * 4096},
        "accounting.json": {
            "parameters": {"embedding": 250, f"blocks{extra}": 750, "total": 1000},
            "memory": {"weights": 1 << 20, "peak": 3 << 20},
            "training_flops_per_token": 6.5e9,
        },
        "lineage.json": {
            "created": "2030-01-02T03:04:05+00:00",
            "command": ["longspan", "train", f"sample.prompt={extra}"],
            "data": {"name": f"stdlib{extra}", "documents": {"train": 12}},
            "versions": {"longspan": "0.1.0", "torch": f"2.13{extra}"},
            "hardware": {"gpu": f"Fast GPU{extra}", "cpus": 2},
        },
    }.items():
        (directory / name).write_text(json.dumps(value))
    (directory / "config.yaml").write_text(f"trainer:\n  steps: {rows}  # {extra}\n")
    (directory / "sample.txt").write_text(f"def main():{extra}\n    return 1\n")
    return directory


def report(directory: Path) -> Page:
    path = write_report(directory)
    assert path == directory / "report.html"
    return Page(path.read_text())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests look at words: the figures are made but not written as SVG, which takes a second a page."""
    monkeypatch.setattr(plots, "svg", lambda figure, *, label, css="": "<svg></svg>")


@pytest.mark.usefixtures("undrawn")
def test_headline_numbers(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    for said in (
        "my run",
        "1,000 parameters · 205 k tokens · 50 steps · Fast GPU · 2030-01-02",
        "Validation loss 2.250",
        "95 % interval 2.125 – 2.375",
        "Perplexity 9.49",
        "Bits per byte 1.750",
        "Against the order-2 byte n-gram −50 % 1.750 bits per byte fewer than its 3.500",
        "Tokens 205 k",
        "Time 25 s",
        "Throughput 30 k tok/s",
        "MFU 31.2 %",
        "The model needs 50.0% fewer bits than the baseline.",
    ):
        assert said in page.text


@pytest.mark.usefixtures("undrawn")
def test_every_section_has_its_content(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    assert page.tags.count("svg") == 8  # loss and loss by position twice (wide, narrow), four small ones
    assert "gap" not in [value for _, name, value in page.attributes if name == "class"]
    for said in (
        "Each document alone.",
        "books 2.5000 12.20 1.900 900 3",
        "2 – 3 4.0000",
        "def main(): return 1",
        "Parameters: 1,000",
        "blocks 750",
        "memory",
        "3 MiB",
        "training flops per token 6.5 GFLOP",
        "documents.train 12",
        "longspan train",
        "trainer: steps: 50",
        "torch 2.13",
    ):
        assert said.lower() in page.text.lower(), said


def test_nothing_is_requested_and_nothing_runs(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", extra=EVIL))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not {"script", "iframe", "object", "img", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "src", "xlink:href", "srcset", "data"):
            assert value.startswith(("#", "data:")) or re.fullmatch(r"[a-z]+\.(csv|json|yaml)", value), (tag, value)
        assert "url(" not in value.replace("url(#", ""), (tag, name, value)
    policy = next(value for _, name, value in page.attributes if name == "content")
    assert policy.startswith("default-src 'none'")


@pytest.mark.usefixtures("undrawn")
def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    """The hostile text reaches the reader as text, in each of the places where it was planted."""
    page = report(write_run(tmp_path / "run", extra=EVIL))
    evil = " ".join(EVIL.split())
    for planted in ("my run", "Fast GPU", "alone.", "books", "n-gram", "def main():", "blocks", "stdlib", "# ", "2.13"):
        assert f"{planted}{evil}" in page.text, planted
    assert f"sample.prompt={evil}" in page.text


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "lineage.json", "accounting.json", "metrics.csv", "summary.json", "evaluation.json", "sample.txt"],
)
@pytest.mark.usefixtures("undrawn")
def test_a_missing_file_is_a_stated_gap(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    page = report(run)
    words = "has no summary" if name == "summary.json" else f"{name} is missing"
    assert words in page.text


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '"text"', "null", "\x00\xff", "step\nloss", '{"perplexity": 3}']
)
@pytest.mark.usefixtures("undrawn")
def test_damaged_files_do_not_stop_it(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    for name in ("lineage.json", "accounting.json", "metrics.csv", "summary.json", "evaluation.json", "sample.txt"):
        (run / name).write_bytes(content.encode("latin-1"))
    report(run)


@pytest.mark.usefixtures("undrawn")
def test_values_of_the_wrong_type_do_not_stop_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    strange = {"loss": "high", "loss_interval": [1], "by_position": [3, {"start": 0}], "by_source": {"a": 1, "b": None}}
    (run / "evaluation.json").write_text(json.dumps({"perplexity": strange, "baseline": []}))
    (run / "accounting.json").write_text('{"parameters": {"a": "x", "total": 0}, "x": NaN, "y": [[1], {"z": null}]}')
    (run / "summary.json").write_text('{"name": 3, "tokens": "many", "skipped": 2, "seconds": NaN, "mfu": null}')
    page = report(run)
    assert "2 steps were skipped" in page.text
    assert "x not finite" in page.text


@pytest.mark.usefixtures("undrawn")
def test_text_that_html_or_utf8_cannot_hold(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "sample.txt").write_bytes(b"a\x00\x1b[31mb\xff\tc")
    (run / "summary.json").write_text('{"name": "half \\ud800 pair"}')
    path = write_report(run)
    assert "a␀␛[31mb\ufffd\tc" in path.read_text()
    assert "<h1>half ? pair</h1>" in path.read_text()


def test_an_empty_directory_and_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "has no summary" in report(tmp_path / "run").text
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.usefixtures("undrawn")
def test_a_worse_model_is_called_worse(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = json.loads((run / "evaluation.json").read_text())
    record["perplexity"]["bits_per_byte"] = 4.2
    (run / "evaluation.json").write_text(json.dumps(record))
    page = report(run)
    assert "+20 %" in page.text
    assert "20.0% more bits than the baseline: counts of byte triples predict this text better." in page.text


@pytest.mark.parametrize("rows", [1, 2, 100_000])
def test_short_and_long_runs(tmp_path: Path, rows: int) -> None:
    path = write_report(write_run(tmp_path / "run", rows=rows, mfu=rows > 2))
    assert path.stat().st_size < 600_000
    assert ("no MFU" in path.read_text()) == (rows <= 2)


def test_a_pure_function_of_its_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


@pytest.mark.usefixtures("undrawn")
def test_a_long_sample_is_cut_with_a_word(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "sample.txt").write_text("x" * 20_001)
    page = report(run)
    assert "The first 20,000 of 20,001 characters" in page.text
    assert page.text.count("x" * 20_000) == 1
    assert "x" * 20_001 not in page.text


# -- metrics.csv ------------------------------------------------------------------------------------------------------


def test_metrics_after_kill_and_resume(tmp_path: Path) -> None:
    """Steps 2 and 3 ran twice and the later rows count; a row cut short, blanks and NaN are left out."""
    lines = ["step,loss,lr", "1,5.0,0.1", "2,4.0,0.2", "3,3.0,", "2,4.5,0.25", "3,nan,0.3", "4,2.0,0.4", "5,1."]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    metrics = read_run(tmp_path).metrics
    assert metrics["loss"].step.tolist() == [1, 2, 3, 4]
    assert metrics["loss"].value.tolist() == [5.0, 4.5, 3.0, 2.0]
    assert metrics["lr"].value.tolist() == [0.1, 0.25, 0.3, 0.4]


def test_bins_keep_mean_and_extremes() -> None:
    series = Series(np.arange(1, 1001), np.arange(1000.0))
    step, mean, low, high = plots.binned(series, 10)
    assert len(step) == 10
    assert low[0] == 0
    assert high[-1] == 999
    assert float(np.average(mean, weights=[100] * 10)) == pytest.approx(series.value.mean(), rel=1e-2)
    assert (low <= mean).all()
    assert (mean <= high).all()


def test_uneven_steps_leave_empty_bins_out() -> None:
    step, mean, low, high = plots.binned(Series(np.array([1, 2, 1000]), np.array([1.0, 3.0, 7.0])), 10)
    assert step.tolist() == [1.5, 1000]
    assert mean.tolist() == [2, 7]
    assert low.tolist() == [1, 7]
    assert high.tolist() == [3, 7]


# -- figures and numbers ----------------------------------------------------------------------------------------------


def test_figures_hold_no_address_and_share_no_id() -> None:
    bucket = PositionBucket(start=0, end=1, loss=3.0, standard_error=0.1, tokens=4, documents=2)
    figure = plots.loss_by_position([bucket])
    assert figure is not None
    wide, narrow = (plots.svg(figure, label="Loss", css=css) for css in ("wide", "narrow"))
    assert "://" not in wide
    ids, references = ([set(re.findall(pattern, each)) for each in (wide, narrow)] for pattern in (ID, REFERENCE))
    assert ids[0]
    assert not ids[0] & ids[1]
    assert references[0] <= ids[0]
    assert references[1] <= ids[1]
    assert plots.png(figure).startswith(b"\x89PNG")
    assert plots.png_data_uri(figure).startswith("data:image/png;base64,")


def test_no_figure_without_measurements() -> None:
    nothing = (plots.loss_curves({}), plots.learning_rate({}), plots.utilisation({}), plots.loss_by_position([]))
    assert nothing == (None,) * 4


def test_matplotlib_is_imported_only_for_a_figure() -> None:
    code = (
        "import sys, longspan.evaluation.reporting.run_report, longspan.evaluation.results.evaluation_files\n"
        "print([m for m in ('matplotlib', 'lightning', 'hydra', 'omegaconf', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("tokens", 999_999, "999,999"),
        ("tokens", 1_000_000, "1 M (1,000,000)"),
        ("seed", 12345678, "12,345,678"),
        ("kv_bytes_per_token", 12288, "12 KiB"),
        ("memory.peak", 3 << 30, "3 GiB"),
        ("total_flops", 2.5e18, "2.5 EFLOP"),
        ("peak_flops", 989.4e12, "989 TFLOP/s"),
        ("seconds", 59.4, "59.4 s"),
        ("seconds", 3725.0, "1 h 2 min"),
        ("loss", 2.34567, "2.346"),
        ("loss", math.inf, "not finite"),
        ("compile", True, "yes"),
        ("parent", None, "—"),
        ("command", ["a", 1], "a 1"),
    ],
)
def test_quantities(key: str, value: object, shown: str) -> None:
    assert quantity(key, value) == shown


def test_short_numbers_and_durations() -> None:
    assert [short(x) for x in (950, 9_999, 12_345, 124_439_808)] == ["950", "9,999", "12.3 k", "124 M"]
    assert [plots.tick(x) for x in (0.00125, 1500, 12_345, 2.5e9)] == ["0.00125", "1500", "12.3k", "2.5B"]
    assert [duration(x) for x in (0.5, 60, 3599.6)] == ["0.5 s", "1 min 0 s", "1 h 0 min"]


# -- stages -----------------------------------------------------------------------------------------------------------

STAGES = [
    {
        "name": "short",
        "first_step": 1,
        "last_step": 30,
        "context": 512,
        "windows": "32–128",
        "lr": 1e-3,
        "tokens": 1000,
    },
    {"name": "long", "first_step": 31, "last_step": 50, "context": 1024, "windows": "64–256", "lr": 5e-4},
]


def staged(directory: Path, stages: object) -> Path:
    run = write_run(directory)
    accounting = json.loads((run / "accounting.json").read_text())
    (run / "accounting.json").write_text(json.dumps({**accounting, "stages": stages}))
    return run


def test_stages_are_told_and_drawn(tmp_path: Path) -> None:
    run = staged(tmp_path, STAGES)
    page = report(run)
    assert "1. short 1 – 30 512 32–128 0.001 — 1,000" in page.text
    assert "2. long 31 – 50 1,024 64–256 0.0005 — —" in page.text
    assert "Loss (dashed: a stage begins)" in page.text
    files = read_run(run)
    figure = plots.loss_curves(files.metrics, stages=stages(files))
    assert figure is not None
    (axes,) = figure.axes
    dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]  # type: ignore[index]
    assert dashed == [30.5]
    assert {"short", "long"} <= {text.get_text() for text in axes.texts}


def test_names_without_room_are_numbers(tmp_path: Path) -> None:
    crowded = [{"name": f"a rather long name {i}", "first_step": i * 5 + 1, "last_step": i * 5 + 5} for i in range(10)]
    files = read_run(staged(tmp_path, crowded))
    figure = plots.loss_curves(files.metrics, stages=stages(files))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == [str(i) for i in range(1, 11)]


def test_a_run_without_stages_says_nothing_of_them(tmp_path: Path) -> None:
    for damaged in ("no list", [1, {"name": "x"}], []):
        page = report(staged(tmp_path / str(damaged)[:3], damaged))
        assert "keys in a window" not in page.text
        assert "dashed" not in page.text


def test_names_of_stages_are_escaped(tmp_path: Path) -> None:
    page = report(staged(tmp_path, [{**STAGES[0], "name": EVIL, "windows": EVIL}, STAGES[1]]))
    assert "script" not in page.tags
    assert "img" not in page.tags


def test_scores_on_examples_take_the_place_of_perplexity(tmp_path: Path) -> None:
    record = {"kind": "qa", "exact_match": 0.25, "f1": 0.5, "n": 1234, "protocol": {"overlap": 48, "context": EVIL}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"checkpoint": "step-00000001", "examples": record}))
    page = Page(write_report(tmp_path).read_text())
    assert "Held-out examples: 1,234" in page.text
    assert "exact match 0.250" in page.text
    assert "f1 0.500" in page.text
    assert "overlap 48" in page.text
    assert "script" not in page.tags
