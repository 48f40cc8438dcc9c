"""What a checkpoint says about the data and the settings of its run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longspan.data.sources import SourceSpec
from longspan.data.store import TokenStore, build_store
from longspan.data.tokenizer import byte_level
from longspan.training.errors import UserError
from longspan.training.held_out import TrainedWith, trained_with, training_store


def a_store(root: Path, words: str) -> TokenStore:
    texts = root / f"texts-{words}"
    texts.mkdir()
    for i in range(10):
        (texts / f"{i}.txt").write_text(f"{words} {i}")
    source = SourceSpec(kind="files", path=str(texts), name="texts")
    return build_store(root / words, [source], byte_level(), validation_fraction=0.3)


def a_checkpoint(root: Path, data: dict | None) -> Path:
    checkpoint = root / "run/checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    if data is not None:
        (checkpoint / "lineage.json").write_text(json.dumps({"data": data}))
    return checkpoint


def refusal(checkpoint: Path) -> str:
    with pytest.raises(UserError) as caught:
        training_store(checkpoint, byte_level())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_store_of_a_run_is_opened_or_refused(tmp_path: Path) -> None:
    mine, other = a_store(tmp_path, "mine"), a_store(tmp_path, "other")
    facts = {"store": str(mine.directory), "manifest_sha256": mine.manifest["self_sha256"]}
    checkpoint = a_checkpoint(tmp_path, facts)
    assert training_store(checkpoint, byte_level()).counts == mine.counts

    shutil.rmtree(mine.directory)
    assert "is gone; prepare the data of that run again" in refusal(checkpoint)
    shutil.copytree(other.directory, mine.directory)
    message = refusal(checkpoint)
    assert message.startswith(f"{mine.directory}: is not the token store that {checkpoint} was trained on")
    assert mine.manifest["self_sha256"][:12] in message
    assert message.endswith("give data.path=… to score a text")
    (mine.directory / "manifest.json").write_text("{")
    assert "cannot be used: " in refusal(checkpoint)


@pytest.mark.parametrize("data", [None, {}, {"store": "somewhere"}, {"store": 3, "manifest_sha256": "a"}])
def test_a_checkpoint_that_names_no_store(tmp_path: Path, data: dict | None) -> None:
    assert refusal(a_checkpoint(tmp_path, data)).startswith("data.path: is needed, because ")


def test_settings_of_the_run(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path, None)
    assert trained_with(checkpoint) == TrainedWith()
    config = tmp_path / "run/config.yaml"
    config.write_text(json.dumps({"data": {"context": 16}, "trainer": {"precision": "bf16-mixed"}}))
    assert trained_with(checkpoint) == TrainedWith(16, "bf16-mixed")
    assert trained_with(checkpoint.parent) == TrainedWith()  # not a checkpoint of a run
    config.write_text(json.dumps({"data": [], "trainer": {"precision": "half"}}))
    assert trained_with(checkpoint) == TrainedWith()
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.yaml: is damaged"):
        trained_with(checkpoint)
