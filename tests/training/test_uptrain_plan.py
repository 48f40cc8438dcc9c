"""The arithmetic of a grid: cells, steps, learning rates, and what a request may not say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from longspan.data.batch import IGNORE, TokenBatch
from longspan.model.config import DecoderConfig, EncoderConfig
from longspan.model.decoder import from_config
from longspan.model.encoder import from_config as encoder_from
from longspan.training.distillation import DistilledHiddenLoss, DistilledTokenLoss
from longspan.training.errors import UserError
from longspan.training.optim import build_schedule
from longspan.training.schema import ConfigError, validate_uptrain
from longspan.training.schema_uptrain import Init, UptrainSchedule
from longspan.training.uptrain_plan import chains_of, schedule_of, seconds_left, steps_between, steps_of


@dataclass(frozen=True)
class Asked:
    kv_heads: tuple[int, ...] = (1, 2)
    init: tuple[Init, ...] = ("mean", "random")
    alpha: tuple[float, ...] = (0.05, 0.02)
    seeds: tuple[int, ...] = (0, 1)
    control: bool = True
    schedule: UptrainSchedule = "constant"


def names(grid: Asked, parent_steps: int = 1000) -> dict[str, list[str]]:
    return {chain.name: [cell.name for cell in chain.cells] for chain in chains_of(grid, parent_steps)}


def test_the_cells_of_a_grid() -> None:
    found = names(Asked())
    conversions = [
        "control-a0",
        "kv2-mean-a0",
        "kv2-random-a0-seed0",
        "kv2-random-a0-seed1",
        "kv1-mean-a0",
        "kv1-random-a0-seed0",
        "kv1-random-a0-seed1",
    ]
    assert [name for name, cells in found.items() if cells == [name]] == conversions
    trained = {name: cells for name, cells in found.items() if name not in conversions}
    assert list(trained) == [
        f"{kind}-seed{seed}"
        for seed in (0, 1)
        for kind in ("control", "kv2-mean", "kv2-random", "kv1-mean", "kv1-random")
    ]
    assert trained["kv1-random-seed1"] == ["kv1-random-a0.02-seed1", "kv1-random-a0.05-seed1"]
    chain = next(chain for chain in chains_of(Asked(), 1000) if chain.name == "kv1-random-seed1")
    assert [cell.steps for cell in chain.cells] == [20, 50]
    assert chain.steps == 50
    assert chain.start.seed == chain.seed == 1
    # Each seed of random heads is trained on its own seed's data alone.
    assert sum(len(chain.cells) for chain in chains_of(Asked(), 1000)) == 7 + 2 * 5 * 2


def test_rewarming_gives_each_alpha_a_run_of_its_own() -> None:
    found = names(Asked(schedule="rewarm", seeds=(3,), init=("mean",)))
    assert all(len(cells) == 1 for cells in found.values())
    assert "kv1-mean-a0.05-seed3" in found
    assert len(found) == 3 + 3 * 2


def test_alpha_zero_alone_and_no_control() -> None:
    assert list(names(Asked(alpha=(0.0,), init=("mean",)))) == ["control-a0", "kv2-mean-a0", "kv1-mean-a0"]
    without = names(Asked(control=False, init=("mean",), kv_heads=(2,), seeds=(0,)))
    assert list(without) == ["control-a0", "kv2-mean-a0", "kv2-mean-seed0"]


@pytest.mark.parametrize(
    ("alpha", "parent", "steps"), [(0.05, 5000, 250), (0.05, 50, 3), (0.01, 50, 1), (0.0, 10, 0), (1.0, 7, 7)]
)
def test_steps(alpha: float, parent: int, steps: int) -> None:
    assert steps_of(alpha, parent) == steps


def test_less_than_a_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha=0.001: is less than one of the parent's 100 steps; give at least 0.01"):
        chains_of(Asked(alpha=(0.001,)), 100)


def factors(kind: UptrainSchedule, steps: int, *, warmup: float = 0.002) -> list[float]:
    config = schedule_of(kind, parent_steps=5000, warmup=warmup, final_ratio=0.1, shortest=steps)
    factor = build_schedule(config, steps)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("kind", ["constant", "t5"])
def test_a_shorter_run_is_the_beginning_of_a_longer_one(kind: UptrainSchedule) -> None:
    assert factors(kind, 100) == factors(kind, 250)[:100]
    assert factors(kind, 100)[9] == pytest.approx(1.0)  # 0.002 of 5,000 steps of warm-up
    assert factors(kind, 100)[4] == pytest.approx(0.5)


def test_learning_rates() -> None:
    assert factors("constant", 250)[10:] == [1.0] * 240
    # T5: 1/sqrt of the step that the parent and this run have taken together.
    t5 = factors("t5", 250)
    assert t5[249] == pytest.approx((5000 / 5249) ** 0.5)
    rewarm = factors("rewarm", 250)
    assert rewarm[9] == 1.0
    assert rewarm[249] == pytest.approx(0.1)
    assert factors("rewarm", 100)[50] < rewarm[50]
    assert factors("constant", 20, warmup=0) == [1.0] * 20
    assert factors("constant", 20, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(UserError, match=r"warmup=0.002: 10 steps of warm-up are more than the 5 of the smallest alpha"):
        schedule_of("constant", parent_steps=5000, warmup=0.002, final_ratio=0.1, shortest=5)


def test_the_time_that_is_left() -> None:
    steps = steps_between(chains_of(Asked(kv_heads=(2,), init=("mean",), seeds=(0,)), 1000))
    assert steps == {
        "control-a0": 0,
        "kv2-mean-a0": 0,
        "control-a0.02-seed0": 20,
        "control-a0.05-seed0": 30,  # of 50, 20 are there
        "kv2-mean-a0.02-seed0": 20,
        "kv2-mean-a0.05-seed0": 30,
    }
    trained = [name for name, count in steps.items() if count]
    assert seconds_left(steps, steps, {}) is None
    assert seconds_left(steps, ["kv2-mean-a0"], {"control-a0": 4.0}) == 4
    assert seconds_left(steps, trained, {"control-a0": 4.0}) is None  # what a step takes is not known
    # A measurement takes 4 s and a step 0.5 s.
    taken = {"control-a0": 3.0, "kv2-mean-a0": 5.0, "control-a0.02-seed0": 14.0}
    assert seconds_left(steps, trained[1:], taken) == pytest.approx(3 * 4 + 80 * 0.5)
    assert seconds_left(steps, [], taken) == 0


RAW = {"checkpoint": "x", "output": "y", "kv_heads": 2}


def test_numbers_and_names_stand_for_lists_of_one() -> None:
    config = validate_uptrain({**RAW, "alpha": 0.05, "init": "first", "seeds": 3, "data": {"context": 64}})
    assert (config.kv_heads, config.alpha, config.init, config.seeds) == ((2,), (0.05,), ("first",), (3,))
    assert config.overrides == {"data": {"context": 64}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": [-0.1]}, "alpha=-0.1: expected a share of the parent's steps, from 0 to 1"),
        ({"alpha": [0, 1.5]}, "alpha=1.5: expected a share of the parent's steps, from 0 to 1"),
        ({"alpha": [0.05, "x"]}, "alpha=x: expected"),
        ({"alpha": []}, "alpha=[]: expected a non-empty list"),
        ({"kv_heads": [2, 0]}, "kv_heads=0: expected"),
        ({"kv_heads": "many"}, "kv_heads=many: expected"),
        ({"kv_heads": [2, 2]}, "kv_heads=[2, 2]: 2 is there twice"),
        ({"init": ["mean", "meen"]}, "init=meen: expected"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]: 0 is there twice"),
        ({"seeds": True}, "seeds=true: expected"),
        ({"trainer": {"steps": 5}}, "trainer.steps=5: leave it out; alpha says how many steps there are"),
        ({"trainer": {"devices": 2}}, "trainer.devices=2: leave it out; each cell has one device"),
        ({"resume": "auto", "overwrite": True}, "overwrite=true: would delete the cells that resume=auto keeps"),
        ({"warmup": 2.5}, "warmup=2.5: is neither a share of the parent's steps (below 1) nor a whole number"),
        ({"init": "random", "grouping": "similar"}, "grouping=similar with init=random"),
        ({"statistics": "x"}, "statistics=x: init=mean compares no heads; leave it out, or add aligned or svd"),
        ({"alpha": 0, "distill": {"enabled": True}}, "distill.enabled=true: needs training"),
        ({"kvheads": 1}, "kvheads=1: unknown key; did you mean kv_heads?"),
        ({"data": {"contex": 64}}, "data.contex=64: unknown key; did you mean data.context?"),
    ],
)
def test_wrong_requests(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_uptrain({**RAW, **changes})
    assert any(problem.startswith(said) for problem in caught.value.problems), caught.value.problems


# -- distillation ------------------------------------------------------------------------------------------------------


def batch(vocabulary: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(vocabulary, (3, 12), generator=generator)
    targets_BT = torch.randint(vocabulary, (3, 12), generator=generator)
    targets_BT[0, :5] = IGNORE
    return TokenBatch(tokens_BT=tokens_BT, targets_BT=targets_BT, indices_B=torch.arange(3))


def decoder(seed: int, **changes: object) -> nn.Module:
    config = DecoderConfig(
        vocab_size=40, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=32, dropout=0.2, **changes
    )  # type: ignore[arg-type]
    return from_config(config, seed=seed)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 2.0), (1.0, 4.0)])
def test_a_decoder_is_held_to_its_teacher(weight: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.training.distillation.CHUNK_LOGITS", {"cpu": 5 * 40})  # several chunks
    student, teacher = decoder(0, n_kv_heads=2), decoder(1)
    objective = DistilledTokenLoss(student, teacher, weight=weight, temperature=temperature)  # type: ignore[arg-type]
    objective.eval()
    given = batch(40)
    loss = objective(given)
    logits, taught = student(given.tokens_BT), teacher(given.tokens_BT)
    asked = given.targets_BT != IGNORE
    nll = nn.functional.cross_entropy(logits[asked], given.targets_BT[asked], reduction="sum")
    p, q = (taught[asked] / temperature).softmax(-1), (logits[asked] / temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum()
    expected = (1 - weight) * nll + weight * temperature**2 * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    loss.backward()
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_never_trains() -> None:
    student, teacher = decoder(0), decoder(1)
    objective = DistilledTokenLoss(student, teacher, weight=0.5, temperature=1.0)  # type: ignore[arg-type]
    objective.train()
    assert student.training
    assert not teacher.training  # or dropout would blur what it says
    assert {id(parameter) for parameter in objective.parameters()} == {id(each) for each in student.parameters()}


def test_an_encoder_is_held_to_its_teachers_hidden_states() -> None:
    config = EncoderConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=4, d_ff=48, max_positions=32, pooler=True)
    student, teacher = encoder_from(config, seed=0), encoder_from(config, seed=1)
    objective = DistilledHiddenLoss(student, teacher).eval()
    given = batch(40)
    asked = given.targets_BT != IGNORE
    ours, theirs = student.hidden(given.tokens_BT)[asked], teacher.hidden(given.tokens_BT)[asked]
    expected = (ours - theirs).square().sum() / theirs.square().mean() / 32
    torch.testing.assert_close(objective(given), expected)
    assert not any(parameter.requires_grad for parameter in student.pooler.parameters())  # type: ignore[union-attr]
    assert objective(given) > 0
    assert DistilledHiddenLoss(teacher, teacher).eval()(given) == 0
