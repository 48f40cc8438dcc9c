"""A grid from its request to its report: what cells are equal to, and that stopping changes nothing."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.data.tokenizer import Tokenizer
from longspan.evaluation.ablation.tables import GRID, read_grid
from longspan.evaluation.perplexity.evaluate import evaluate_documents
from longspan.model.checkpoint import load_decoder, load_model, resolve_checkpoint
from longspan.model.surgery import GroupedQuery, convert_model
from longspan.training import run, uptrain_view
from longspan.training.errors import RunFailed, Terminated, UserError
from longspan.training.held_out import training_store
from longspan.training.schema import validate, validate_uptrain
from longspan.training.uptrain import uptrain
from longspan.training.uptrain_pool import environments, visible_gpus
from longspan.training.uptrain_recipe import settle_uptraining

STEPS = 40


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run with four heads, of which everything can be read off."""
    directory = tmp_path_factory.mktemp("parent") / "run"
    run.train(
        validate(
            {
                "model": {
                    "name": "gpt-tiny", "vocab_size": 260, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48,
                    "dropout": 0.1,
                },
                "data": {
                    "path": str(corpus), "cache": str(corpus.parent / "cache"), "tokenizer": {"kind": "bytes"},
                    "context": 64, "validation_fraction": 0.2,
                },
                "trainer": {
                    "steps": STEPS, "global_batch": 4, "micro_batch": 4, "precision": "fp32", "accelerator": "cpu",
                    "val_batches": 2,
                },
                "optimizer": {"lr": 3e-3},
                "evaluation": {"max_tokens": 1500},
                "sample": {"prompt": ""},
                "callbacks": {"progress": "off", "report": False},
                "logger": {"wandb": "off"},
                "output": str(directory),
            }
        )
    )  # fmt: skip
    return directory


def request(parent: Path, output: Path, **changes: object) -> dict:
    raw: dict = {
        "checkpoint": str(parent),
        "output": str(output),
        "kv_heads": 2,
        "init": "mean",
        "alpha": [0, 0.1, 0.2],
        "seeds": [0],
        "progress": "off",
        "speed": {"enabled": False},
        "retrieval": {"trials": 2},
    }
    return {**copy.deepcopy(raw), **changes}


def results(output: Path) -> dict[str, dict]:
    """Every cell's file but what a clock says."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("cells/*/result.json"))}
    for record in found.values():
        del record["training_seconds"]
    return found


@pytest.fixture(scope="module")
def whole(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid that nobody interrupts, all weights kept."""
    output = tmp_path_factory.mktemp("whole") / "grid"
    uptrain(validate_uptrain(request(parent, output, keep="all", seeds=[0, 1])), None)
    return output


CELLS = ["control-a0", "control-a0.1", "control-a0.2", "kv2-mean-a0", "kv2-mean-a0.1", "kv2-mean-a0.2"]


def test_every_cell_is_there_and_the_report_too(whole: Path) -> None:
    found = results(whole)
    assert set(found) == {
        "control-a0",
        "kv2-mean-a0",
        *(f"{kind}-a{alpha}-seed{seed}" for kind in ("control", "kv2-mean") for alpha in (0.1, 0.2) for seed in (0, 1)),
    }
    assert [found[f"kv2-mean-a{alpha}-seed0"]["cell"]["steps"] for alpha in (0.1, 0.2)] == [4, 8]
    assert found["kv2-mean-a0.2-seed1"]["tokens"] == 8 * 4 * 64
    assert found["kv2-mean-a0"]["kv_bytes_per_token"] * 2 == found["control-a0"]["kv_bytes_per_token"]
    losses = {record["loss"] for record in found.values()}
    assert len(losses) == len(found)
    # Every number of the report is the cells' own.
    summary = read_grid(whole).found
    row = summary.row(2, "mean", 0.2)
    assert row is not None
    mine = [found[f"kv2-mean-a0.2-seed{seed}"]["loss"] for seed in (0, 1)]
    control = [found[f"control-a0.2-seed{seed}"]["loss"] for seed in (0, 1)]
    start = found["kv2-mean-a0"]["loss"]
    assert row.loss == pytest.approx(sum(mine) / 2)
    assert row.gap == pytest.approx((sum(mine) - sum(control)) / 2)
    assert row.recovered == pytest.approx((start - sum(mine) / 2) / (start - sum(control) / 2))
    for name in ("report.html", "report.md", "report.json", "report-alpha.png", "report-heads.png", "uptrain.log"):
        assert (whole / name).stat().st_size > 0
    assert not (whole / "speed.json").exists()


