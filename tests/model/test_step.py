"""`DecodeStep` on a CPU, where nothing is recorded; tests/model/test_gpu_step.py has the CUDA graphs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionSpec, BlockLayout, Window
from longspan.model import generation, step
from longspan.model.cache import ContiguousCache, create_cache
from longspan.model.cache_plan import CacheKind
from longspan.model.config import AttentionPlan, DecoderConfig
from longspan.model.decoder import Decoder, from_config
from longspan.model.generation import generate, prefill, stream
from longspan.model.paging import PagedCache
from longspan.model.session import Session
from longspan.model.step import DecodeStep, why_not_recorded

TINY = DecoderConfig(
    vocab_size=128,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    d_ff=64,
    max_positions=64,
    positions="rope",
    norm="rmsnorm",
    mlp="swiglu",
)
WINDOWED = replace(
    TINY,
    attention=AttentionPlan(
        patterns={"local": AttentionSpec(causal=True, window=Window.causal_keys(8))}, layers=("local",)
    ),
)


@pytest.mark.parametrize("kind", ["auto", "contiguous", "paged"])
@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
def test_steps_are_the_model_itself(kind: CacheKind, config: DecoderConfig) -> None:
    """Logits of every step equal those of the whole text read at once, far beyond the window."""
    model = from_config(config, seed=0).eval()
    tokens_BT = torch.randint(100, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
    cache = create_cache(model, 2, 40, kind=kind)
    logits_BV = prefill(model, tokens_BT[:, :10], cache)
    torch.testing.assert_close(logits_BV, whole_BTV[:, 9], rtol=1e-4, atol=1e-4)
    advance = DecodeStep(model, cache)
    for place in range(10, 40):
        logits_BV = advance(tokens_BT[:, place])
        torch.testing.assert_close(logits_BV, whole_BTV[:, place], rtol=1e-4, atol=1e-4)
    assert cache.length == 40
    with pytest.raises(ValueError, match="do not fit"):
        advance(tokens_BT[:, 0])


@pytest.mark.parametrize("config", [TINY, WINDOWED], ids=["full", "window"])
def test_generation_by_recorded_steps(monkeypatch: pytest.MonkeyPatch, config: DecoderConfig) -> None:
    """What `generate` does on CUDA, run here with fixed shapes: ragged prompts, stop tokens, sampling."""
    model = from_config(config, seed=0).eval()
    tokens_BT = torch.randint(100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(12)[None] < torch.tensor([12, 5, 1])[:, None]

    def text(cache: CacheKind) -> Tensor:
        return generate(
            model, tokens_BT, max_new_tokens=30, seed=1, stop_tokens=[7], prompt_mask_BT=mask_BT, cache=cache
        )

    kinds: tuple[CacheKind, ...] = ("auto", "contiguous", "paged")
    plain = [text(kind) for kind in kinds]
    steps: list[DecodeStep] = []

    def recorded(model: Decoder, cache: ContiguousCache | PagedCache, *, compiled: bool) -> DecodeStep:
        steps.append(DecodeStep(model, cache, compiled=compiled))
        return steps[-1]

    monkeypatch.setattr(step, "why_not_recorded", lambda model, paged: None)
    monkeypatch.setattr(generation, "DecodeStep", recorded)
    assert all(torch.equal(text(kind), expected) for kind, expected in zip(kinds, plain, strict=True))
    assert len(steps) == 3


def test_what_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: the questions are asked of a model that says so."""
    model = from_config(TINY, seed=0).eval()
    assert "CUDA graphs are recorded on CUDA, and the model is on cpu" in (why_not_recorded(model, paged=False) or "")
    weight = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(type(model), "head_weight", weight)

    def asked(config: DecoderConfig = TINY, decode: str = "auto", training: bool = False) -> str | None:
        model = from_config(config, device="meta").train(training)
        model.set_backends(decode=decode)
        return why_not_recorded(model, paged=False)

    blocks = AttentionSpec(causal=True, block_sparse=BlockLayout.from_rows([[1]], q_block=64, kv_block=64))
    assert asked() is None
    assert asked(WINDOWED, decode="decode") is None
    assert "set_backends chose 'sdpa' to decode" in (asked(decode="sdpa") or "")
    assert "training mode" in (asked(training=True) or "")
    assert "layer pattern 'full' has a block layout" in (
        asked(replace(TINY, attention=AttentionPlan(patterns={"full": blocks}))) or ""
    )
    assert "decode cannot: head_dim=512" in (asked(replace(TINY, head_dim=512)) or "")
    weight.dtype = torch.float64
    assert "decode cannot: dtype=float64" in (asked() or "")


def test_ways_that_cannot_be_are_refused_before_anything_is_computed() -> None:
    model, tokens_BT = from_config(TINY, seed=0).eval(), torch.tensor([[1, 2]])
    model.hidden = None  # type: ignore[assignment]  # nothing may be computed
    for steps in ("recorded", "compiled"):
        with pytest.raises(ValueError, match=f"steps='{steps}': CUDA graphs are recorded on CUDA, and the model is on"):
            stream(model, tokens_BT, max_new_tokens=3, steps=steps)
        with pytest.raises(ValueError, match=f"steps='{steps}': CUDA graphs are recorded on CUDA"):
            Session(model, pages=4, steps=steps)
        with pytest.raises(ValueError, match=f"num_beams=2 with steps='{steps}': the rows of a beam search change"):
            generate(model, tokens_BT, max_new_tokens=3, temperature=0, num_beams=2, steps=steps)
    with pytest.raises(ValueError, match="steps='fast': it is one of auto, plain, recorded, compiled"):
        stream(model, tokens_BT, max_new_tokens=3, steps="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a cache for 1 sequences of .* takes .* GiB"):
        stream(model, tokens_BT, max_new_tokens=2**40)


def test_a_compiled_step_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing lengths must not ask for another compilation: they live in tensors. Traced, not translated to C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = from_config(TINY, seed=0).eval()
    cache = create_cache(model, 1, 32)
    prefill(model, torch.tensor([[1, 2, 3]]), cache)
    plain = create_cache(model, 1, 32)
    prefill(model, torch.tensor([[1, 2, 3]]), plain)
    torch.compiler.reset()
    fused, eager = DecodeStep(model, cache, compiled=True), DecodeStep(model, plain)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for token in (5, 6, 7, 8):
        torch.testing.assert_close(fused(torch.tensor([token])), eager(torch.tensor([token])), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_steps_of_many_shapes_are_compiled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than torch.compile keeps variants of a function, from tokens that lie anyhow in memory."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, texts_BT = from_config(TINY, seed=0).eval(), torch.arange(12).view(2, 6)
    for n in range(torch._dynamo.config.recompile_limit + 1):
        cache = create_cache(model, 2, 20 + n)
        prefill(model, texts_BT[:, :3], cache)
        step = DecodeStep(model, cache, compiled=True)
        for place in (3, 4, 5):
            step(texts_BT[:, place] if place > 3 else texts_BT[:, place].clone())
        assert counters["stats"]["unique_graphs"] == n + 1


def test_a_step_is_freed_without_the_garbage_collector() -> None:
    """A graph that a collection destroys while another is recorded ends that recording."""
    model = from_config(TINY, seed=0).eval()
    step = DecodeStep(model, create_cache(model, 1, 8))
    step(torch.tensor([1]))
    alive = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert alive() is None
    finally:
        gc.enable()
