"""`longspan import` and `longspan export` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from longspan.data.tokenizer import Tokenizer, byte_level
from longspan.model.checkpoint import load_model, save_model
from longspan.model.zoo import build
from longspan.scripts.cli import main

Refused = Callable[..., list[str]]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Hugging Face directory, made by the other verb."""
    tokenizer = byte_level()
    save_model(build("gpt-tiny", {"vocab_size": tokenizer.vocab_size}, seed=0), tmp_path / "ours", tokenizer)
    assert main(["export", "checkpoint=ours", "output=foreign", "model_type=gpt2"]) == 0
    return tmp_path / "foreign"


def test_out_and_in_again(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((foreign / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": 256}
    assert main(["import", "source=foreign", "output=again", "dtype=bf16"]) == 0
    assert capsys.readouterr().out == "gpt2 imported to again/\n"
    before, after = load_model(tmp_path / "ours"), load_model(tmp_path / "again")
    assert before.config == after.config
    assert all(torch.equal(t.bfloat16(), after.state_dict()[name]) for name, t in before.state_dict().items())
    assert main(["generate", "checkpoint=again", "prompt=def", "max_new_tokens=3", "accelerator=cpu"]) == 0
    assert capsys.readouterr().out.startswith("def")


def test_dry_runs_show_the_translation_and_write_nothing(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["import", "source=foreign", "output=again", "dry_run=true"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model_type"], shown["model"]["d_model"], shown["model"]["mlp"]) == ("gpt2", 64, "gelu_tanh")
    assert main(["export", "checkpoint=ours", "output=again", "dry_run=true"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model_type"], shown["config.json"]["n_embd"]) == ("gpt2", 64)
    assert not (tmp_path / "again").exists()


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build("gpt-tiny", seed=0), tmp_path / "ours")
    assert main(["export", "checkpoint=ours", "output=foreign"]) == 0
    assert "has no tokenizer.json, so foreign/ has none" in capsys.readouterr().out
    assert main(["import", "source=foreign", "output=again"]) == 0
    assert "put one into again/ before text is read or written" in capsys.readouterr().out


def test_older_vocabulary_files_become_a_tokenizer(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    definition = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"] | {"<|endoftext|>": 256}
    (foreign / "tokenizer.json").unlink()
    (foreign / "vocab.json").write_text(json.dumps(vocabulary))
    (foreign / "merges.txt").write_text("#version: 0.2\n")
    assert main(["import", "source=foreign", "output=again"]) == 0
    assert "tokenizer.json made of the vocabulary files in foreign" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "again").encode("def f") == byte_level().encode("def f")
    assert not (foreign / "tokenizer.json").exists()
    assert main(["generate", "checkpoint=again", "prompt=def", "max_new_tokens=3", "accelerator=cpu"]) == 0
    assert capsys.readouterr().out.startswith("def")
    (foreign / "vocab.json").write_text(json.dumps({"a": 0}))
    assert main(["import", "source=foreign", "output=third"]) == 0
    assert "no text can be read or written yet: third: the vocabulary has no" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_noticed(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_level(mask=True).save(foreign)
    assert main(["import", "source=foreign", "output=again"]) == 0
    assert capsys.readouterr().err == (
        "again/tokenizer.json has 258 tokens, but the model knows 257: it may be another model's\n"
    )


def test_mistakes_cost_a_line(foreign: Path, tmp_path: Path, refused: Refused) -> None:
    assert refused("import", "source=foreing", "output=again") == [
        "source=foreing: does not exist; did you mean foreign? (set on the command line)"
    ]
    assert refused("import", "source=foreign", "output=ours") == [
        "output=ours: exists and is not an empty directory; choose another, or set overwrite=true"
    ]
    assert refused("export", "checkpoint=foreign", "output=again") == [
        "foreign/config.json describes a Hugging Face model of type 'gpt2'; make a checkpoint of it first: longspan "
        "import source=foreign output=DIR"
    ]
    assert refused("export", "checkpoint=ours", "output=again", "dtype=int8") == [
        "dtype=int8: expected one of stored, fp32, bf16, fp16 (set on the command line)"
    ]
    raw = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**raw, "gate": 1, "pruned_heads": {"0": [1]}}))
    assert refused("import", "source=foreign", "output=again") == [
        "config.json: gate=1 is no field that this version knows, and may matter",
        "config.json: pruned_heads={'0': [1]} cannot be translated (layers whose heads were cut out have other "
        "shapes); it has to be null or {}",
    ]


def test_an_imported_model_reads_texts_as_its_tokenizer_frames_them(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Llama has only ever seen texts behind its start token; a model of ours has none."""
    definition = json.loads((foreign / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 65, "content": "<s>"})
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [65], "tokens": ["<s>"]}},
    }
    (foreign / "tokenizer.json").write_text(json.dumps(definition))
    assert main(["import", "source=foreign", "output=again"]) == 0
    (tmp_path / "text.txt").write_text("some words to read\n" * 5)
    for checkpoint, token in (("again", 65), ("ours", 256)):
        capsys.readouterr()
        arguments = [f"checkpoint={checkpoint}", "data.path=text.txt", "accelerator=cpu", f"output={checkpoint}-e"]
        assert main(["evaluate", *arguments]) == 0
        assert f"(the first given token {token})" in capsys.readouterr().out
