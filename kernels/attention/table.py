"""The capability table of docs/attention.md, generated: `python -m longspan.kernels.attention.table` prints it."""

from __future__ import annotations

from .backend import Capabilities, Feature, short
from .registry import available


def capability_table() -> str:
    """A Markdown table: a row for each feature, dtypes and head dims, a column for each registered backend.

    It shows what `longspan.kernels.testing.conformance` holds a backend to: "yes" must pass, "–" must be refused.
    """
    backends = available()
    lines = ["| | " + " | ".join(backends) + " |", "|---|" + "---|" * len(backends)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for feature in Feature:
        cells = []
        for capabilities in backends.values():
            note = (capabilities.notes or {}).get(feature)
            no = "–" if note is None else f"– ({note})"
            yes = "yes" if note is None else f"yes ({note})"
            cells.append(yes if feature in capabilities.features else no)
        row(f"`{feature}`", cells)
    for device in sorted({device for capabilities in backends.values() for device in capabilities.dtypes}):
        row(
            f"dtypes on {device}",
            [", ".join(map(short, capabilities.dtypes.get(device, ()))) or "–" for capabilities in backends.values()],
        )
    row("phases", [", ".join(phase for phase in sorted(capabilities.phases)) for capabilities in backends.values()])
    row("head dims", [_head_dims(capabilities) for capabilities in backends.values()])
    return "\n".join(lines)


def _head_dims(capabilities: Capabilities) -> str:
    step, largest = capabilities.head_dim_multiple, capabilities.max_head_dim
    words = ([f"multiples of {step}"] if step > 1 else []) + ([f"up to {largest}"] if largest else [])
    return ", ".join(words) or "any"


if __name__ == "__main__":
    print(capability_table())
