"""The fields of every family as Markdown, from the tables that the code translates by."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .registry import FAMILIES
from .translate import METADATA, Field, shown


def field_tables() -> str:
    """A section for each family, and one for the fields that any config may hold."""
    sections = [_section(f"`{name}`", family.fields) for name, family in FAMILIES.items()]
    return "\n\n".join([*sections, _section("Any model type", METADATA)])


def _section(title: str, fields: Iterable[Field]) -> str:
    by_fate: dict[str, list[Field]] = {"translated": [], "refused": [], "irrelevant": []}
    for field in fields:
        by_fate[field.fate].append(field)
    lines = [f"### {title}"]
    if by_fate["translated"]:
        lines += ["", "| translated | absent means | becomes |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{shown(f.default)}` | {f.meaning} |" for f in by_fate["translated"]]
    if by_fate["refused"]:
        lines += ["", "| refused | unless it is | because |", "|---|---|---|"]
        for field in by_fate["refused"]:
            values = " or ".join(f"`{shown(value)}`" for value in field.values)
            lines.append(f"| `{field.name}` | {values} | {field.meaning} |")
    reasons: dict[str, list[str]] = {}
    for field in by_fate["irrelevant"]:
        reasons.setdefault(field.meaning, []).append(f"`{field.name}`")
    if reasons:
        lines += ["", "| irrelevant | because |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(lines)


BEGINS = "<!-- from here on: `python -m longspan.model.conversion.table docs/import-export.md` -->\n"


def page_with_tables(page: str) -> str:
    """A page up to the mark that says where the tables begin, and the tables."""
    return page.partition(BEGINS)[0] + BEGINS + "\n" + field_tables() + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page_with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
