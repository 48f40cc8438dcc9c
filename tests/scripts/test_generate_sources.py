"""`longspan generate` of encoder–decoders: the text given is a source, what is printed a target."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import processors

from longspan.data.tokenizer import Tokenizer, byte_level
from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.checkpoint import save_model
from longspan.model.config import AttentionPlan, Seq2SeqConfig, StackConfig
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.seq2seq import Seq2Seq, from_config
from longspan.model.zoo import build
from longspan.scripts.cli import main

STACK = StackConfig(n_layers=1, n_heads=2, d_ff=48, max_positions=96)
LOCAL = AttentionPlan(
    patterns={"local": AttentionSpec(causal=False, window=Window.symmetric(3), global_tokens=True)}, layers=("local",)
)
PLANS = {"bart": None, "led": LOCAL}


def framing() -> Tokenizer:
    """Bytes, with a template around each text, as BART's tokenizer has one: <s> … </s>."""
    raw = Library.from_str(byte_level()._definition)
    raw.add_special_tokens(["<s>", "</s>"])
    ids = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
    )
    return Tokenizer(raw.to_str(), "</s>")


@pytest.fixture(params=PLANS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Seq2Seq:
    """Imported or trained here: its sources are framed either way."""
    config = Seq2SeqConfig(
        vocab_size=259,
        d_model=32,
        encoder=StackConfig(n_layers=1, n_heads=2, d_ff=48, max_positions=96, attention=PLANS[kind]),
        decoder=STACK,
        decoder_start_token=258,
        forced_eos_token=258,
    )
    model = from_config(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name and not name.endswith("bias"):
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
        embedding_VD = model.encoder.embedding.weight
        embedding_VD.div_(embedding_VD.norm(dim=1, keepdim=True))
    lineage = {"imported": {"from": "elsewhere"}} if kind == "bart" else {"command": "longspan train"}
    save_model(model, "checkpoint", framing(), lineage=lineage)
    return model


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    found = main(["generate", "checkpoint=checkpoint", "precision=fp32", *arguments])
    out, err = capsys.readouterr()
    assert found == code, err
    return out


def expected(model: Seq2Seq, kind: str, source: str, sampling: Sampling) -> str:
    tokenizer = framing()
    tokens = [257, *source.encode(), 258]
    where: dict[str, Any] = {"global_positions": [0]} if kind == "led" else {}
    (completion,) = complete(model, [tokens], sampling, tokenizer=tokenizer, **where)
    assert completion.text is not None
    return completion.text


GREEDY = Sampling(max_new_tokens=12, temperature=0, stop_tokens=frozenset({258}))


def test_a_source_is_read_and_its_target_printed(
    model: Seq2Seq, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = expected(model, kind, "a source", GREEDY)
    assert len(text) > 3
    assert text != expected(model, kind, "another", GREEDY)
    settings = ("temperature=0", "max_new_tokens=12")
    assert said(capsys, "prompt=a source", *settings) == f"{text}\n"  # and not the source
    Path("source.txt").write_text("a source")
    assert said(capsys, "file=source.txt", *settings) == f"{text}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a source")))
    assert said(capsys, "file=-", *settings) == f"{text}\n"


def test_every_way_of_choosing(model: Seq2Seq, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"max_new_tokens": 12, "stop_tokens": frozenset({258})}
    for words, settings in (
        (("num_beams=3", "temperature=0"), {"num_beams": 3, "temperature": 0}),
        (("temperature=1.3", "seed=4", "top_k=null"), {"temperature": 1.3, "seed": 4}),
        (("temperature=0", "cache=paged", "storage=int8", "repetition_penalty=1.4"),
         {"temperature": 0, "repetition_penalty": 1.4}),
    ):  # fmt: skip
        text = expected(model, kind, "x", Sampling(**base, **settings))
        assert said(capsys, "prompt=x", "max_new_tokens=12", *words) == f"{text}\n", words
    assert said(capsys, "prompt=", "temperature=0", "max_new_tokens=3").endswith("\n")
    table = said(capsys, "prompt=x", "temperature=0", "max_new_tokens=3", "logprobs=true").splitlines()
    assert table[2].split() == ["token", "log-probability"]


def test_global_tokens_are_the_first_or_those_that_are_named(
    model: Seq2Seq, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prompt=0123456789", "temperature=0", "max_new_tokens=12")
    if kind == "bart":
        assert main(["generate", "checkpoint=checkpoint", *words, "global_positions=[0]"]) == 2
        assert "has no global attention; leave it out" in capsys.readouterr().err
        return
    tokens = [257, *b"0123456789", 258]
    by_default = said(capsys, *words)
    for positions in ([], [0, 7]):
        (completion,) = complete(model, [tokens], GREEDY, tokenizer=framing(), global_positions=positions)
        found = said(capsys, *words, f"global_positions={json.dumps(positions).replace(' ', '')}")
        assert found == f"{completion.text}\n"
        assert found != by_default


def test_requests_have_the_text_that_each_has_alone(
    model: Seq2Seq, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, object] | str] = [
        {"prompt": "a source"},
        {"prompt": "short", "id": "s"},
        "nonsense",
        {"prompt": "sampled", "temperature": 1.2, "seed": 5, "top_k": None},
        {"prompt": "sampled", "temperature": 1.2, "seed": 6, "top_k": None},
        {"prompt": "x" * 200},
        {"prompt": "a source", "max_new_tokens": 3},
    ]
    Path("q.jsonl").write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    words = ("requests=q.jsonl", "output=a.jsonl", "temperature=0", "max_new_tokens=12", "max_batch=4")
    said(capsys, *words, code=1)
    found = {each["line"]: each for each in map(json.loads, Path("a.jsonl").read_text().splitlines())}
    assert sorted(found) == list(range(1, 8))
    assert found[1]["text"] == expected(model, kind, "a source", GREEDY)
    assert (found[2]["text"], found[2]["id"]) == (expected(model, kind, "short", GREEDY), "s")
    for line, seed in ((4, 5), (5, 6)):
        drawn = Sampling(max_new_tokens=12, temperature=1.2, seed=seed, stop_tokens=frozenset({258}))
        assert found[line]["text"] == expected(model, kind, "sampled", drawn)
    assert found[3]["error"].startswith("is not JSON")
    assert found[6]["error"].startswith("position 201 is beyond the 96 learned positions of this model")
    assert found[7]["new_tokens"] <= 3
    assert found[1]["prompt_tokens"] == len("a source") + 2
    before = Path("a.jsonl").read_bytes()
    Path("q.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines[:2]))
    assert main(["generate", "checkpoint=checkpoint", "precision=fp32", *words]) == 2  # some are not asked any more
    assert "which is not among the requests" in capsys.readouterr().err
    assert Path("a.jsonl").read_bytes() == before


def test_an_encoder_is_refused_with_words(refused: Callable[..., list[str]]) -> None:
    save_model(build("bert-tiny", {"vocab_size": 257}, seed=0), "encoder", byte_level())
    (line,) = refused("generate", "checkpoint=encoder", "prompt=x")
    assert line == (
        "encoder holds an encoder, which fills in masked tokens and continues no text; generate takes decoders and "
        "encoder–decoders"
    )
