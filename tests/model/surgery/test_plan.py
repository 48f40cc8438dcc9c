"""A conversion as a whole: order, lineage, files, memory, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longspan.model.accounting import kv_bytes_per_token, parameters
from longspan.model.build import Model, build_from
from longspan.model.checkpoint import CheckpointError, load_model, save_model, sha256_of, verify
from longspan.model.config import DecoderConfig, EncoderConfig, ModelConfig, Seq2SeqConfig, StackConfig
from longspan.model.config_surgery import OPTIONAL_KEYS, REQUIRED_KEYS
from longspan.model.lazy import stored_weights, write_weights
from longspan.model.surgery import (
    SURGERIES,
    CopyGlobal,
    ExtendPositions,
    LazyTensor,
    Longformer,
    SurgeryError,
    Weights,
    convert_model,
    cost,
    make_surgery,
    operate,
    plan_conversion,
    plan_steps,
)
from longspan.model.surgery.plan import Report

Source = Callable[[ModelConfig], Model]
Convert = Callable[..., Model]

GPT = DecoderConfig(vocab_size=61, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=24)
BERT = EncoderConfig(vocab_size=61, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=24, n_types=2)


# -- order and lineage ------------------------------------------------------------------------------------------------


def test_the_order_is_the_one_given(source: Source, convert: Convert) -> None:
    source(BERT)
    longformer, copy_global = Longformer(window=8), CopyGlobal()
    with pytest.raises(SurgeryError, match="surgery=longformer makes them"):
        plan_steps(BERT, [copy_global, longformer])
    plain, copied = convert(longformer, name="plain"), convert(longformer, copy_global, name="copied")
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize(("init", "same"), [("mean", True), ("svd", True), ("random", False)])
def test_grouping_before_and_after_copying(init: str, same: bool) -> None:
    """Global projections are copies of grouped heads, or grouped copies; random heads are drawn for each tensor."""
    weights = {name: LazyTensor.of(tensor) for name, tensor in build_from(BERT, seed=0).state_dict().items()}
    surgeries = [make_surgery("gqa", {"kv_heads": 2, "init": init}), Longformer(window=8)]
    one, _ = operate(plan_steps(BERT, surgeries), weights)
    other, _ = operate(plan_steps(BERT, surgeries[::-1]), weights)
    for name, tensor in one.items():
        assert torch.equal(tensor.read(), other[name].read()) or (not same and ".global_attention." in name)
    assert same == all(torch.equal(tensor.read(), other[name].read()) for name, tensor in one.items())


def test_lineage_says_what_was_done_to_what(source: Source, convert: Convert, tmp_path: Path) -> None:
    model = source(BERT)
    save_model(model, tmp_path / "source", lineage={"step": 7, "data": {"store": "books"}}, overwrite=True)
    convert(ExtendPositions(max_positions=64), Longformer(window=(8, 16)))
    convert(CopyGlobal(), of="converted", name="again")
    lineage = json.loads((tmp_path / "again/lineage.json").read_text())
    assert (lineage["step"], lineage["data"]) == (7, {"store": "books"})  # the weights' past remains theirs
    of_source = {"checkpoint": "source", "weights_sha256": sha256_of(tmp_path / "source/model.safetensors")}
    of_converted = {"checkpoint": "converted", "weights_sha256": sha256_of(tmp_path / "converted/model.safetensors")}
    sizes = [parameters(model.config).total]
    sizes += [sizes[0] + 40 * 32, sizes[0] + 41 * 32 + 2 * 3 * (32 + 1) * 32]
    assert lineage["surgery"] == [
        {
            "surgery": "positions",
            "of": of_source,
            "parameters": {"before": sizes[0], "after": sizes[1]},
            "changes": {"mode": "copy", "max_positions": {"before": 24, "after": 64}},
        },
        {
            "surgery": "longformer",
            "of": of_source,
            "parameters": {"before": sizes[1], "after": sizes[2]},
            "changes": {
                "window": [8, 16],
                "global_tokens": True,
                "global_projections_from_local_ones_in_layers": [0, 1],
                "position_offset": {"before": 0, "after": 1},
            },
        },
        {
            "surgery": "copy-global",
            "of": of_converted,
            "parameters": {"before": sizes[2], "after": sizes[2]},
            "changes": {"layers": [0, 1], "projections": ["q_proj", "k_proj", "v_proj"]},
        },
    ]
    assert sum(tensor.numel() for tensor in load_model(tmp_path / "again").state_dict().values()) == sizes[2]


def test_costs_before_and_after(source: Source, tmp_path: Path) -> None:
    source(GPT)
    surgeries = [ExtendPositions(max_positions=96), Longformer(window=10, sink_tokens=2, full_every=2)]
    plan = plan_conversion(tmp_path / "source", surgeries)
    before, after = cost(plan.before), cost(plan.after)
    per_layer = kv_bytes_per_token(GPT) // 2
    assert (before.length, before.kv_bytes) == (24, 2 * per_layer * 24)
    assert (after.length, after.kv_bytes) == (96, per_layer * (12 + 96))  # two sinks and ten, and a full layer
    assert after.parameters - before.parameters == 72 * 32
    assert cost(BERT).kv_bytes is None
    stack = StackConfig(n_layers=2, n_heads=4, d_ff=48, max_positions=24)
    bart = Seq2SeqConfig(vocab_size=61, d_model=32, encoder=replace(stack, max_positions=50), decoder=stack)
    assert cost(bart).kv_bytes == 2 * per_layer * (24 + 50)


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_goes_along_and_knows_the_new_length(source: Source, convert: Convert, tmp_path: Path) -> None:
    source(BERT)
    carried = {"tokenizer.json": '{"truncation": null}', "vocab.txt": "a\n", "special_tokens_map.json": "{}"}
    told = {"model_max_length": 24, "do_lower_case": True}
    for name, text in {**carried, "tokenizer_config.json": json.dumps(told)}.items():
        (tmp_path / "source" / name).write_text(text)
    convert(ExtendPositions(max_positions=96), name="longer")
    for name, text in carried.items():
        assert (tmp_path / "longer" / name).read_text() == text
    assert json.loads((tmp_path / "longer/tokenizer_config.json").read_text()) == {**told, "model_max_length": 96}
    convert(Longformer(window=8), name="windowed")
    assert json.loads((tmp_path / "windowed/tokenizer_config.json").read_text()) == told
    (tmp_path / "source/tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    convert(ExtendPositions(max_positions=96), name="unlimited")
    assert "19884624838656}" in (tmp_path / "unlimited/tokenizer_config.json").read_text()
    verify(tmp_path / "longer")  # sealed after that


def test_a_run_is_a_checkpoint_too(source: Source, tmp_path: Path) -> None:
    source(GPT)
    for step in (1, 2):
        shutil.copytree(tmp_path / "source", tmp_path / f"run/checkpoints/step-{step:08d}")
    (tmp_path / "run/checkpoints/best.json").write_text('{"step": 1}')
    plan = plan_conversion(tmp_path / "run", [Longformer(window=8)])
    assert plan.checkpoint.name == "step-00000001"
    convert_model(tmp_path / "run", tmp_path / "output", [Longformer(window=8)])
    (entry,) = json.loads((tmp_path / "output/lineage.json").read_text())["surgery"]
    assert entry["of"]["checkpoint"] == "run/checkpoints/step-00000001"
    for output in (tmp_path / "run", tmp_path / "run/checkpoints"):
        with pytest.raises(CheckpointError, match="holds the checkpoint that is converted"):
            convert_model(tmp_path / "run", output, [Longformer(window=8)], overwrite=True)
    with pytest.raises(CheckpointError, match="lies in the checkpoint that is converted"):
        convert_model(tmp_path / "source", tmp_path / "source/new", [Longformer(window=8)])
    assert (tmp_path / "run/checkpoints/step-00000002/config.json").is_file()


def test_an_occupied_output_needs_leave_and_may_be_the_source(source: Source, tmp_path: Path) -> None:
    source(GPT)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert_model(tmp_path / "source", tmp_path / "taken", [Longformer(window=8)])
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    convert_model(tmp_path / "source", tmp_path / "source", [ExtendPositions(max_positions=48)], overwrite=True)
    model = load_model(tmp_path / "source")
    assert isinstance(model.config, DecoderConfig)
    assert model.config.max_positions == 48


@dataclass(frozen=True)
class Fails:
    """Goes wrong at the last tensor but a few."""

    shape: bool = False
    name: str = "fails"

    def config(self, before: ModelConfig) -> ModelConfig:
        return before

    def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
        bad = weights["norm.weight"].then(self._fail if not self.shape else lambda tensor: tensor[:1])
        return {**weights, "norm.weight": bad}

    def changes(self, before: ModelConfig) -> dict[str, object]:
        return {}

    def _fail(self, tensor: Tensor) -> Tensor:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("shape", [False, True])
def test_nothing_half_written_is_left(shape: bool, source: Source, tmp_path: Path) -> None:
    source(GPT)
    with pytest.raises(ValueError if shape else OSError, match=r"norm\.weight: became \[1\]" if shape else "No space"):
        convert_model(tmp_path / "source", tmp_path / "output", [Fails(shape)])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_checkpoint_is_refused(source: Source, tmp_path: Path) -> None:
    source(GPT)
    weights = tmp_path / "source/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        convert_model(tmp_path / "source", tmp_path / "output", [Longformer(window=8)])
    assert not (tmp_path / "output").exists()


def test_a_surgery_makes_what_it_announces() -> None:
    @dataclass(frozen=True)
    class Forgets(Fails):
        def weights(self, before: ModelConfig, weights: Weights, report: Report) -> Weights:
            return {name: lazy for name, lazy in weights.items() if name != "norm.bias"}

    state = {name: LazyTensor.of(tensor) for name, tensor in build_from(GPT, seed=0).state_dict().items()}
    with pytest.raises(ValueError, match=r"surgery=fails does not make norm\.bias of the model that it plans"):
        operate(plan_steps(GPT, [Forgets()]), state)


# -- streaming --------------------------------------------------------------------------------------------------------


def test_the_writer_is_readable_by_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(3, generator=generator).bfloat16(),  # 6 bytes: what follows would not be aligned
        "wide": torch.randn(5, 7, generator=generator),
        "half": torch.randn(2, 3, 4, generator=generator).half(),
        "double": torch.randn(4, generator=generator).double(),
        "turned": torch.randn(6, 4, generator=generator).T,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    told: list[tuple[int, int]] = []
    write_weights(
        tmp_path / "w.safetensors",
        {name: LazyTensor.of(tensor) for name, tensor in tensors.items()},
        lambda done, of: told.append((done, of)),
    )
    for found in (load_file(tmp_path / "w.safetensors"), _read_all(tmp_path / "w.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
        assert all(tensor.dtype == tensors[name].dtype for name, tensor in found.items())
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    raw = (tmp_path / "w.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size <= (tmp_path / "theirs.safetensors").stat().st_size + 64


def _read_all(path: Path) -> dict[str, Tensor]:
    return {name: lazy.read() for name, lazy in stored_weights(path).items()}


def test_numbers_that_no_surgery_computes_with(tmp_path: Path) -> None:
    save_file({"codes": torch.zeros(3, dtype=torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="codes is stored as I8; known: F64, F32, F16, BF16"):
        stored_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        stored_weights(tmp_path / "w.safetensors")


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """Readers that keep count of what they gave and is still alive: never more than a tensor and its source."""
    model = build_from(BERT, seed=0)
    alive: set[int] = set()
    most: list[int] = []

    def read(number: int, tensor: Tensor) -> Tensor:
        given = tensor.clone()
        alive.add(number)
        weakref.finalize(given, alive.discard, number)
        most.append(len(alive))
        return given

    lazies = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(read, number, tensor))
        for number, (name, tensor) in enumerate(model.state_dict().items())
    }
    steps = plan_steps(BERT, [ExtendPositions(max_positions=64, mode="interpolate"), Longformer(window=8)])
    weights, _ = operate(steps, lazies)
    assert not most, "planning reads nothing"
    write_weights(tmp_path / "w.safetensors", weights)
    assert max(most) == 1
    assert len(most) == len(weights)  # each is read once; the local projections once more for the global ones


MEASURED = """
import sys
from pathlib import Path
from longspan.model.surgery import ExtendPositions, Longformer, convert_model
def peak():  # (ru_maxrss would begin with the parent's)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024
surgeries = [ExtendPositions(max_positions=64), Longformer(window=8)]
convert_model(sys.argv[1] + "/small", sys.argv[1] + "/small-out", surgeries)
before = peak()
convert_model(sys.argv[1] + "/large", sys.argv[1] + "/large-out", surgeries)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """100 MB of weights in tensors of 4 MB pass through some megabytes."""
    large = replace(GPT, n_layers=8, d_model=512, d_ff=2048)
    save_model(build_from(GPT, seed=0), tmp_path / "small")
    save_model(build_from(large, seed=0), tmp_path / "large")
    assert (tmp_path / "large/model.safetensors").stat().st_size > 95e6
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30, f"{done.stdout} MB"


