"""`longspan evaluate`: perplexity and long-document tasks, of one checkpoint or of several beside each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from longspan.evaluation.results.directory import Occupied, begun, directories, distinct_names
from longspan.evaluation.results.pairs import compare_checkpoints
from longspan.evaluation.results.report import Results, markdown, write_results
from longspan.evaluation.tasks.registry import check_files, chosen
from longspan.model.checkpoint import resolve_checkpoint
from longspan.model.checkpoint_files import fingerprint
from longspan.training.config_plain import plain
from longspan.training.errors import RunFailed, UserError
from longspan.training.evaluate_checks import check_evaluation
from longspan.training.evaluating import load_subject, measure
from longspan.training.run_directory import command, now, source_commit, versions
from longspan.training.schema import EvaluateConfig

from .output import as_yaml, progress

_NOT_ASKED = ("output", "overwrite", "dry_run", "force", "accelerator")  # keys that change no number, but for rounding


def run(config: EvaluateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    tasks = chosen(config.tasks)
    check_files(tasks, None if config.files is None else Path(config.files), hub=config.hub)
    read = check_evaluation(config, tasks)
    output = Path(config.output) if config.output is not None else _default_output(config)
    names = distinct_names(config.subjects)
    parts = directories(output, names)
    request = _request(config)
    measured = []
    try:
        with (
            begun(output, request, overwrite=config.overwrite, again=config.force, parts=parts) as resumed,
            progress("longspan evaluate") as shown,
        ):
            if resumed:
                print(f"longspan evaluate: going on with {output}/", file=sys.stderr)
            for checkpoint, name, part in zip(config.subjects, names, parts, strict=True):
                label = "" if len(names) == 1 else f"{name}: "
                found = measure(
                    load_subject(config, checkpoint),  # no name for it here: the next one takes its place in memory
                    config,
                    tasks,
                    read=read,
                    name=name,
                    directory=part,
                    shown=shown.labelled(label),
                )
                measured.append(found)
            if not any(each.perplexity or each.effective or each.tasks or each.harness for each in measured):
                raise UserError(next(why for each in measured for why in each.refused.values()))
    except Occupied as error:
        raise UserError(str(error)) from None
    comparisons, not_compared = compare_checkpoints(measured, seed=config.seed, force=config.force)
    results = Results(
        about={"finished": now(), "command": command(), "commit": source_commit(), "versions": versions()},
        request=request,
        measured=tuple(measured),
        comparisons=comparisons,
        not_compared=not_compared,
    )
    write_results(results, output)
    if config.tasks == ("perplexity",) and len(parts) == 1 and not config.harness:
        print((output / "evaluation.md").read_text(encoding="utf-8"))
    else:
        print(markdown(results))
    print(f"written to {output}/")
    if not_compared:
        many = "one number was" if len(not_compared) == 1 else f"{len(not_compared)} numbers were"
        raise RunFailed(f"{many} measured and not compared; the first: {not_compared[0]}")
    return 0


def _request(config: EvaluateConfig) -> dict[str, object]:
    """What decides about the numbers."""
    asked = {key: value for key, value in plain(config).items() if key not in _NOT_ASKED}
    asked["evaluation"] = {key: value for key, value in asked["evaluation"].items() if key != "batch"}
    return {**asked, "weights_sha256": [fingerprint(resolve_checkpoint(each)) for each in config.subjects]}


def _default_output(config: EvaluateConfig) -> Path:
    """evaluations/<checkpoint's name>/<data's name>: one checkpoint is evaluated on many texts."""
    data = "held-out"
    if config.data.path is not None:
        data = re.sub(r"[^\w.-]+", "-", config.data.path.removeprefix("hub:").rstrip("/")).strip("-.") or "text"
    if config.tasks != ("perplexity",):
        data = "-".join(task for task in config.tasks)[:80] if "perplexity" not in config.tasks else f"{data}-and-tasks"
    names = "-".join(Path(each).resolve().name for each in config.subjects)
    return Path("evaluations", names[:120], data)