def test_conversion_alone_is_what_evaluating_the_conversion_gives(parent: Path, whole: Path, tmp_path: Path) -> None:
    converted = convert_model(parent, tmp_path / "converted", [GroupedQuery(kv_heads=2)])
    tokenizer = Tokenizer.load(converted)
    documents = training_store(resolve_checkpoint(parent), tokenizer).documents("validation")
    scoring = validate({"checkpoint": str(parent), "evaluation": {"max_tokens": 1500}}).evaluation
    found = evaluate_documents(
        load_decoder(converted), tokenizer, documents, scoring, context=64, device="cpu", precision="fp32"
    )
    assert results(whole)["kv2-mean-a0"]["loss"] == found.result.loss
    original = evaluate_documents(
        load_decoder(resolve_checkpoint(parent)),
        tokenizer,
        documents,
        scoring,
        context=64,
        device="cpu",
        precision="fp32",
    )
    assert results(whole)["control-a0"]["loss"] == original.result.loss


def test_the_control_is_plain_continued_training(parent: Path, whole: Path, tmp_path: Path) -> None:
    """The same command as anybody would give: more steps from these weights, 0.3 of the peak, constant."""
    recipe = json.loads((parent / "config.yaml").read_text())
    recipe |= {"checkpoint": str(parent), "output": str(tmp_path / "plain"), "seed": 1, "logger": {"wandb": "off"}}
    recipe["optimizer"]["lr"] = 0.3 * 3e-3
    recipe["schedule"] = {"name": "constant", "warmup": 0}
    recipe["trainer"] |= {"steps": 8}
    run.train(validate(recipe))
    plain = (tmp_path / "plain/checkpoints/step-00000008/model.safetensors").read_bytes()
    assert (whole / "cells/control-a0.2-seed1/model/model.safetensors").read_bytes() == plain


