"""docs/attention.md shows the capabilities that the code has."""

from __future__ import annotations

from pathlib import Path

from longspan.kernels.attention import Feature
from longspan.kernels.attention.table import capability_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attention.md"


def test_the_capability_table_is_current() -> None:
    shown = PAGE.read_text().split("attention.table` -->\n", 1)[1].split("\n<!-- end -->", 1)[0]
    assert shown == capability_table(), "run `python -m longspan.kernels.attention.table` and paste its output"


def test_every_feature_has_a_row() -> None:
    table = capability_table()
    assert all(f"| `{feature}` |" in table for feature in Feature)
