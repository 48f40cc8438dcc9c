"""No more than one attention at a time: what is read is let go of when the next layer begins."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from longspan.model.build import build_from
from longspan.model.config import DecoderConfig
from longspan.model.surgery import GroupedQuery, LazyTensor, operate, plan_steps

CONFIG = DecoderConfig(vocab_size=64, n_layers=6, d_model=64, n_heads=8, d_ff=64, max_positions=16, positions="rope")


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What other tests of the process have left is not looked through at every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("keys", [{"init": "mean"}, {"init": "svd", "grouping": "similar"}, {"init": "random"}])
def test_one_attention_at_a_time(keys: dict[str, object]) -> None:
    weights = build_from(CONFIG, seed=0).state_dict()
    alive: dict[str, weakref.ref[Tensor]] = {}
    reads: dict[str, int] = dict.fromkeys(weights, 0)

    def read(name: str) -> Tensor:
        tensor = weights[name].clone()
        alive[name] = weakref.ref(tensor)
        reads[name] += 1
        return tensor

    lazy = {name: LazyTensor(tuple(t.shape), t.dtype, partial(read, name)) for name, t in weights.items()}
    steps = plan_steps(CONFIG, [GroupedQuery(kv_heads=2, **keys)])  # pyright: ignore[reportArgumentType]: keys of tests
    made, _ = operate(steps, lazy)
    assert not any(reads.values())
    written: dict[str, weakref.ref[Tensor]] = {}
    most = 0
    for name, tensor in made.items():
        result = tensor.read()
        written[name] = weakref.ref(result)
        del result
        gc.collect()
        held = [name for names in (alive, written) for name, of in names.items() if of() is not None]
        assert len({name.split(".")[1] for name in held if name.startswith("blocks.")}) <= 1
        most = max(most, len(held))
    assert most <= 8  # the heads' results of one attention: four projections, weights and biases
    assert all(reads[name] <= 1 for name in reads if ".k_proj." in name or ".v_proj." in name)


def test_tensors_may_be_read_in_any_order_and_twice() -> None:
    weights = {name: LazyTensor.of(tensor) for name, tensor in build_from(CONFIG, seed=0).state_dict().items()}
    steps = plan_steps(CONFIG, [GroupedQuery(kv_heads=2, init="aligned", grouping="similar")])
    made, _ = operate(steps, weights)
    forwards = {name: lazy.read() for name, lazy in made.items()}
    backwards = {name: lazy.read() for name, lazy in reversed(made.items())}
    assert all(torch.equal(tensor, backwards[name]) for name, tensor in forwards.items())
