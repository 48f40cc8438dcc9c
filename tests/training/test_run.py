"""Whole runs in this process, and every wrong request."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.data.prepare import prepare
from longspan.kernels.attention import UnsupportedAttention
from longspan.model import checkpoint as model_checkpoint
from longspan.model.checkpoint import CheckpointError, load_config, load_model
from longspan.training import checkpointing, run_directory
from longspan.training import run as run_module
from longspan.training.checkpointing import Checkpoints, load_state, newest
from longspan.training.data_settings import prepare_settings
from longspan.training.errors import RunFailed, UserError
from longspan.training.metrics import MetricsFile, Row, read_rows
from longspan.training.plan import plan
from longspan.training.run import RunResult, train
from longspan.training.schema import as_request, validate

Request = Callable[..., dict]


def go(raw: dict) -> RunResult:
    return train(validate(raw))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"base": tmp_path_factory.mktemp("shared")}


@pytest.fixture
def finished(shared: dict[str, Path], request_of: Request) -> Path:
    """One short run with everything on, for tests that only read it."""
    if "run" not in shared:
        go(
            request_of(
                output=str(shared["base"] / "run"),
                evaluation={"enabled": True, "max_tokens": 500},
                sample={"prompt": "the ", "max_new_tokens": 30},
                callbacks={"progress": "off", "report": True},
            )
        )
        shared["run"] = shared["base"] / "run"
    return shared["run"]


def test_a_run_leaves_what_is_promised(finished: Path) -> None:
    assert {entry.name for entry in finished.iterdir()} == {
        ".lock",
        "accounting.json",
        "checkpoints",
        "config.yaml",
        "evaluation.json",
        "lineage.json",
        "metrics.csv",
        "report.html",
        "sample.txt",
        "summary.json",
        "train.log",
    }
    rows = read_rows(finished / "metrics.csv")
    assert [row.step for row in rows] == list(range(1, 11))
    assert [row.tokens for row in rows] == [128 * step for step in range(1, 11)]
    assert [row.step for row in rows if row.validation_loss is not None] == [4, 8, 10]
    assert [row.lr for row in rows][:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert rows[-1].lr == pytest.approx(1e-4)
    assert rows[0].loss is not None
    assert rows[-1].loss is not None
    assert rows[-1].loss < rows[0].loss
    summary = run_directory.read_json(finished / "summary.json")
    assert summary["steps"] == 10
    assert summary["validation_loss"] == rows[-1].validation_loss
    assert summary["bits_per_byte"] > summary["baseline_bits_per_byte"] > 0  # ten steps teach little
    evaluation = run_directory.read_json(finished / "evaluation.json")
    assert evaluation["perplexity"]["protocol"]["window"] == 16
    assert (finished / "sample.txt").read_text().startswith("the ")
    assert validate(json.loads((finished / "config.yaml").read_text())).trainer.steps == 10
    assert "step 10/10 loss" in (finished / "train.log").read_text()
    lineage = run_directory.read_json(finished / "lineage.json")
    assert lineage["parent"] is None
    assert lineage["versions"]["torch"] == torch.__version__
    assert len(lineage["sessions"]) == 1
    assert lineage["sessions"][0]["step"] == 0


def test_a_checkpoint_is_a_model_and_a_state(finished: Path) -> None:
    checkpoints = Checkpoints(finished, keep=2)
    assert checkpoints.steps() == [9, 10]
    path = checkpoints.path(10)
    model_checkpoint.verify(path)
    assert json.loads((path / "manifest.json").read_text())["files"].keys() >= {"trainer.ckpt", "tokenizer.json"}
    assert load_model(path).config.d_model == 32
    state = torch.load(path / "trainer.ckpt", weights_only=True)
    assert state["step"] == 10
    assert state["data"]["consumed"] == 80
    assert state["rng"][0].keys() == {"python", "numpy", "torch"}
    best = run_directory.read_json(finished / "checkpoints" / "best.json")
    losses = {row.step: row.validation_loss for row in read_rows(finished / "metrics.csv") if row.validation_loss}
    assert best == {"step": min(losses, key=losses.__getitem__), "validation_loss": min(losses.values())}
    assert model_checkpoint.resolve_checkpoint(finished) == checkpoints.path(best["step"])


def test_a_finished_run_is_finished(finished: Path, request_of: Request) -> None:
    before = (finished / "metrics.csv").read_text()
    result = go(request_of(output=str(finished), resume="auto"))
    assert result.final_step == 10
    assert (finished / "metrics.csv").read_text() == before


def test_starting_from_weights(finished: Path, request_of: Request, tmp_path: Path) -> None:
    # Another model is configured (the default of a command line); the checkpoint's own is trained.
    raw = request_of(
        checkpoint=str(finished),
        trainer__steps=2,
        model={"name": "llama-tiny", "vocab_size": 400},
        optimizer={"lr": 1e-9},
    )
    raw["data"]["tokenizer"] = {"kind": "bpe", "vocab_size": 300}
    go(raw)
    run = tmp_path / "run"
    parent = model_checkpoint.resolve_checkpoint(finished)
    assert load_config(Checkpoints(run, keep=2).path(2)) == load_config(parent)
    for (name, one), other in zip(
        load_model(parent).state_dict().items(), load_model(Checkpoints(run, keep=2).path(2)).state_dict().values()
    ):
        torch.testing.assert_close(one, other, msg=name, rtol=0, atol=1e-6)
    assert (parent / "tokenizer.json").read_bytes() == (
        Checkpoints(run, keep=2).path(2) / "tokenizer.json"
    ).read_bytes()
    assert run_directory.read_json(run / "lineage.json")["parent"] == str(parent)
    # Continued, it still is the checkpoint's model.
    raw.pop("checkpoint")
    assert go({**raw, "resume": "auto", "trainer": {**raw["trainer"], "steps": 3}}).final_step == 3


def without_context(raw: dict) -> dict:
    raw["data"].pop("context")
    return raw


def test_the_context_is_what_the_checkpoint_can_read(finished: Path, request_of: Request, tmp_path: Path) -> None:
    # The checkpoint has 128 learned positions; the model of the command line, which is not trained, has 4096.
    raw = without_context(request_of(checkpoint=str(finished), trainer__steps=1, model={"name": "llama-20m"}))
    planned = plan(validate(raw))
    assert planned.tokens_per_step == 8 * 128
    assert planned.model.n_layers == 1
    assert "context" not in as_request(validate(raw))["data"]  # what `dry_run` prints does not claim 1024
    go(raw)
    saved = validate(json.loads((tmp_path / "run" / "config.yaml").read_text()))
    assert saved.data.context == 128
    assert saved.model == load_config(Checkpoints(tmp_path / "run", keep=1).path(1))
    assert [row.tokens for row in rows_of(tmp_path / "run")] == [8 * 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__context": 129}, r"^data.context=129: is longer than the 128 learned positions of .*; lower it$"),
        ({"evaluation": {"window": 129}}, r"^evaluation.window=129: is longer than the 128 learned positions of "),
        ({"evaluation": {"stride": 17}}, r"^evaluation.stride=17: is larger than the window \(data.context=16\)"),
    ],
)
def test_lengths_that_the_checkpoint_cannot_read(
    changes: dict, message: str, finished: Path, request_of: Request
) -> None:
    refused(request_of(checkpoint=str(finished), model={"name": "llama-20m"}, **changes), message)


def test_a_resumed_run_keeps_its_context(finished: Path, request_of: Request, tmp_path: Path) -> None:
    raw = request_of(checkpoint=str(finished), trainer__steps=1, data__context=128, model={"name": "llama-20m"})
    go(raw)
    # Resumed with what the command line defaults to: a model with other lengths, and no context.
    raw = without_context(request_of(resume="auto", trainer__steps=2, model={"name": "gpt-tiny", "max_positions": 64}))
    assert plan(validate(raw)).tokens_per_step == 8 * 128
    go(raw)
    assert [row.tokens for row in rows_of(tmp_path / "run")] == [8 * 128, 16 * 128]
    raw["data"]["context"] = 127  # what is written counts: 64 positions are not the run's
    with pytest.raises(UserError, match=r"not what the run was trained on \(context: 128 → 127\)"):
        go(raw)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"config.yaml: does not say data.context"):
        go(without_context(raw))


def test_lengths_of_a_new_run_with_resume_auto(request_of: Request) -> None:
    refused(request_of(resume="auto", data__context=129), r"data.context=129: is longer than model.max_positions=128")
    refused(request_of(resume="auto", model__vocab_size=256), r"data.tokenizer.kind=bytes: makes 257 tokens")


def refused(raw: dict, message: str, error: type[Exception] = UserError) -> None:
    """Refused in one line, and the output directory is not there afterwards."""
    with pytest.raises(error, match=message) as caught:
        go(raw)
    assert "\n" not in str(caught.value)
    assert not Path(raw["output"]).exists()


def test_wrong_requests(finished: Path, request_of: Request, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run already; continue it with resume=auto, replace it with overwrite"):
        go(request_of(output=str(finished)))
    with pytest.raises(UserError, match="a run continues in its own directory; leave out output="):
        go(request_of(resume=str(finished)))
    raw = request_of(resume=str(tmp_path / "nowhere"))
    raw.pop("output")
    with pytest.raises(UserError, match="nowhere: is not a run"):
        go(raw)
    refused(request_of(checkpoint=str(tmp_path / "nothing")), "nothing: no such directory", CheckpointError)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (foreign / "manifest.json").write_text('{"files": {}}')
    refused(request_of(checkpoint=str(foreign)), "manifest.json|bert", CheckpointError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(request_of: Request) -> None:
    refused(request_of(trainer__accelerator="gpu"), "trainer.accelerator=gpu: no CUDA device is visible")


def test_a_window_with_a_backend_that_cannot(request_of: Request) -> None:
    raw = request_of(
        attention={"patterns": {"local": {"causal": True, "softcap": 5.0}}, "layers": ["local"], "backend": "sdpa"}
    )
    refused(raw, "sdpa cannot run this attention: softcap=5.0 .* Asked by layer pattern 'local'", UnsupportedAttention)


def test_a_vocabulary_that_is_too_large(finished: Path, request_of: Request, tmp_path: Path) -> None:
    tokenizer = {"kind": "file", "path": str(model_checkpoint.resolve_checkpoint(finished))}
    refused(
        request_of(data__tokenizer=tokenizer, model__vocab_size=256),
        "model.vocab_size=256: the tokenizer has 257 tokens; raise it",
    )
    config = validate(request_of(data__tokenizer={"kind": "bpe", "vocab_size": 270}, model__vocab_size=300))
    other = prepare(prepare_settings(config.data))
    raw = request_of(checkpoint=str(finished), data__tokenizer={"kind": "file", "path": str(other.directory)})
    refused(raw, "not the tokenizer of .*, whose weights know only their own")


def test_a_checkpoint_cut_short(finished: Path, request_of: Request, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_checkpoint.resolve_checkpoint(finished), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(
        request_of(checkpoint=str(broken)),
        "model.safetensors is .* bytes, the manifest says .* cut short",
        CheckpointError,
    )


def test_the_newest_checkpoint_that_verifies(request_of: Request, tmp_path: Path) -> None:
    raw = request_of(resume="auto")
    whole = [(row.step, row.loss) for row in rows_of(go(raw).directory)]
    run = tmp_path / "run"
    state = Checkpoints(run, keep=2).path(10) / "trainer.ckpt"
    state.write_bytes(state.read_bytes()[:100])
    (run / "checkpoints" / ".step-00000010.partial-abc").mkdir()
    assert newest(run) == Checkpoints(run, keep=2).path(9)
    go(raw)
    assert [(row.step, row.loss) for row in rows_of(run)] == whole
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
        "best.json",
        "step-00000009",
        "step-00000010",
    ]
    assert len(run_directory.read_json(run / "lineage.json")["sessions"]) == 2


def rows_of(run: Path) -> list:
    return read_rows(run / "metrics.csv")


def test_what_may_change_on_resume_and_what_may_not(request_of: Request, tmp_path: Path) -> None:
    go(request_of(trainer__steps=3))
    with pytest.raises(
        UserError, match=r"resume: the configured model is not the one that .* holds: n_layers=1, not 2"
    ):
        go(request_of(resume="auto", model__n_layers=2))
    with pytest.raises(UserError, match=r"is not what the run was trained on \(seed: 0 → 1\)"):
        go(request_of(resume="auto", seed=1))
    with pytest.raises(UserError, match=r"trainer.steps=2: the run in .* is at step 3 already"):
        go(request_of(resume="auto", trainer__steps=2))
    go(request_of(resume="auto", trainer__steps=5, optimizer={"lr": 5e-4}, schedule={"name": "constant", "warmup": 0}))
    assert [row.lr for row in rows_of(tmp_path / "run")][3:] == [5e-4, 5e-4]


def test_a_full_disk(request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def full(value: dict, path: Path) -> None:
        if value["step"] == 6:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(value, path)

    monkeypatch.setattr(checkpointing.torch, "save", full)
    with pytest.raises(
        RunFailed, match=r"step-00000006: cannot be written: No space left on device; the last good ch"
    ) as e:
        go(request_of())
    assert "\n" not in str(e.value)
    assert "step-00000004" in str(e.value)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(entry.name for entry in checkpoints.iterdir()) == ["best.json", "step-00000003", "step-00000004"]


def test_a_disk_that_fills_up_elsewhere(request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: MetricsFile, row: Row) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.csv")

    monkeypatch.setattr(MetricsFile, "append", full)
    with pytest.raises(RunFailed, match=r"^metrics.csv: No space left on device; there is no checkpoint yet$"):
        go(request_of())


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EACCES, errno.EIO, errno.ENOENT])
@pytest.mark.parametrize("name", ["lineage.json", "metrics.csv", "sample.txt"])
def test_what_the_system_refuses_a_run_that_goes_on(
    number: int, name: str, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, on the way, at the end: RunFailed in one line, never a wrong request."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), name)

    owner, function = {
        "lineage.json": (run_directory, "write_json"),
        "metrics.csv": (MetricsFile, "append"),
        "sample.txt": (run_module, "sample"),
    }[name]
    monkeypatch.setattr(owner, function, refuse)
    with pytest.raises(
        RunFailed, match=rf"^{name}: {os.strerror(number)}; (the last good|there is no) checkpoint"
    ) as e:
        go(request_of(trainer__steps=1))
    assert "\n" not in str(e.value)


def test_a_nan_names_the_last_good_checkpoint(request_of: Request, tmp_path: Path) -> None:
    with pytest.raises(
        RunFailed, match=r"step \d: the loss is nan in sequences .* the last good checkpoint is|no checkpoint"
    ):
        go(request_of(optimizer={"lr": 1e30}, schedule={"name": "constant", "warmup": 0}))


def test_a_training_state_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "trainer.ckpt").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(tmp_path)
    with zipfile.ZipFile(tmp_path / "trainer.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000_000)
    with pytest.raises(CheckpointError, match="holds compressed entries"):
        load_state(tmp_path)
    torch.save({"format": 99}, tmp_path / "trainer.ckpt")
    with pytest.raises(CheckpointError, match="format 99, but this version reads format 1"):
        load_state(tmp_path)


def test_a_plan_writes_nothing(request_of: Request, tmp_path: Path) -> None:
    costs = plan(validate(request_of()))
    assert costs.tokens == 10 * 8 * 16
    assert costs.tokens_per_step == 128
    assert costs.flops == costs.tokens * costs.flops_per_token
    assert costs.seconds is not None
    assert costs.seconds > 0
    assert costs.memory.total > 4 * costs.parameters.total * 4
    assert any("measured matrix-product rate" in line for line in costs.lines())
    assert list(tmp_path.iterdir()) == []


def test_a_plan_refuses_what_the_run_would(request_of: Request) -> None:
    sinks = {
        "patterns": {"sinks": {"causal": True, "window": {"left": 7}, "sink_tokens": 2}},
        "backend": {"train": "flex"},
    }
    raw = request_of(attention=sinks)
    with pytest.raises(UnsupportedAttention, match="flex cannot run this attention: backward on cpu"):
        plan(validate(raw))
    # On a GPU it can, and the plan of one needs none.
    raw["trainer"]["accelerator"] = "gpu"
    raw["trainer"]["precision"] = "bf16-mixed"
    assert plan(validate(raw), hardware="H100").device == "H100"


def test_document_mask_reaches_model_and_checkpoint(request_of: Request, tmp_path: Path) -> None:
    raw = request_of(trainer__steps=1, data__document_mask=True, data__reset_positions=True, data__boundary_loss=False)
    go(raw)
    run = tmp_path / "run"
    config = load_config(Checkpoints(run, keep=1).path(1))
    assert all(spec.documents for specs in config.attention.specs().values() for spec in specs)


@pytest.mark.parametrize("model", [{"name": "gpt-tiny"}, {"name": "llama-tiny"}])
def test_backends_agree_for_200_steps(model: dict, request_of: Request, tmp_path: Path) -> None:
    small = {"vocab_size": 260, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 48, "dropout": 0.0}
    curves = []
    for backend in ("reference", "sdpa"):
        raw = request_of(
            output=str(tmp_path / backend),
            trainer__steps=200,
            trainer__global_batch=4,
            trainer__micro_batch=4,
            trainer__val_every=200,
            trainer__save_every=200,
            attention={"backend": backend},
        )
        raw["model"] = {**model, **small}
        curves.append([row.loss for row in rows_of(go(raw).directory)])
    assert len(curves[0]) == 200
    assert max(abs(one - other) for one, other in zip(*curves)) < 1e-4
    assert curves[0] != curves[1]  # or both were the same implementation
    assert curves[0][-1] < 0.75 * curves[0][0]
