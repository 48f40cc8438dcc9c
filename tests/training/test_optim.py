from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.model import zoo
from longspan.training.optim import build_optimizer, build_schedule, in_steps, split_parameters
from longspan.training.schema import OptimizerConfig, ScheduleConfig


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_each_parameter_is_in_exactly_one_group(name: str) -> None:
    model = zoo.build(name, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_what_decays() -> None:
    split = split_parameters(zoo.build("gpt-tiny", seed=0))
    assert {name.rpartition(".")[2] for name in split.decay} == {"weight"}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert all(name.split(".")[-2] in kinds for name in split.decay)
    assert {"embedding.weight", "position_embedding.weight", "norm.weight", "norm.bias"} <= set(split.no_decay)
    assert not any(parameter.ndim < 2 for parameter in split.decay.values())


def test_an_untied_head_decays_and_a_tied_one_is_the_embedding() -> None:
    assert "head.weight" in split_parameters(zoo.build("llama-tiny", seed=0)).decay
    tied = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 9, bias=False), "embedding": torch.nn.Embedding(9, 4)})
    tied["head"].weight = tied["embedding"].weight
    split = split_parameters(tied)
    assert list(split.decay) == []
    assert list(split.no_decay) == ["head.weight"]


def factors(steps: int, **config: object) -> list[float]:
    factor = build_schedule(ScheduleConfig(**config), steps)  # pyright: ignore[reportArgumentType]
    return [factor(step) for step in range(steps + 2)]


def test_cosine_by_hand() -> None:
    # Peak at step 3 (the last of the warm-up), 8 steps from there to the last one.
    got = factors(12, name="cosine", warmup=4, final_ratio=0.1)
    half = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8))
    assert got[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 8))])
    assert got[7] == pytest.approx(half) == pytest.approx(0.55)
    assert got[11:] == pytest.approx([0.1, 0.1, 0.1])


def test_linear_by_hand() -> None:
    assert factors(6, name="linear", warmup=2, final_ratio=0.2) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_wsd_by_hand() -> None:
    # 10 steps: warm-up 2, then the peak until step 5, then 4 steps down to the last one.
    got = factors(10, name="wsd", warmup=2, decay=4, final_ratio=0.0)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0])


def test_constant_and_no_warm_up() -> None:
    assert factors(3, name="constant", warmup=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert factors(3, name="linear", warmup=0, final_ratio=0.0) == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0])
    assert factors(1, name="cosine", warmup=0, final_ratio=0.1)[0] == pytest.approx(0.1)


def test_rsqrt_goes_on_from_where_the_offset_says() -> None:
    # T5's 1/sqrt(n), from step 100 on: 1/10, 1/sqrt(101), …, whatever the number of steps.
    for steps in (4, 50):
        got = factors(steps, name="rsqrt", warmup=0, offset=100)
        assert got[:5] == pytest.approx([10 / math.sqrt(n) for n in (100, 101, 102, 103, 104)])
    assert factors(4, name="rsqrt", warmup=2, offset=300)[:3] == pytest.approx([0.5, 1.0, math.sqrt(300 / 302)])


def test_rsqrt_without_offset_begins_where_the_warm_up_ends() -> None:
    # Long Range Arena's: c · min(1, n / w) / sqrt(max(n, w)) at step n, with the peak c / sqrt(w).
    warmup, steps = 4, 40
    got = factors(steps, name="rsqrt", warmup=warmup, offset=None)
    expected = [min(1, n / warmup) * math.sqrt(warmup / max(n, warmup)) for n in range(1, steps + 1)]
    assert got[:steps] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"schedule.offset=null: counts from the warm-up, and schedule.warmup=0"):
        build_schedule(ScheduleConfig(name="rsqrt", warmup=0, offset=None), 10)


def test_shares_and_step_counts() -> None:
    assert in_steps(0.25, 200) == 50
    assert in_steps(1, 200) == 1
    assert in_steps(0, 200) == 0
    with pytest.raises(
        ValueError, match=r"schedule.warmup=11: the warm-up is longer than the run \(trainer.steps=10\)"
    ):
        build_schedule(ScheduleConfig(warmup=11), 10)
    with pytest.raises(ValueError, match=r"are 5 and 6 steps, together more than trainer.steps=10"):
        build_schedule(ScheduleConfig(name="wsd", warmup=5, decay=6), 10)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "wsd", "rsqrt", "constant"]),
    steps=st.integers(1, 60),
    warmup=st.integers(0, 20),
    decay=st.floats(0.05, 0.5),
    final=st.floats(0, 1),
)
def test_schedules_rise_then_never_rise_again(name: str, steps: int, warmup: int, decay: float, final: float) -> None:
    warmup = min(warmup, steps // 2)
    got = factors(steps, name=name, warmup=warmup, decay=decay, final_ratio=final)
    assert all(0 <= value <= 1 + 1e-12 for value in got)
    rising, falling = got[:warmup], got[max(warmup - 1, 0) :]
    assert rising == sorted(rising)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    if name not in ("constant", "rsqrt") and steps > warmup and (name != "wsd" or in_steps(decay, steps)):
        assert got[steps - 1] == pytest.approx(final)
