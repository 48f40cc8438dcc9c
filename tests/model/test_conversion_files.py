"""What is wrong with a foreign directory is said in a line; written without the library whose directories they are."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.model.build import build_from
from longspan.model.checkpoint import CheckpointError, load_model, save_model
from longspan.model.config import DecoderConfig
from longspan.model.conversion import FAMILIES, ConversionError, export_model, import_model, plan_export, plan_import

SUPPORTED = ", ".join(FAMILIES)
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 31,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def tensors() -> dict[str, Tensor]:
    shapes = {
        "wte.weight": (31, 8),
        "wpe.weight": (16, 8),
        "h.0.ln_1.weight": (8,),
        "h.0.ln_1.bias": (8,),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8),
        "h.0.attn.c_proj.bias": (8,),
        "h.0.ln_2.weight": (8,),
        "h.0.ln_2.bias": (8,),
        "h.0.mlp.c_fc.weight": (8, 32),
        "h.0.mlp.c_fc.bias": (32,),
        "h.0.mlp.c_proj.weight": (32, 8),
        "h.0.mlp.c_proj.bias": (8,),
        "ln_f.weight": (8,),
        "ln_f.bias": (8,),
    }
    generator = torch.Generator().manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), directory / "model.safetensors")
    return directory


Edit = Callable[[Path], None]
CODED = "transformer.h.0.mlp.c_fc.weight"


def config(**changes: object) -> Edit:
    def edit(directory: Path) -> None:
        kept = {name: value for name, value in {**CONFIG, **changes}.items() if value != "gone"}
        (directory / "config.json").write_text(json.dumps(kept))

    return edit


def weights(change: Callable[[dict[str, Tensor]], None]) -> Edit:
    def edit(directory: Path) -> None:
        state = tensors()
        change(state)
        save_file(state, directory / "model.safetensors")

    return edit


def refused(source: Path) -> list[str]:
    output = source.parent / "output"
    with pytest.raises(ConversionError) as caught:
        import_model(source, output)
    assert not output.exists()
    assert [path.name for path in source.parent.iterdir()] == ["source"], "something was left behind"
    return list(caught.value.problems)


def test_it_is_sound_as_it_is(source: Path, tmp_path: Path) -> None:
    model = load_model(import_model(source, tmp_path / "output"))
    q, k, v = tensors()["transformer.h.0.attn.c_attn.weight"].split(8, dim=1)
    attention = model.blocks[0].attention
    assert torch.equal(attention.q_proj.weight, q.T)
    assert torch.equal(attention.k_proj.weight, k.T)
    assert torch.equal(attention.v_proj.weight, v.T)
    lineage = json.loads((tmp_path / "output/lineage.json").read_text())["imported"]
    assert (lineage["source"], lineage["model_type"]) == ("source", "gpt2")
    assert len(lineage["weights_sha256"]["model.safetensors"]) == 64
    assert str(tmp_path) not in json.dumps(lineage)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (config(model_type="mamba"), f"config.json: model_type='mamba' is not supported; supported are {SUPPORTED}"),
        (config(model_type="gone"), f"config.json names no model_type; supported are {SUPPORTED}"),
        (
            config(novel_gate=0.5),
            "config.json: novel_gate=0.5 is no field that this version knows, and may matter",
        ),
        (
            config(scale_attn_by_inverse_layer_idx=True),
            "config.json: scale_attn_by_inverse_layer_idx=true cannot be translated (a scale of its own in every "
            "layer); it has to be false",
        ),
        (
            config(add_cross_attention=True),
            "config.json: add_cross_attention=true cannot be translated (cross-attention belongs to encoder–decoders); "
            "it has to be false or null",
        ),
        (
            config(quantization_config={"bits": 4}),
            "config.json: quantization_config={'bits': 4} cannot be translated (the weights are codes, not numbers: "
            "dequantise them first); it has to be null",
        ),
        (
            config(activation_function="relu"),
            "config.json: activation_function='relu' is not known; known are gelu_new, gelu_pytorch_tanh, gelu_fast, "
            "gelu",
        ),
        (config(n_ctx=8), "config.json: n_ctx=8 contradicts n_positions=16"),
        (
            config(embd_pdrop=0.1),
            "config.json: embd_pdrop=0.1 and resid_pdrop=0.0 are one setting here; make them equal (it matters in "
            "training only)",
        ),
        (config(n_embd="8"), "config.json: n_embd='8': it is a whole number"),
        (config(n_embd=True), "config.json: n_embd=true: it is a whole number"),
        (config(n_layer=None), "config.json: n_layer=null: it is a whole number"),
        (config(tie_word_embeddings=1), "config.json: tie_word_embeddings=1: it is true or false"),
        (
            config(n_head=3),
            "config.json translates to a model that cannot be: d_model=8 is not a multiple of n_heads=3: choose a "
            "number of heads that divides it, or set head_dim",
        ),
        (
            config(vocab_size=30),
            "1 tensor contradict config.json in shape: transformer.wte.weight is [31, 8], not [30, 8]",
        ),
        (
            weights(lambda state: state.__delitem__("transformer.ln_f.bias")),
            "the weights lack 1 tensor that config.json asks for: transformer.ln_f.bias",
        ),
        (
            weights(lambda state: state.update({"transformer.h.0.attn.q_norm.weight": torch.ones(8)})),
            "the weights hold 1 tensor that config.json has no place for: transformer.h.0.attn.q_norm.weight",
        ),
        (
            weights(lambda state: state.update({"lm_head.weight": torch.zeros(31, 8)})),
            "lm_head.weight differs from transformer.wte.weight, but config.json says that they are tied",
        ),
        (
            weights(lambda state: state.update({CODED: state[CODED].to(torch.int8)})),
            f"1 tensor hold codes, not weights: {CODED} (I8); weights are F64, F32, F16, BF16",
        ),
        (
            config(tie_word_embeddings=False),
            "the weights lack 1 tensor that config.json asks for: lm_head.weight",
        ),
    ],
)
def test_what_is_wrong_is_said(edit: Edit, line: str, source: Path) -> None:
    edit(source)
    assert refused(source) == [line]


def test_all_of_it_at_once(source: Path) -> None:
    config(novel_gate=0.5, pruned_heads={"0": [1]}, n_head=2.5)(source)
    assert len(refused(source)) == 3


def test_more_layers_than_weights(source: Path) -> None:
    config(n_layer=3)(source)
    (line,) = refused(source)
    assert line.startswith("the weights lack 24 tensors that config.json asks for: transformer.h.1.ln_1.weight, ")
    assert line.endswith(" and 14 more")
    assert line.count("transformer.") == 10


def test_a_transposed_matrix(source: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    weights(lambda state: state.update({name: state[name].T.contiguous()}))(source)
    assert refused(source) == [f"1 tensor contradict config.json in shape: {name} is [32, 8], not [8, 32]"]


def test_no_directory_and_no_files(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="nowhere: no such directory"):
        plan_import(tmp_path / "nowhere")
    (source / "model.safetensors").unlink()
    (line,) = refused(source)
    assert line.endswith("holds no weights: looked for model.safetensors, model.safetensors.index.json, "
                         "pytorch_model.bin, pytorch_model.bin.index.json")  # fmt: skip
    (source / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(source)[0]
    (source / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused(source)[0]
    (source / "config.json").unlink()
    assert "holds no config.json: it is not a Hugging Face model directory" in refused(source)[0]


def test_a_checkpoint_of_ours_is_no_source(source: Path, tmp_path: Path) -> None:
    ours = import_model(source, tmp_path / "ours")
    with pytest.raises(ConversionError, match="is a checkpoint of Longspan already"):
        import_model(ours, tmp_path / "again")
    with pytest.raises(CheckpointError, match="a Hugging Face model of type 'gpt2'"):
        export_model(source, tmp_path / "again")


def test_a_truncated_file(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-100])
    assert "is not a readable safetensors file" in refused(source)[0]


def test_shards_and_their_index(source: Path) -> None:
    state = tensors()
    names = sorted(state)
    (source / "model.safetensors").unlink()
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, source / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = source / "model.safetensors.index.json"

    index.write_text(json.dumps({"weight_map": {**places, names[0]: "../elsewhere.safetensors"}}))
    assert "names the file '../elsewhere.safetensors' outside of its directory: refused" in refused(source)[0]
    index.write_text(json.dumps({"weight_map": {**places, names[0]: "c.safetensors"}}))
    assert "lacks c.safetensors, which model.safetensors.index.json names" in refused(source)[0]
    index.write_text(json.dumps({"weight_map": {}}))
    assert "has no weight_map" in refused(source)[0]
    index.write_text(json.dumps({"weight_map": places}))
    save_file({name: state[name] for name in names[4:]}, source / "b.safetensors")
    assert f"holds {names[4]}, which another file holds too" in refused(source)[0]


MEASURED = """
import sys
from pathlib import Path
from longspan.model.conversion import export_model, import_model
def peak():  # (ru_maxrss would begin with the parent's)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024
def there_and_back(folder):
    export_model(folder, folder / "hf", shard_bytes=20_000_000, repeat_kv=True)
    import_model(folder / "hf", folder / "back")
