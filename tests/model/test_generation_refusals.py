"""What generation says of logits that are no numbers, of settings of a wrong type, of positions and of memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from longspan.kernels.attention import AttentionContext
from longspan.model import cache_layers, prompts
from longspan.model.cache_layers import free_memory
from longspan.model.conditional import Unread
from longspan.model.config import Seq2SeqConfig, StackConfig
from longspan.model.decoder import Decoder
from longspan.model.generation import complete, generate, stream
from longspan.model.paging import OutOfPages, PagePool
from longspan.model.sampling import Sampling, draw
from longspan.model.seq2seq import from_config
from longspan.model.session import Request, Session
from longspan.model.zoo import build

SMALL = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48, "vocab_size": 64, "max_positions": 32}


def decoder(**overrides: object) -> Decoder:
    model = build("llama-tiny", {**SMALL, **overrides}, seed=0)
    assert isinstance(model, Decoder)
    return model.eval()


# -- no numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0, "num_beams": 2}])
def test_logits_that_are_no_numbers_are_refused_by_name(value: float, settings: dict[str, float]) -> None:
    model = decoder()
    with torch.no_grad():
        model.norm.weight[3] = value
    said = "the model's logits.* are NaN or infinite, so no token can be chosen: its weights are damaged"
    sampling = Sampling(max_new_tokens=4, **settings)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match=said):
        complete(model, [[1, 2]], sampling)
    with pytest.raises(FloatingPointError, match=said):
        generate(model, torch.tensor([[1, 2]]), max_new_tokens=4, **settings)  # type: ignore[arg-type]
    if "num_beams" not in settings:
        session = Session(model, pages=8)
        session.submit(Request(prompt=[1, 2], sampling=sampling))
        with pytest.raises(FloatingPointError, match=said):
            session.run()


def test_what_is_drawn_is_always_a_token() -> None:
    """The next lookup of anything else would end a CUDA process."""
    broken_BV = torch.full((1, 5), torch.nan, dtype=torch.float64)
    assert draw(broken_BV, torch.tensor([0.3], dtype=torch.float64)).tolist() == [4]


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": "9"}, "max_new_tokens='9': expected a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"temperature": None}, "temperature=None: expected a number"),
        ({"top_k": 3.0}, "top_k=3.0: expected a whole number or None"),
        ({"top_p": "0.5"}, "top_p='0.5': expected a number or None"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number or None"),
        ({"seeds": 4}, "seeds=4: expected a tuple of whole numbers"),
        ({"seeds": ("a",)}, r"seeds=\('a',\): expected a tuple of whole numbers"),
        ({"stop_tokens": 2}, "stop_tokens=2: expected a frozenset of tokens"),
        ({"num_beams": True}, "num_beams=True: expected a whole number"),
    ],
)
def test_settings_of_a_wrong_type_are_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**{"max_new_tokens": 3, **settings})  # type: ignore[arg-type]


# -- positions ---------------------------------------------------------------------------------------------------------


def test_rotary_positions_beyond_the_model_cost_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    prompts._warn_beyond.cache_clear()
    model, within = decoder(), {"max_new_tokens": 3, "temperature": 0}
    with caplog.at_level(logging.WARNING, "longspan.model"):
        generate(model, torch.ones(1, 30, dtype=torch.int64), **within)  # type: ignore[arg-type]
        session = Session(model, pages=8)
        session.prefill([1] * 32).free()
        assert not caplog.messages
        for length in (31, 40):
            generate(model, torch.ones(1, length, dtype=torch.int64), **within)  # type: ignore[arg-type]
        session.submit(Request(prompt=[1] * 40, sampling=Sampling(max_new_tokens=1, temperature=0)))
    (line,) = caplog.messages
    assert line.startswith("the text may grow beyond the 32 positions of this model")
    assert "\n" not in line


def test_positions_that_scale_with_the_text_cost_none(caplog: pytest.LogCaptureFixture) -> None:
    prompts._warn_beyond.cache_clear()
    scaling = {"kind": "dynamic", "factor": 2.0, "original_positions": 32}
    with caplog.at_level(logging.WARNING, "longspan.model"):
        complete(decoder(rope_scaling=scaling), [[1] * 40], Sampling(max_new_tokens=2))
    assert not caplog.messages


# -- before any work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_source_is_read_after_its_targets_cache_was_judged(monkeypatch: pytest.MonkeyPatch, num_beams: int) -> None:
    stack = StackConfig(n_layers=1, n_heads=2, d_ff=48, max_positions=64)
    model = from_config(Seq2SeqConfig(vocab_size=64, d_model=32, encoder=stack, decoder=stack), seed=0)

    def never(self: Unread) -> None:
        raise AssertionError("the source was read")

    monkeypatch.setattr(Unread, "read", never)
    monkeypatch.setattr(cache_layers, "free_memory", lambda device: 10_000)  # enough for the source's keys and values
    source_BS = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="GiB free"):
        generate(model, source_BS, max_new_tokens=60, temperature=0, num_beams=num_beams)
    if num_beams == 1:
        with pytest.raises(ValueError, match="GiB free"):
            stream(model, source_BS, max_new_tokens=60)  # not at the first step, but here


# -- memory ------------------------------------------------------------------------------------------------------------


def groups(root: Path, patch: pytest.MonkeyPatch, lines: str, files: dict[str, str]) -> None:
    """A machine with 1 GiB free and these control groups."""
    (root / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n")
    (root / "cgroup").write_text(lines)
    patch.setattr(cache_layers, "_MEMINFO", root / "meminfo")
    patch.setattr(cache_layers, "_GROUPS", root / "cgroup")
    patch.setattr(cache_layers, "_GROUP_ROOT", root / "sys")
    for name, content in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


V1 = {"memory.usage_in_bytes": "700", "memory.stat": "cache 9\ntotal_inactive_file 50\n"}
V2 = {"memory.current": "700", "memory.stat": "anon 9\ninactive_file 50\n"}


@pytest.mark.parametrize(
    ("lines", "files", "free"),
    [
        ("0::/job/step\n", {}, 2**30),  # no limits anywhere
        ("0::/job/step\n", {f"job/step/{n}": t for n, t in {**V2, "memory.max": "1000\n"}.items()}, 350),
        ("0::/job/step\n", {f"job/{n}": t for n, t in {**V2, "memory.max": "900"}.items()}, 250),  # of all its jobs
        ("0::/job/step\n", {f"job/step/{n}": t for n, t in {**V2, "memory.max": "max"}.items()}, 2**30),
        ("0::/job\n", {f"job/{n}": t for n, t in {**V2, "memory.max": "600"}.items()}, 0),  # beyond its limit
        ("4:memory:/job\n2:cpu,cpuacct:/job\n",
         {f"memory/job/{n}": t for n, t in {**V1, "memory.limit_in_bytes": "1000"}.items()}, 350),
        ("4:memory:/seen/by/the/host\n",  # a container sees its own group at the root
         {f"memory/{n}": t for n, t in {**V1, "memory.limit_in_bytes": "1000"}.items()}, 350),
        ("4:memory:/job\n",
         {f"memory/job/{n}": t for n, t in {**V1, "memory.limit_in_bytes": str(2**63 - 4096)}.items()}, 2**30),
    ],
)  # fmt: skip
def test_a_containers_limit_is_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, files: dict[str, str], free: int
) -> None:
    groups(tmp_path, monkeypatch, lines, files)
    assert free_memory(torch.device("cpu")) == free


def test_pages_that_a_failed_call_left_are_no_obstacle() -> None:
    """A call may have taken pages for more tokens than a later, narrower cache of the sequence has room for."""
    model = decoder()
    pool = PagePool(model.config, 12, 4)
    sequence = pool.open()
    tokens_1T = torch.ones(1, 20, dtype=torch.int64)
    wide = pool.cache([sequence], length=32)
    with torch.no_grad():
        model(tokens_1T[:, :3], cache=wide)
        blocked = pool.cache([sequence, pool.open()], length=32)
        with pytest.raises(OutOfPages):
            model(torch.ones(2, 29, dtype=torch.int64), cache=blocked)
        model.hidden(tokens_1T[:, :3], cache=wide)
        wide.begin(20, AttentionContext())  # and never finished
        assert len(sequence.pages) > 2
        narrow = pool.cache([sequence], length=8)
        found = model(tokens_1T[:, :1], cache=narrow)
    torch.testing.assert_close(found[:, -1], model(tokens_1T[:, :7])[:, -1], atol=1e-4, rtol=0)