def test_each_tensor_keeps_its_type(tmp_path: Path) -> None:
    model = build_from(BERT, seed=0).to(torch.bfloat16)
    model.state_dict()["embedding_norm.weight"].data = torch.ones(32)
    state = {name: tensor.float() if "norm" in name else tensor for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "source", state=state)
    surgeries = [ExtendPositions(max_positions=64, mode="random"), Longformer(window=8)]
    convert_model(tmp_path / "source", tmp_path / "output", surgeries)
    for name, tensor in load_file(tmp_path / "output/model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name


# -- names and keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SURGERIES)
def test_keys_are_the_fields_of_a_surgery(name: str) -> None:
    of_class = [field.name for field in fields(SURGERIES[name])]  # type: ignore[arg-type]
    assert sorted(of_class) == sorted(REQUIRED_KEYS[name] + OPTIONAL_KEYS[name])


def test_every_name_has_its_surgery() -> None:
    assert set(SURGERIES) == set(REQUIRED_KEYS) == set(OPTIONAL_KEYS)


def test_a_surgery_from_its_keys() -> None:
    assert make_surgery("longformer", {"window": 8}) == Longformer(window=8)
    with pytest.raises(SurgeryError, match="surgery=longfromer: there is no such surgery; did you mean 'longformer'"):
        make_surgery("longfromer", {})
    with pytest.raises(SurgeryError) as caught:
        make_surgery("longformer", {"windows": 8})
    assert caught.value.problems == (
        "windows: is not a key of surgery=longformer; did you mean 'window'?",
        "window: is required by surgery=longformer",
    )
    with pytest.raises(SurgeryError, match="names at least one"):
        plan_steps(GPT, [])
