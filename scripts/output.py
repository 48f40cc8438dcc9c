"""What several verbs print alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from longspan.training.errors import UserError


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""


_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, dict | list) for item in items)
    ),
)


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as the YAML that would compose to it."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def refuse_occupied(output: Path, *, overwrite: bool) -> None:
    """Raises UserError, before any work is done, where `output` would be overwritten without leave."""
    if output.exists() and not (output.is_dir() and (overwrite or not any(output.iterdir()))):
        raise UserError(f"output={output}: exists and is not an empty directory; choose another, or set overwrite=true")


def progress_bars() -> Progress:
    """Bars on stderr that vanish when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; those that hold numbers throughout stand to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell.replace(",", "").isdigit() for cell in column[1:]) and bool(rows) for column in columns]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if right else f"{cell:<{width}}" for cell, width, right in zip(row, widths, numeric)
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
