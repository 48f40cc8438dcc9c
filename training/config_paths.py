"""What a request names on the file system, checked before torch is imported and before anything is read or built.

The schema judges a config by itself; this judges it by what is there. What is inside the files is found out later.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

from longspan.model.checkpoint_files import (
    CONFIG,
    CheckpointError,
    load_decoder_config,
    step_directories,
    why_no_checkpoint,
)
from longspan.model.config import DecoderConfig

from .config_errors import ConfigError, Problem, assignment, lines
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
    UptrainConfig,
)

HUB = "hub:"


def check_paths(config: object, *, where: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError, a line for each path of a verb's config that is not there or not what it has to be.

    `longspan estimate` plans runs for other machines, so its data may be elsewhere (`missing_data` tells).
    """
    found = lines(_problems(config), where or {})
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
    elif not ((run / "config.yaml").is_file() or (run / "checkpoints").is_dir()):
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
    path = Path(checkpoint)
    if not path.is_dir():
        return None
    candidates = [path, *step_directories(path)]
    chosen = next((directory for directory in candidates if (directory / CONFIG).is_file()), None)
    if chosen is None:
        return None
    try:
        return load_decoder_config(chosen)
    except CheckpointError:
        return None
