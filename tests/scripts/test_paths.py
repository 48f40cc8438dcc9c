"""Paths that are not there, runs that are damaged, devices that are missing: one line that names the key, and soon."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.model.checkpoint import resolve_checkpoint
from longspan.scripts.cli import main

Refused = Callable[..., list[str]]
TYPED = " (set on the command line)"

MISSING = [
    (["train", "data.path=nope"], "data.path=nope: does not exist" + TYPED),
    (["train", "data.path=nope", "dry_run=true"], "data.path=nope: does not exist" + TYPED),
    (["train", "data.path=text"], "data.path=text: does not exist; did you mean texts?" + TYPED),
    (["train", "data.path=texts/*.md"], "data.path=texts/*.md: no file matches" + TYPED),
    (["prepare", "data.path=nope"], "data.path=nope: does not exist" + TYPED),
    (
        ["prepare", "data=files", "data.sources=[{kind: files, path: texts}, {kind: files, path: nope}]"],
        "data.sources.1.path=nope: does not exist" + TYPED,
    ),
    (
        ["train", "data.tokenizer.kind=file", "data.tokenizer.path=nope.json"],
        "data.tokenizer.path=nope.json: does not exist" + TYPED,
    ),
    (["train", "checkpoint=nope"], "checkpoint=nope: no such directory" + TYPED),
    (["estimate", "checkpoint=nope"], "checkpoint=nope: no such directory" + TYPED),
    (["train", "resume=nope"], "resume=nope: no such directory" + TYPED),
    (["train", "resume=texts"], "resume=texts: is not a run (it has neither config.yaml nor checkpoints/)" + TYPED),
    (["evaluate", "checkpoint=nope"], "checkpoint=nope: no such directory" + TYPED),
    (
        ["evaluate", "checkpoint=texts"],
        "checkpoint=texts: is neither a checkpoint directory (no config.json) nor a run (no checkpoints/)" + TYPED,
    ),
    (["generate", "checkpoint=nope", "prompt=x"], "checkpoint=nope: no such directory" + TYPED),
]


@pytest.fixture(autouse=True)
def _texts() -> None:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some text")


@pytest.mark.parametrize(("argv", "line"), MISSING, ids=[" ".join(argv) for argv, _ in MISSING])
def test_what_is_not_there_is_named_with_its_key(refused: Refused, argv: list[str], line: str) -> None:
    assert refused(*argv) == [line]


def test_several_paths_cost_several_lines(refused: Refused, workshop: Path) -> None:
    lines = refused("evaluate", "checkpoint=nope", "data.path=nowhere.txt")
    assert [line.partition("=")[0] for line in lines] == ["checkpoint", "data.path"]
    (line,) = refused("generate", f"checkpoint={workshop / 'runs/tiny'}", "file=nowhere.txt")
    assert line == "file=nowhere.txt: does not exist" + TYPED


def test_paths_are_checked_before_torch_is_imported() -> None:
    code = (
        "import sys; from longspan.scripts.cli import main; "
        f"codes = [main(argv) for argv in {[argv for argv, _ in MISSING]}]; "
        "print(set(codes), [name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "{2} []\n"
    assert len(done.stderr.splitlines()) == len(MISSING)


def test_data_elsewhere_is_no_hindrance_to_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "experiment=tiny", "data.path=nope"]) == 0
    out, err = capsys.readouterr()
    assert "parameters" in out
    assert err == "note: data.path=nope: does not exist (on this machine)\n"
    assert main(["estimate", "experiment=tiny", "data.path=texts"]) == 0
    assert capsys.readouterr().err == ""


def test_globs_and_data_sets_on_the_hub_are_not_files(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("texts/*.txt", "**/*.txt", "hub:owner/name"):
        assert main(["prepare", f"data.path={path}", "dry_run=true"]) == 0
    capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_lightning_is_imported() -> None:
    code = (
        "import sys; from longspan.scripts.cli import main; "
        "code = main(['train', 'experiment=tiny', 'trainer.accelerator=gpu']); print(code, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False\n"
    assert done.stderr == (
        "longspan train: trainer.accelerator=gpu: no CUDA device is visible; use trainer.accelerator=cpu or auto\n"
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_an_evaluation_window_beyond_the_learned_positions(refused: Refused, workshop: Path) -> None:
    run = workshop / "runs/tiny"
    for checkpoint in (run, resolve_checkpoint(run)):
        assert refused("evaluate", f"checkpoint={checkpoint}", "evaluation.window=129") == [
            f"evaluation.window=129: is longer than the 128 learned positions of {checkpoint}; lower it" + TYPED
        ]


def test_evaluations_of_one_checkpoint_on_several_texts(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.txt").write_text("import os\n" * 20)
    arguments = ["evaluate", f"checkpoint={workshop / 'runs/tiny'}"]
    assert main([*arguments, "evaluation.max_tokens=500"]) == 0
    assert main([*arguments, "data.path=texts/a.txt"]) == 0
    assert main([*arguments, "data.path=b.txt"]) == 0
    capsys.readouterr()
    scored = {
        path.parent.name: json.loads(path.read_text())["perplexity"]["bytes"]
        for path in Path("evaluations/tiny").glob("*/evaluation.json")
    }
    assert scored.pop("held-out") >= 500
    assert scored == {"texts-a.txt": 9, "b.txt": 200}


def test_by_default_as_much_is_generated_as_fits(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", f"checkpoint={workshop / 'runs/tiny'}", "prompt=abc", "stop=false", "temperature=0"]
    assert main([*arguments, "precision=fp32"]) == 0
    default = capsys.readouterr().out
    from longspan.data.tokenizer import Tokenizer

    prompt = len(Tokenizer.load(resolve_checkpoint(workshop / "runs/tiny")).encode("abc"))
    assert main([*arguments, "precision=fp32", f"max_new_tokens={128 - prompt + 1}"]) == 0
    assert capsys.readouterr().out == default
    assert main([*arguments, "precision=fp32", f"max_new_tokens={128 - prompt + 2}"]) == 2
    assert "learned 128" in capsys.readouterr().err


def test_a_damaged_run_names_the_file(refused: Refused, workshop: Path) -> None:
    shutil.copytree(workshop / "runs/tiny", "run", symlinks=True)  # some of wandb's lead nowhere
    for weights in Path("run/checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    Path("run/checkpoints/best.json").unlink()
    for argv in (["generate", "prompt=x"], ["evaluate"], ["train", "experiment=tiny"]):
        verb, *rest = argv
        (line,) = refused(verb, "checkpoint=run", *rest)
        assert line.startswith(
            "run: no checkpoint of the run is whole: run/checkpoints/step-00000020/model.safetensors is 1000 bytes"
        )
    (line,) = refused("train", "experiment=tiny", "resume=run", "callbacks=quiet")
    assert "run/checkpoints/step-00000020/model.safetensors is 1000 bytes" in line
    assert line.startswith("resume=run: ")
    assert line.endswith("; without resume, overwrite=true starts the run anew")


def test_a_run_that_has_more_steps_already(refused: Refused, workshop: Path) -> None:
    shutil.copytree(workshop / "runs/tiny", "run", symlinks=True)  # some of wandb's lead nowhere
    (line,) = refused(
        "train", "experiment=tiny", "callbacks=quiet", "resume=run", "trainer.steps=5", "schedule.warmup=1",
        f"data.cache={workshop}/cache",
    )  # fmt: skip
    assert line.startswith(
        "trainer.steps=5: the run in run is at step 20 already; give more steps, or start another run"
    )


# -- the tokenizer that weights bring ----------------------------------------------------------------------------------


def test_a_typed_tokenizer_beside_weights_that_bring_theirs(refused: Refused, workshop: Path) -> None:
    run = workshop / "runs/tiny"
    brings = f"checkpoint={run} brings the tokenizer that its weights were trained with; leave data.tokenizer out"
    uptrain = ("uptrain", "kv_heads=1", "output=grid")
    for argv in (["train", "experiment=tiny"], ["estimate", "experiment=tiny"], ["train", "dry_run=true"], uptrain):
        assert refused(*argv, f"checkpoint={run}", "data.tokenizer.kind=words", "data.tokenizer.vocab_size=300") == [
            f"data.tokenizer.kind=words: {brings}" + TYPED,
            f"data.tokenizer.vocab_size=300: {brings}" + TYPED,
        ]
        (line,) = refused(*argv, f"checkpoint={resolve_checkpoint(run)}", "data.tokenizer={kind: words}")
        assert line.startswith('data.tokenizer={"kind": "words"}: ' if argv is uptrain else "data.tokenizer={")
        assert line.endswith(
            "brings the tokenizer that its weights were trained with; leave data.tokenizer out" + TYPED
        )
    # Which file it is is compared when it is read; its other keys say nothing of a file.
    file = ["data.tokenizer.kind=file", f"data.tokenizer.path={resolve_checkpoint(run)}"]
    (line,) = refused("train", "experiment=tiny", f"checkpoint={run}", *file, "data.tokenizer.train_bytes=9")
    assert line == f"data.tokenizer.train_bytes=9: {brings}" + TYPED
    (line,) = refused(*uptrain, f"checkpoint={run}", "data={tokenizer: {kind: words}}")
    assert line == f'data.tokenizer={{"kind": "words"}}: {brings}' + TYPED


def test_weights_without_a_tokenizer_need_one_named(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(resolve_checkpoint(workshop / "runs/tiny"), "bare")
    Path("bare/tokenizer.json").unlink()
    _take_off("bare", "tokenizer.json")
    argv = ["train", "experiment=tiny", "checkpoint=bare", "data.tokenizer.kind=bytes", "dry_run=true"]
    assert main(argv) == 0, capsys.readouterr().err


def test_what_is_recorded_is_the_tokenizer_that_was_used(refused: Refused, workshop: Path) -> None:
    parent = resolve_checkpoint(workshop / "runs/tiny")
    experiment = Path("mine/experiment")
    experiment.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [tiny]\ndata: {tokenizer: {kind: bpe, vocab_size: 300}}\n"
    (experiment / "other.yaml").write_text(text)
    argv = [
        "train",
        "--config-dir",
        "mine",
        "experiment=other",
        "callbacks=quiet",
        "logger=csv",
        "evaluation.enabled=false",
    ]
    argv += [f"data.cache={workshop}/cache", "trainer.steps=4", "schedule.warmup=1", "sample.prompt=", "output=run"]
    assert main([*argv, f"checkpoint={parent}"]) == 0

    def recorded() -> dict[str, object]:
        return json.loads(Path("run/config.yaml").read_text())["data"]["tokenizer"]

    assert (recorded()["kind"], recorded()["path"]) == ("file", str(parent))
    used = recorded()
    assert main([*argv, "resume=auto", "trainer.steps=6"]) == 0
    assert recorded() == used
    assert refused(*argv, "resume=auto", "trainer.steps=8", "data.tokenizer.kind=bytes") == [
        "data.tokenizer.kind=bytes: the run in run goes on with the tokenizer that its weights brought; leave "
        "data.tokenizer out" + TYPED
    ]


def test_a_run_from_weights_without_a_tokenizer_goes_on_as_it_began(workshop: Path) -> None:
    shutil.copytree(resolve_checkpoint(workshop / "runs/tiny"), "bare")
    Path("bare/tokenizer.json").unlink()
    _take_off("bare", "tokenizer.json")
    argv = [
        "train",
        "experiment=tiny",
        "callbacks=quiet",
        "logger=csv",
        "evaluation.enabled=false",
        "data.tokenizer.kind=bytes",
    ]
    argv += [f"data.cache={workshop}/cache", "trainer.steps=4", "schedule.warmup=1", "sample.prompt=", "output=run"]
    assert main([*argv, "checkpoint=bare"]) == 0
    assert main([*argv, "resume=auto", "trainer.steps=6"]) == 0
    assert json.loads(Path("run/config.yaml").read_text())["data"]["tokenizer"]["kind"] == "bytes"


def _take_off(checkpoint: str, name: str) -> None:
    """Strikes a file from a checkpoint's manifest."""
    manifest = Path(checkpoint, "manifest.json")
    content = json.loads(manifest.read_text())
    del content["files"][name]
    manifest.write_text(json.dumps(content))
