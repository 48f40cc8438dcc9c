"""What a user sees: verbs, exit codes, one line a mistake, and nothing left behind."""
# ruff: noqa: E501 (what a user reads is quoted whole)

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan.model.checkpoint import resolve_checkpoint
from longspan.scripts import verb_estimate
from longspan.scripts.cli import VERBS, main
from longspan.training.errors import RunFailed, Terminated

Refused = Callable[..., list[str]]
COMMAND = [sys.executable, "-m", "longspan.scripts.cli"]
EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs/experiment").glob("*.yaml"))


# -- the surface -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_without_a_verb_the_verbs_are_listed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    for verb in ("train", "prepare", "evaluate", "generate", "estimate", "attention"):
        assert f"\n  {verb} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("longspan ")


def test_a_misspelled_verb(refused: Refused) -> None:
    assert refused("trian") == ["trian: no such verb; did you mean train?"]
    assert refused("zzz") == [f"zzz: no such verb; verbs are {', '.join(VERBS)}"]


def test_sweeps_are_shell_loops(refused: Refused) -> None:
    (line,) = refused("train", "-m", "optimizer.lr=1e-3,1e-4")
    assert "for lr in" in line
    (line,) = refused("train", "optimizer.lr=1e-3,1e-4")
    assert line == "optimizer.lr=1e-3,1e-4: lists several values; a list is [a,b], and a sweep is a shell loop"


# -- mistakes in what was typed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trainer.stps=5"], "trainer.stps=5: unknown key; did you mean trainer.steps? (set on the command line)"),
        (["+trainer.stps=5"], "trainer.stps=5: unknown key; did you mean trainer.steps? (set on the command line)"),
        (["modle=x"], "modle=x: unknown key; did you mean model? (set on the command line)"),
        (["experimnt=tiny"], "experimnt=tiny: unknown key; did you mean experiment? (set on the command line)"),
        (["sed=3"], "sed=3: unknown key; did you mean seed? (set on the command line)"),
        (["trainr=cpu"], "trainr=cpu: unknown key; did you mean trainer? (set on the command line)"),
        (["dataset=x"], "dataset=x: unknown key; did you mean data.path? (set on the command line)"),
        (["lr=1e-3"], "lr=0.001: unknown key; did you mean optimizer.lr? (set on the command line)"),
        (["trainer.steps=many"], "trainer.steps=many: expected a whole number, at least 1 (set on the command line)"),
        (["trainer.steps="], "trainer.steps=: expected a whole number, at least 1 (set on the command line)"),
        (["trainer.steps=0"], "trainer.steps=0: expected a whole number, at least 1 (set on the command line)"),
        (["optimizer=adamW"], "optimizer=adamW: optimizer has adamw; did you mean adamw? (set on the command line)"),
        (["experiment=quikstart"], f"experiment=quikstart: experiment has {', '.join(EXPERIMENTS)}; "
                                   "did you mean quickstart? (set on the command line)"),
        (["trainer.steps"], "trainer.steps: expected key=value, with a key like trainer.steps"),
        (["--steps=5"], "--steps=5: longspan takes key=value; did you mean trainer.steps=5?"),
        (["--steps", "5"], "--steps 5: longspan takes key=value; did you mean trainer.steps=5?"),
        (["--trainer.steps", "5"], "--trainer.steps 5: longspan takes key=value; did you mean trainer.steps=5?"),
        (["--max-steps"], "--max-steps: longspan takes key=value; did you mean trainer.steps=…?"),
        (["--zzz"], "--zzz: expected key=value, as in trainer.steps=5, without dashes"),
        (["=5"], "=5: expected key=value, with a key like trainer.steps"),
        (["trainer..steps=5"], "trainer..steps=5: expected key=value, with a key like trainer.steps"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: configs are composed with Hydra, but its settings and launchers are not used"),
        (["trainer.steps=(("], "trainer.steps=((: cannot be read; put text with special characters in quotes: "
                               "'trainer.steps=\"…\"'"),
        (["seed=${oc.env:HOME}"], "seed=${oc.env:HOME}: configs are saved with a run, so they read no environment variables; "
                                  "let the shell put the value in: key=$NAME"),
        (["data.sources.7.path=x"], "data.sources.7.path=x: there is no item 7 in that list"),
        (["model=gpt2-small", "model.n_heads=7"], "model.d_model=768 is not a multiple of n_heads=7: choose a number of heads "
                                                  "that divides it, or set head_dim (set on the command line)"),
        (["model=gpt2-small", "data.context=1025"], "data.context=1025: is longer than model.max_positions=1024 learned "
                                                    "positions; raise model.max_positions or lower it (set on the command line)"),
        (["data.tokenizer.vocab_size=9000"], "data.tokenizer.vocab_size=9000: makes 9000 tokens, more than "
                                             "model.vocab_size=8192; raise it or lower this (set on the command line)"),
        (["checkpoint=a", "resume=auto"], "checkpoint=a: starts anew from weights and resume=auto continues a run; "
                                          "give one of them (resume=auto alone continues a run that started from weights) "
                                          "(set on the command line)"),
        (["data=files"], "data.sources.0.kind=files: needs data.sources.0.path, a file, directory or glob (or data.path) "
                         "(set in configs/data/files.yaml)"),
        (["a\x1eb\n=1"], "a\\x1eb\\n=1: expected key=value, with a key like trainer.steps"),
        (["--config-dir=nowhere"], "--config-dir=nowhere: no such directory"),
    ],
)  # fmt: skip
def test_one_line_says_what_to_do(refused: Refused, arguments: list[str], line: str) -> None:
    assert refused("train", *arguments) == [line]


