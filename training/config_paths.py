"""What a request names on the file system, checked before torch is imported and before anything is read or built.

The schema judges a config by itself; this judges it by what is there. What is inside the files is found out later.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from longspan.model.checkpoint_files import (
    CONFIG,
    LINEAGE,
    TOKENIZER,
    CheckpointError,
    load_decoder_config,
    step_directories,
    why_no_checkpoint,
)
from longspan.model.config import DecoderConfig

from .config_errors import COMMAND_LINE, ConfigError, Problem, assignment, lines
from .config_plain import plain, written
from .schema import (
    ConvertConfig,
    DataConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PrepareConfig,
    RunConfig,
    TokenizerConfig,
    UptrainConfig,
)

HUB = "hub:"
RUN_CONFIG = "config.yaml"


def check_paths(config: object, *, where: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError, a line for each path of a verb's config that is not there or not what it has to be, and for
    each key of a tokenizer that was typed beside weights that bring theirs.

    `longspan estimate` plans runs for other machines, so its data may be elsewhere (`missing_data` tells).
    """
    found = lines([*_problems(config), *_tokenizers_passed_over(config, where or {})], where or {})
    if found:
        raise ConfigError(found)


def missing_data(data: DataConfig) -> Iterator[Problem]:
    """Local files that `data` names and that are not there."""
    if data.examples is not None:
        for name in ("path", "validation_path"):
            if (path := getattr(data.examples, name)) is not None:
                yield from _missing(f"data.examples.{name}", path)
    elif data.path is not None:
        yield from _missing("data.path", data.path)
    else:
        for i, source in enumerate(data.sources):
            if source.kind == "files" and source.path is not None:
                yield from _missing(f"data.sources.{i}.path", source.path)
    if data.tokenizer.kind == "file" and data.tokenizer.path is not None:
        yield from _missing("data.tokenizer.path", data.tokenizer.path, globs=False)


def _problems(config: object) -> Iterator[Problem]:
    if isinstance(config, RunConfig):
        if not isinstance(config, EstimateConfig):
            yield from missing_data(config.data)
        if config.checkpoint is not None:
            yield from _no_checkpoint(config.checkpoint)
        if config.resume is not None and config.resume != "auto":
            yield from _no_run(config.resume)
    elif isinstance(config, PrepareConfig):
        yield from missing_data(config.data)
    elif isinstance(config, EvaluateConfig):
        key = "checkpoint" if config.checkpoint is not None else "checkpoints"
        for checkpoint in config.subjects:
            yield from _no_checkpoint(checkpoint, key=key)
            yield from _too_long_a_window(checkpoint, config.evaluation.window)
        if config.data.path is not None:
            yield from _missing("data.path", config.data.path)
        for name in ("files", "harness_files"):
            if (path := getattr(config, name)) is not None:
                yield from _missing(name, path, globs=False)
    elif isinstance(config, GenerateConfig):
        yield from _no_checkpoint(config.checkpoint)
        if config.file is not None and config.file != "-":
            yield from _missing("file", config.file, globs=False)
        if config.requests is not None and config.requests != "-":
            yield from _missing("requests", config.requests, globs=False)
    elif isinstance(config, UptrainConfig):
        yield from _no_checkpoint(config.checkpoint)
        path = config.overrides.get("data", {}).get("path")
        if isinstance(path, str):
            yield from _missing("data.path", path)
        if config.statistics is not None:
            yield from _missing("statistics", config.statistics, globs=False)
    elif isinstance(config, ImportConfig):
        yield from _missing("source", config.source, globs=False)
    elif isinstance(config, ExportConfig):
        yield from _no_checkpoint(config.checkpoint)
    elif isinstance(config, ConvertConfig):
        yield from _no_checkpoint(config.checkpoint)
        if config.statistics is not None:
            yield from _missing("statistics", config.statistics, globs=False)


def _missing(key: str, value: str, *, globs: bool = True) -> Iterator[Problem]:
    path = Path(value).expanduser()
    if path.exists() or (globs and value.startswith(HUB)):
        return
    if globs and glob.has_magic(value):
        if not any(True for _ in glob.iglob(str(path), recursive=True)):
            yield Problem((key,), f"{assignment(key, value)}: no file matches")
        return
    near = ""
    if path.parent.is_dir():
        close = get_close_matches(path.name, sorted(entry.name for entry in path.parent.iterdir()), 1)
        near = f"; did you mean {path.parent / close[0]}?" if close else ""
    yield Problem((key,), f"{assignment(key, value)}: does not exist{near}")


