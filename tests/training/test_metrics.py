from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from longspan.training.errors import RunFailed
from longspan.training.metrics import (
    COLUMNS,
    MetricsFile,
    MetricsLog,
    Row,
    WandbTracker,
    clock,
    format_row,
    open_trackers,
    read_rows,
    short_count,
    wandb_mode,
)
from longspan.training.progress import ProgressView, choose_style, logging_to
from longspan.training.schema import LoggerConfig


def row(step: int, loss: float | None = 1.0) -> Row:
    return Row(step=step, tokens=step * 10, loss=loss, seconds=0.5 * step)


def test_columns_are_the_promised_ones() -> None:
    assert COLUMNS == (
        "step",
        "tokens",
        "loss",
        "validation_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "seconds",
        "skipped",
        "stage",
        "accuracy",
        "exact_match",
        "f1",
    )


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(row(1))
    assert (tmp_path / "metrics.csv").read_text() == ",".join(COLUMNS) + "\n1,10,1.0,,,,,,0.5,0,,,,\n"
    file.close()


@pytest.mark.parametrize("resumed_step", [0, 1, 3, 4])
def test_rows_past_the_resumed_step_go(tmp_path: Path, resumed_step: int) -> None:
    path = tmp_path / "metrics.csv"
    with MetricsLog(MetricsFile(path)) as log:
        for step in range(1, 5):
            log.write(row(step))
    path.write_text(path.read_text() + "5,50,0.1")  # a row cut short by a kill
    with MetricsLog(MetricsFile(path, resumed_step=resumed_step)) as log:
        log.write(row(9))
    assert [each.step for each in read_rows(path)] == [*range(1, resumed_step + 1), 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats(allow_nan=False))
def test_every_bit_of_a_float_survives(tmp_path: Path, value: float) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append(row(1, value))
    file.close()
    assert read_rows(tmp_path / "metrics.csv") == [row(1, value)]


def test_a_line_for_people() -> None:
    full = Row(step=120, tokens=0, loss=3.2104, lr=3e-4, tokens_per_second=41_000.0, mfu=0.312, skipped=2)
    assert format_row(full, steps=10_000, memory_bytes=31 * 2**30, eta_seconds=131.4) == (
        "step 120/10000 loss 3.210 lr 0.0003 tok/s 41k mfu 0.31 mem 31.0G skipped 2 eta 02:11"
    )
    assert format_row(Row(step=1, tokens=1), steps=2, memory_bytes=None, eta_seconds=None) == "step 1/2"
    assert [short_count(n) for n in (950, 4_100, 41_000, 1.2e6, 12e9)] == ["950", "4.1k", "41k", "1.2M", "12G"]
    assert [clock(s) for s in (0.4, 59.6, 3599, 3600, 93784)] == ["00:00", "01:00", "59:59", "1:00:00", "26:03:04"]


def test_wandb_needs_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    modes = ("auto", "online", "offline", "off")
    assert [wandb_mode(LoggerConfig(wandb=mode)) for mode in modes] == ["offline", "offline", "offline", "off"]
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert [wandb_mode(LoggerConfig(wandb=mode)) for mode in modes] == ["online", "online", "offline", "off"]


def test_a_wandb_that_cannot_start_costs_a_line_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.Error("no service")

    monkeypatch.setattr(wandb, "init", refuse)
    assert open_trackers(LoggerConfig(wandb="off"), tmp_path, "name", {}) == ()
    assert open_trackers(LoggerConfig(), tmp_path, "name", {}) == ()
    assert "wandb does not start (no service)" in caplog.text
    with pytest.raises(RunFailed, match=r"logger\.wandb=offline: wandb does not start"):
        open_trackers(LoggerConfig(wandb="offline"), tmp_path, "name", {})


def test_wandb_offline_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(LoggerConfig(), "offline", tmp_path, "name", {"seed": 0})
    tracker.log(row(1))
    tracker.finish(0)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_off_a_terminal_lines_on_one_a_bar() -> None:
    assert choose_style("auto", Console(force_terminal=True)) == "bar"
    assert choose_style("auto", Console(force_terminal=False)) == "lines"
    assert choose_style("off", Console(force_terminal=True)) == "off"


@pytest.mark.parametrize("style", ["lines", "off", "bar"])
def test_the_log_file_has_the_lines_whatever_the_style(tmp_path: Path, style: str) -> None:
    console = Console(record=True, width=200, force_terminal=style == "bar", file=(tmp_path / "screen").open("w"))
    with logging_to(tmp_path / "train.log", console):
        with ProgressView(style, console, steps=10, seconds=100) as view:  # pyright: ignore[reportArgumentType]
            assert view.due()
            view.show(row(1), memory_bytes=None, eta_seconds=60.0, line=True)
            assert not view.due()
            view.show(row(2), memory_bytes=None, eta_seconds=50.0, line=False)
        logging.getLogger("longspan.anything").warning("a warning")
    console.file.close()
    log, screen = (tmp_path / "train.log").read_text(), console.export_text()
    assert [line[20:] for line in log.splitlines()] == ["step 1/10 loss 1.000 eta 01:00", "a warning"]
    assert ("step 1/10" in screen) == (style == "lines")
    assert "a warning" in screen
    assert ("2/10" in screen) == (style == "bar")
