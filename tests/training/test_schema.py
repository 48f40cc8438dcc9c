"""The schema: what is refused, in which words, and what a sound config becomes."""
# ruff: noqa: E501 (what a user reads is quoted whole)

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from longspan.kernels.attention import AttentionSpec, Window
from longspan.model.zoo import DECODERS
from longspan.training.config_errors import COMMAND_LINE, ConfigError
from longspan.training.config_keys import documented, find, keys
from longspan.training.errors import UserError
from longspan.training.schema import (
    BACKENDS,
    EvaluateConfig,
    ExplainRequest,
    GenerateConfig,
    PrepareConfig,
    RunRequest,
    as_request,
    validate,
    validate_evaluate,
    validate_explain,
    validate_generate,
    validate_prepare,
)

LLAMA = {"model": {"name": "llama-tiny", "vocab_size": 8192}}  # rotary: no table of positions to outgrow
GPT = {"model": {"name": "gpt-tiny", "vocab_size": 8192}}  # 128 learned positions


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in change.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def problems(change: Mapping[str, Any], base: Mapping[str, Any] = LLAMA, where: Mapping[str, str] | None = None):
    with pytest.raises(ConfigError) as caught:
        validate(merged(base, change), where=where)
    return list(caught.value.problems)


def test_a_sound_config_becomes_plain_dataclasses() -> None:
    config = validate(merged(LLAMA, {"trainer": {"steps": 7}, "attention": {"backend": "sdpa"}}))
    assert config.trainer.steps == 7
    assert config.model.vocab_size == 8192
    assert config.model.n_layers == DECODERS["llama-tiny"].n_layers
    assert config.model_name == "llama-tiny"
    assert (config.attention_backend.train, config.attention_backend.decode) == ("sdpa", "sdpa")
    assert config.directory == "runs/run"
    assert validate(merged(LLAMA, {"output": "here"})).directory == "here"


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_written_down_reads_back_the_same(name: str) -> None:
    raw = {
        "model": {"name": name, "dropout": 0.1},
        "data": {"tokenizer": {"kind": "bytes"}, "document_mask": True},
        "attention": {
            "patterns": {"near": {"causal": True, "window": {"left": 3, "right": 0}, "documents": True}},
            "backend": {"train": ["flex", "reference"]},
        },
    }
    if DECODERS[name].vocab_size < 257:
        raw["model"]["vocab_size"] = 300
    config = validate(raw)
    written = json.loads(json.dumps(as_request(config)))  # plain data throughout
    assert validate(written) == config


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"trainer": {"stps": 5}}, "trainer.stps=5: unknown key; did you mean trainer.steps?"),
        ({"traner": {"steps": 5}}, "traner.steps=5: unknown key; did you mean trainer.steps?"),
        ({"lr": 1e-3}, "lr=0.001: unknown key; did you mean optimizer.lr?"),
        ({"trainer": {"lr": 1e-3}}, "trainer.lr=0.001: unknown key; did you mean optimizer.lr?"),
        ({"model": {"n_layer": 2}}, "model.n_layer=2: unknown key; did you mean model.n_layers?"),
        ({"model": {"n_embd": 2}}, "model.n_embd=2: unknown key; did you mean model.d_model?"),
        ({"learning_rate": 1}, "learning_rate=1: unknown key; did you mean optimizer.lr?"),
        ({"data": {"sources": [{"pth": "x"}]}}, "data.sources.0.pth=x: unknown key; did you mean data.sources.0.path?"),
        ({"data": {"tokeniser": {"kind": "bytes"}}}, "did you mean data.tokenizer.kind?"),
        ({"zzz": {"y": {"x": 1}}}, "zzz.y.x=1: unknown key; known are data, optimizer, schedule, trainer,"),
        ({"optimizer": {"zzz": 1}}, "optimizer.zzz=1: unknown key; optimizer has name, lr, betas, eps, weight_decay"),
        ({"trainer": {"steps": "abc"}}, "trainer.steps=abc: expected a whole number, at least 1"),
        ({"trainer": {"steps": 1.5}}, "trainer.steps=1.5: expected a whole number, at least 1"),
        ({"trainer": {"steps": 0}}, "trainer.steps=0: expected a whole number, at least 1"),
        ({"trainer": {"steps": None}}, "trainer.steps=null: expected a whole number, at least 1"),
        ({"trainer": {"steps": True}}, "trainer.steps=true: expected a whole number, at least 1"),
        ({"trainer": {"steps": {"x": 1}}}, 'trainer.steps={"x": 1}: expected a whole number, at least 1'),
        ({"trainer": {"compile": "maybe"}}, "trainer.compile=maybe: expected true or false"),
        ({"trainer": {"clip": 0}}, "trainer.clip=0: expected a number, above 0, or null"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr=NaN: expected a number, above 0"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr=Infinity: expected a number, above 0"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas=[0.9]: expected a list of 2 numbers"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas=0.9: expected a list of 2 numbers"),
        ({"data": {"validation_fraction": 1.0}}, "expected a number, at least 0, below 1"),
        ({"data": {"path": ["a"]}}, 'data.path=["a"]: expected text or null'),
        ({"data": 5}, "data=5: expected a section with name, path, sources, tokenizer,"),
        ({"logger": {"tags": "x"}}, "logger.tags=x: expected a list of names"),
        (
            {"schedule": {"name": "cosin"}},
            "schedule.name=cosin: expected one of cosine, linear, wsd, rsqrt, constant; did you mean cosine?",
        ),
        ({"model": {"name": "lama-tiny"}}, "did you mean llama-tiny?"),
        ({"model": {"positions": "ropes"}}, "expected one of learned, sinusoidal, rope, alibi, none; did you mean rope?"),
        ({"model": {"n_heads": 6}}, "model.d_model=64 is not a multiple of n_heads=6"),
        ({"model": {"n_kv_heads": 3}}, "model.n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"attention": {"backend": {"train": True}}}, "attention.backend.train=true: expected text or a non-empty list of names"),
        ({"attention": {"backend": []}}, "attention.backend=[]: expected a section with train, prefill, decode"),
        ({"attention": {"backend": {"prefil": "x"}}}, "did you mean attention.backend.prefill?"),
    ],
)  # fmt: skip
def test_each_mistake_costs_one_line(change: Mapping[str, Any], line: str) -> None:
    found = problems(change)
    assert len(found) == 1
    assert line in found[0]
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ({"causl": True}, "attention.patterns.a.causl=true: unknown key; did you mean attention.patterns.a.causal?"),
        ({}, "attention.patterns.a.causal: is required: a query sees no key at a later position"),
        ({"causal": True, "window": {"left": -1}}, "attention.patterns.a.window.left=-1: a count of neighbours"),
        ({"causal": True, "windw": {"left": 3}}, "windw.left=3: unknown key; did you mean attention.patterns.a.window.left?"),
        ({"causal": True, "sink_tokens": "x"}, "attention.patterns.a.sink_tokens=x: expected a whole number"),
        ({"causal": True, "sink_tokens": True}, "attention.patterns.a.sink_tokens=true: expected a whole number"),
        ({"causal": False}, "attention.patterns.a: causal=false, but a decoder predicts the next token"),
        (5, "attention.patterns.a=5: expected a section with causal, window,"),
        ([], "attention.patterns.a=[]: expected a section with causal, window,"),
        ([{"head": 4, "spec": {"causal": True}}], "a.0.head=4: unknown key; did you mean attention.patterns.a.0.heads?"),
        ([{"heads": 4, "spec": {"causal": "x"}}], "attention.patterns.a.0.spec.causal=x: expected true or false"),
        ([{"heads": 2, "spec": {"causal": True}}], "attention.patterns.a: its groups have [2] heads"),
    ],
)  # fmt: skip
def test_a_pattern_is_judged_as_the_kind_it_was_written_as(pattern: object, line: str) -> None:
    found = problems({"attention": {"patterns": {"a": pattern}, "layers": ["a"]}})
    assert len(found) == 1, found
    assert line in found[0]


