"""From what a user typed to one plain mapping and where each of its keys was set.

Hydra composes the YAML groups. The values on the command line are applied here, because Hydra's own advice for an
unknown key ("use +key") would hide a misspelling, and because a prompt or a path should need no second quoting.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longspan.training.config_errors import COMMAND_LINE, ConfigError, assignment, nearest
from longspan.training.config_keys import children, find

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+|\[\d+\])*")
_ENVIRONMENT = re.compile(r"\$\{\s*(oc\.)?env:")
_ABSENT = object()
_NEAR = 0.75  # difflib ratio; `dataset` (0.73 from data) has an answer of its own


@dataclass(frozen=True, slots=True)
class Composed:
    """raw: the config as dicts, lists and scalars. where: key path -> "on the command line", "in configs/x.yaml"."""

    raw: dict[str, Any]
    where: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Choice:
    group: str
    option: str


@dataclass(frozen=True, slots=True)
class _Value:
    key: str
    value: Any
    verbatim: bool  # not to be searched for ${interpolations}


def compose(config: str, arguments: Sequence[str], *, schema: type, config_dir: Path | None = None) -> Composed:
    """The config of a verb with `key=value` and `group=option` arguments applied, in this order: the verb's YAML, its
    groups, experiment, debug, what was typed.

    `schema` tells which keys hold text, whose values are taken as typed. `config_dir` adds groups and options of the
    user's own. Raises ConfigError for arguments that cannot be understood; the values are the schema's to judge.
    """
    directories = [CONFIGS] if config_dir is None else [CONFIGS, config_dir]
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError([f"--config-dir={config_dir}: no such directory"])
    options = group_options(config, directories)
    problems: list[str] = []
    choices: dict[str, str] = {}  # by group: the last choice counts
    values: list[_Value] = []
    for argument in _with_their_values(arguments):
        try:
            parsed = _parse(argument, options, schema)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if isinstance(parsed, _Value):
            values.append(parsed)
        else:
            choices[parsed.group] = parsed.option
    if problems:
        raise ConfigError(problems)

    optional = {group for group, option in _groups(config) if option is None}
    overrides = [
        f"{group}={option}" if option != "null" else f"~{group}"
        for group, option in choices.items()
        if option != "null" or group not in optional
    ]
    tree, where = _compose_groups(config, overrides, directories)
    for each in values:
        if not each.verbatim:
            _apply(tree, each)
            where = {path: origin for path, origin in where.items() if not path.startswith(f"{each.key}.")}
            where[each.key] = COMMAND_LINE
    raw = _resolve(tree)
    for each in values:
        if each.verbatim:
            _set(raw, each.key.split("."), each.value)
            where[each.key] = COMMAND_LINE
    return Composed(raw, where)


def group_options(config: str, directories: Sequence[Path] = (CONFIGS,)) -> dict[str, tuple[str, ...]]:
    """Every group of a verb's config with its options."""
    return {
        group: tuple(sorted({path.stem for root in directories for path in (root / group).glob("*.yaml")}))
        for group, _ in _groups(config)
    }


def _groups(config: str) -> Iterator[tuple[str, str | None]]:
    """The groups of a verb's config, each with the option it has unless another is chosen."""
    for entry in _load(CONFIGS / f"{config}.yaml").get("defaults", ()):
        if isinstance(entry, Mapping):
            yield from ((str(group), option) for group, option in entry.items())
        elif entry != "_self_":
            yield from _groups(str(entry))


