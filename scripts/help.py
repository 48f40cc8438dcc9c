"""`longspan <verb> --help`: every key with value, type, meaning and choices, from schema and composed config."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.training.config_keys import REQUIRED, Inherited, Key, keys

from .compose import CONFIGS, group_options

_INDENT = " " * 6


def render(
    verb: str,
    summary: str,
    examples: Sequence[str],
    schema: type,
    raw: Mapping[str, Any],
    *,
    config_dir: Path | None = None,
) -> str:
    """The help text. `raw` is the composed config: what each key is unless it is set to something else."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    options = group_options(verb, [CONFIGS] if config_dir is None else [CONFIGS, config_dir])
    text = [
        f"longspan {verb}: {summary}",
        "",
        f"usage: longspan {verb} [key=value ...]" + (" [group=option ...] [--config-dir DIR]" if options else ""),
        *(f"  {example}" for example in examples),
    ]
    if options:
        text += ["", "Groups, each chosen with group=option (--config-dir adds options of your own):"]
        for group, names in options.items():
            text += _wrapped(f"  {group:<12}" + ", ".join(names), width, " " * 14)
    text += ["", "Keys, with what they are unless set (another group or experiment beside --help shows its values):"]
    section = None
    for key in keys(schema):
        if "<i>.spec." in key.path:
            continue  # as attention.patterns.<name>.*
        top = key.path.partition(".")[0] if "." in key.path else ""
        if top != section:
            text.append("")
            section = top
        text += _entry(key, raw, width)
    if any("<i>.heads" in key.path for key in keys(schema)):
        text += [
            "  attention.patterns.<name>.<i>.spec",
            f"{_INDENT}what these heads attend to: as attention.patterns.<name>.*",
        ]
    return "\n".join(text)


def _entry(key: Key, raw: Mapping[str, Any], width: int) -> Iterator[str]:
    value = _current(key, raw)
    if value is REQUIRED or isinstance(value, Inherited):
        yield f"  {key.path}  ({'required' if value is REQUIRED else value.source})"
    else:
        yield f"  {key.path}" + (f"={_shown(value)}" if value is not _OPEN else "")
    meaning = f"{key.meaning[:1].upper()}{key.meaning[1:]}. " if key.meaning else ""
    yield from _wrapped(f"{_INDENT}{meaning}[{key.allowed}]", width, _INDENT)


_OPEN = object()  # the value depends on other keys


def _current(key: Key, raw: Mapping[str, Any]) -> object:
    node: Any = raw
    for part in key.path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
    else:
        return node
    if key.path.startswith("model.") and key.default is None:
        return _OPEN  # from model.name
    if "<" in key.path and key.default is None and key.path.endswith(">"):
        return _OPEN
    return key.default


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value if value and value == value.strip() else json.dumps(value)
    text = json.dumps(value, default=lambda item: getattr(item, "__dict__", str(item)))
    return text if len(text) <= 60 else text[:57] + "..."


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# -- docs/configuration.md ---------------------------------------------------------------------------------------------

REFERENCE_BEGINS = "<!-- keys: made by `python -m longspan.scripts.help docs/configuration.md`; do not edit below -->"


def reference(verbs: Mapping[str, type]) -> str:
    """Markdown tables of every key of every verb; a key that an earlier verb has is not repeated."""
    text: list[str] = [REFERENCE_BEGINS]
    seen: set[tuple[str, str]] = set()
    for verb, schema in verbs.items():
        fresh = [key for key in keys(schema) if (key.path, key.meaning) not in seen and "<i>.spec." not in key.path]
        seen.update((key.path, key.meaning) for key in fresh)
        text += ["", f"### `longspan {verb}`", ""]
        if not fresh:
            text.append("The keys above, as far as `--help` lists them.")
            continue
        text += ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        text += [f"| `{key.path}` | {_default(key)} | {_cell(key.allowed)} | {_cell(key.meaning)} |" for key in fresh]
    return "\n".join(text) + "\n"


def _default(key: Key) -> str:
    value = _current(key, {})
    if isinstance(value, Inherited):
        return value.source
    return "required" if value is REQUIRED else "" if value is _OPEN else f"`{_shown(value)}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _rewrite(document: Path) -> None:
    from longspan.training import schema

    from .cli import VERBS

    kept = document.read_text(encoding="utf-8").partition(REFERENCE_BEGINS)[0]
    tables = reference({verb: getattr(schema, facts.request) for verb, facts in VERBS.items()})
    document.write_text(kept + tables, encoding="utf-8")


if __name__ == "__main__":
    _rewrite(Path(sys.argv[1]))