def test_several_mistakes_cost_several_lines(refused: Refused) -> None:
    lines = refused("train", "trainer.stps=5", "optimizer.lr=-1", "schedule.name=cosin")
    assert [line.partition("=")[0] for line in lines] == ["optimizer.lr", "schedule.name", "trainer.stps"]
    lines = refused("train", "model=nope", "experiment=nope")
    assert [line.partition("=")[0] for line in lines] == ["model", "experiment"]


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_verbs_that_need_a_checkpoint_say_so(refused: Refused, verb: str) -> None:
    assert refused(verb)[0].startswith("checkpoint: is required: a checkpoint directory, or a run")


def test_a_wrong_request_is_refused_before_torch_is_imported() -> None:
    code = (
        "import sys; from longspan.scripts.cli import main; code = main(['train', 'trainer.stps=5']); "
        "print(code, [name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    seconds = time.monotonic() - start
    assert done.stdout.split(" ", 1) == ["2", "[]\n"]
    assert done.stderr.splitlines() == [
        "longspan train: trainer.stps=5: unknown key; did you mean trainer.steps? (set on the command line)"
    ]
    assert seconds < 15  # about one on an idle machine; the bound only catches an import gone astray


# -- mistakes that show when files are read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "no text"),
        (b"text\0text" * 100, "binary"),
        ("naïve café".encode("latin-1") * 10, "UTF-8"),
    ],
    ids=["missing", "empty", "binary", "latin-1"],
)
def test_data_that_cannot_be_read(refused: Refused, content: bytes | None, words: str) -> None:
    if content is not None:
        Path("text.txt").write_bytes(content)
    for verb in ("train", "prepare"):
        tiny = ["experiment=tiny"] if verb == "train" else ["data=stdlib"]
        (line,) = refused(verb, *tiny, "data.path=text.txt")
        assert "text.txt" in line
        assert words in line
    assert not Path("runs/tiny").exists()


def test_a_window_with_a_backend_that_cannot(refused: Refused) -> None:
    # flex has no backward on a CPU: refused when the model is built, by the name of the pattern.
    (line,) = refused("train", "experiment=tiny", "attention=local", "attention.backend.train=flex")
    assert line.startswith("flex cannot run this attention: backward on cpu")
    assert "layer pattern 'local'" in line
    assert "Backends that can: " in line
    (line,) = refused("train", "experiment=tiny", "attention.backend=flexx")
    assert "did you mean flex" in line.replace("'", "")


