"""JSON lines as requests: what is understood, what is refused and how, and a file of answers that can be continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.model.answers import Answers, AnswersError, Origin, as_line
from longspan.model.requests import BadLine, TextRequest, read_requests
from longspan.model.sampling import Sampling, sequence_seed

DEFAULTS = Sampling(max_new_tokens=7, temperature=0.8, top_k=50, seed=3)


def read(*lines: str | bytes) -> list[TextRequest | BadLine]:
    return list(read_requests([line if isinstance(line, bytes) else line.encode() for line in lines], DEFAULTS))


def test_a_line_sets_what_it_sets() -> None:
    line = {
        "id": "a", "prompt": "x\n", "max_new_tokens": 2, "temperature": 0, "top_k": None, "top_p": 0.5, "min_p": 0.1,
        "repetition_penalty": 1.5, "seed": 11, "stop": ["\n", "END"],
    }  # fmt: skip
    full, plain = read(json.dumps(line), '{"prompt": ""}')
    assert isinstance(full, TextRequest)
    assert isinstance(plain, TextRequest)
    assert (full.line, full.id, full.prompt, full.stop_strings) == (1, "a", "x\n", ("\n", "END"))
    assert full.sampling == Sampling(
        max_new_tokens=2, temperature=0.0, top_p=0.5, min_p=0.1, repetition_penalty=1.5, seed=11
    )
    assert (plain.line, plain.id, plain.prompt, plain.stop_strings) == (2, None, "", ())
    assert (plain.sampling.max_new_tokens, plain.sampling.temperature, plain.sampling.top_k) == (7, 0.8, 50)


def test_lines_draw_different_numbers_unless_they_say_otherwise() -> None:
    requests = read(*['{"prompt": "p"}'] * 3, "", '{"prompt": "p", "seed": 3}')
    seeds = [request.sampling.seed for request in requests if isinstance(request, TextRequest)]
    assert seeds == [3, sequence_seed(3, 1), sequence_seed(3, 2), 3]
    assert len(set(seeds)) == 3
    assert [request.line for request in requests] == [1, 2, 3, 5]  # a blank line is none, and still a line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prompt", "is not JSON: Expecting value (character 1)"),
        ('{"prompt": "p"', "is not JSON: Expecting ',' delimiter (character 15)"),
        (b'{"prompt": "caf\xe9"}', "is not UTF-8 text (byte 15)"),
        ("[" * 100_000, "is not a request: JSON nested too deeply"),
        ('["p"]', 'is not a JSON object; a request looks like {"prompt": "…"}'),
        ("{}", "prompt: is missing; it is the text to continue"),
        ('{"prompt": "p", "temprature": 1}', "temprature: unknown field; did you mean temperature?"),
        ('{"prompt": "p", "x": 1}', "x: unknown field; a request has id, prompt, max_new_tokens, temperature, top_k"),
        ('{"prompt": 5}', "prompt=5: expected text"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair (character 1) is no text"),
        ('{"prompt": "p", "max_new_tokens": "5"}', 'max_new_tokens="5": expected a whole number'),
        ('{"prompt": "p", "max_new_tokens": true}', "max_new_tokens=true: expected a whole number"),
        ('{"prompt": "p", "max_new_tokens": -1}', "max_new_tokens=-1: a count"),
        ('{"prompt": "p", "temperature": null}', "temperature=null: expected a number"),
        ('{"prompt": "p", "temperature": NaN}', "temperature=nan: 0 is greedy"),
        ('{"prompt": "p", "temperature": 1' + "0" * 400 + "}", "expected a number"),
        ('{"prompt": "p", "top_p": 2}', "top_p=2.0: a probability"),
        ('{"prompt": "p", "seed": -1}', "seed=-1: a whole number from 0"),
        ('{"prompt": "p", "stop": 3}', "stop=3: expected text or a list of texts"),
        ('{"prompt": "p", "stop": ["a", ""]}', 'stop="": an empty text'),
        ('{"prompt": "p", "id": 1.5}', "id=1.5: expected text or a whole number"),
    ],
)
def test_a_bad_line_is_named_and_the_others_go_on(line: str | bytes, said: str) -> None:
    good, bad, after = read('{"prompt": "p"}', line, '{"prompt": "q"}')
    assert isinstance(good, TextRequest)
    assert isinstance(after, TextRequest)
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert said in bad.error
    assert "\n" not in bad.error


def test_a_bad_line_keeps_its_id() -> None:
    (bad,) = read('{"id": "q7", "prompt": 1}')
    assert (bad.id, bad.key) == ("q7", ("id", "q7"))


def test_an_id_is_used_once() -> None:
    first, second, number = read('{"id": "1", "prompt": "a"}', '{"id": "1", "prompt": "b"}', '{"id": 1, "prompt": "c"}')
    assert isinstance(first, TextRequest)
    assert second == BadLine(line=2, id=None, error='id="1": line 1 has it already')
    assert isinstance(number, TextRequest)  # the number 1 is not the text "1"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: json.dumps({"prompt": text}).encode())))
def test_anything_at_all_is_a_request_or_an_error(lines: list[bytes]) -> None:
    lines = [line.replace(b"\n", b" ") for line in lines]
    found = list(read_requests(lines, DEFAULTS))
    assert [each.line for each in found] == [number for number, line in enumerate(lines, 1) if line.strip()]


# -- answers -----------------------------------------------------------------------------------------------------------

ORIGIN = Origin(checkpoint="c0ffee", settings={"dtype": "float32"})
REQUESTS = read('{"prompt": "a"}', '{"prompt": "b", "id": "b"}', '{"prompt": "c", "id": 4}')
GOOD = [
    {
        "line": request.line,
        **({} if request.id is None else {"id": request.id}),
        "text": "…\n",
        "digest": ORIGIN.digest(request),
    }
    for request in REQUESTS
    if isinstance(request, TextRequest)
]


def opened(path: Path, requests: list[TextRequest | BadLine] | None = REQUESTS, origin: Origin = ORIGIN) -> Answers:
    return Answers(path, origin, requests)


def test_answers_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/out.jsonl"
    with opened(path) as file:
        for n, answer in enumerate(GOOD, 1):
            file.write(answer)
            assert [json.loads(line) for line in path.read_text().splitlines()] == GOOD[:n]
    again = opened(path)
    assert len(again) == 3
    assert all(map(again.has, REQUESTS))


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 300), bad=st.integers(0, 3))
def test_wherever_writing_was_cut_off_it_goes_on(tmp_path_factory: pytest.TempPathFactory, cut: int, bad: int) -> None:
    path = tmp_path_factory.mktemp("answers") / "out.jsonl"
    late = read("", "", "", '{"prompt": "d"}')[0]
    assert isinstance(late, TextRequest)
    lines = [as_line(answer) for answer in GOOD]
    lines.insert(bad, as_line({"line": 4, "error": "no"}))
    whole = b"".join(lines)[:cut]
    path.write_bytes(whole)
    now = [*GOOD, {"line": 4, "text": "now", "digest": ORIGIN.digest(late)}]
    with opened(path, [*REQUESTS, late]) as file:
        for request, answer in zip([*REQUESTS, late], now, strict=True):
            if not file.has(request):
                file.write(answer)
        kept = len(file)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(found, key=lambda answer: answer["line"]) == now
    complete = whole.count(b"\n") - (b'"error"' in whole[: whole.rfind(b"\n") + 1])
    assert kept == complete
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    ["hello\n", '{"a": 1}\n', '{"line": 1, "text": "", "digest": "a.b.c"}\n[]\n', "hello", '{"line": [1]}\n',
     '{"line": 1, "text": "of a version that did not say what it answers"}\n'],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(AnswersError, match=r"line \d is no answer of `longspan generate`; remove the file or choose"):
        opened(path)
    assert path.read_text() == content


CHANGED = {
    "prompt": ('{"prompt": "A"}', ORIGIN, "was made from another prompt than line 1 of the requests has now"),
    "seed": ('{"prompt": "a", "seed": 9}', ORIGIN, "was made from other settings than line 1"),
    "stop": ('{"prompt": "a", "stop": "x"}', ORIGIN, "was made from other settings than line 1"),
    "length": ('{"prompt": "a", "max_new_tokens": 7}', ORIGIN, "was made from other settings than line 1"),
    "dtype": ('{"prompt": "a"}', replace(ORIGIN, settings={"dtype": "bfloat16"}), "was made from other settings than"),
    "checkpoint": ('{"prompt": "a"}', replace(ORIGIN, checkpoint="d"), "was made from another checkpoint than line 1"),
    "two": ('{"prompt": "b"}', replace(ORIGIN, checkpoint="d"), "was made from another prompt and another checkpoint"),
    "broken": ("nonsense", ORIGIN, "was made from another prompt than line 1 of the requests has now"),
}


@pytest.mark.parametrize("stdin", [False, True], ids=["file", "standard input"])
@pytest.mark.parametrize("change", CHANGED)
def test_answers_of_something_else_are_noticed(tmp_path: Path, change: str, stdin: bool) -> None:
    line, origin, said = CHANGED[change]
    path = tmp_path / "out.jsonl"
    path.write_bytes(as_line(GOOD[0]) + b'{"line": 2')
    before = path.read_bytes()
    requests = [*read(line), *REQUESTS[1:]]
    with pytest.raises(
        AnswersError, match=f"out.jsonl: line 1 {said}.*; choose another output, or remove this file to"
    ):
        opened(path, None if stdin else requests, origin).has(requests[0])  # stdin is not known beforehand
    assert path.read_bytes() == before


def test_answers_to_requests_that_are_not_there_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(map(as_line, GOOD)))
    with pytest.raises(
        AnswersError, match="line 2 answers id b, which is not among the requests; choose another output"
    ):
        opened(path, [REQUESTS[0], REQUESTS[2]])
