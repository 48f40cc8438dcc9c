"""Checkpoint directories: the round trip, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.kernels.attention import AttentionSpec, BlockLayout, Window
from longspan.model import checkpoint
from longspan.model.checkpoint import (
    CheckpointError,
    load_config,
    load_model,
    resolve_checkpoint,
    save_model,
    step_directory,
    verify,
)
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.decoder import Decoder
from longspan.model.zoo import build

TOKENS = torch.arange(12)[None]


class Words:
    """Stands for a tokenizer."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"words": []}')


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build("llama-tiny", seed=5).eval()


@pytest.fixture
def saved(model: Decoder, tmp_path: Path) -> Path:
    return save_model(model, tmp_path / "model", Words(), lineage={"run": "r1", "parent": None})


def reseal(directory: Path) -> None:
    """A manifest that agrees with the files, so that the check behind it is the one that speaks."""
    (directory / "manifest.json").unlink()
    checkpoint._seal(directory)


def error_of(call: object, *arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the round trip ---------------------------------------------------------------------------------------------------


def test_a_directory_holds_what_it_promises(model: Decoder, saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "lineage.json", "manifest.json"}
    assert json.loads((saved / "lineage.json").read_text()) == {"run": "r1", "parent": None}
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    loaded = load_model(saved)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_fused_and_unfused_models_share_checkpoints(model: Decoder, saved: Path, tmp_path: Path) -> None:
    fused = load_model(saved, fused_qkv=True)
    assert any(name.endswith("qkv_proj.weight") for name, _ in fused.named_parameters())
    torch.testing.assert_close(fused(TOKENS), model(TOKENS), atol=1e-6, rtol=0)
    again = save_model(fused, tmp_path / "fused")
    assert (again / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert set(load_file(again / "model.safetensors")) == set(model.state_dict())


def test_biased_projections_fuse_too(tmp_path: Path) -> None:
    model = build("gpt-tiny", seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    save_model(model, tmp_path / "m")
    torch.testing.assert_close(load_model(tmp_path / "m", fused_qkv=True)(TOKENS), model(TOKENS), atol=1e-5, rtol=0)


def test_dtype_is_kept_or_converted(model: Decoder, tmp_path: Path) -> None:
    import copy

    save_model(copy.deepcopy(model).bfloat16(), tmp_path / "half")
    assert load_model(tmp_path / "half").head_weight.dtype == torch.bfloat16
    wide = load_model(tmp_path / "half", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_a_config_with_every_kind_of_attention_survives(tmp_path: Path) -> None:
    layout = BlockLayout.from_rows([[1] * 8] * 8, q_block=16, kv_block=16)
    plan = AttentionPlan(
        patterns={
            "heads": (
                HeadGroup(heads=2, spec=AttentionSpec(causal=True, window=Window(left=5, dilation=3))),
                HeadGroup(heads=2, spec=AttentionSpec(causal=True, softcap=3, sink_tokens=2, learned_sink=True)),
            ),
            "sparse": AttentionSpec(causal=True, documents=True, global_tokens=True, block_sparse=layout, scale=0.5),
        },
        layers=("heads", "sparse"),
    )
    model = build("llama-tiny", {"attention": plan, "norm_eps": 1e-6}, seed=0)
    assert load_config(save_model(model, tmp_path / "m")) == model.config


def test_more_files_are_sealed_with_the_model(model: Decoder, tmp_path: Path) -> None:
    directory = save_model(model, tmp_path / "m", also=lambda staging: (staging / "trainer.ckpt").write_bytes(b"state"))  # type: ignore[func-returns-value]
    verify(directory)
    (directory / "trainer.ckpt").write_bytes(b"statf")
    assert "trainer.ckpt does not match its sha256" in error_of(verify, directory)


def test_a_given_state_is_saved_instead_of_the_modules(model: Decoder, tmp_path: Path) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "m", state=state)
    assert float(load_model(tmp_path / "m").head_weight.detach().abs().sum()) == 0.0


# -- writing whole or not at all --------------------------------------------------------------------------------------


def test_an_occupied_directory_is_refused_unless_overwritten(model: Decoder, saved: Path) -> None:
    before = (saved / "manifest.json").read_bytes()
    assert "exists and is not empty" in error_of(save_model, model, saved)
    assert (saved / "manifest.json").read_bytes() == before
    save_model(model, saved, overwrite=True)
    assert not (saved / "tokenizer.json").exists()
    verify(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_an_empty_directory_is_filled(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    verify(save_model(model, tmp_path / "empty"))


def test_a_failed_write_leaves_nothing(model: Decoder, saved: Path, tmp_path: Path) -> None:
    def no_space(_staging: Path) -> None:
        raise OSError(28, "No space left on device")

    for target in (tmp_path / "new", saved):
        with pytest.raises(OSError, match="No space left"):
            save_model(model, target, also=no_space, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    verify(saved)


def test_a_killed_writer_leaves_no_checkpoint(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from longspan.model.zoo import build; from longspan.model.checkpoint import save_model\n"
        "save_model(build('gpt-tiny', seed=0), Path(sys.argv[1]) / 'm', also=lambda staging: os.kill(os.getpid(), 9))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=dict(os.environ))
    assert done.returncode == -9
    assert not (tmp_path / "m").exists()
    assert len(list(tmp_path.iterdir())) == 1
    checkpoint.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_between_its_two_renames_loses_nothing(
    model: Decoder, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_args, **_kwargs: None)  # a killed process cleans nothing
        with pytest.raises(Killed):
            save_model(model, saved, overwrite=True)
    assert not saved.exists()
    checkpoint.remove_unfinished(saved.parent)
    verify(saved)
    assert (saved / "tokenizer.json").is_file()  # the old one
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_permissions_are_the_users(model: Decoder, saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o777 & ~mask


# -- what is refused --------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    assert error_of(load_model, tmp_path / "nothing").endswith("nothing: no such directory")


def test_no_config(tmp_path: Path) -> None:
    assert "holds no config.json" in error_of(load_model, tmp_path)


def test_no_manifest(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    assert "holds no manifest.json" in error_of(load_model, saved)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    message = error_of(load_model, saved)
    assert f"the manifest says {len(whole)}" in message
    assert "cut short" in message
    reseal(saved)
    assert "not a readable safetensors file" in error_of(load_model, saved)


def test_one_flipped_bit(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "model.safetensors does not match its sha256" in error_of(load_model, saved)


def test_a_listed_file_is_gone(saved: Path) -> None:
    (saved / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in error_of(load_model, saved)


def test_damaged_json(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    assert "config.json is not JSON" in error_of(load_model, saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "bert"}, "architecture 'bert'; this version reads: decoder"),
        ({"architecture": None, "model_type": "llama"}, "a Hugging Face model of type 'llama'"),
        ({"n_head": 4}, "n_head: unknown key; did you mean 'n_heads'?"),
        ({"n_heads": 5}, "d_model=64 is not a multiple of n_heads=5"),
        ({"n_heads": "4"}, "n_heads='4': it is a whole number"),
    ],
)
def test_foreign_configs(saved: Path, change: dict[str, object], said: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reseal(saved)
    message = error_of(load_model, saved)
    assert said in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 3}, "lacks blocks.2."),
        ({"n_layers": 1}, "holds blocks.1."),
        ({"d_ff": 96}, "has shape [160, 64], this model's has [96, 64]"),
        ({"vocab_size": 300}, "embedding.weight has shape [256, 64], this model's has [300, 64]"),
        ({"tied_head": True}, "holds head.weight, which this model does not have"),
    ],
)
def test_weights_of_another_model(saved: Path, change: dict[str, object], said: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reseal(saved)
    assert said in error_of(load_model, saved)


def test_missing_and_renamed_tensors(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["blocks.0.mlp.up.weight"] = weights.pop("blocks.0.mlp.up_proj.weight")
    save_file(weights, saved / "model.safetensors")
    reseal(saved)
    assert "lacks blocks.0.mlp.up_proj.weight" in error_of(load_model, saved)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model: Decoder, tmp_path: Path) -> Path:
    for step in (100, 200, 1000):
        save_model(model, step_directory(tmp_path / "run", step))
    return tmp_path / "run"


def test_a_run_means_its_best_else_its_last_that_verifies(run: Path) -> None:
    assert resolve_checkpoint(run).name == "step-00001000"
    (run / "checkpoints" / "best.json").write_text('{"step": 200, "validation_loss": 1.5}')
    assert resolve_checkpoint(run).name == "step-00000200"
    assert resolve_checkpoint(run / "checkpoints" / "step-00000100").name == "step-00000100"
    for step in (200, 1000):
        (step_directory(run, step) / "model.safetensors").write_bytes(b"")
    assert resolve_checkpoint(run) == step_directory(run, 100)
    (step_directory(run, 100) / "manifest.json").unlink()
    said = error_of(resolve_checkpoint, run)
    assert said.startswith(
        f"{run}: no checkpoint of the run is whole: {step_directory(run, 1000)}/model.safetensors is 0 "
    )
    assert said.endswith(" (so are 2 older ones)")


@pytest.mark.parametrize("record", ['{"step": 200', '{"step": null}', "[]", '{"step": 300}'])
def test_a_best_checkpoint_that_cannot_be_used_costs_a_warning(
    run: Path, record: str, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints" / "best.json").write_text(record)
    assert resolve_checkpoint(run).name == "step-00001000"
    assert "the best checkpoint of" in caplog.text
    assert "best.json" in caplog.text or "step-00000300: no such directory" in caplog.text


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "the run has no checkpoint yet" in error_of(resolve_checkpoint, tmp_path / "run")


def test_paths_that_are_neither(tmp_path: Path) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "neither a checkpoint directory" in error_of(resolve_checkpoint, tmp_path / "runs" / "first")
    assert "did you mean 'first'?" in error_of(resolve_checkpoint, tmp_path / "runs" / "frist")
    assert error_of(resolve_checkpoint, tmp_path / "no" / "such").endswith("no such directory")


def test_whoever_may_read_one_file_may_read_all(tmp_path: Path) -> None:
    directory = save_model(build("gpt-tiny", seed=0), tmp_path / "model")
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1