def test_checkpoints_that_are_not_there_or_not_ours(refused: Refused, workshop: Path) -> None:
    for argv in (["generate", "prompt=x"], ["evaluate"], ["train", "experiment=tiny"]):
        verb, *rest = argv
        (line,) = refused(verb, "checkpoint=nowhere", *rest)
        assert "nowhere" in line
        assert "no such directory" in line

    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"model_type": "bert"}')
    (line,) = refused("generate", "checkpoint=foreign", "prompt=x")
    assert "'bert'" in line

    shutil.copytree(workshop / "runs/tiny/checkpoints/step-00000020", "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    for argv in (["generate", "prompt=x"], ["evaluate"], ["train", "experiment=tiny"]):
        verb, *rest = argv
        (line,) = refused(verb, "checkpoint=cut", *rest)
        assert "cut/model.safetensors is 1000 bytes" in line


def test_two_processes_cannot_write_one_run(refused: Refused, workshop: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from longspan.training.run_directory import locked\n"
        "with locked(Path('busy')): print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        (line,) = refused("train", "experiment=tiny", "output=busy", f"data.cache={workshop}/cache")
        assert line.startswith(f"output=busy: process {other.pid} is writing this run")
    finally:
        other.communicate()
    assert not Path("busy").exists()


def test_outputs_are_not_overwritten_unasked(
    refused: Refused, workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workshop / "runs/tiny"
    (line,) = refused("train", "experiment=tiny", f"output={run}")
    assert "resume=auto" in line
    assert "overwrite=true" in line

    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    (line,) = refused("evaluate", f"checkpoint={run}", "output=full")
    assert line == "output=full: exists and is not an empty directory; choose another, or set overwrite=true"
    assert main(["evaluate", f"checkpoint={run}", "output=full", "overwrite=true"]) == 0
    assert sorted(path.name for path in Path("full").iterdir()) == [
        "documents.jsonl",
        "evaluation.json",
        "evaluation.md",
        "evaluation.png",
        "mine.txt",
        "request.json",
        "results.html",
        "results.json",
        "results.md",
    ]
    capsys.readouterr()


# -- how things end ----------------------------------------------------------------------------------------------------------


def _raising(error: BaseException):
    def run(config: object) -> int:
        raise error

    return run


def _from_torch(config: object) -> int:
    import torch

    torch.zeros(2).reshape(3)
    return 0


def _from_numpy(config: object) -> int:
    import numpy as np

    np.zeros(2).reshape(3)  # a ValueError, but not a sentence of ours
    return 0


@pytest.mark.parametrize(
    ("run", "code", "line"),
    [
        (_raising(KeyboardInterrupt()), 130, "interrupted"),
        (_raising(Terminated(signal.SIGTERM, "saved")), 143, "saved"),
        (_raising(Terminated(signal.SIGINT, "saved")), 130, "saved"),
        (_raising(RunFailed("the loss is NaN")), 1, "the loss is NaN"),
        (_raising(FileNotFoundError(2, "No such file or directory", "x")), 2, "x: No such file or directory"),
        (
            _raising(OSError(errno.ENOSPC, "No space left on device", "runs/a")),
            1,
            "runs/a: No space left on device; free some and run the same command again",
        ),
        (_raising(ValueError("two\nlines")), 1, "ValueError: two lines (LONGSPAN_TRACEBACK=1 shows where)"),
        (_from_torch, 1, "RuntimeError: shape '[3]' is invalid for input of size 2 (LONGSPAN_TRACEBACK=1 shows where)"),
        (
            _from_numpy,
            1,
            "ValueError: cannot reshape array of size 2 into shape (3,) (LONGSPAN_TRACEBACK=1 shows where)",
        ),
    ],
)
def test_every_end_has_its_exit_code(
    run: Callable[[object], int],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verb_estimate, "run", run)
    assert main(["estimate"]) == code
    assert capsys.readouterr().err == f"longspan estimate: {line}\n"


def test_a_full_disk_behind_another_error_is_still_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: object) -> int:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RunFailed("no space left while writing runs/a; free some and continue with resume=auto") from error

    monkeypatch.setattr(verb_estimate, "run", run)
    assert main(["estimate"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_sentence_of_our_own_code_is_a_users_mistake(refused: Refused) -> None:
    (line,) = refused("estimate", "hardware=Z80")
    assert line.startswith("hardware=Z80: no ")
    assert "H100" in line


def test_the_traceback_is_there_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGSPAN_TRACEBACK", "1")
    assert main(["train", "trainer.stps=5"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("longspan train: trainer.stps=5")


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    child = subprocess.Popen(
        [*COMMAND, "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.wait(timeout=120) == 0
    assert child.stderr.read() == ""
    child.stderr.close()


# -- what works ----------------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_a_config_that_reads_back_and_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from longspan.training.schema import validate

    assert (
        main(
            [
                "train",
                "experiment=gpt2_small",
                "dry_run=true",
                "sample.prompt=x: ${y}",
                "trainer.steps=7",
                "schedule.warmup=1",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    config = validate(yaml.safe_load(out))
    assert config.trainer.steps == 7
    assert config.sample.prompt == "x: ${y}"
    assert config.optimizer.lr == 6e-4
    assert "# parameters  124,439,808" in out
    assert "# tokens      917,504 = 7 steps × 131,072" in out
    for word in ("FLOPs", "memory", "time"):
        assert f"# {word}" in out
    assert list(Path.cwd().iterdir()) == []


def test_estimate_for_a_gpu_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "experiment=gpt2_small", "hardware=A100"]) == 0
    out = capsys.readouterr().out
    assert "124,439,808" in out
    assert "A100" in out


def test_prepare_counts_what_it_stored(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for i in range(30):
        Path(f"texts/{i}.txt").write_text(f"text number {i}\n" * 5)
    texts = list(Path("texts").iterdir())
    for name in ("scan.pdf", "table.xlsx"):
        Path(f"texts/{name}").write_bytes(b"no text")
    arguments = [
        "prepare",
        "data=files",
        "data.path=texts",
        "data.tokenizer.kind=bytes",
        "data.validation_fraction=0.3",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "texts: skipped 2 files of other kinds\n" in out
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["split", "source", "documents", "tokens", "bytes"]
    counted = {row[0]: [int(cell.replace(",", "")) for cell in row[2:]] for row in rows[1:3]}
    total = [sum(column) for column in zip(counted["train"], counted["validation"], strict=True)]
    n_bytes = sum(len(path.read_bytes()) for path in texts)
    assert total == [30, n_bytes + 30, n_bytes]  # a token a byte, and one that ends each document


def test_evaluate_the_runs_own_held_out_documents(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workshop / "runs/tiny"
    # The best checkpoint of a run is what the run evaluated at its end: same documents, arithmetic and baseline.
    assert main(["evaluate", f"checkpoint={run}", "output=out", "evaluation.max_tokens=2000"]) == 0
    out = capsys.readouterr().out
    assert "Protocol: " in out
    assert "| order-2 byte n-gram |" in out
    mine = json.loads(Path("out/evaluation.json").read_text())
    theirs = json.loads((run / "evaluation.json").read_text())
    assert theirs.pop("checkpoint") in ("step-00000010", "step-00000020")
    assert mine == theirs
    assert mine["perplexity"]["protocol"]["max_tokens"] == 2000
    assert mine["perplexity"]["protocol"]["precision"] == "fp32"
    assert mine["baseline"]["bytes"] == mine["perplexity"]["bytes"]
    assert f"{mine['perplexity']['loss']:.4f}" in out


def test_evaluate_a_text_of_ones_own(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("naïve " * 50)
    checkpoint = workshop / "runs/tiny/checkpoints/step-00000020"
    assert main(["evaluate", f"checkpoint={checkpoint}", "data.path=a.txt"]) == 0
    capsys.readouterr()
    found = json.loads(Path("evaluations/step-00000020/a.txt/evaluation.json").read_text())["perplexity"]
    assert found["bytes"] == 350
    assert found["tokens"] == 351
    assert found["documents"] == 1


def test_evaluate_without_the_runs_store(workshop: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("run")
    shutil.copytree(workshop / "runs/tiny", run, symlinks=True)  # some of wandb's lead nowhere
    checkpoint = resolve_checkpoint(run)
    lineage = json.loads((checkpoint / "lineage.json").read_text())
    assert Path(lineage["data"]["store"]).is_absolute()
    lineage["data"]["store"] = str(Path.cwd() / "gone")
    (checkpoint / "lineage.json").write_text(json.dumps(lineage))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["lineage.json"] = {
        "size": (checkpoint / "lineage.json").stat().st_size,
        "sha256": hashlib.sha256((checkpoint / "lineage.json").read_bytes()).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (line,) = refused("evaluate", "checkpoint=run")
    assert line.startswith(f"{Path.cwd() / 'gone'}: the token store that ")
    assert line.endswith("prepare the data of that run again (longspan prepare), or give data.path=… to score a text")
    Path("a.txt").write_text("text " * 50)
    assert main(["evaluate", "checkpoint=run", "data.path=a.txt", "output=out"]) == 0
    assert "no n-gram baseline, " in capsys.readouterr().err
    assert "baseline" not in json.loads(Path("out/evaluation.json").read_text())


def test_generate_streams_the_prompt_and_what_follows(
    workshop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "generate",
        f"checkpoint={workshop / 'runs/tiny'}",
        "max_new_tokens=12",
        "stop=false",
        "precision=fp32",
    ]
    texts = []
    for seed in (1, 1, 2):
        assert main([*arguments, "prompt=def f(x): return x, ${y}", f"seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def f(x): return x, ${y}")
    assert len(texts[0].rstrip("\n")) > len("def f(x): return x, ${y}")
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]

    Path("prompt.txt").write_text("def f(x): return x, ${y}")
    assert main([*arguments, "file=prompt.txt", "seed=1"]) == 0
    assert capsys.readouterr().out == texts[0]
    assert main([*arguments, "prompt="]) == 0  # the start of a document
    assert capsys.readouterr().out.strip() != ""


def test_generate_reads_standard_input(
    workshop: Path, refused: Refused, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", f"checkpoint={workshop / 'runs/tiny'}", "file=-", "max_new_tokens=3", "temperature=0"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import os")))
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("import os")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert refused(*arguments) == ["file=-: is not UTF-8 text (byte 3)"]


def test_generation_past_the_positions_is_refused(refused: Refused, workshop: Path) -> None:
    (line,) = refused("generate", f"checkpoint={workshop / 'runs/tiny'}", "prompt=x", "max_new_tokens=500")
    assert "128" in line
    assert "max_new_tokens" in line


def test_attention_explains_both_stacks_of_an_encoder_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "model=led-tiny", "precision=fp32", "accelerator=cpu"]) == 0
    encoder, decoder = capsys.readouterr().out.split("\ndecoder\n")
    assert encoder.startswith("encoder\npattern layer: layers 0, 1\n  window=(8, 8), global_tokens; train")
    assert "prefill on" not in encoder  # it has no cache
    assert decoder.startswith("pattern full: layers 0, 1\n  causal; train")
    assert "; prefill on cpu" in decoder
    assert "; decode on cpu" in decoder


def test_attention_explains_every_pattern_in_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "attention=local_global", "model=llama-20m", "precision=bf16"]) == 0
    out = capsys.readouterr().out
    assert "pattern local: layers 0, 1, 2, 4, 5" in out
    assert "pattern global: layers 3" in out
    for word in ("train", "prefill", "decode", "reference", "sdpa", "flex", "window=(255, 0)"):
        assert word in out
