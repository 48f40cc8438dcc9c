"""`longspan convert` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from longspan.data.tokenizer import byte_level
from longspan.model.accounting import kv_bytes_per_token, parameters
from longspan.model.checkpoint import load_model, save_model
from longspan.model.config import DecoderConfig
from longspan.model.zoo import build
from longspan.scripts.cli import main

Refused = Callable[..., list[str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`gpt` with a tokenizer, `llama` and `bert` without."""
    tokenizer = byte_level()
    save_model(build("gpt-tiny", {"vocab_size": tokenizer.vocab_size}, seed=0), tmp_path / "gpt", tokenizer)
    for name in ("llama", "bert"):
        save_model(build(f"{name}-tiny", seed=0), tmp_path / name)
    return tmp_path


BOTH = ("checkpoint=gpt", "surgery=[positions,longformer]", "max_positions=512", "window=64", "output=out")


def test_two_surgeries_in_one_command(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *BOTH, "sink_tokens=4", "mode=interpolate"]) == 0
    shown = capsys.readouterr().out
    before, after = load_model(models / "gpt").config, load_model(models / "out").config
    assert isinstance(before, DecoderConfig)
    assert isinstance(after, DecoderConfig)
    assert (after.max_positions, after.head_groups(0)[0].spec.window.left) == (512, 63)
    kv = kv_bytes_per_token(before)
    for number in (parameters(before).total, parameters(after).total, 128, 512, kv * 128, kv * (64 + 4)):
        assert f" {number:,}" in shown
    assert [entry["surgery"] for entry in json.loads((models / "out/lineage.json").read_text())["surgery"]] == [
        "positions",
        "longformer",
    ]
    assert main(["generate", "checkpoint=out", "prompt=def", "max_new_tokens=3", "accelerator=cpu"]) == 0
    assert capsys.readouterr().out.startswith("def")


def test_a_dry_run_prints_the_model_and_what_it_costs(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *BOTH, "dry_run=true"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["surgery"] == ["positions", "longformer"]
    assert shown["changes"][0]["positions"]["max_positions"] == {"before": 128, "after": 512}
    assert shown["model"]["max_positions"] == 512
    config = load_model(models / "gpt").config
    assert isinstance(config, DecoderConfig)
    assert shown["before"] == {
        "parameters": parameters(config).total,
        "length": 128,
        "kv_bytes": 128 * kv_bytes_per_token(config),
    }
    assert shown["after"]["kv_bytes"] == 64 * kv_bytes_per_token(config)
    assert not (models / "out").exists()


def test_one_window_for_each_layer(models: Path) -> None:
    assert main(["convert", "checkpoint=bert", "surgery=longformer", "window=[8,16]", "output=out"]) == 0
    plan = load_model(models / "out").config
    assert not isinstance(plan, DecoderConfig)
    assert plan.architecture == "encoder"
    assert [plan.head_groups(layer)[0].spec.window.left for layer in range(2)] == [4, 8]


WRONG = [
    (("surgery=longformr", "window=8"), "surgery=longformr: there is no such surgery; did you mean 'longformer'?"),
    (("surgery=longformer",), "window: is required by surgery=longformer"),
    (
        ("surgery=longformer", "window=8", "max_positions=512"),
        "max_positions=512: is read by surgery=positions; asked for is longformer",
    ),
    (
        ("surgery=copy-global", "seed=1"),
        "seed=1: is read by surgery=positions and gqa; asked for is copy-global",
    ),
    (("surgery=[longformer,longformer]", "window=8"), "surgery=[longformer, longformer]: longformer is there twice"),
    (("surgery=longformer", "windw=8", "window=8"), "windw=8: unknown key; did you mean window?"),
    (("surgery=longformer", "window=true"), "window=true: expected a non-empty list of whole numbers or null"),
    (("surgery=longformer", "window=5"), "window=5: counts both sides of a token together, so it is even; 6 is"),
    (("surgery=longformer", "window=258"), "window=258: reaches 129 to either side, further than the model's 128"),
    (("surgery=positions", "max_positions=128"), "max_positions=128: this model has 128 positions already"),
    (("surgery=positions", "max_positions=512", "mode=yarn"), "mode=yarn: this model has positions=learned"),
    (("surgery=positions", "max_positions=512", "mode=tile"), "mode=tile: expected one of copy, interpolate, random,"),
    (("surgery=longformer", "window=8", "sink_tokens=2"), "sink_tokens=2: is for decoders"),
]


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_requests(arguments: tuple[str, ...], line: str, models: Path, refused: Refused) -> None:
    (found,) = refused("convert", "checkpoint=bert", "output=out", *arguments)
    assert found.startswith(line)


def test_what_is_wrong_with_paths(models: Path, refused: Refused) -> None:
    asked = ("surgery=longformer", "window=8")
    (line,) = refused("convert", "checkpoint=brt", "output=out", *asked)
    assert line.startswith("checkpoint=brt: no such directory; did you mean 'bert'?")
    (line,) = refused("convert", "checkpoint=bert", "output=gpt", *asked)
    assert line.startswith("output=gpt: exists and is not an empty directory; choose another, or set overwrite=true")
    (line,) = refused("convert", "checkpoint=bert", "output=bert/new", *asked)
    assert "lies in the checkpoint that is converted" in line
    assert main(["convert", "checkpoint=bert", "output=gpt", *asked, "overwrite=true"]) == 0
    (line,) = refused(
        "convert", "checkpoint=llama", "output=out", "surgery=positions", "max_positions=512", "mode=copy"
    )
    assert line.startswith("mode=copy: this model has positions=rope, for which mode is one of linear")
    (line,) = refused("convert", "checkpoint=llama", "output=out", *asked, "global_projections=true")
    assert line.startswith("global_projections=true: is for encoders; a decoder keeps tokens in sight by sink_tokens")


def test_heads_are_compared_on_a_text(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "text.txt").write_text("def main() -> None:\n    print('hello')\n" * 400)
    keys = ("convert", "checkpoint=gpt", "surgery=gqa", "kv_heads=2", "init=svd", "grouping=similar")
    assert main([*keys, "statistics=text.txt", "output=by-text"]) == 0
    assert main([*keys, "output=by-weights"]) == 0
    by_text, by_weights = (load_model(models / name).state_dict() for name in ("by-text", "by-weights"))
    assert by_text.keys() == by_weights.keys()
    name = "blocks.1.attention.v_proj.weight"
    assert not by_text[name].equal(by_weights[name])
    (entry,) = json.loads((models / "by-text/lineage.json").read_text())["surgery"]
    assert (entry["changes"]["init"], entry["changes"]["statistics"]) == ("svd", "text.txt")
    assert entry["changes"]["kv_heads"] == {"decoder_self": {"before": 4, "after": 2}}
    assert set(entry["changes"]["attentions"]) == {"blocks.0.attention", "blocks.1.attention"}
    capsys.readouterr()
    (models / "short.txt").write_text("def")
    assert main([*keys, "statistics=short.txt", "output=again"]) == 2
    assert "no document has 128 tokens; give longer ones" in capsys.readouterr().err
    assert not (models / "again").exists()
