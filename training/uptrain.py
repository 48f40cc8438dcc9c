"""`uptrain`: a grid of conversions and trainings from its request to its report.

grid.json       what was asked for, settled: the cells, the parent, the settings that they share
config.yaml     the request
cells/ runs/    see `uptrain_cells`
speed.json      milliseconds by number of heads and shape
report.*        written at the end
uptrain.log
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from longspan.evaluation.ablation.report import write_ablation
from longspan.evaluation.ablation.tables import GRID, SPEED, read_grid
from longspan.evaluation.surgery.speed import copy_rate, measure_speed
from longspan.model.config import DecoderConfig

from . import run_directory as files
from .config_keys import keys
from .config_plain import plain
from .errors import UserError
from .precision import choose_device
from .progress import logging_to
from .schema_requests import RunRequest
from .schema_uptrain import UptrainConfig
from .signals import SignalFlag
from .uptrain_cells import STATISTICS, Workshop, forget_models
from .uptrain_plan import Chain
from .uptrain_pool import Pool, environments, visible_gpus
from .uptrain_recipe import Uptraining, settle_uptraining
from .uptrain_view import GridStyle, GridView

LOG = "uptrain.log"
_OURS = ("cells", "runs", GRID, SPEED, STATISTICS, LOG, files.CONFIG, files.LINEAGE)


def uptrain(request: UptrainConfig, recipe: Mapping[str, Any] | None) -> Path:
    """Makes every cell of the grid that is not there yet, measures, reports; returns the page's path.

    `recipe` as in `settle_uptraining`. Raises UserError (and what means the same) for a wrong request before anything
    is written; RunFailed where a cell cannot go on; Terminated when a signal stopped it after saving.
    """
    grid = settle_uptraining(request, recipe)
    directory = grid.directory
    console = Console(soft_wrap=True)
    with ExitStack() as stack:
        stack.enter_context(files.locked(directory))
        _check_output(grid)
        signals = stack.enter_context(SignalFlag().installed())
        workshop = Workshop(grid, signals)
        _ = workshop.held_out  # what cannot be measured is found out before anything is written
        if request.overwrite:
            _clear(directory)
        _open(grid, recipe)
        style = _style(request, console)
        stack.enter_context(logging_to(directory / LOG, None))
        done = {cell.name: _loss(directory, cell.name) for cell in grid.cells if workshop.is_done(cell)}
        view = GridView(grid, style, console, done=done)
        with view:
            _make(workshop, view, signals)
        _measure_speed(workshop, view)
        page = write_ablation(directory)
        chosen = read_grid(directory).found.recommended
        if request.keep == "recommended":
            forget_models(directory, but=chosen.cell)
        view.say(chosen.why)
        view.say(f"everything is in {directory}; the weights are in {directory / 'cells' / (chosen.cell or '')}/model")
        return page


def reopen(directory: Path) -> Uptraining:
    """The grid of a directory, as a worker needs it."""
    opened = files.read_json(directory / GRID)
    return settle_uptraining(UptrainConfig(**opened["request"]), opened["recipe"])


def _phases(grid: Uptraining) -> tuple[list[Chain], list[Chain]]:
    """Conversions, which trainings start from; trainings, the long ones first so that none is alone at the end."""
    conversions = [chain for chain in grid.chains if not chain.steps]
    trainings = [chain for chain in grid.chains if chain.steps]
    return conversions, sorted(trainings, key=lambda chain: -chain.steps)


def _make(workshop: Workshop, view: GridView, signals: SignalFlag) -> None:
    """Everything that is not there yet, in this process or in one for each device."""
    grid = workshop.grid
    phases = [
        [chain for chain in chains if not all(workshop.is_done(cell) for cell in chain.cells)]
        for chains in _phases(grid)
    ]
    gpus = torch.cuda.device_count() if workshop.device.type == "cuda" else 0
    workers = min(grid.request.workers or max(1, gpus), max(map(len, phases)))
    with ExitStack() as stack:
        pool = None
        if workers > 1:
            pool = stack.enter_context(Pool(grid, environments(workers, visible_gpus(gpus)), signals))
        for chains in phases:
            for chain in chains if pool is not None else []:
                if chain.steps:  # weights that were taken away when the grid was done are made again by one process
                    workshop.convert(chain.start)
            if pool is not None:
                pool.make(chains, view.tell)
                continue
            for chain in chains:
                workshop.make(chain, view.tell)


def _measure_speed(workshop: Workshop, view: GridView) -> None:
    """speed.json, of every number of heads; kept where it is there for these shapes."""
    grid, device = workshop.grid, workshop.device
    asked, model = grid.request.speed, grid.model
    path = grid.directory / SPEED
    if not asked.enabled or not isinstance(model, DecoderConfig):
        path.unlink(missing_ok=True)
        return
    batches = asked.batches or ((1, 16) if device.type == "cuda" else (1, 4))
    contexts = asked.contexts or _contexts(model)
    heads = [None, *sorted(set(grid.request.kv_heads), reverse=True)]
    wanted = [(batch, context, count or model.kv_heads) for batch in batches for context in contexts for count in heads]
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        if [(row["batch"], row["context"], row["kv_heads"]) for row in there] == wanted:
            return
    view.say(f"measuring speed: {len(wanted)} shapes")
    copied = copy_rate(device)
    models = {cell.start.kv_heads: grid.model_of(cell) for cell in grid.cells}
    rows = []
    for batch, context, count in wanted:
        config = models[None if count == model.kv_heads else count]
        workshop.stop_if_asked()
        if isinstance(config, DecoderConfig):
            rows.append(asdict(measure_speed(config, batch=batch, context=context, device=device, copied=copied)))
    files.write_json(path, rows)


def _contexts(model: DecoderConfig) -> tuple[int, ...]:
    room = model.max_positions - 64  # for what is written behind it
    return (room,) if room < 256 else (model.max_positions // 4, room)


# -- the directory -----------------------------------------------------------------------------------------------------


def _check_output(grid: Uptraining) -> None:
    """Refuses a directory that is not ours to write to, and to continue a grid of other settings."""
    directory, request = grid.directory, grid.request
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output={directory}: is a file; a grid needs a directory")
    if files.is_empty(directory):
        return
    if not (directory / GRID).is_file():
        hint = "; overwrite=true only replaces grids" if request.overwrite else ""
        raise UserError(f"output={directory}: not empty, and not a grid of uptrain; choose another output{hint}")
    if request.overwrite:
        return
    if request.resume is None:
        raise UserError(
            f"output={directory}: holds a grid already; continue it with resume=auto, replace it with overwrite=true, "
            "or choose another output"
        )
    former = _flat(files.read_json(directory / GRID).get("settings", {}))
    now = _flat(json.loads(json.dumps(grid.settings)))
    defaults = {f"recipe.{key.path}": key.default for key in keys(RunRequest)}
    # A key that a later version brought is what it was, at its default.
    came = {key for key in now.keys() - former.keys() if key in defaults and now[key] == defaults[key]}
    changed = sorted(key for key in (former.keys() | now.keys()) - came if former.get(key) != now.get(key))
    if changed:
        told = ", ".join(f"{key}: {former.get(key)} → {now.get(key)}" for key in changed[:3])
        raise UserError(
            f"resume=auto: the cells in {directory} were made with other settings ({told}); give them again, or choose "
            "another output"
        )


def _open(grid: Uptraining, recipe: Mapping[str, Any] | None) -> None:
    directory, model = grid.directory, grid.model
    device = choose_device(grid.base.trainer.accelerator)
    request = plain(grid.request)
    files.write_json(
        directory / GRID,
        {
            "measure": "loss" if isinstance(model, DecoderConfig) else "distance",
            "request": request,
            "recipe": recipe,
            "settings": grid.settings,
            "parent": {
                "checkpoint": str(grid.parent),
                "steps": grid.parent_steps,
                "kv_heads": model.kv_heads,
                "heads": model.n_heads,
            },
            "lr": grid.lr,
            "tokens_per_step": grid.tokens_per_step,
            "cells": {cell.name: cell.key() for cell in grid.cells},
        },
    )
    (directory / files.CONFIG).write_text(json.dumps(request, indent=2) + "\n")
    if not (directory / files.LINEAGE).is_file():
        lineage = files.lineage(seed=0, data={}, parent=str(grid.parent), device=device)
        files.write_json(directory / files.LINEAGE, lineage)


def _clear(directory: Path) -> None:
    for path in (*(directory / name for name in _OURS), *directory.glob("report*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _loss(directory: Path, cell: str) -> float:
    return float(files.read_json(directory / "cells" / cell / "result.json")["loss"])


def _style(request: UptrainConfig, console: Console) -> GridStyle:
    if request.progress != "auto":
        return request.progress
    return "table" if console.is_terminal else "lines"


def _flat(value: object, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, object] = {}
    for name, each in value.items():
        flat |= _flat(each, f"{path}.{name}" if path else name)
    return flat