def test_grouped_cells_are_continued_training_of_the_conversion(parent: Path, whole: Path, tmp_path: Path) -> None:
    """And the smaller alpha is on the way to the larger one."""
    recipe = json.loads((parent / "config.yaml").read_text())
    converted = convert_model(parent, tmp_path / "converted", [GroupedQuery(kv_heads=2)])
    recipe |= {"checkpoint": str(converted), "output": str(tmp_path / "plain"), "logger": {"wandb": "off"}}
    recipe["optimizer"]["lr"] = 0.3 * 3e-3
    recipe["schedule"] = {"name": "constant", "warmup": 0}
    recipe["trainer"] |= {"steps": 4}
    run.train(validate(recipe))
    plain = (tmp_path / "plain/checkpoints/step-00000004/model.safetensors").read_bytes()
    assert (whole / "cells/kv2-mean-a0.1-seed0/model/model.safetensors").read_bytes() == plain
    assert load_model(whole / "cells/kv2-mean-a0.2-seed0/model").config.kv_heads == 2  # type: ignore[union-attr]


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_signal_stops_and_the_same_request_continues(
    parent: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = uptrain_view.GridView.tell

    def stopping(self: uptrain_view.GridView, event: str, cell: object, record: Mapping[str, object]) -> None:
        tell(self, event, cell, record)  # type: ignore[arg-type]
        if event == "begun" and getattr(cell, "name", "") == "kv2-mean-a0.2-seed0":
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "grid"
    monkeypatch.setattr(uptrain_view.GridView, "tell", stopping)
    with pytest.raises(Terminated) as stopped:
        uptrain(validate_uptrain(request(parent, output)), None)
    monkeypatch.undo()
    assert stopped.value.exit_code == 143
    assert set(results(output)) == {
        "control-a0",
        "kv2-mean-a0",
        "control-a0.1-seed0",
        "control-a0.2-seed0",
        "kv2-mean-a0.1-seed0",
    }
    assert not (output / "report.html").exists()
    with pytest.raises(UserError, match=r"holds a grid already; continue it with resume=auto"):
        uptrain(validate_uptrain(request(parent, output)), None)
    uptrain(validate_uptrain(request(parent, output, resume="auto")), None)
    expected = {name: record for name, record in results(whole).items() if not name.endswith("seed1")}
    assert results(output) == expected
    # The grid is done: of the weights only the recommended ones are left, and no training state.
    chosen = read_grid(output).found.recommended.cell
    assert [path.parent.name for path in output.glob("cells/*/model")] == [chosen]
    assert not list(output.glob("runs/*/checkpoints"))


def test_a_killed_process_leaves_nothing_wrong(
    parent: Path, whole: Path, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    """kill -9 in the middle of a training, then the same command with more seeds."""
    output = tmp_path / "grid"
    asked = request(parent, output, trainer={"save_every": 1})
    script = (
        "import json, sys, time\n"
        "from longspan.training import callbacks, schema, uptrain\n"
        "end = callbacks.RunLoop.on_train_batch_end\n"
        "def slow(self, trainer, *rest):\n"
        "    end(self, trainer, *rest)\n"
        "    time.sleep(0.2)\n"
        "callbacks.RunLoop.on_train_batch_end = slow\n"
        "uptrain.uptrain(schema.validate_uptrain(json.loads(sys.argv[1])), None)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(asked)], env=environment)
    try:
        wait_for(lambda: (output / "runs/kv2-mean-seed0/checkpoints/step-00000002").is_dir(), 120)
    finally:
        process.kill()
        process.wait()
    assert "kv2-mean-a0.1-seed0" not in results(output)
    uptrain(validate_uptrain({**asked, "resume": "auto", "seeds": [0, 1]}), None)
    found, expected = results(output), results(whole)
    assert found == expected


def test_two_workers_make_the_same_cells(parent: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid"
    uptrain(validate_uptrain(request(parent, output, alpha=[0.1], workers=2)), None)
    found = results(output)
    assert set(found) == {"control-a0", "kv2-mean-a0", "control-a0.1-seed0", "kv2-mean-a0.1-seed0"}
    assert found == {name: record for name, record in results(whole).items() if name in found}


def test_a_worker_that_fails_ends_the_grid(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its reason is passed on: here a recipe whose loss is not finite."""
    output = tmp_path / "grid"
    asked = request(parent, output, alpha=[0.2], workers=2, optimizer={"lr": 1e30}, trainer={"clip": None})
    with pytest.raises(RunFailed, match=r"a worker failed: step \d+: the (loss|gradient norm) is"):
        uptrain(validate_uptrain(asked), None)
    assert "control-a0" in results(output)


def test_one_gpu_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environments(2, []) == [{}, {}]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments(3, ["4", "7"])] == ["4", "7", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert visible_gpus(2) == ["4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_grid_continues_only_with_its_settings(parent: Path, whole: Path) -> None:
    changed = request(parent, whole, seeds=[0, 1], keep="all", resume="auto", lr_fraction=0.1)
    with pytest.raises(UserError, match=r"made with other settings \(lr_fraction: 0.3 → 0.1, recipe.optimizer.lr: "):
        uptrain(validate_uptrain(changed), None)
    before = results(whole)
    page = (whole / "report.html").stat().st_mtime_ns
    # The grid of a version that did not know a key goes on where the key has its default, and only there.
    grid = whole / GRID
    written = grid.read_text()
    older = json.loads(written)
    del older["settings"]["recipe"]["data"]["tokenizer"]["digits"]
    grid.write_text(json.dumps(older))
    uptrain(validate_uptrain(request(parent, whole, seeds=[0, 1], keep="all", resume="auto")), None)
    assert results(whole) == before
    del older["settings"]["recipe"]["optimizer"]["lr"]
    grid.write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"made with other settings \(recipe.optimizer.lr: None → "):
        uptrain(validate_uptrain(request(parent, whole, seeds=[0, 1], keep="all", resume="auto")), None)
    grid.write_text(written)
    time.sleep(0.01)
    # A finished grid is looked at again, with another tolerance: nothing is trained.
    uptrain(validate_uptrain(request(parent, whole, seeds=[0, 1], keep="all", resume="auto", tolerance=9.0)), None)
    assert results(whole) == before
    assert (whole / "report.html").stat().st_mtime_ns > page
    assert read_grid(whole).found.recommended.kv_heads == 2


def test_a_foreign_directory_is_left_alone(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for changes in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(UserError, match="not empty, and not a grid of uptrain"):
            uptrain(validate_uptrain(request(parent, tmp_path, **changes)), None)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_what_a_run_says_of_itself_is_the_recipe(parent: Path, tmp_path: Path) -> None:
    grid = settle_uptraining(validate_uptrain(request(parent, tmp_path / "grid")), None)
    assert grid.parent_steps == STEPS
    assert grid.base.data.context == 64
    assert grid.base.optimizer.lr == pytest.approx(0.3 * 3e-3)
    assert grid.tokens_per_step == 4 * 64
    other = settle_uptraining(
        validate_uptrain(
            request(parent, tmp_path / "grid", parent_steps=1000, data={"context": 32}, optimizer={"lr": 1e-3})
        ),
        None,
    )
    assert [cell.steps for cell in other.cells if cell.alpha == 0.1] == [100, 100]
    assert other.base.data.context == 32
    assert other.base.optimizer.betas == grid.base.optimizer.betas
    assert other.base.optimizer.lr == pytest.approx(3e-4)


@pytest.fixture
def foreign(parent: Path, tmp_path: Path) -> Path:
    """The same weights in a directory that lies in no run."""
    directory = convert_model(parent, tmp_path / "foreign", [GroupedQuery(kv_heads=4)])
    (directory / "lineage.json").write_text("{}")
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["lineage.json"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_foreign_parent_needs_its_steps_and_a_recipe(foreign: Path, parent: Path, tmp_path: Path) -> None:
    recipe = json.loads((parent / "config.yaml").read_text())
    asked = validate_uptrain(request(foreign, tmp_path / "grid"))
    with pytest.raises(UserError, match=r"^parent_steps and recipe: are required, because .* lies in no run"):
        settle_uptraining(asked, None)
    with pytest.raises(UserError, match=r"^recipe: is required"):
        settle_uptraining(replace(asked, parent_steps=100), None)
    with pytest.raises(UserError, match=r"^parent_steps: is required"):
        settle_uptraining(asked, recipe)
    grid = settle_uptraining(replace(asked, parent_steps=100), recipe)
    assert [cell.steps for cell in grid.cells if cell.alpha == 0.2] == [20, 20]
    assert grid.base.data.path == recipe["data"]["path"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_heads": [3]}, "kv_heads=3: the parent's 4 key/value heads are shared out evenly; choose one of 2, 1$"),
        ({"kv_heads": [8]}, "kv_heads=8: .* heads can only be made fewer; choose one of 2, 1$"),
        ({"kv_heads": [4, 2]}, r"kv_heads=\[4, 2\]: 4 is what the parent has"),
        ({"alpha": [0.001]}, "alpha=0.001: is less than one of the parent's 40 steps"),
        ({"warmup": 7}, "warmup=7: 7 steps of warm-up are more than the 4 of the smallest alpha"),
        ({"data": {"context": 9999}}, "data.context=9999: is longer than the .* learned positions"),
        ({"data": {"validation_fraction": 0}}, "data.validation_fraction: no document is held out"),
    ],
)
def test_wrong_requests_leave_nothing_behind(changes: dict, said: str, parent: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid"
    with pytest.raises(ValueError, match=said):
        uptrain(validate_uptrain(request(parent, output, **changes)), None)
    assert not output.exists()


def test_heads_are_compared_on_the_texts_given(parent: Path, corpus: Path, tmp_path: Path) -> None:
    asked = request(parent, tmp_path / "grid", init=["mean", "aligned"], alpha=0, statistics=str(corpus), keep="all")
    uptrain(validate_uptrain(asked), None)
    model = tmp_path / "grid/cells/kv2-aligned-a0/model"
    (entry,) = json.loads((model / "lineage.json").read_text())["surgery"]
    assert entry["changes"]["statistics"] == corpus.name
    losses = {name: record["loss"] for name, record in results(tmp_path / "grid").items()}
    assert len({losses["kv2-aligned-a0"], losses["kv2-mean-a0"], losses["control-a0"]}) == 3


# -- encoders and distillation -----------------------------------------------------------------------------------------


def test_distillation_draws_the_model_towards_its_parent(parent: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid"
    uptrain(validate_uptrain(request(parent, output, distill={"enabled": True, "weight": 1.0}, alpha=[0.2])), None)
    found, plain = results(output), results(whole)
    assert found["control-a0.2-seed0"] == plain["control-a0.2-seed0"]  # the control has no teacher
    assert found["kv2-mean-a0.2-seed0"]["loss"] != plain["kv2-mean-a0.2-seed0"]["loss"]
    assert found["kv2-mean-a0.2-seed0"]["loss"] < found["kv2-mean-a0"]["loss"]


def test_an_encoder_learns_its_parents_embeddings(corpus: Path, tmp_path: Path) -> None:
    from longspan.data.tokenizer import byte_level
    from longspan.model.checkpoint import save_model
    from longspan.model.config import EncoderConfig
    from longspan.model.encoder import from_config

    config = EncoderConfig(vocab_size=260, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=64, init_std=0.3)
    save_model(from_config(config, seed=0), tmp_path / "bert", byte_level())
    recipe = {
        "model": {"name": "bert-tiny", "vocab_size": 260},
        "data": {"path": str(corpus), "cache": str(corpus.parent / "cache"), "validation_fraction": 0.2, "context": 48},
        "trainer": {"global_batch": 4, "micro_batch": 4, "precision": "fp32", "accelerator": "cpu"},
        "optimizer": {"lr": 1e-2},
    }
    asked = request(tmp_path / "bert", tmp_path / "grid", parent_steps=100, kv_heads=[2, 1], alpha=[0.3])
    uptrain(validate_uptrain(asked), recipe)
    found = results(tmp_path / "grid")
    assert set(found) == {"control-a0", *(f"kv{g}-mean-a{a}" for g in (1, 2) for a in ("0", "0.3-seed0"))}
    assert found["control-a0"]["loss"] == pytest.approx(0, abs=1e-6)
    for heads in (1, 2):
        assert found[f"kv{heads}-mean-a0.3-seed0"]["loss"] < 0.8 * found[f"kv{heads}-mean-a0"]["loss"]
    assert found["kv1-mean-a0"]["similarity"]["cosine"] == pytest.approx(1 - found["kv1-mean-a0"]["loss"])
    text = (tmp_path / "grid/report.md").read_text()
    assert "Cosine between mean-pooled hidden states" in text
    assert "## Cache" not in text
