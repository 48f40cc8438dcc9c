"""Our decoders in lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness).

    run_harness(model, tokenizer, ["lambada_openai"])                         its tasks, by name
    run_harness(model, tokenizer, ["mine"], include_path=Path("my_tasks"))    tasks of one's own, without a connection

The harness's own command line knows no models but its own; from Python, importing `longspan.evaluation.harness.model`
registers ours as `longspan`. lm_eval is imported when something here is called, never before.

What the harness asks for is computed in `likelihoods`.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, cast

from longspan.data.tokenizer import Tokenizer
from longspan.model.decoder import Decoder

from ..journal import keep, kept_records
from ..passes import Precision

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger("longspan.evaluation")

_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


def run_harness(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    batch: int = 8,
    precision: Precision = "fp32",
    starts: bool = False,
    seed: int = 0,
    kept: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """The harness's results of some of its tasks, or of those defined below `include_path`, as plain data: `results`
    by task as the harness has them, `questions_sha256` of what was asked, and under `harness` its version and how it
    was asked. Tasks (or groups of them) are run one by one.

    limit         documents per task; None: all
    num_fewshot   examples in each prompt; None: as each task has it
    max_length    tokens that the model reads at most; None: the context that its config states
    batch         rows in a forward pass
    precision     of log-likelihoods: "bf16" multiplies under autocast; answers are written in the type of the weights
    starts        contexts begin with the tokenizer's start tokens, as the models of others expect
    seed          of what the harness draws (examples, samples)
    kept          file of JSON lines that each finished task is appended to, and whose tasks are not run again; it
                  begins with what they depend on, the model's weights aside: something else there is refused
    progress      called with (tasks finished, tasks in all) before the first and after each

    The harness seeds the generators of random, numpy and torch. Raises ImportError where lm_eval is not installed,
    ValueError for tasks that it does not have (with the nearest names) and for data that cannot be had.
    """
    manager = check_names(tasks, include_path)
    import lm_eval
    from lm_eval.evaluator import simple_evaluate

    from .model import HarnessModel

    adapter = HarnessModel(model, tokenizer, max_length=max_length, batch=batch, precision=precision, starts=starts)

    def asked(name: str) -> dict[str, object]:
        try:
            found = simple_evaluate(
                adapter,
                tasks=[name],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"the harness cannot read the data of {name}: {reason}; its own tasks take theirs from the "
                "hub, so be online, or define tasks with local files and give include_path"
            ) from error
        results = cast("Mapping[str, Mapping[str, object]]", found)
        plain = {part: _plain(results[part]) for part in _KEPT if part in results}
        samples = cast("Mapping[str, Sequence[Mapping[str, str]]]", results["samples"])
        return plain | {"questions_sha256": {task: _digest(each) for task, each in samples.items()}}

    protocol = {
        "lm_eval": lm_eval.__version__,
        "definitions_sha256": None if include_path is None else _definitions_digest(include_path),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "seed": seed,
        **adapter.protocol,
    }
    names = list(dict.fromkeys(tasks))
    done = {record["task"]: record["found"] for record in kept_records(kept, protocol)} if kept is not None else {}
    if progress is not None:
        progress(sum(name in done for name in names), len(names))
    for name in names:
        if name in done:
            continue
        done[name] = asked(name)
        if kept is not None:
            keep(kept, protocol, {"task": name, "found": done[name]})
        if progress is not None:
            progress(sum(each in done for each in names), len(names))
    merged: dict[str, object] = {"harness": {**protocol, "tasks": names}}
    for part in (*_KEPT, "questions_sha256"):
        of_tasks = [done[name][part] for name in names if part in done[name]]
        if of_tasks:
            merged[part] = {key: value for each in of_tasks for key, value in each.items()}
    return merged


def _digest(samples: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of the harness's own hashes of the documents, prompts and right answers of a task, in order."""
    digest = hashlib.sha256()
    for each in samples:
        digest.update(f"{each['doc_hash']} {each['prompt_hash']} {each['target_hash']}\n".encode())
    return digest.hexdigest()


def _definitions_digest(folder: Path) -> str:
    """SHA-256 of the files beside each other that define tasks: definitions, their functions, and data among them."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and "__pycache__" not in each.parts):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def check_names(tasks: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """The harness's manager of tasks that has all of these. Raises ImportError where lm_eval is not installed, and
    ValueError for none and for a name that is known neither below `include_path` nor to the harness."""
    if not tasks:
        raise ValueError("no tasks for the harness: name some")
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ImportError(f"harness tasks need lm-evaluation-harness ({error}): pip install longspan[eval]") from error
    if include_path is None:
        return _manager(tuple(tasks), None, None)
    if not include_path.is_dir():
        raise ValueError(f"include_path={include_path} is not a directory: it holds tasks as YAML files")
    return _manager(tuple(tasks), include_path, _definitions_digest(include_path))


@lru_cache(maxsize=1)  # reading the harness's own definitions takes it a while
def _manager(tasks: tuple[str, ...], include_path: Path | None, definitions_sha256: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"the harness has no task named '{name}'{hint}")
    return manager


def _plain(value: object) -> object:
    """As JSON has it: numbers of numpy unwrapped, functions and the like by their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else None
    return str(value)


# -- what the harness asks --------------------------------------------------------------------------------------------
