"""Decoding steps recorded as CUDA graphs: what is replayed is what the model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.cache import create_cache
from longspan.model.cache_plan import CacheKind
from longspan.model.config import AttentionPlan, DecoderConfig
from longspan.model.decoder import from_config
from longspan.model.generation import prefill, stream
from longspan.model.step import DecodeStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's compiler
]

FULL, LOCAL = AttentionSpec(causal=True), AttentionSpec(causal=True, window=Window.causal_keys(64))
PLANS = {
    "full": AttentionPlan(),
    "window": AttentionPlan(patterns={"local": LOCAL}, layers=("local",)),
    "mixed": AttentionPlan(patterns={"local": LOCAL, "full": FULL}, layers=("local", "full")),
}


def config(plan: str) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128,
        n_layers=4,
        d_model=256,
        n_heads=4,
        n_kv_heads=2,
        d_ff=512,
        max_positions=256,
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        attention=PLANS[plan],
    )


@pytest.mark.parametrize("kind", ["auto", "contiguous", "paged"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_replays_are_the_model_itself(kind: CacheKind, plan: str, compiled: bool) -> None:
    """Teacher-forced logits of 60 replayed steps against the whole text read at once, past the window."""
    model = from_config(config(plan), seed=0).to("cuda", torch.bfloat16).eval()
    tokens_BT = torch.randint(100, (3, 160), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        whole_BTV = model(tokens_BT).float()
        exact_BTV = copy.deepcopy(model).float()(tokens_BT)
    cache = create_cache(model, 3, 160, kind=kind)
    prefill(model, tokens_BT[:, :100], cache)
    step = DecodeStep(model, cache, compiled=compiled)
    own = theirs = 0.0
    for place in range(100, 160):
        logits_BV = step(tokens_BT[:, place]).float()
        own = max(own, float((logits_BV - exact_BTV[:, place]).abs().max()))
        theirs = max(theirs, float((whole_BTV[:, place] - exact_BTV[:, place]).abs().max()))
    assert own <= 3 * theirs + 1e-3, (own, theirs)
    assert cache.length == 160


def test_eight_bit_storage_replays() -> None:
    """Recorded steps over int8 keys equal the same steps run eagerly, bit for bit."""
    model = from_config(config("full"), seed=0).to("cuda", torch.bfloat16).eval()
    tokens_BT = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    seen = []
    for recorded in (True, False):
        cache = create_cache(model, 2, 60, storage="int8")
        prefill(model, tokens_BT[:, :20], cache)
        step = DecodeStep(model, cache)
        if not recorded:
            step._taken = -100  # never gets to recording
        seen.append(torch.stack([step(tokens_BT[:, place]).clone() for place in range(20, 40)]))
    assert torch.equal(seen[0], seen[1])


def test_a_rotary_table_may_grow_while_a_recorded_stream_lives() -> None:
    """Another call needs more positions and replaces the table; the recording goes on reading the one it was made
    with, whose memory nobody may have taken."""
    model = from_config(replace(config("full"), max_positions=64), seed=0).to("cuda", torch.bfloat16).eval()
    tokens_BT = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0)).cuda()

    def steps() -> Iterator[torch.Tensor]:
        return stream(model, tokens_BT, max_new_tokens=40, temperature=0)

    expected = torch.stack([token_B.clone() for token_B in steps()])
    found, garbage = [], []
    for number, token_B in enumerate(steps()):
        found.append(token_B.clone())
        if number == 15:
            before = model.rotary.table.values if model.rotary is not None else None
            assert before is not None
            place, nbytes = before.data_ptr(), before.nbytes
            del before
            with torch.no_grad():
                model(tokens_BT.repeat(1, 20))  # 400 positions
            assert model.rotary is not None
            assert model.rotary.table.values.data_ptr() != place
            garbage = [torch.full((nbytes,), 113, dtype=torch.uint8, device="cuda") for _ in range(200)]
    assert torch.equal(torch.stack(found), expected)
    assert garbage
