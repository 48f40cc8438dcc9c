"""Where measured rows go, and how bad numbers are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from longspan.benchmarks import extension, position_copy, sharing, summary_lengths
from longspan.benchmarks.arguments import started
from longspan.benchmarks.environment import append


def test_rows_with_other_columns_go_to_a_file_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = append("speed.csv", [{"case": "a", "ms": 1.5}], tmp_path)
    assert append("speed.csv", [{"case": "b", "ms": 2.5}], tmp_path) == first == tmp_path / "speed.csv"
    assert first.read_text().splitlines() == ["case,ms", "a,1.5", "b,2.5"]
    assert capsys.readouterr().err == ""

    second = append("speed.csv", [{"case": "c", "ms": 3.5, "gpu": "H100"}], tmp_path)
    assert second == tmp_path / "speed-2.csv"
    told = capsys.readouterr().err
    assert str(first) in told
    assert str(second) in told
    assert append("speed.csv", [{"case": "d", "ms": 4.5, "gpu": "H100"}], tmp_path) == second
    assert second.read_text().splitlines() == ["case,ms,gpu", "c,3.5,H100", "d,4.5,H100"]
    assert append("speed.csv", [{"case": "e"}], tmp_path) == tmp_path / "speed-3.csv"
    assert len(first.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("main", "arguments", "line"),
    [
        (position_copy.main, ["steps=0,many"], "steps=0,many: expected whole numbers"),
        (position_copy.main, ["seeds=-1"], "seeds=-1: expected whole numbers"),
        (position_copy.main, ["length=4k"], "length=4k: expected a whole number"),
        (extension.main, ["checkpoint=x", "data=y", "lengths="], "lengths=: expected whole numbers"),
        (extension.main, ["checkpoint=x", "data=y", "lengths=8", "texts=0"], "texts=0: expected a whole number"),
        (sharing.main, ["checkpoint=x", "data=y", "kv_heads=two"], "kv_heads=two: expected whole numbers"),
        (sharing.main, ["checkpoint=x", "data=y", "kv_heads=2", "texts=0"], "texts=0: expected a whole number"),
        (sharing.main, ["checkpoint=x", "data=y", "kv_heads=2", "inits=meen"], "inits=meen: expected some of "),
        (summary_lengths.main, ["checkpoint=x", "samples=1.5"], "samples=1.5: expected a whole number"),
    ],
)
def test_numbers_are_looked_at_before_anything_is_read(
    main: Callable[[Sequence[str]], int], arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith(line)


def test_what_is_not_there_costs_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sharing", "checkpoint=/nowhere", "data=y", "kv_heads=2"])
    monkeypatch.delenv("LONGSPAN_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        started(sharing.main)
    assert capsys.readouterr().err == "/nowhere: no such directory (LONGSPAN_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("LONGSPAN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such directory"):
        started(sharing.main)
