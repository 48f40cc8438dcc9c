"""What `longspan evaluate` leaves behind: a directory that says what was asked and holds what is done, to go on from.

request.json               what was asked, of which weights: another request does not go on from here
results.json               everything found; written last, so that a directory without it is unfinished
results.md, results.html   the same for people
<checkpoint>/              of each checkpoint (of a single one, the directory itself):
  evaluation.json, .md, .png   perplexity
  documents.jsonl              each scored document's nll: what checkpoints are compared by
  effective_context.jsonl      nll of each block of tokens, read with each length of context
  harness.jsonl                what lm-evaluation-harness said of each task
  samples/<task>.jsonl         each question's answer and scores
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..context.effective import ContextCurve, EffectiveContext, RetrievalContext
from ..files import write_atomically
from ..perplexity.result import DocumentScore
from ..tasks.result import QuestionScore, TaskResult

REQUEST, RESULTS = "request.json", "results.json"
_OWN = (REQUEST, RESULTS, "results.md", "results.html")
CONTEXT, HARNESS = "effective_context.jsonl", "harness.jsonl"
_OF_A_CHECKPOINT = (
    "evaluation.json",
    "evaluation.md",
    "evaluation.png",
    "documents.jsonl",
    CONTEXT,
    HARNESS,
    "samples",
)


class Occupied(ValueError):  # noqa: N818  # says what is the matter, as its users read it
    """An output directory that holds something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointResults:
    """Everything about one checkpoint.

    name         its directory's name, or with what tells it from another one of that name
    facts        where it lies, what it holds: plain data
    perplexity   the record of evaluation.json; None: not asked for
    documents    what that was summed up from
    curve        the losses behind its effective context by loss; None: not asked for
    effective    its effective context: the record by loss (None: not asked for), and by each retrieval task
    tasks        task → result; samples: the scores of its questions
    refused      task → why this model cannot be asked it
    harness      what lm-evaluation-harness said
    """

    name: str
    facts: Mapping[str, object]
    perplexity: Mapping[str, object] | None = None
    documents: tuple[DocumentScore, ...] = ()
    curve: ContextCurve | None = None
    effective: EffectiveContext | None = None
    retrieves: Mapping[str, RetrievalContext] = field(default_factory=dict)
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    samples: Mapping[str, tuple[QuestionScore, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    harness: Mapping[str, object] = field(default_factory=dict)


@contextmanager
def begun(
    output: Path, request: Mapping[str, object], *, overwrite: bool, again: bool, parts: Sequence[Path]
) -> Iterator[bool]:
    """The directory for as long as it is filled: new, or left unfinished by the same request (gives True then). Where
    nothing comes of it, a new one is gone again.

    again   a finished one of the same request, too, is gone on with: its numbers are compared anew
    parts   directories of single checkpoints
    Raises Occupied where it holds something else, unless it may be overwritten: then what an evaluation writes is
    removed, and nothing else.
    """
    missing = [path for path in {*parts, output, *output.parents} if not path.exists()]
    resumed = _begin(output, request, overwrite=overwrite, again=again, parts=parts)
    try:
        yield resumed
    except BaseException:
        if not resumed and not any((part / name).exists() for part in parts for name in _OF_A_CHECKPOINT):
            (output / REQUEST).unlink(missing_ok=True)
            for path in sorted(missing, key=lambda path: -len(path.parts)):
                with suppress(OSError):  # somebody else has put something there
                    path.rmdir()
        raise


def _begin(output: Path, request: Mapping[str, object], *, overwrite: bool, again: bool, parts: Sequence[Path]) -> bool:
    if output.exists() and not output.is_dir():
        raise Occupied(f"output={output}: is a file; name a directory")
    if overwrite and output.is_dir():
        for path in (*(output / name for name in _OWN), *(part / name for part in parts for name in _OF_A_CHECKPOINT)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    asked = output / REQUEST
    if asked.is_file():
        differing = _differing(json.loads(asked.read_text(encoding="utf-8")), json.loads(json.dumps(request)))
        finished = (output / RESULTS).exists()
        if differing is None and (again or not finished):
            return True
        if differing is None:
            raise Occupied(
                f"output={output}: holds this evaluation already, finished: read results.md; or choose another, or set "
                "overwrite=true to measure again"
            )
        if not finished:
            raise Occupied(
                f"output={output}: holds an unfinished evaluation that asked for something else ({differing}); choose "
                "another, or set overwrite=true to begin again"
            )
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise Occupied(f"output={output}: exists and is not an empty directory; choose another, or set overwrite=true")
    for part in (output, *parts):
        part.mkdir(parents=True, exist_ok=True)
    write_atomically(asked, (json.dumps(request, indent=2, ensure_ascii=False) + "\n").encode())
    return False


def directories(output: Path, names: Sequence[str]) -> list[Path]:
    """Where each checkpoint's own files go."""
    return [output] if len(names) == 1 else [output / name for name in names]


def distinct_names(checkpoints: Sequence[str]) -> list[str]:
    """The last part of each path that tells it from the others: as many parts as that takes, joined by dashes."""
    parts = [[part for part in Path(each).resolve().parts if part != "/"] for each in checkpoints]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same checkpoint is named twice")


def write_documents(directory: Path, documents: Sequence[DocumentScore]) -> None:
    lines = "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in documents)
    write_atomically(directory / "documents.jsonl", lines.encode())


def read_perplexity(directory: Path) -> tuple[Mapping[str, object], tuple[DocumentScore, ...]] | None:
    """What an unfinished evaluation has of it already."""
    record, documents = directory / "evaluation.json", directory / "documents.jsonl"
    if not (record.is_file() and documents.is_file()):
        return None
    lines = documents.read_text(encoding="utf-8").splitlines()
    found = json.loads(record.read_text(encoding="utf-8"))
    return found, tuple(DocumentScore(**json.loads(line)) for line in lines)


def _differing(old: Mapping[str, object], new: Mapping[str, object], path: str = "") -> str | None:
    """The first key whose value is another one now, in words."""
    for key in sorted({*old, *new}):
        here = f"{path}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found = _differing(a, b, f"{here}.")
            if found is not None:
                return found
        elif a != b:
            return f"{here}={a}, now {b}"
    return None