there_and_back(Path(sys.argv[1]) / "small")
before = peak()
there_and_back(Path(sys.argv[1]) / "large")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """100 MB of weights in tensors of 4 MB pass through some megabytes, out and in."""
    small = DecoderConfig(vocab_size=61, n_layers=1, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_positions=24)
    large = replace(small, n_layers=8, d_model=512, d_ff=2048)
    for name, shape in (("small", small), ("large", large)):
        save_model(build_from(shape, seed=0), tmp_path / name)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "large/hf").glob("*.safetensors"))) > 4
    assert int(done.stdout) < 30, f"{done.stdout} MB"


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(source: Path) -> Path:
    (source / "model.safetensors").unlink()
    torch.save(tensors(), source / "pytorch_model.bin")
    return source


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("old", [False, True])
def test_pickled_code_is_not_run(old: bool, pickled: Path, tmp_path: Path) -> None:
    sign = tmp_path / "source" / "ran"
    state = {**tensors(), "extra": Payload(sign)}
    torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    (line,) = refused(pickled)
    assert "pytorch_model.bin holds more than tensors and was not loaded" in line
    assert "save its tensors as safetensors" in line
    assert not sign.exists()
    assert "\n" not in line


def test_a_bare_pickle(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(pickled / "ran")}, protocol=2))
    assert refused(pickled)
    assert not (pickled / "ran").exists()