def test_everything_wrong_is_said_at_once() -> None:
    found = problems(
        {
            "trainer": {"stps": 1, "global_batch": 30, "micro_batch": 8},
            "optimizer": {"lr": -1},
            "model": {"n_heads": 6},
            "checkpoint": "a",
            "resume": "b",
        }
    )
    assert [line.split(":")[0].split("=")[0] for line in found] == [
        "optimizer.lr",
        "trainer.stps",
        "model.d_model",
        "trainer.global_batch",
        "checkpoint",
    ]


def test_nothing_is_said_that_only_follows_from_another_mistake() -> None:
    # 8 does not divide 30, but what the micro batch is meant to be is not known.
    assert len(problems({"trainer": {"global_batch": 30, "micro_batch": "x"}})) == 1
    assert len(problems({"model": {"name": "nope", "n_heads": 5}})) == 1
    assert len(problems({"attention": {"patterns": {"a": {"causal": 3}, "b": {"causal": True}}}})) == 1


def test_each_line_says_where_the_key_was_set() -> None:
    where = {"trainer.steps": COMMAND_LINE, "optimizer.lr": "in configs/optimizer/adamw.yaml"}
    found = problems({"trainer": {"steps": 0}, "optimizer": {"lr": 0}, "schedule": {"warmup": -1}}, where=where)
    assert found[0].endswith("(set in configs/optimizer/adamw.yaml)")
    assert found[1] == "schedule.warmup=-1: expected a number, at least 0"
    assert found[2].endswith("(set on the command line)")
    # Of two keys that disagree, the typed one is the mistake.
    (line,) = problems({"model": {"n_heads": 6}}, where={"model.d_model": "in x.yaml", "model.n_heads": COMMAND_LINE})
    assert line.endswith("(set on the command line)")


