"""docs/import-export.md shows the fields that the code translates by."""

from __future__ import annotations

from pathlib import Path

from longspan.model.conversion import FAMILIES
from longspan.model.conversion.table import field_tables, page_with_tables
from longspan.model.conversion.translate import METADATA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "import-export.md"


def test_the_tables_are_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page_with_tables(page) == page, "run `python -m longspan.model.conversion.table docs/import-export.md`"


def test_every_field_of_every_family_has_a_row() -> None:
    tables = field_tables()
    for fields in (METADATA, *(family.fields for family in FAMILIES.values())):
        assert all(f"`{field.name}`" in tables for field in fields)


def test_no_field_has_two_fates() -> None:
    for fields in (METADATA, *(family.fields for family in FAMILIES.values())):
        names = [field.name for field in fields]
        assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
