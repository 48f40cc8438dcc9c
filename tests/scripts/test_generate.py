"""`longspan generate`: one prompt in every way; files of requests, answered, refused line by line, and continued."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.data.tokenizer import Tokenizer, byte_level
from longspan.model.checkpoint import load_decoder, resolve_checkpoint, save_model
from longspan.model.generation import complete
from longspan.model.sampling import Sampling
from longspan.model.zoo import build
from longspan.scripts.cli import main

Refused = Callable[..., list[str]]


@pytest.fixture
def generate(workshop: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """stdout of a command that must succeed."""

    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        words = ["generate", f"checkpoint={workshop / 'runs/tiny'}", "precision=fp32", "stop=false", *arguments]
        found = main(words)
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        return out

    return run


def requests(*lines: dict[str, object] | str) -> str:
    Path("q.jsonl").write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return "requests=q.jsonl"


def answers(path: str = "a.jsonl") -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len({each["line"] for each in found}) == len(found)
    return {each["line"]: each for each in found}


# -- one prompt --------------------------------------------------------------------------------------------------------


def test_text_is_cut_before_a_stop_string(generate: Callable[..., str]) -> None:
    free = generate("prompt=def", "max_new_tokens=40", "temperature=1.2", "seed=1").removesuffix("\n")
    stop = free[10:12]
    cut = generate("prompt=def", "max_new_tokens=40", "temperature=1.2", "seed=1", f"stop_strings=['{stop}', never]")
    assert cut == "def" + free[3:].partition(stop)[0] + "\n"


def test_beams_and_penalties_and_caches(generate: Callable[..., str], workshop: Path) -> None:
    checkpoint = resolve_checkpoint(workshop / "runs/tiny")
    model, tokenizer = load_decoder(checkpoint), Tokenizer.load(checkpoint)
    for words, settings in (
        (("num_beams=3", "length_penalty=0.5"), {"num_beams": 3, "length_penalty": 0.5}),
        (("repetition_penalty=1.7", "cache=contiguous"), {"repetition_penalty": 1.7}),
        (("cache=paged", "storage=int8"), {}),
    ):
        sampling = Sampling(max_new_tokens=12, temperature=0, **settings)  # type: ignore[arg-type]
        (expected,) = complete(model, ["import "], sampling, tokenizer=tokenizer)
        assert generate("prompt=import ", "temperature=0", "max_new_tokens=12", *words) == f"import {expected.text}\n"


def test_log_probabilities_follow_the_text(generate: Callable[..., str], workshop: Path) -> None:
    checkpoint = resolve_checkpoint(workshop / "runs/tiny")
    model, tokenizer = load_decoder(checkpoint), Tokenizer.load(checkpoint)
    (expected,) = complete(model, ["x"], Sampling(max_new_tokens=5, temperature=0), tokenizer=tokenizer)
    out = generate("prompt=x", "temperature=0", "max_new_tokens=5", "logprobs=true").splitlines()
    assert out[-6].split() == ["token", "log-probability"]
    assert [float(line.split()[-1]) for line in out[-5:]] == pytest.approx(expected.logprobs, abs=6e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prompt=x", "num_beams=4"], "num_beams=4: beam search draws nothing, but temperature=0.8; add temperature=0"),
        (["prompt=x", "requests=a"], "requests=a: and prompt are both given; the text to continue is one of them"),
        (["prompt=x", "output=a"], "output=a: is for the answers to requests=FILE.jsonl; a prompt's text is printed"),
        (["prompt=x", "length_penalty=2"], "length_penalty=2.0: compares the texts of a beam search; set num_beams"),
        (["prompt=x", 'stop_strings=""'], 'stop_strings=[""]: an empty text would stop before the first token'),
        (["requests=a", "cache=contiguous"], "cache=contiguous: requests=a come and go, and so share pages"),
        (["requests=a", "temperature=0", "num_beams=2"], "num_beams=2: requests=a are answered without beam search"),
        (["requests=nowhere.jsonl"], "requests=nowhere.jsonl: does not exist"),
        (
            ["prompt=x", "storage=int4"],
            "storage=int4: expected one of int8, float8_e4m3fn, or null; did you mean",
        ),
        (["prompt=x", "steps=fast"], "steps=fast: expected one of auto, plain, recorded, compiled"),
        (
            ["prompt=x", "steps=recorded", "accelerator=cpu"],
            "steps='recorded': CUDA graphs are recorded on CUDA, and the model is on cpu; 'plain' and 'auto' work",
        ),
        (
            ["prompt=x", "temperature=0", "num_beams=2", "steps=compiled"],
            "num_beams=2 with steps='compiled': the rows of a beam search change between steps; steps is auto or plain",
        ),
        (["prompt=x", "global_positions=[0]"], "global_positions=[0]: "),
        (["prompt=x", "min_p=1.5"], "min_p=1.5: expected a number, at least 0, at most 1, or null"),
    ],
)
def test_what_is_refused(refused: Refused, workshop: Path, arguments: list[str], said: str) -> None:
    (line,) = refused("generate", f"checkpoint={workshop / 'runs/tiny'}", *arguments)
    assert line.startswith(said)


def test_a_tokenizer_of_another_model_is_refused(refused: Refused) -> None:
    save_model(build("gpt-tiny", {"vocab_size": 200}, seed=0), "foreign", byte_level())
    for source in ("prompt=x", requests({"prompt": "x"})):
        (line,) = refused("generate", "checkpoint=foreign", source)
        assert line == (
            "the tokenizer has 257 tokens, the model 200: they do not belong together; use the tokenizer that the "
            "model was trained with"
        )


# -- requests ----------------------------------------------------------------------------------------------------------


def test_each_request_is_answered_as_a_prompt_alone(generate: Callable[..., str]) -> None:
    source = requests(
        {"prompt": "def f", "max_new_tokens": 9},
        {"prompt": "import", "id": "i", "temperature": 0, "repetition_penalty": 1.5},
        {"prompt": "", "seed": 5, "top_k": 3, "max_new_tokens": 20},
        {"prompt": "x", "seed": 5, "min_p": 0.1, "top_k": None, "stop": ["e", " "]},
    )
    assert generate(source, "output=a.jsonl", "max_batch=2", "seed=3", "max_new_tokens=15") == ""
    found = answers()
    alone = {
        1: ["prompt=def f", "max_new_tokens=9", "seed=3"],
        2: ["prompt=import", "temperature=0", "repetition_penalty=1.5"],
        3: ["prompt=", "seed=5", "top_k=3", "max_new_tokens=20"],
        4: ["prompt=x", "seed=5", "min_p=0.1", "top_k=null", "stop_strings=[e,' ']"],
    }
    for line, arguments in alone.items():
        prompt = arguments[0].removeprefix("prompt=")
        assert prompt + found[line]["text"] + "\n" == generate("max_new_tokens=15", *arguments), line
    assert found[2]["id"] == "i"
    assert found[1]["finish_reason"] == "length"
    assert (found[1]["new_tokens"], found[4]["finish_reason"]) == (9, "stop_string")
    assert set(found[1]) == {"line", "text", "finish_reason", "prompt_tokens", "new_tokens", "digest"}


def test_a_bad_line_costs_its_own_answer_only(
    generate: Callable[..., str], capsys: pytest.CaptureFixture[str], workshop: Path
) -> None:
    misspelled = {"prompt": "b", "id": 7, "tempertaure": 1}
    source = requests({"prompt": "a"}, "nonsense", misspelled, "", {"prompt": "c" * 200}, {"prompt": "d"})
    words = [f"checkpoint={workshop / 'runs/tiny'}", source, "output=a.jsonl", "max_new_tokens=4", "temperature=0"]
    assert main(["generate", *words]) == 1
    err = capsys.readouterr().err
    assert "longspan generate: requests=q.jsonl: 3 answered by an error; the first is line 2: is not JSON" in err
    found = answers()
    assert sorted(found) == [1, 2, 3, 5, 6]
    assert found[3] == {
        "line": 3, "id": 7, "error": "tempertaure: unknown field; did you mean temperature?"
    }  # fmt: skip
    assert "200 tokens and 4 new ones need 203 positions, but the model has learned 128" in found[5]["error"]
    assert all("text" in found[line] for line in (1, 6))


def test_the_same_command_goes_on_where_it_was_stopped(
    generate: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, object]] = [{"prompt": word} for word in ("a", "b", "c", "d")]
    lines[2]["id"] = "third"
    arguments = ("output=a.jsonl", "max_new_tokens=6", "logprobs=true")
    generate(requests(*lines), *arguments)
    whole = answers()
    assert len(whole[1]["logprobs"]) == len(whole[1]["tokens"]) == 6
    kept = [json.dumps(whole[line], ensure_ascii=False) for line in (3, 1)]
    Path("a.jsonl").write_text("\n".join([*kept, json.dumps(whole[2])[:30]]))
    generate(requests(*lines), *arguments)
    again = answers()
    for line, answer in whole.items():  # other requests beside it, so other rounding
        assert again[line].pop("logprobs") == pytest.approx(answer.pop("logprobs"), abs=1e-4)
    assert again == whole
    assert Path("a.jsonl").read_text().splitlines()[0] == kept[0]
    before = Path("a.jsonl").read_bytes()
    generate(requests(*lines), *arguments)  # nothing left to do
    assert Path("a.jsonl").read_bytes() == before

    bad = requests(*lines, "{}")  # a line that failed is tried again once it is mended
    generate(bad, *arguments, code=1)
    assert "error" in answers()[5]
    generate(requests(*lines, {"prompt": "e"}), *arguments)
    assert "text" in answers()[5]


def test_answers_of_another_command_are_noticed(generate: Callable[..., str], refused: Refused, workshop: Path) -> None:
    """One line that says what is different and what to do; the file stays as it is."""
    arguments = ("output=a.jsonl", "max_new_tokens=4", "temperature=0")
    generate(requests({"prompt": "a"}, {"prompt": "b"}), *arguments)
    where = f"checkpoint={workshop / 'runs/tiny'}"
    advice = "; choose another output, or remove this file to answer everything anew"
    for first, other, said in (
        ("A", arguments, "another prompt than line 1 of the requests has now"),
        ("a", (*arguments[:2], "temperature=1"), "other settings than line 1 of the requests has now"),
        ("a", (*arguments, "logprobs=true"), "other settings than line 1 of the requests has now"),
    ):
        source = requests({"prompt": first}, {"prompt": "b"})
        (line,) = refused("generate", where, "precision=fp32", "stop=false", source, *other)
        assert f"was made from {said}" in line
        assert line.endswith(advice)
    model = load_decoder(resolve_checkpoint(workshop / "runs/tiny"))
    with torch.no_grad():
        model.norm.weight.mul_(2)
    save_model(model, "sibling", Tokenizer.load(resolve_checkpoint(workshop / "runs/tiny")))
    source = requests({"prompt": "a"}, {"prompt": "b"})
    (line,) = refused("generate", "checkpoint=sibling", "precision=fp32", "stop=false", source, *arguments)
    assert "was made from another checkpoint than line 1 of the requests has now" in line
    generate(requests({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}), *arguments)  # more of them are welcome
    assert sorted(answers()) == [1, 2, 3]


def test_quotes_of_a_prompt_are_part_of_it(generate: Callable[..., str]) -> None:
    for prompt in ('"x"', "'x'", '""'):
        assert generate(f"prompt={prompt}", "max_new_tokens=1", "temperature=0").startswith(prompt)


def test_a_request_beyond_the_pool_is_told_of_keys_that_exist(generate: Callable[..., str]) -> None:
    config = {"vocab_size": 257, "n_layers": 1, "max_positions": 64}
    save_model(build("llama-tiny", config, seed=0), "rotary", byte_level())
    source = requests({"prompt": "a" * 100})
    generate(source, "checkpoint=rotary", "output=a.jsonl", "max_batch=1", "max_new_tokens=4", code=1)
    error = answers()[1]["error"]
    assert error.startswith("a prompt of 100 tokens and 4 new ones need 7 pages of 16 tokens, but the session has 4, ")
    assert error.endswith("; ask for fewer tokens, or raise max_batch, which sizes the pool")
    generate(source, "checkpoint=rotary", "output=a.jsonl", "max_batch=2", "max_new_tokens=4")
    assert answers()[1]["new_tokens"] == 4


def test_requests_from_standard_input_to_standard_output(
    generate: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO('{"prompt": "é"}\n{"prompt": "b"}'.encode())))
    lines = generate("requests=-", "max_new_tokens=3").splitlines()
    assert sorted(json.loads(line)["line"] for line in lines) == [1, 2]


def test_by_default_requests_end_where_positions_do(generate: Callable[..., str]) -> None:
    generate(requests({"prompt": "a"}, {"prompt": "abc", "max_new_tokens": 3}), "output=a.jsonl", "temperature=0")
    found = answers()
    assert found[1]["prompt_tokens"] + found[1]["new_tokens"] == 129
    assert found[2]["new_tokens"] == 3


def test_a_file_of_something_else_is_no_place_for_answers(refused: Refused, workshop: Path) -> None:
    Path("notes.txt").write_text("mine\n")
    source = requests({"prompt": "a"})
    for output in ("notes.txt", "q.jsonl"):
        (line,) = refused("generate", f"checkpoint={workshop / 'runs/tiny'}", source, f"output={output}")
        assert line == f"{output}: line 1 is no answer of `longspan generate`; remove the file or choose another"