def _no_checkpoint(value: str, *, key: str = "checkpoint") -> Iterator[Problem]:
    reason = why_no_checkpoint(value)
    if reason is not None:
        yield Problem((key,), f"{assignment(key, value)}: {reason}")


def _no_run(value: str) -> Iterator[Problem]:
    run = Path(value)
    if not run.exists():
        yield Problem(("resume",), f"{assignment('resume', value)}: {why_no_checkpoint(run)}")
    elif not ((run / RUN_CONFIG).is_file() or (run / "checkpoints").is_dir()):
        rest = "is not a run (it has neither config.yaml nor checkpoints/)"
        yield Problem(("resume",), f"{assignment('resume', value)}: {rest}")


def _too_long_a_window(checkpoint: str, window: int | None) -> Iterator[Problem]:
    model = _model_of(checkpoint)
    if window is None or model is None or model.positions != "learned" or window <= model.max_positions:
        return
    yield Problem(
        ("evaluation.window",),
        f"evaluation.window={window}: is longer than the {model.max_positions} learned positions of "
        f"{checkpoint}; lower it",
    )


def _model_of(checkpoint: str) -> DecoderConfig | None:
    """As the config.json of a checkpoint, or of the newest in a run, says; None where it cannot, which is found out
    when the checkpoint is read."""
    chosen = _directory_of(checkpoint)
    if chosen is None:
        return None
    try:
        return load_decoder_config(chosen)
    except CheckpointError:
        return None


def _directory_of(checkpoint: str) -> Path | None:
    """A checkpoint, or the newest in a run; None where there is none."""
    path = Path(checkpoint)
    candidates = [path, *step_directories(path)] if path.is_dir() else []
    return next((directory for directory in candidates if (directory / CONFIG).is_file()), None)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def _tokenizers_passed_over(config: object, where: Mapping[str, str]) -> Iterator[Problem]:
    """What was typed of `data.tokenizer` beside weights that bring their own. What an experiment says of it is left
    unread: it is for the run that begins without weights."""
    if not isinstance(config, RunConfig | UptrainConfig):
        return
    used: Mapping[str, object] = {}
    if config.checkpoint is not None:
        chosen = _directory_of(config.checkpoint)
        if chosen is None or not (chosen / TOKENIZER).is_file():
            return
        rest = f"checkpoint={config.checkpoint} brings the tokenizer that its weights were trained with"
    elif isinstance(config, RunConfig) and config.resume is not None:
        directory = Path(config.directory if config.resume == "auto" else config.resume)
        if _read(directory / LINEAGE).get("parent") is None:
            return  # the tokens of another one are other data, which are refused when they are read
        used = written(written(_read(directory / RUN_CONFIG), "data"), "tokenizer")
        rest = f"the run in {directory} goes on with the tokenizer that its weights brought"
    else:
        return
    for key, value in _typed_of_tokenizer(config, where, used).items():
        yield Problem((key,), f"{assignment(key, value)}: {rest}; leave data.tokenizer out")


def _typed_of_tokenizer(
    config: RunConfig | UptrainConfig, where: Mapping[str, str], used: Mapping[str, object]
) -> dict[str, object]:
    """What is not as `used` says, by key, or all of it where it was typed as one mapping. Of a file nothing is said: a
    run compares it with the tokenizer of its weights when it reads both."""
    section = "data.tokenizer"
    typed = {key.rpartition(".")[2] for key, origin in where.items() if origin == COMMAND_LINE and section in key}
    if isinstance(config, UptrainConfig):
        asked = written(written(config.overrides, "data"), "tokenizer")
    else:
        defaults, file = plain(TokenizerConfig()), config.data.tokenizer.kind == "file"
        asked = {
            name: value
            for name, value in plain(config.data.tokenizer).items()
            if (name in typed or value != defaults[name]) and not (file and name in ("kind", "path"))
        }
    asked = {name: value for name, value in asked.items() if name not in used or used[name] != value}
    if COMMAND_LINE in (where.get("data"), where.get(section)):
        return {section: asked} if asked else {}
    return {f"{section}.{name}": value for name, value in asked.items() if name in typed}


def _read(path: Path) -> Mapping[str, object]:
    """A file of a run; nothing where it is missing or damaged, which is found out when the run is continued."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
