"""`longspan evaluate`: perplexity and long-document tasks, of one checkpoint or of several beside each other."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from longspan.data.synthetic import TooShortError, TooSmallError
from longspan.evaluation.asking import TooLong
from longspan.evaluation.record import write_evaluation
from longspan.evaluation.suite import (
    CheckpointResults,
    Occupied,
    begun,
    directories,
    distinct_names,
    read_perplexity,
    write_documents,
)
from longspan.evaluation.suite_compare import compare_checkpoints
from longspan.evaluation.suite_context import by_retrieval
from longspan.evaluation.suite_report import Results, markdown, write_results
from longspan.evaluation.task_run import CannotAsk, run_task, way_of_asking
from longspan.evaluation.tasks.registry import check_files, chosen, gather
from longspan.evaluation.tasks.task import Material, Task
from longspan.model.checkpoint import resolve_checkpoint
from longspan.model.checkpoint_files import fingerprint
from longspan.training.config_plain import plain
from longspan.training.errors import RunFailed, UserError
from longspan.training.evaluating import (
    Subject,
    asked_model,
    load_subject,
    measure_context,
    measure_harness,
    measure_perplexity,
)
from longspan.training.run_directory import command, now, source_commit, versions
from longspan.training.schema import EvaluateConfig

from .output import Progress, as_yaml, progress

_NOT_ASKED = ("output", "overwrite", "dry_run", "force", "accelerator")  # keys that change no number, but for rounding


def run(config: EvaluateConfig) -> int:
    if config.dry_run:
        print(as_yaml(plain(config)), end="")
        return 0
    tasks = chosen(config.tasks)
    check_files(tasks, None if config.files is None else Path(config.files), hub=config.hub)
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
                measured.append(_measure(config, load_subject(config, checkpoint), tasks, name, part, shown, label))
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


def _measure(
    config: EvaluateConfig,
    subject: Subject,
    tasks: Sequence[Task],
    name: str,
    part: Path,
    shown: Progress,
    label: str,
) -> CheckpointResults:
    """Everything that was asked for; what this model cannot be asked is refused, with the reason: the rest goes on."""
    measured = CheckpointResults(name=name, facts=subject.facts)
    refused: dict[str, str] = {}
    if "perplexity" in config.tasks:
        try:
            measured = _with_perplexity(measured, config, subject, part, shown, label)
        except CannotAsk as error:
            refused["perplexity"] = str(error)
    if "effective_context" in config.tasks:
        try:
            with shown.part(f"{label}effective context") as advance:
                measured = replace(measured, effective=measure_context(subject, config, advance))
        except CannotAsk as error:
            refused["effective_context"] = str(error)
    if config.harness:
        with shown.part(f"{label}lm-evaluation-harness"):
            measured = replace(measured, harness=measure_harness(subject, config))
    model = asked_model(subject, batch=config.evaluation.batch, long_texts=config.long_texts)
    for task in tasks:
        try:
            way_of_asking(task, model.reader)
            asked = gather(task, _material(config, subject), shorten=config.lengths is None)
            with shown.part(f"{label}{task.name}") as advance:
                result, scores = run_task(
                    task,
                    model,
                    asked,
                    samples=part / "samples" / f"{task.name}.jsonl",
                    long_texts=config.long_texts,
                    progress=advance,
                )
        except (CannotAsk, TooLong) as error:
            refused[task.name] = str(error)
            continue
        except (TooShortError, TooSmallError) as error:
            if config.lengths is not None:
                raise
            refused[task.name] = f"by a context of {subject.context:,} tokens: {error}"
            continue
        measured = replace(
            measured,
            tasks={**measured.tasks, task.name: result},
            samples={**measured.samples, task.name: scores},
        )
    return replace(
        measured, refused=refused, retrieves=by_retrieval(measured.tasks, measured.samples, seed=config.seed)
    )


def _with_perplexity(
    measured: CheckpointResults, config: EvaluateConfig, subject: Subject, part: Path, shown: Progress, label: str
) -> CheckpointResults:
    found = read_perplexity(part)
    if found is None:
        with shown.part(f"{label}perplexity") as advance:
            evaluation = measure_perplexity(subject, config, advance)
        title = f"Perplexity of {subject.checkpoint}"
        write_documents(part, evaluation.documents)
        write_evaluation(
            evaluation.result, part, baseline=evaluation.baseline, protocols=evaluation.protocols, title=title
        )
        found = evaluation.record(), evaluation.documents
    record, documents = found
    return replace(measured, perplexity=record, documents=documents)


def _material(config: EvaluateConfig, subject: Subject) -> Material:
    context = subject.context
    return Material(
        lengths=config.lengths or (context // 8, context // 4, context // 2, context),
        depths=config.depths,
        samples=config.samples,
        seed=config.seed,
        files=None if config.files is None else Path(config.files),
        count=lambda text: len(subject.tokenizer.encode(text)),
        hub=config.hub,
    )


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
