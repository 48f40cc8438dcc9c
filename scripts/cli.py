"""`longspan <verb> [key=value …]`: finds the verb, has its config composed and validated, and turns every way in which
that can end into an exit code and, at most, a line per problem on stderr.

Exit codes: 0 done, 1 a run failed, 2 the request was wrong, 130 interrupted, 143 terminated after saving.
Nothing here imports torch; a verb does, once its request is known to be sound.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from longspan.training.errors import RunFailed, Terminated, UserError

DONE, FAILED, WRONG_REQUEST, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb is a module `verb_<name>` with `run(config) -> exit code`, a YAML in configs/ and a schema.

    request   the class in training/schema_requests.py that lists the keys; validate  the function that checks them
    """

    summary: str
    request: str
    validate: str
    examples: tuple[str, ...]


VERBS: dict[str, Verb] = {
    "train": Verb(
        "a run from config: tokenizer and data if missing, training, evaluation, report",
        "RunRequest",
        "validate",
        ("longspan train experiment=quickstart", "longspan train data.path=my_texts/ model=llama-20m attention=local"),
    ),
    "prepare": Verb(
        "documents -> tokenizer -> memory-mapped token store",
        "PrepareConfig",
        "validate_prepare",
        ("longspan prepare data=stdlib", "longspan prepare experiment=quickstart"),
    ),
    "import": Verb(
        "a checkpoint from a Hugging Face directory",
        "ImportConfig",
        "validate_import",
        ("longspan import source=DIR output=checkpoints/mine", "longspan import source=DIR output=OUT dry_run=true"),
    ),
    "export": Verb(
        "a Hugging Face directory from a checkpoint, for transformers and vLLM",
        "ExportConfig",
        "validate_export",
        ("longspan export checkpoint=runs/mine output=DIR", "longspan export checkpoint=DIR output=OUT dtype=bf16"),
    ),
    "convert": Verb(
        "surgery on a checkpoint: windows and global tokens, more positions, fewer key/value heads",
        "ConvertConfig",
        "validate_convert",
        (
            "longspan convert checkpoint=DIR surgery=longformer window=512 output=OUT",
            "longspan convert checkpoint=DIR surgery=[positions,longformer] max_positions=4096 window=512 output=OUT",
        ),
    ),
    "uptrain": Verb(
        "fewer key/value heads, trained further, beside a control: a grid of cells and a report",
        "UptrainRequest",
        "validate_uptrain",
        (
            "longspan uptrain checkpoint=runs/mine kv_heads=[4,2,1] alpha=[0,0.02,0.05] seeds=[0,1] output=runs/gqa",
            "longspan uptrain checkpoint=DIR kv_heads=2 parent_steps=5000 recipe=quickstart data.path=texts output=OUT",
        ),
    ),
    "evaluate": Verb(
        "perplexity and long-document tasks of checkpoints, each number with its protocol; JSON, Markdown, a page",
        "EvaluateConfig",
        "validate_evaluate",
        (
            "longspan evaluate checkpoint=runs/quickstart",
            "longspan evaluate checkpoint=DIR data.path=book.txt tasks=[perplexity,passkey] lengths=[1024,2048]",
            "longspan evaluate checkpoints=[A,B] tasks=[qmsum] files=my_data long_texts=bm25",
        ),
    ),
    "generate": Verb(
        "text from a prompt, a file or a list of requests, streamed",
        "GenerateConfig",
        "validate_generate",
        (
            "longspan generate checkpoint=runs/quickstart prompt='def main'",
            "longspan generate checkpoint=DIR file=- num_beams=4 temperature=0",
            "longspan generate checkpoint=DIR requests=questions.jsonl output=answers.jsonl",
        ),
    ),
    "estimate": Verb(
        "parameters, tokens, FLOPs, memory and time of a run before it starts",
        "EstimateRequest",
        "validate_estimate",
        ("longspan estimate experiment=gpt2_small", "longspan estimate experiment=llama_300m hardware=A100"),
    ),
    "attention": Verb(
        "which backends can compute an attention on this machine, and why the others cannot",
        "ExplainRequest",
        "validate_explain",
        ("longspan attention attention=local_global", "longspan attention model=llama-300m accelerator=gpu"),
    ),
    "bench": Verb(
        "attention kernels against their peers, checked against fp64 before they are timed",
        "BenchConfig",
        "validate_bench",
        ("longspan bench suite=attention", "longspan bench suite=window shapes=full time_limit=540 output=DIR"),
    ),
    "conformance": Verb(
        "holds an attention backend, a registered or your own, to the definition of attention",
        "ConformanceConfig",
        "validate_conformance",
        ("longspan conformance backend=sdpa", "longspan conformance backend=mypkg.mymodule:MyBackend dtypes=[fp32]"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Line:
    """A command line taken apart."""

    arguments: tuple[str, ...]
    config_dir: Path | None
    help: bool


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `longspan ARGV…` (default: of this process's arguments)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in argv if not word.startswith("-")), "")
    speaker = f"longspan {name}" if name in VERBS else "longspan"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # a reader that is gone shows here, not at exit
    except BrokenPipeError:
        _silence_stdout()
        return DONE
    except KeyboardInterrupt:
        print(f"{speaker}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the one place where every failure becomes an exit code)
        if os.environ.get("LONGSPAN_TRACEBACK") == "1":
            traceback.print_exc()
        code, lines = explain_failure(error)
        for line in lines:
            print(f"{speaker}: {_printable(line)}", file=sys.stderr)
    return code


def explain_failure(error: Exception) -> tuple[int, list[str]]:
    """The exit code of an exception and what to say about it."""
    problems = getattr(error, "problems", None)
    if isinstance(error, Terminated):
        return error.exit_code, [_one_line(error)]
    if _disk_is_full(error):
        advice = "; free some and run the same command again" if type(error) is OSError and error.filename else ""
        return FAILED, [_one_line(error) + advice]
    if isinstance(error, RunFailed):
        return FAILED, [_one_line(error)]
    if _users_mistake(error):
        return WRONG_REQUEST, list(problems) if problems else [_one_line(error)]
    return FAILED, [f"{type(error).__name__}: {_one_line(error)} (LONGSPAN_TRACEBACK=1 shows where)"]


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if argv[0] in ("-V", "--version"):
        print(f"longspan {_version()}")
        return DONE
    name = argv[0]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(VERBS)}"
        raise UserError(f"{name}: no such verb; {hint}")
    line = _take_apart(argv[1:])

    from longspan.training import schema
    from longspan.training.config_paths import check_paths

    from .compose import compose

    verb = VERBS[name]
    request: type = getattr(schema, verb.request)
    composed = compose(name, line.arguments, schema=request, config_dir=line.config_dir)
    if line.help:
        from .help import render

        print(render(name, verb.summary, verb.examples, request, composed.raw, config_dir=line.config_dir))
        return DONE
    validate: Callable[..., object] = getattr(schema, verb.validate)
    config = validate(composed.raw, where=composed.where)
    check_paths(config, where=composed.where)
    return import_module(f".verb_{name}", __package__ or "longspan.scripts").run(config)


def _take_apart(words: Sequence[str]) -> _Line:
    arguments: list[str] = []
    config_dir: Path | None = None
    asks_help = False
    remaining = iter(words)
    for word in remaining:
        flag, _, value = word.partition("=")
        if word in ("-h", "--help"):
            asks_help = True
        elif flag in ("--config-dir", "-cd"):
            value = value or next(remaining, "")
            if not value:
                raise UserError("--config-dir: expected a directory")
            config_dir = Path(value)
        elif flag in ("-m", "--multirun"):
            raise UserError(
                "--multirun is not offered, because every run is a process of its own; "
                "sweep with a shell loop: for lr in 1e-3 3e-4; do longspan train optimizer.lr=$lr name=lr-$lr; done"
            )
        else:
            arguments.append(word)
    return _Line(tuple(arguments), config_dir, asks_help)


def _overview() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "longspan: train and evaluate long-context transformers from one definition of attention",
            "",
            "usage: longspan <verb> [key=value ...] [group=option ...] [--config-dir DIR]",
            "",
            *(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()),
            "",
            "longspan <verb> --help lists every key with its type, default and meaning. longspan --version.",
        ]
    )


def _version() -> str:
    try:
        return version("longspan")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "(not installed)"


def _users_mistake(error: BaseException) -> bool:
    """ValueErrors that our own code raised are sentences for the user; so is what the file system says of a path.

    UnsupportedAttention is a NotImplementedError with a sentence. What torch or another library raises is a failure.
    """
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)):
        return True
    if type(error).__module__.startswith("longspan."):
        return isinstance(error, (ValueError, NotImplementedError))
    return type(error) is ValueError and _raised_by(error).startswith("longspan.")


def _raised_by(error: BaseException) -> str:
    """The module whose code raised it."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _printable(line: str) -> str:
    """What a user typed may hold control characters; a line stays a line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _silence_stdout() -> None:
    """Nobody reads any more; without this the interpreter complains when it flushes at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # stdout is not a file
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


if __name__ == "__main__":
    sys.exit(main())