def test_no_wording_of_the_library_underneath_reaches_a_user() -> None:
    found = problems(
        {"trainer": {"steps": [], "zzz": 1}, "optimizer": 3, "data": {"sources": 3}, "seed": -1, "name": {}}
    )
    assert len(found) == 6
    text = " ".join(found).lower()
    assert not any(
        word in text for word in ("pydantic", "input should", "http", "validation error", "argument", "<one>")
    )


# -- between keys: a limit holds on one side of its boundary and not on the other --------------------------------------


@pytest.mark.parametrize(
    ("base", "good", "bad", "line"),
    [
        (GPT, {"data": {"context": 128}}, {"data": {"context": 129}}, "data.context=129: is longer than model.max_positions=128"),
        (LLAMA, {"data": {"context": 4096}}, {"data": {"context": 1}}, "data.context=1: expected a whole number, at least 2"),
        (GPT, {"evaluation": {"window": 128}}, {"evaluation": {"window": 129}}, "evaluation.window=129: is longer than"),
        (
            LLAMA,
            {"evaluation": {"window": 64, "stride": 64}},
            {"evaluation": {"window": 64, "stride": 65}},
            "evaluation.stride=65: is larger than evaluation.window=64",
        ),
        (
            LLAMA,
            {"data": {"context": 64}, "evaluation": {"stride": 64}},
            {"data": {"context": 64}, "evaluation": {"stride": 65}},
            "evaluation.stride=65: is larger than the window (data.context=64)",
        ),
        (
            LLAMA,
            {"trainer": {"global_batch": 32, "micro_batch": 4, "devices": 4, "nodes": 2}},
            {"trainer": {"global_batch": 31, "micro_batch": 4, "devices": 4, "nodes": 2}},
            "trainer.global_batch=31: is not a multiple of trainer.micro_batch=4 × 8 devices; 32 would be",
        ),
        (
            LLAMA,
            {"data": {"prompt_field": "p", "response_field": "r"}},
            {"data": {"prompt_field": "p"}},
            "data.prompt_field=p: needs data.response_field too",
        ),
        (LLAMA, {"data": {"path": "x"}}, {"data": {"response_field": "r"}}, "data.response_field=r: needs data.prompt_field too"),
        (LLAMA, {"checkpoint": "a"}, {"checkpoint": "a", "resume": "auto"}, "checkpoint=a: starts anew"),
        (LLAMA, {"resume": "auto"}, {"resume": "auto", "overwrite": True}, "overwrite=true: would delete the run"),
        (
            {"model": {"name": "llama-tiny"}},
            {"data": {"tokenizer": {"kind": "file", "path": "t"}}},
            {"data": {"tokenizer": {"kind": "bytes"}}},
            "data.tokenizer.kind=bytes: makes 257 tokens, more than model.vocab_size=256",
        ),
        (
            LLAMA,
            {"data": {"tokenizer": {"vocab_size": 8192}}},
            {"data": {"tokenizer": {"vocab_size": 8193}}},
            "data.tokenizer.vocab_size=8193: makes 8193 tokens, more than model.vocab_size=8192",
        ),
        (
            LLAMA,
            {"data": {"tokenizer": {"kind": "file", "path": "t"}}},
            {"data": {"tokenizer": {"kind": "file"}}},
            "data.tokenizer.kind=file: needs data.tokenizer.path",
        ),
        (LLAMA, {}, {"data": {"tokenizer": {"path": "t"}}}, "data.tokenizer.path=t: is not read with data.tokenizer.kind=bpe"),
        (LLAMA, {}, {"data": {"tokenizer": {"kind": "bytes", "digits": "single"}}}, "data.tokenizer.digits=single: is not read with data.tokenizer.kind=bytes"),
        (
            LLAMA,
            {"data": {"sources": [{"kind": "files", "path": "x"}]}},
            {"data": {"sources": [{"kind": "files"}]}},
            "data.sources.0.kind=files: needs data.sources.0.path",
        ),
        (LLAMA, {}, {"data": {"sources": [{"path": "x"}]}}, "data.sources.0.path=x: is not read with data.sources.0.kind=stdlib"),
        (
            LLAMA,
            {"data": {"sources": [{"kind": "hub", "path": "a/b", "revision": "r"}]}},
            {"data": {"sources": [{"revision": "r"}]}},
            "data.sources.0.revision=r: belongs to kind=hub",
        ),
        (
            LLAMA,
            {"data": {"sources": [{}, {"name": "other"}]}},
            {"data": {"sources": [{}, {}]}},
            "data.sources.1.name=stdlib: is the name of an earlier source",
        ),
        (LLAMA, {"data": {"path": "x", "sources": []}}, {"data": {"sources": []}}, "data.sources=[]: names no source"),
        (
            LLAMA,
            {"trainer": {"steps": 11}, "schedule": {"warmup": 10}},
            {"trainer": {"steps": 10}, "schedule": {"warmup": 10}},
            "schedule.warmup=10.0: steps of warm-up fill trainer.steps=10",
        ),
        (LLAMA, {"schedule": {"warmup": 2}}, {"schedule": {"warmup": 2.5}}, "schedule.warmup=2.5: is neither a share"),
        (
            LLAMA,
            {"schedule": {"name": "wsd", "warmup": 0.5, "decay": 0.5}},
            {"schedule": {"name": "wsd", "warmup": 0.5, "decay": 0.6}},
            "schedule.decay=0.6: and schedule.warmup=0.5 together are longer",
        ),
        (
            LLAMA,
            {"data": {"validation_fraction": 0}, "evaluation": {"enabled": False}},
            {"data": {"validation_fraction": 0}},
            "data.validation_fraction=0: holds nothing out to evaluate on",
        ),
        (
            LLAMA,
            {"trainer": {"strategy": "fsdp", "accelerator": "gpu"}},
            {"trainer": {"strategy": "fsdp", "accelerator": "cpu"}},
            "trainer.strategy=fsdp: shards over GPUs",
        ),
        (LLAMA, {"name": "a.b-c"}, {"name": "a/b"}, "name=a/b: names a directory below runs/"),
        (
            LLAMA,
            {"data": {"document_mask": True}, "attention": {"patterns": {"a": {"causal": True, "documents": True}}}},
            {"attention": {"patterns": {"a": {"causal": True, "documents": True}}}},
            "attention.patterns.a.documents=true: needs document ids in the batches: set data.document_mask=true",
        ),
        (
            LLAMA,
            {"attention": {"patterns": {"a": {"causal": True}, "b": {"causal": True}}, "layers": ["a", "b"]}},
            {"attention": {"patterns": {"a": {"causal": True}, "b": {"causal": True}}, "layers": ["a"]}},
            "attention.patterns.b: no layer has it; attention.layers names a",
        ),
        (
            LLAMA,
            {"attention": {"patterns": {"a": {"causal": True}}}},
            {"attention": {"patterns": {"a": {"causal": True}, "b": {"causal": True}}}},
            "attention.layers: is required: which of a, b each layer has",
        ),
        (
            LLAMA,
            {"attention": {"patterns": {"a": {"causal": True}}, "layers": ["a"]}},
            {"attention": {"patterns": {"a": {"causal": True}}, "layers": ["c"]}},
            "attention.layers names the pattern 'c', but attention.patterns has a",
        ),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(base: dict[str, Any], good: dict, bad: dict, line: str) -> None:
    validate(merged(base, good))
    found = problems(bad, base)
    assert len(found) == 1, found
    assert line in found[0]


def test_the_context_fits_the_model_unless_it_was_given() -> None:
    assert validate(GPT).data.context == 128
    assert validate({"model": {"name": "gpt2-small"}}).data.context == 1024
    assert validate({"model": {"name": "llama-20m"}}).data.context == 1024
    # With weights to start from, the model is the checkpoint's, which is not known here.
    assert validate(merged(GPT, {"checkpoint": "x"})).data.context == 1024


def test_null_is_a_value_where_it_is_allowed() -> None:
    config = validate(merged(LLAMA, {"model": {"n_kv_heads": None}, "trainer": {"clip": None}}))
    assert config.model.n_kv_heads is None
    assert config.trainer.clip is None
    assert DECODERS["llama-tiny"].n_kv_heads is not None


def test_an_attention_section_replaces_the_models_own() -> None:
    window = {"causal": True, "window": {"left": 7, "right": 0}}
    config = validate(merged(LLAMA, {"attention": {"patterns": {"near": window}}}))
    assert dict(config.model.attention.patterns) == {"near": AttentionSpec(causal=True, window=Window(7, 0))}
    assert config.model.attention.layers == ("near",)
    groups = [{"heads": 2, "spec": window}, {"heads": 2, "spec": {"causal": True}}]
    config = validate(merged(LLAMA, {"attention": {"patterns": {"mixed": groups}}}))
    assert [group.heads for group in config.model.head_groups(0)] == [2, 2]
    assert (
        validate(merged(LLAMA, {"attention": {"patterns": None}})).model.attention == DECODERS["llama-tiny"].attention
    )


def test_numbers_may_be_written_as_yaml_and_people_write_them() -> None:
    config = validate(merged(LLAMA, {"trainer": {"steps": 1e3}, "optimizer": {"lr": "3e-4"}, "name": 2024, "seed": 3}))
    assert config.trainer.steps == 1000
    assert config.optimizer.lr == 3e-4
    assert config.name == "2024"


# -- the other verbs ---------------------------------------------------------------------------------------------------


def test_prepare_leaves_an_experiments_other_sections_unread_but_not_what_is_typed() -> None:
    raw = {**LLAMA, "trainer": {"steps": 3}, "data": {"name": "x"}}
    assert validate_prepare(raw, where={"trainer.steps": "in configs/experiment/x.yaml"}).data.name == "x"
    with pytest.raises(ConfigError, match=r"trainer.steps=3: unknown key"):
        validate_prepare(raw, where={"trainer.steps": COMMAND_LINE})


def test_evaluate_and_generate_name_what_they_lack() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: is required: a checkpoint directory, or a run"):
        validate_evaluate({})
    with pytest.raises(ConfigError, match=r"tasks=\[\]: measures nothing"):
        validate_evaluate({"checkpoint": "x", "tasks": []})
    with pytest.raises(ConfigError, match=r"stride=9: is larger than evaluation.window=8"):
        validate_evaluate({"checkpoint": "x", "evaluation": {"window": 8, "stride": 9}})
    with pytest.raises(ConfigError, match=r"prompt: is required \(or file=PATH"):
        validate_generate({"checkpoint": "x"})
    with pytest.raises(ConfigError, match=r"file=f: and prompt are both given"):
        validate_generate({"checkpoint": "x", "prompt": "p", "file": "f"})
    assert validate_generate({"checkpoint": "x", "prompt": ""}).prompt == ""


def test_attention_resolves_the_model_as_training_does() -> None:
    raw = {**LLAMA, "attention": {"patterns": {"near": {"causal": True, "window": {"left": 3}}}}}
    assert validate_explain(raw).model == validate(raw).model
    with pytest.raises(ConfigError, match=r"model.d_model=64 is not a multiple of n_heads=3"):
        validate_explain(merged(LLAMA, {"model": {"n_heads": 3}}))


# -- the table of keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [RunRequest, PrepareConfig, EvaluateConfig, GenerateConfig, ExplainRequest])
def test_every_key_says_what_it_is(schema: type) -> None:
    table = keys(schema)
    assert len({key.path for key in table}) == len(table)
    assert [key.path for key in table if not key.meaning] == []
    assert [key.path for key in table if not key.allowed or "typing" in key.allowed] == []


def test_keys_are_found_by_their_concrete_paths() -> None:
    assert find(RunRequest, "data.sources.3.kind").choices == ("stdlib", "files", "hub")  # type: ignore[union-attr]
    assert find(RunRequest, "attention.patterns.any.window.left").is_number  # type: ignore[union-attr]
    assert find(RunRequest, "data.path").is_text  # type: ignore[union-attr]
    assert not find(RunRequest, "attention.backend.train").is_text  # type: ignore[union-attr]
    assert find(RunRequest, "data.sources.x.kind") is None
    assert find(RunRequest, "trainer") is None


def test_docstrings_are_read_with_their_continuation_lines() -> None:
    class Example:
        """Prose that   names x nothing.

        a       first
                and more; None: nothing
        b, c    both
        """

        __annotations__ = {"a": int, "b": int, "c": int}

    from dataclasses import dataclass

    Example.__doc__ = (Example.__doc__ or "").replace("\n        ", "\n    ")
    assert documented(dataclass(Example)) == {"a": "first and more; null: nothing", "b": "both", "c": "both"}


def test_a_config_error_is_a_users_mistake() -> None:
    assert issubclass(ConfigError, UserError)


def test_validation_needs_no_torch() -> None:
    code = (
        "import sys; from longspan.training.schema import validate; "
        "validate({'model': {'name': 'gpt2-small'}, 'attention': {'patterns': {'a': {'causal': True}}}}); "
        "print([name for name in ('torch', 'numpy', 'lightning', 'hydra', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("backend", "problem"),
    [
        (
            "sdap",
            "attention.backend: no backend is called 'sdap'; did you mean sdpa? there are auto, reference, sdpa, flex",
        ),
        (["flex", "refernce"], "attention.backend: no backend is called 'refernce'; did you mean reference?"),
        ({"train": "felx"}, "attention.backend.train: no backend is called 'felx'; did you mean flex?"),
        ({"decode": ["sdpa", "foo"]}, "attention.backend.decode.1: no backend is called 'foo'; there are auto,"),
        (["auto", "sdpa"], "attention.backend: auto chooses by itself and stands alone"),
        ({"train": ["auto"]}, "attention.backend.train: auto chooses by itself and stands alone"),
    ],
)
def test_a_backend_that_nobody_registered(backend: object, problem: str) -> None:
    (found,) = problems({"attention": {"backend": backend}})
    assert found.startswith(problem)


def test_backend_names_are_those_of_the_registry() -> None:
    from longspan.kernels.attention.registry import _factories

    assert set(BACKENDS) <= set(_factories)
    plan = validate({**GPT, "attention": {"backend": {"train": ["lab.sparse", "flex"], "decode": "auto"}}})
    assert plan.attention_backend.train == ("lab.sparse", "flex")  # a dot: somebody else registers it


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9]])
def test_betas_are_decay_rates(betas: list[float]) -> None:
    (found,) = problems({"optimizer": {"betas": betas}})
    assert found == f"optimizer.betas={betas}: expected two numbers, each at least 0 and below 1"
    assert validate({**GPT, "optimizer": {"betas": [0.0, 0.999]}}).optimizer.betas == (0.0, 0.999)