def _parse(argument: str, options: Mapping[str, Sequence[str]], schema: type) -> _Choice | _Value:
    key, equals, text = argument.partition("=")
    if key.startswith("~"):
        if not _KEY.fullmatch(key[1:]) or key[1:] in options:
            raise ConfigError([f"{argument}: only a single key can be taken out with ~, as in ~data.path"])
        return _Value(_dotted(key[1:]), _ABSENT, verbatim=False)
    if not equals:
        raise _not_key_value(argument, schema)
    key = key.lstrip("+")
    if not _KEY.fullmatch(key):
        raise _not_key_value(argument, schema)
    if key in options:
        if text in options[key] or text == "null":
            return _Choice(key, text)
        near = difflib.get_close_matches(text, options[key], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError([f"{assignment(key, text)}: {key} has {', '.join(options[key])}{hint} (set {COMMAND_LINE})"])
    if key == "hydra" or key.startswith("hydra."):
        raise ConfigError([f"{argument}: configs are composed with Hydra, but its settings and launchers are not used"])
    key = _dotted(key)
    known = find(schema, key)
    group = _misspelled(key, options, schema)
    if group is not None:
        raise ConfigError([f"{assignment(key, text)}: unknown key; did you mean {group}? (set {COMMAND_LINE})"])
    if known is not None and known.is_text and not (known.allowed.endswith("null") and text == "null"):
        verbatim = known.leaf == "prompt"  # quotes may be what it is about
        if not verbatim and len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        return _Value(key, text, verbatim=verbatim or "${" not in text)
    return _Value(key, _read_value(key, text), verbatim=False)


def _misspelled(key: str, options: Mapping[str, Sequence[str]], schema: type) -> str | None:
    """The group or section that a user meant by a first word that is neither; the schema knows only of keys."""
    top = [*children(schema, ""), *options]
    if "." in key or key in top or (nearest(schema, key) or "").rpartition(".")[2] == key:
        return None
    return next(iter(difflib.get_close_matches(key, top, 1, _NEAR)), None)


def _read_value(key: str, text: str) -> object:
    if not text.strip():
        return ""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if override.is_sweep_override():
            raise ConfigError(
                [f"{assignment(key, text)}: lists several values; a list is [a,b], and a sweep is a shell loop"]
            )
        value = override.value()
    except HydraException:
        raise ConfigError(
            [f"{assignment(key, text)}: cannot be read; put text with special characters in quotes: '{key}=\"…\"'"]
        ) from None
    return value


def _compose_groups(config: str, choices: list[str], directories: Sequence[Path]) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra makes of the YAML files, and which file set each key last."""
    search = [f"hydra.searchpath=[{','.join(f'file://{path.resolve()}' for path in directories[1:])}]"]
    overrides = [*choices, *(search if len(directories) > 1 else ())]
    try:
        with initialize_config_dir(str(directories[0]), job_name="longspan", version_base="1.3"):
            tree = hydra_compose(config, overrides)
            loader = GlobalHydra.instance().config_loader()
            parts = loader.compute_defaults_list(config, overrides, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        # Hydra raises the last two for YAML that is no defaults list, such as `override /model: no`.
        raise ConfigError([_one_line(error)]) from error
    where: dict[str, str] = {}
    for part in parts:
        file = next((path for root in directories if (path := root / f"{part.config_path}.yaml").is_file()), None)
        if file is None or str(part.config_path).startswith("hydra"):
            continue
        shown = f"configs/{part.config_path}.yaml" if file.is_relative_to(CONFIGS) else str(file)
        prefix = "" if part.package in (None, "", "_global_") else f"{part.package}."
        body = {name: value for name, value in _load(file).items() if name != "defaults"}
        where.update((f"{prefix}{path}", f"in {shown}") for path, _ in _leaves(body))
    OmegaConf.set_struct(tree, False)
    return tree, where


def _apply(tree: DictConfig, each: _Value) -> None:
    try:
        if each.value is _ABSENT:
            parent, _, leaf = each.key.rpartition(".")
            node = OmegaConf.select(tree, parent) if parent else tree
            if isinstance(node, DictConfig):
                node.pop(leaf, None)
            return
        # A section is changed key by key; where a list takes its place, or it a list's, nothing is left.
        merge = isinstance(each.value, dict) and isinstance(OmegaConf.select(tree, each.key), DictConfig)
        OmegaConf.update(tree, each.key, each.value, merge=merge, force_add=True)
    except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        raise ConfigError([f"{assignment(each.key, each.value)}: cannot be set: {_one_line(error)}"]) from error


def _resolve(tree: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(tree)
    for path, value in _leaves(plain):
        if isinstance(value, str) and _ENVIRONMENT.search(value):
            raise ConfigError(
                [f"{assignment(path, value)}: configs are saved with a run, so they read no environment variables; "
                 "let the shell put the value in: key=$NAME"]
            )  # fmt: skip
    try:
        resolved = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError([f"{key}: {_one_line(error)}"]) from error
    return {str(name): value for name, value in resolved.items()} if isinstance(resolved, dict) else {}


def _load(file: Path) -> Mapping[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file))
    return {str(name): value for name, value in loaded.items()} if isinstance(loaded, dict) else {}


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def _set(raw: dict[str, Any], path: list[str], value: object) -> None:
    node: Any = raw
    for part in path[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError([f"{assignment('.'.join(path), value)}: there is no item {part} in that list"])
    if not isinstance(node, dict):
        raise ConfigError([f"{assignment('.'.join(path), value)}: expected the key of a section"])
    node[path[-1]] = value


def _dotted(key: str) -> str:
    return re.sub(r"\[(\d+)\]", r".\1", key)


def _with_their_values(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, `--steps 5` as one: it is one mistake."""
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument.startswith("-") and "=" not in argument and remaining and not _is_ours(remaining[0]):
            argument = f"{argument} {remaining.pop(0)}"
        yield argument


def _is_ours(argument: str) -> bool:
    return "=" in argument or argument.startswith(("-", "~"))


def _not_key_value(argument: str, schema: type) -> ConfigError:
    """`--steps 5` and `--trainer.steps=5` are how others do it."""
    flag, _, value = argument.replace("=", " ", 1).partition(" ")
    name = flag.lstrip("-").replace("-", "_")
    if flag.startswith("-") and name:
        meant = name if find(schema, name) is not None else nearest(schema, name)
        if meant is not None:
            return ConfigError([f"{argument}: longspan takes key=value; did you mean {meant}={value or '…'}?"])
        return ConfigError([f"{argument}: expected key=value, as in trainer.steps=5, without dashes"])
    return ConfigError([f"{argument}: expected key=value, with a key like trainer.steps"])


def _one_line(error: BaseException) -> str:
    """The first sentence; OmegaConf and Hydra append lines of internals."""
    text = str(error).strip() or type(error).__name__
    return " ".join(
        line.strip() for line in text.splitlines() if not re.match(r"\s*(full_key|object_type|reference_type)", line)
    )
