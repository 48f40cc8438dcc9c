"""Numbers of a run: an append-only CSV that survives kill and resume, log lines, and wandb where it is wanted."""

from __future__ import annotations

import csv
import io
import logging
import os
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Protocol

from .errors import RunFailed
from .schema import LoggerConfig

logger = logging.getLogger("longspan.training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of metrics.csv.

    step               optimizer steps done
    tokens             tokens read so far, over all sessions of the run
    loss               nats per loss token of this step's global batch
    validation_loss    nats per loss token, on rows where a validation ran
    lr                 learning rate that this step used
    grad_norm          norm of the whole gradient before clipping
    tokens_per_second  since the row before, over all devices, validation and checkpoints left out
    mfu                share of the hardware's peak FLOP/s, likewise; None where no peak is known
    seconds            wall-clock seconds of training so far, over all sessions
    skipped            steps skipped so far because of a non-finite loss or gradient
    stage              name of the stage that took the step; None in a run without stages
    accuracy           of classes, on rows where a validation ran
    exact_match        of answers, likewise
    f1                 likewise: of classes the macro-average, of answers that of their words
    """

    step: int
    tokens: int
    loss: float | None = None
    validation_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds: float = 0.0
    skipped: int = 0
    stage: str | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    f1: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))


class MetricsFile:
    """metrics.csv. Each row is flushed, so a killed process loses at most the row it was writing."""

    def __init__(self, path: Path, *, resumed_step: int = 0) -> None:
        """Starts the file, or keeps the rows of an earlier session up to `resumed_step`: what came after that step is
        computed again. A row cut short by a kill goes too."""
        self.path = path
        kept = _complete_rows(path, resumed_step) if resumed_step else []
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        with temporary.open("w", newline="") as file:
            file.write(_line(COLUMNS))
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", newline="")

    def append(self, row: Row) -> None:
        self._file.write(_line([_cell(getattr(row, name)) for name in COLUMNS]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """All complete rows of a metrics.csv."""
    rows = []
    for values in _complete_rows(path, None):
        record = dict(zip(COLUMNS, values, strict=True))
        rows.append(
            Row(
                step=int(record["step"]),
                tokens=int(record["tokens"]),
                loss=_number(record["loss"]),
                validation_loss=_number(record["validation_loss"]),
                lr=_number(record["lr"]),
                grad_norm=_number(record["grad_norm"]),
                tokens_per_second=_number(record["tokens_per_second"]),
                mfu=_number(record["mfu"]),
                seconds=float(record["seconds"]),
                skipped=int(record["skipped"]),
                stage=record["stage"] or None,
                accuracy=_number(record["accuracy"]),
                exact_match=_number(record["exact_match"]),
                f1=_number(record["f1"]),
            )
        )
    return rows


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else repr(value)  # repr() keeps every bit of a float


def _number(text: str) -> float | None:
    return float(text) if text else None


def _complete_rows(path: Path, last_step: int | None) -> list[list[str]]:
    """The rows that end in a newline and have every column, up to `last_step`; none of a missing or foreign file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not lines or tuple(next(csv.reader([lines[0]]))) != COLUMNS:
        return []
    rows = [row for row in csv.reader(lines[1:]) if len(row) == len(COLUMNS)]
    return [row for row in rows if last_step is None or int(row[0]) <= last_step]


def _line(values: list[str] | tuple[str, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


# -- log lines --------------------------------------------------------------------------------------------------------


def format_row(row: Row, *, steps: int, memory_bytes: int | None, eta_seconds: float | None) -> str:
    """`step 120/10000 loss 3.210 lr 3e-04 tok/s 41k mfu 0.31 mem 31.0G eta 02:11`; what is unknown is left out."""
    parts = [f"step {row.step}/{steps}"]
    if row.stage is not None:
        parts.append(row.stage)
    if row.loss is not None:
        parts.append(f"loss {row.loss:.3f}")
    if row.validation_loss is not None:
        parts.append(f"val {row.validation_loss:.3f}")
    for name, score in (("acc", row.accuracy), ("em", row.exact_match), ("f1", row.f1)):
        if score is not None:
            parts.append(f"{name} {score:.3f}")
    if row.lr is not None:
        parts.append(f"lr {row.lr:.2g}")
    if row.tokens_per_second is not None:
        parts.append(f"tok/s {short_count(row.tokens_per_second)}")
    if row.mfu is not None:
        parts.append(f"mfu {row.mfu:.2f}")
    if memory_bytes is not None:
        parts.append(f"mem {memory_bytes / 2**30:.1f}G")
    if row.skipped:
        parts.append(f"skipped {row.skipped}")
    if eta_seconds is not None:
        parts.append(f"eta {clock(eta_seconds)}")
    return " ".join(parts)


def short_count(value: float) -> str:
    """950, 4.1k, 41k, 1.2M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """mm:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


# -- wandb ------------------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """Where rows go besides the file."""

    def log(self, row: Row) -> None: ...
    def finish(self, exit_code: int) -> None: ...


class WandbTracker:
    """One wandb run per run directory: a resumed run continues it. Imported only here: importing it takes a second."""

    def __init__(
        self, config: LoggerConfig, mode: str, directory: Path, name: str, settings: dict[str, object]
    ) -> None:
        import wandb

        identity = directory / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=list(config.tags),
            name=name,
            dir=str(directory),
            id=identity.read_text().strip(),
            resume="allow",
            mode="online" if mode == "online" else "offline",
            config=settings,
            settings=wandb.Settings(silent=mode != "online"),
        )

    def log(self, row: Row) -> None:
        values = {name: getattr(row, name) for name in COLUMNS}
        self._run.log({name: value for name, value in values.items() if value is not None}, step=row.step)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def wandb_mode(config: LoggerConfig) -> str:
    """online, offline or off. Nothing ever asks for an account: without a key, `auto` and `online` are offline, which
    writes files in the run directory that `wandb sync` can send later."""
    if config.wandb in ("auto", "online"):
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return config.wandb


def open_trackers(config: LoggerConfig, directory: Path, name: str, settings: dict[str, object]) -> tuple[Tracker, ...]:
    """What the config asks for. Where nobody asked (`auto`), wandb failing to start costs a log line, not the run."""
    mode = wandb_mode(config)
    if mode == "off":
        return ()
    import wandb

    try:
        return (WandbTracker(config, mode, directory, name, settings),)
    except (wandb.Error, OSError) as error:
        if config.wandb != "auto":
            raise RunFailed(
                f"logger.wandb={config.wandb}: wandb does not start ({error}); try logger.wandb=off"
            ) from error
        logger.warning("wandb does not start (%s); metrics go to %s only", error, directory / "metrics.csv")
        return ()


class MetricsLog:
    """metrics.csv and, where configured, wandb."""

    def __init__(self, file: MetricsFile, trackers: tuple[Tracker, ...] = ()) -> None:
        self._file = file
        self._trackers = trackers
        self.last: Row | None = None

    def write(self, row: Row) -> None:
        self._file.append(row)
        for tracker in self._trackers:
            tracker.log(row)
        self.last = row

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.finish(0 if error is None else 1)
