"""Tables of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table; its first `left` columns are aligned on the left, numbers on the right."""
    rule = ["---" if i < left else "--:" for i in range(len(head))]
    cells = [[markdown_cell(cell) for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def markdown_cell(text: str) -> str:
    """Text from a user, safe inside a Markdown table. A < that begins no tag stays: `< 0.001` is read in a terminal."""
    escaped = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped)
