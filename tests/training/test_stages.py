"""Runs in stages: what a schedule means, that it continues wherever it was killed, and what it leaves behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longspan.evaluation.reporting.run_report import write_report
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.checkpoint import load_config, load_weights
from longspan.model.config import AttentionPlan, DecoderConfig, EncoderConfig, HeadGroup
from longspan.training.checkpointing import Checkpoints, load_state
from longspan.training.held_out import trained_with
from longspan.training.metrics import Row, format_row, read_rows
from longspan.training.optim import stage_schedule
from longspan.training.plan import plan
from longspan.training.progress import ProgressView
from longspan.training.run import train
from longspan.training.schema import ConfigError, RunConfig, as_request, validate
from longspan.training.stages import stage_at, stages_of, widened, windows_in_words

Request = Callable[..., dict]

NEAR = {"causal": True, "window": {"left": 3, "right": 0}}
FAR = {"causal": True, "window": {"left": 3, "right": 0, "dilation": 2}}
WINDOWED = {
    "patterns": {"near": NEAR, "mixed": [{"heads": 1, "spec": NEAR}, {"heads": 1, "spec": FAR}]},
    "layers": ["near", "mixed"],
}
STAGES = [
    {"name": "short", "steps": 4, "context": 8},
    {"name": "middle", "steps": 3, "window_factor": 2, "lr_factor": 0.5, "global_batch": 4},
    {
        "name": "long",
        "steps": 3,
        "context": 32,
        "window_factor": 4,
        "lr_factor": 0.25,
        "optimizer": "fresh",
        "warmup": 1,
    },
]


@pytest.fixture
def staged(request_of: Request) -> Request:
    """10 steps in three stages of 8, 16 and 32 tokens a sequence and windows of 4, 8 and 16 keys."""

    def build(**changes: object) -> dict:
        return request_of(
            **{
                "model__n_layers": 2,
                "model__positions": "rope",
                "attention": WINDOWED,
                "stages": STAGES,
                **changes,
            }
        )

    return build


def curve(run: Path) -> list[tuple]:
    return [
        (row.step, row.stage, row.tokens, row.loss, row.validation_loss, row.lr, row.grad_norm)
        for row in read_rows(run / "metrics.csv")
    ]


# -- what is written means ---------------------------------------------------------------------------------------------


def increasing() -> AttentionPlan:
    """Table 12 of Beltagy et al. 2020: windows of 32 to 512 keys from the lowest layers up, two dilated heads above."""
    patterns: dict[str, AttentionSpec | tuple[HeadGroup, ...]] = {
        f"w{keys}": AttentionSpec(causal=True, window=Window.causal_keys(keys)) for keys in (32, 64, 128, 256)
    }
    plain = AttentionSpec(causal=True, window=Window.causal_keys(512))
    dilated = replace(plain, window=replace(plain.window, dilation=4))
    patterns["w512"] = (HeadGroup(heads=2, spec=dilated), HeadGroup(heads=6, spec=plain))
    layers = ("w32",) * 2 + ("w64",) * 2 + ("w128",) * 2 + ("w256",) * 3 + ("w512",) * 3
    return AttentionPlan(patterns=patterns, layers=layers)


def longformer(stages: object) -> RunConfig:
    model = {"n_layers": 12, "d_model": 64, "n_heads": 8, "d_ff": 128, "vocab_size": 257, "positions": "rope"}
    config = validate(
        {
            "model": {**model, "max_positions": 23040},
            "data": {"context": 2048, "tokenizer": {"kind": "bytes"}},
            "optimizer": {"lr": 2.5e-4},
            "schedule": {"name": "constant", "warmup": 0.1},
            "trainer": {"global_batch": 32},
            "stages": [],
        }
    )
    raw = as_request(replace(config, model=replace(config.model, attention=increasing())))
    del raw["trainer"]["steps"]
    return validate({**raw, "stages": stages})


STEPS = [430_000, 50_000, 50_000, 35_000, 5_000]
BATCHES = [32, 32, 16, 16, 16]


def test_the_schedule_of_the_paper_in_one_line() -> None:
    config = longformer({"steps": STEPS, "max_context": 23_040, "global_batch": BATCHES})
    stages = stages_of(config)
    assert [stage.config.data.context for stage in stages] == [2048, 4096, 8192, 16384, 23040]
    assert [windows_in_words(stage.config.model) for stage in stages] == [
        "32–512", "64–1,024", "128–2,048", "256–4,096", "512–8,192"
    ]  # fmt: skip
    assert [stage.config.optimizer.lr * stage.lr_factor for stage in stages] == [
        2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5, 1.5625e-5
    ]  # fmt: skip
    assert [(stage.start, stage.end) for stage in stages] == [
        (0, 430_000), (430_000, 480_000), (480_000, 530_000), (530_000, 565_000), (565_000, 570_000)
    ]  # fmt: skip
    assert [stage.tokens_before for stage in stages[:3]] == [0, 430_000 * 32 * 2048, (430_000 + 100_000) * 32 * 2048]
    assert config.trainer.steps == 570_000
    top = stages[-1].config.model
    assert isinstance(top, DecoderConfig)
    assert [group.spec.window for group in top.head_groups(11)] == [
        Window(left=8191, right=0, dilation=4),
        Window(left=8191, right=0),
    ]


def test_the_same_as_a_list() -> None:
    contexts = [2048, 4096, 8192, 16384, 23040]
    listed = [
        {
            "steps": steps,
            "context": context,
            "window_factor": 2**i,
            "lr_factor": 0.5**i,
            "global_batch": batch,
        }
        for i, (steps, context, batch) in enumerate(zip(STEPS, contexts, BATCHES))
    ]
    series = longformer({"steps": STEPS, "max_context": 23_040, "global_batch": BATCHES})
    assert stages_of(longformer(listed)) == stages_of(series)


@pytest.mark.parametrize("stages", [{"steps": [3, 2]}, STAGES])
def test_a_config_comes_back_from_its_plain_form(stages: object, staged: Request) -> None:
    raw = staged(stages=stages, data__context=8)
    del raw["trainer"]["steps"]
    config = validate(raw)
    assert validate(json.loads(json.dumps(as_request(config)))) == config
    assert config.trainer.steps == (5 if isinstance(stages, dict) else 10)


def test_a_plain_run_is_one_stage_without_a_name(request_of: Request) -> None:
    config = validate(request_of())
    (stage,) = stages_of(config)
    assert (stage.name, stage.start, stage.end, stage.place, stage.config) == (None, 0, 10, 0, config)
    assert stages_of(validate({**request_of(), "stages": None})) == stages_of(config)


def test_windows_count_keys_on_one_side_and_neighbours_on_two() -> None:
    one = AttentionSpec(causal=True, window=Window.causal_keys(32))
    unsaid = AttentionSpec(causal=True, window=Window(left=31))
    two = AttentionSpec(causal=False, window=Window.symmetric(64, dilation=3))
    full = AttentionSpec(causal=True)
    specs = {"one": one, "unsaid": unsaid, "two": two, "full": full}
    plan = widened(AttentionPlan(patterns=specs, layers=tuple(specs)), 2)
    assert plan.specs()["one"] == (replace(one, window=Window.causal_keys(64)),)
    assert plan.specs()["unsaid"] == (replace(unsaid, window=Window(left=63)),)
    assert plan.specs()["two"] == (replace(two, window=Window.symmetric(128, dilation=3)),)
    assert plan.specs()["full"] == (full,)
    halved = widened(plan, 0.5)
    assert halved == AttentionPlan(patterns=specs, layers=tuple(specs))
    with pytest.raises(ValueError, match=r"a window of 64 keys would have 85.3333; choose a factor that gives whole"):
        widened(plan, 4 / 3)


def test_windows_in_words() -> None:
    near = AttentionSpec(causal=True, window=Window.causal_keys(64))
    model = DecoderConfig(n_layers=2, attention=AttentionPlan(patterns={"near": near}, layers=("near",)))
    assert windows_in_words(model) == "64"
    plan = AttentionPlan(patterns={"near": near, "full": AttentionSpec(causal=True)}, layers=("near", "full"))
    assert windows_in_words(replace(model, attention=plan)) == "64, all"
    sides = AttentionPlan(patterns={"both": AttentionSpec(causal=False, window=Window.symmetric(64))}, layers=("both",))
    assert windows_in_words(EncoderConfig(attention=sides)) == "129"


def test_the_learning_rate_of_each_step(staged: Request) -> None:
    raw = staged(optimizer={"lr": 1e-2}, schedule={"name": "linear", "warmup": 2, "final_ratio": 0.0})
    stages = stages_of(validate(raw))
    factors = [stage_schedule(stage_at(stages, step + 1))(step) for step in range(10)]
    short, middle, long = [0.5, 1.0, 0.5, 0.0], [0.25, 0.5, 0.0], [0.25, 0.125, 0.0]
    assert factors == pytest.approx(short + middle + long)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainer__steps": 11}, "trainer.steps=11: the stages take 10 together; give that or nothing"),
        ({"stages": {"steps": []}}, "stages.steps=[]: expected a non-empty list of whole numbers"),
        ({"stages": [{"context": 8}]}, "stages.0.steps: is required: optimizer steps of the stage"),
        ({"stages": [{"steps": 10, "windows": 2}]}, "stages.0.windows=2: unknown key; "),
        (
            {"stages": [{"steps": 10, "window_factor": 1.3}]},
            "stages.0.window_factor: a window of 4 keys would have 5.2; choose a factor that gives whole numbers",
        ),
        (
            {"stages": {"steps": [5, 5], "window_ratio": 1.1, "context_ratio": 1}},
            "stages.window_ratio: a window of 4 keys would have 4.4; choose a factor that gives whole numbers",
        ),
        (
            {"stages": [{"steps": 10, "window_factor": 2, "patterns": {"near": NEAR}}]},
            "stages.0.window_factor=2: and patterns both say the windows; give one of them",
        ),
        (
            {"stages": [{"steps": 10, "patterns": {"neer": NEAR}}]},
            "stages.0.patterns.neer: the model has no such pattern; it has near, mixed",
        ),
        (
            {"stages": [{"steps": 10, "patterns": {"near": {**NEAR, "learned_sink": True}}}]},
            "stages.0.patterns.near: learned_sink and global_tokens come with weights, so every stage has them or none",
        ),
        (
            {"stages": [{"steps": 10, "patterns": {"near": {**NEAR, "causal": False}}}]},
            "stages.0: attention.patterns.near: causal=false, but a decoder predicts the next token; set causal: true",
        ),
        (
            {"stages": {"steps": [5, 5], "global_batch": [8]}},
            "stages.global_batch=[8]: has 1 numbers and stages.steps has 2; give one a stage",
        ),
        (
            {"stages": {"steps": [5, 5], "context_ratio": 1.3}},
            "stages.context_ratio=1.3: stage 2 would have sequences of 20.8 tokens (data.context=16); choose a ratio",
        ),
        (
            {"stages": [{"steps": 5, "name": "a"}, {"steps": 5, "name": "a"}]},
            "stages.1.name=a: is the name of an earlier stage; give each its own",
        ),
        (
            {"stages": [{"steps": 10, "global_batch": 3}]},
            "stages.0 (stage1): trainer.global_batch=3: is not a multiple of trainer.micro_batch=2",
        ),
        (
            {"stages": [{"steps": 8}, {"steps": 2, "warmup": 2}]},
            "stages.1 (stage2): schedule.warmup=2.0: steps of warm-up fill trainer.steps=2",
        ),
        (
            {"stages": [{"steps": 10, "context": 256}], "model__positions": "learned"},
            "stages.0 (stage1): data.context=256: is longer than model.max_positions=128 learned positions",
        ),
    ],
)
def test_what_is_refused(changes: dict, expected: str, staged: Request) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(staged(**changes))
    assert len(caught.value.problems) == 1
    assert expected in caught.value.problems[0]


def test_learned_positions_longer_than_a_stage(staged: Request) -> None:
    config = validate(staged(model__positions="learned"))
    assert [stage.config.model.max_positions for stage in stages_of(config)] == [128] * 3  # pyright: ignore


def test_patterns_of_a_stage_keep_the_document_mask(staged: Request) -> None:
    wide = {"causal": True, "window": {"left": 9, "right": 0}}
    raw = staged(stages=[{"steps": 10, "patterns": {"near": wide}}], data__document_mask=True)
    result = train(validate(raw))
    model = load_config(Checkpoints(result.directory, keep=1).path(10))
    assert isinstance(model, DecoderConfig)
    expected = AttentionSpec(causal=True, window=Window(left=9, right=0), documents=True)
    assert model.attention.patterns["near"] == expected
    assert all(spec.documents for specs in model.attention.specs().values() for spec in specs)


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_each_stage_costs_what_a_plain_run_of_it_does(staged: Request, request_of: Request, tmp_path: Path) -> None:
    costs = plan(validate(staged()))
    assert [each.plan.tokens for each in costs.stages] == [4 * 8 * 8, 3 * 4 * 16, 3 * 8 * 32]
    assert (costs.tokens, costs.steps) == (256 + 192 + 768, 10)
    long = {"causal": True, "window": {"left": 15, "right": 0}}
    dilated = {"causal": True, "window": {"left": 15, "right": 0, "dilation": 2}}
    patterns = {"near": long, "mixed": [{"heads": 1, "spec": long}, {"heads": 1, "spec": dilated}]}
    alone = plan(
        validate(
            request_of(
                model__n_layers=2,
                model__positions="rope",
                attention={"patterns": patterns, "layers": ["near", "mixed"]},
                data__context=32,
                trainer__steps=3,
                schedule={"warmup": 1},
                output=str(tmp_path / "alone"),
            )
        )
    )
    third = costs.stages[2].plan
    assert (third.flops, third.memory, third.tokens) == (alone.flops, alone.memory, alone.tokens)
    assert costs.flops == pytest.approx(sum(each.plan.flops for each in costs.stages))
    assert costs.memory == max((each.plan.memory for each in costs.stages), key=lambda memory: memory.total)
    lines = costs.lines()
    table = [line.split() for line in lines[-4:]]
    assert table[0] == ["stage", "steps", "context", "windows", "lr", "batch", "tokens", "FLOPs", "memory", "time"]
    assert [row[:4] for row in table[1:]] == [
        ["short", "4", "8", "4"],
        ["middle", "3", "16", "8"],
        ["long", "3", "32", "16"],
    ]
    assert lines[1] == "tokens      1,216 in 10 steps"
    assert costs.to_dict()["stages"][1]["tokens"] == 192  # pyright: ignore


# -- a run -------------------------------------------------------------------------------------------------------------


def test_equal_stages_are_one_run(request_of: Request, tmp_path: Path) -> None:
    """Nothing happens between stages but what they say: data, moments, masks and rows go on."""
    constant = {"name": "constant", "warmup": 0}
    train(validate(request_of(schedule=constant, output=str(tmp_path / "whole"))))
    stages = [{"steps": 4}, {"steps": 3}, {"steps": 3}]
    train(validate(request_of(schedule=constant, stages=stages, trainer__val_every=100)))
    keep = [
        (row.step, row.tokens, row.loss, row.lr, row.grad_norm) for row in read_rows(tmp_path / "whole/metrics.csv")
    ]
    assert keep == [
        (row.step, row.tokens, row.loss, row.lr, row.grad_norm) for row in read_rows(tmp_path / "run/metrics.csv")
    ]
    weights = [load_weights(Checkpoints(tmp_path / name, keep=1).path(10)) for name in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_in_stages(staged: Request, tmp_path: Path) -> None:
    request = staged(trainer__keep=10, trainer__save_every=1, callbacks__report=True, sample__prompt="the ")
    result = train(validate({**request, "evaluation": {"max_tokens": 200}}))
    run = result.directory
    rows = read_rows(run / "metrics.csv")
    assert [row.stage for row in rows] == ["short"] * 4 + ["middle"] * 3 + ["long"] * 3
    assert [row.tokens for row in rows] == [64, 128, 192, 256, 320, 384, 448, 704, 960, 1216]
    assert [row.step for row in rows if row.validation_loss is not None] == [4, 7, 8, 10]

    # The windows of each checkpoint are those of the stage that wrote it.
    checkpoints = Checkpoints(run, keep=10)
    lefts = {}
    for step in checkpoints.steps():
        model = load_config(checkpoints.path(step))
        assert isinstance(model, DecoderConfig)
        lefts[step] = [group.spec.window.left for group in model.head_groups(1)]
        assert [group.spec.window.dilation for group in model.head_groups(1)] == [1, 2]
    assert lefts == {
        **{step: [3, 3] for step in (1, 2, 3, 4)},
        **{step: [7, 7] for step in (5, 6, 7)},
        **{step: [15, 15] for step in (8, 9, 10)},
    }
    assert [trained_with(checkpoints.path(step)).context for step in (4, 5, 10)] == [8, 16, 32]

    # Moments: kept into the second stage, fresh in the third.
    counts = {step: _adam_steps(load_state(checkpoints.path(step))) for step in (4, 5, 7, 8, 10)}
    assert counts == {4: 4, 5: 5, 7: 7, 8: 1, 10: 3}

    # The best checkpoint is one of the last stage, whatever earlier ones reached on their sequences.
    last = {row.step: row.validation_loss for row in rows if row.stage == "long" and row.validation_loss is not None}
    assert result.best_step == min(last, key=lambda step: last[step])
    assert json.loads((run / "evaluation.json").read_text())["perplexity"]["protocol"]["window"] == 32

    lineage = json.loads((run / "lineage.json").read_text())
    assert [(each["name"], each["first_step"], each["last_step"], each["context"]) for each in lineage["stages"]] == [
        ("short", 1, 4, 8),
        ("middle", 5, 7, 16),
        ("long", 8, 10, 32),
    ]
    assert [each["optimizer"] for each in lineage["stages"]] == ["kept", "kept", "fresh"]
    assert json.loads((checkpoints.path(6) / "lineage.json").read_text())["stage"]["name"] == "middle"
    page = write_report(run).read_text()
    assert "<td>2. middle</td><td>5 – 7</td><td>16</td><td>8</td>" in page
    log = (run / "train.log").read_text()
    assert "stage 2/3 middle: context 16, windows 8, lr 0.0005, 3 steps of 64 tokens" in log
    assert "step 10/10 long loss" in log


def test_the_best_is_of_the_last_stage(staged: Request, tmp_path: Path) -> None:
    """Even where the last stage spoils the model: its windows are the ones that were asked for."""
    stages = [{"steps": 5, "context": 16}, {"steps": 2, "context": 16, "lr_factor": 1000}]
    request = staged(stages=stages, trainer__val_every=1)
    del request["trainer"]["steps"]
    result = train(validate(request))
    losses = {row.step: row.validation_loss or 0.0 for row in read_rows(tmp_path / "run/metrics.csv")}
    assert min(losses[6], losses[7]) > losses[5] > 0
    assert result.best_step == min((6, 7), key=lambda step: losses[step])
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["step"] == result.best_step


def _adam_steps(state: dict) -> int:
    (count,) = {int(moments["step"]) for moments in state["optimizer"]["state"].values()}
    return count


def test_stages_read_on_where_the_one_before_stopped(staged: Request, tmp_path: Path) -> None:
    """256 tokens into a stream of sequences of 16 is sequence 16; 448 into one of 32 is sequence 14."""
    train(validate(staged(trainer__keep=10, trainer__save_every=1)))
    checkpoints = Checkpoints(tmp_path / "run", keep=10)
    consumed = {step: load_state(checkpoints.path(step))["data"]["consumed"] for step in checkpoints.steps()}
    assert consumed == {1: 8, 2: 16, 3: 24, 4: 32, 5: 20, 6: 24, 7: 28, 8: 22, 9: 30, 10: 38}


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[tuple]]:
    return {}


@pytest.fixture
def expected(uninterrupted: dict, runner, staged: Request, tmp_path: Path) -> Callable[..., list[tuple]]:
    def get(ranks: int = 1, **changes: object) -> list[tuple]:
        key = f"{ranks} {changes}"
        if key not in uninterrupted:
            whole = tmp_path / f"whole-{len(uninterrupted)}"
            assert runner.run(staged(output=str(whole), **changes), ranks=ranks) == 0, runner.log.read_text()
            uninterrupted[key] = curve(whole)
            assert [row[0] for row in uninterrupted[key]] == list(range(1, 11))
        return uninterrupted[key]

    return get


# Stages end with steps 4, 7 and 10.
MOMENTS = ["row:1", "row:4", "half:4", "after:4", "row:5", "before:7", "after:7", "row:8", "row:10", "after:10"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_then_the_same_command(moment: str, runner, staged: Request, expected, tmp_path: Path) -> None:
    config = staged(resume="auto")
    assert runner.run(config, kill=moment) == -signal.SIGKILL, runner.log.read_text()
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected()


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_signal_in_any_stage(step: int, runner, staged: Request, expected, tmp_path: Path) -> None:
    """Steps 4 and 7 end a stage, so the next session owes a validation of the stage that is over."""
    config = staged(resume="auto")
    assert runner.run(config, kill=f"SIGTERM:{step}") == 143, runner.log.read_text()
    assert Checkpoints(tmp_path / "run", keep=2).steps()[-1] == step + 1
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected()


def test_killed_in_every_stage(runner, staged: Request, expected, tmp_path: Path) -> None:
    config = staged(resume="auto")
    for moment in ("row:3", "after:4", "row:6", "row:7", "row:9"):
        assert runner.run(config, kill=moment) == -signal.SIGKILL, runner.log.read_text()
    assert runner.run(config) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == expected()
    sessions = json.loads((tmp_path / "run/lineage.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 4, 4, 6, 8]


def test_stages_of_a_run_that_started_from_weights(runner, staged: Request, tmp_path: Path) -> None:
    """Its windows are multiples of the parent's, not of the stage's that it continues in."""
    base = staged(output=str(tmp_path / "base"), stages=[], trainer__steps=2)
    assert runner.run(base) == 0, runner.log.read_text()
    start = {**staged(), "checkpoint": base["output"]}
    assert runner.run({**start, "output": str(tmp_path / "whole")}) == 0, runner.log.read_text()
    assert runner.run(start, kill="row:6") == -signal.SIGKILL, runner.log.read_text()
    assert runner.run({**staged(), "resume": "auto"}) == 0, runner.log.read_text()
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    model = load_config(Checkpoints(tmp_path / "run", keep=2).path(10))
    assert isinstance(model, DecoderConfig)
    assert model.head_groups(0)[0].spec.window.left == 15


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"window_factor": 4}, "resume: the configured model in middle is not the one that"),
        ({"context": 24}, "the training data is not what the run was trained on (context: 16 → 24)"),
        ({"global_batch": 2}, "(global_batch: 4 → 2)"),
    ],
)
def test_another_schedule_does_not_continue(changes: dict, expected: str, runner, staged: Request) -> None:
    assert runner.run(staged(), kill="SIGTERM:5") == 143, runner.log.read_text()
    stages = [STAGES[0], {**STAGES[1], **changes}, STAGES[2]]
    assert runner.run(staged(resume="auto", stages=stages)) == 2
    assert expected in runner.log.read_text()


def test_two_processes(runner, staged: Request, expected, tmp_path: Path) -> None:
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    config = staged(resume="auto", **changes)
    runner.start(config, kill="groupSIGTERM:5", ranks=2)
    assert runner.finish() == [143, 0], runner.log.read_text()
    runner.start(config, ranks=2)
    assert runner.finish() == [0, 0], runner.log.read_text()
    assert curve(tmp_path / "run") == expected(ranks=2, **changes)


def test_sharded_over_two_processes(runner, staged: Request, expected) -> None:
    shape = {"trainer__devices": 2, "trainer__strategy": "fsdp", "trainer__accelerator": "auto"}
    alone = expected(model__dropout=0.0)
    together = expected(ranks=2, model__dropout=0.0, **shape)
    assert [row[:3] for row in together] == [row[:3] for row in alone]
    assert [row[3] for row in together] == pytest.approx([row[3] for row in alone], abs=2e-6)


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
def test_a_stage_has_a_bar_of_its_own(number: int, staged: Request, tmp_path: Path) -> None:
    """Above the run's, which only the last stage leaves on the screen."""
    stage = stages_of(validate(staged()))[number - 1]
    console = Console(record=True, width=120, force_terminal=True, file=(tmp_path / "screen").open("w"))
    with ProgressView("bar", console, steps=10, seconds=100, stage=stage) as view:
        row = Row(step=stage.start + 2, tokens=1, loss=2.5, stage=stage.name)
        view.show(row, memory_bytes=None, eta_seconds=65.0, line=False)
    console.file.close()
    *_, last = console.export_text().split(f"{number}/3 {stage.name}")
    bars = last.splitlines()
    assert " 2/3 " in bars[0]
    assert "loss 2.500" in bars[0]
    assert [("train" in line, "9/10" in line, "eta 01:05" in line) for line in bars[1:2]] == [(True,) * 3] * (
        number - 2
    )


def test_a_line_names_the_stage() -> None:
    row = Row(step=6, tokens=1, loss=2.5, stage="middle")
    assert format_row(row, steps=10, memory_bytes=None, eta_seconds=None) == "step 6/10 middle loss 2.500"