def test_an_archive_that_unfolds(pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "has entries that torch never writes (compressed: " in refused(pickled)[0]


def test_a_damaged_archive_and_another_object(pickled: Path) -> None:
    file = pickled / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:500])
    assert len(refused(pickled)) == 1
    torch.save([torch.ones(2)], file)
    assert "is not a state dict" in refused(pickled)[0]
    torch.save({"step": 3, **tensors()}, file)
    assert "is not a state dict" in refused(pickled)[0]


# -- what goes along --------------------------------------------------------------------------------------------------


def test_code_of_the_directory_is_noted_and_left_alone(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    config(auto_map={"AutoModelForCausalLM": "modeling.Model"})(source)
    (source / "modeling.py").write_text("raise SystemExit")
    written = import_model(source, source.parent / "output")
    assert "brings code of its own (auto_map); it is not run" in caplog.text
    assert not (written / "modeling.py").exists()


def test_the_tokenizer_goes_along_in_both_directions(source: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "x"}', "merges.txt": "a b"}
    for name, content in files.items():
        (source / name).write_text(content)
    config(eos_token_id=7, bos_token_id=None)(source)
    ours = import_model(source, tmp_path / "ours")
    back = export_model(ours, tmp_path / "back")
    for name, content in files.items():
        assert (ours / name).read_text() == (back / name).read_text() == content
    assert json.loads((back / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == 7
    before, after = tensors(), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_an_occupied_output_is_kept(source: Path, tmp_path: Path) -> None:
    ours = import_model(source, tmp_path / "ours")
    for write in (lambda: import_model(source, ours), lambda: export_model(ours, ours)):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            write()
    assert load_model(import_model(source, ours, overwrite=True)).config.d_model == 8


def test_plans_write_nothing(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    assert plan_import(source).config["d_model"] == 8
    save_file(tensors(), source / "model.safetensors")
    ours = import_model(source, tmp_path / "ours")
    assert plan_export(ours).config["n_embd"] == 8
    with pytest.raises(ConversionError, match="model_type=t5: is not supported; supported are gpt2"):
        plan_export(ours, model_type="t5")
