"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), made here to length.

Settings, prompts and answer room are those of the published scripts (github.com/NVIDIA/RULER, Apache-2.0, scripts/data
of July 2026), the `base` template: a prompt that ends with the beginning of the answer. What differs:

    words     keys are an adjective and a noun of our own lists, 70,245 pairs. cwe draws from those lists and one of
              verbs, and from the pairs where a text takes more words; theirs has larger lists, which are downloaded
    essays    the natural text is any that is given, pydoc's help topics by default; theirs are Paul Graham's essays.
              Sentences are found by their full stops
    vt        the worked example before the question has at most 500 tokens, as theirs, and at most a quarter of the
              length, but five lines of filling at least; variables have different names, theirs but for chance
    fwe       coded words are drawn anew for each question
    qa        files that cannot fill a length are refused; theirs repeats documents
    length    filled to the last unit that fits; theirs stops some units short
    seeds     each question has random numbers of its own
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np

from ..questions import Question
from .fill import Count, Prompt, Units, fill, generator, unit_cost
from .haystack import NOISE, natural_text
from .ruler_counting import common_words, frequent_words
from .words import NaturalText, compound, cut_at_sentence, distinct, number, random_uuid

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
SAMPLES = 500

_Draw = Callable[[np.random.Generator], str]
_Make = Callable[["_Request"], Prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """A retrieval task: `keys` keys with `values` values each are in the text, `queries` of the keys are asked for.

    haystack  noise: sentences that repeat; essay: natural text; needle: more needles, which are not asked for
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES: Mapping[str, Needles] = MappingProxyType(
    {
        "niah_single_1": Needles(haystack="noise"),
        "niah_single_2": Needles(haystack="essay"),
        "niah_single_3": Needles(haystack="essay", value="uuids"),
        "niah_multikey_1": Needles(haystack="essay", keys=4),
        "niah_multikey_2": Needles(haystack="needle"),
        "niah_multikey_3": Needles(haystack="needle", key="uuids", value="uuids"),
        "niah_multivalue": Needles(haystack="essay", values=4),
        "niah_multiquery": Needles(haystack="essay", keys=4, queries=4),
    }
)
HOPS = 4  # of vt's one chain
EXAMPLE_TOKENS = 500  # of vt's worked example at most

TASKS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
MADE_TASKS = TASKS[:-2]
ROOM: Mapping[str, int] = MappingProxyType(
    {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
)
"""Tokens that an answer may have."""

_DEPTHS = tuple(round(place * 100 / 39) / 100 for place in range(40))  # of needles in natural text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What a prompt is made by. `text`: of haystack=essay."""

    length: int
    room: int
    count: Count
    rng: np.random.Generator
    text: NaturalText | None


def ruler(
    task: str,
    *,
    count: Count,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    room: int | None = None,
    texts: Sequence[str] | None = None,
) -> Iterator[Question]:
    """Questions of one of `MADE_TASKS` (`ruler_qa.ruler_qa` makes qa_1 and qa_2, of files).

    count    tokens of a text
    lengths  tokens of a prompt and its answer
    samples  questions of each length
    room     tokens kept for an answer; None: the task's own (`ROOM`)
    texts    natural text around needles; None: pydoc's help topics, which change with the version of Python

    All references of a question are asked for together: `evaluation.string_match.string_match_all` scores them.
    Raises ValueError for an unknown task, and TooShortError for a length that the prompt alone fills.
    """
    if task not in MADE_TASKS:
        hint = "; ruler_qa makes it, of a file" if task in TASKS else ""
        raise ValueError(f"task={task}: one of {', '.join(MADE_TASKS)}{hint}")
    text = None
    if task in NEEDLES and NEEDLES[task].haystack == "essay":
        text = natural_text() if texts is None else NaturalText(texts)
    make = partial(_needles, task) if task in NEEDLES else _OTHERS[task]
    return (
        _question(task, make, length, index, seed, ROOM[task] if room is None else room, count, text)
        for length in lengths
        for index in range(samples)
    )


def _question(
    task: str,
    make: _Make,
    length: int,
    index: int,
    seed: int,
    room: int,
    count: Count,
    text: NaturalText | None,
) -> Question:
    rng = generator(seed, f"ruler {task}", length, index)
    prompt = make(_Request(length=length, room=room, count=count, rng=rng, text=text))
    name = f"{task}-{length}-{index}"
    return Question(
        id=name,
        document=name,
        before=prompt.before,
        context=prompt.context,
        after=prompt.after,
        joint=prompt.joint,
        references=prompt.references,
        groups={"length": length},
    )


# -- needles ----------------------------------------------------------------------------------------------------------


def _needles(task: str, request: _Request) -> Prompt:
    asked, rng, count = NEEDLES[task], request.rng, request.count
    draw_key: _Draw = compound if asked.key == "words" else random_uuid
    draw_value: _Draw = number if asked.value == "numbers" else random_uuid
    keys = distinct(draw_key, asked.keys, rng)
    values = distinct(draw_value, asked.keys * asked.values, rng)
    of_key = {key: values[k * asked.values : (k + 1) * asked.values] for k, key in enumerate(keys)}
    said = [ruler_fact(asked.value, key, value) for key in keys for value in of_key[key]]
    needles = [said[place] for place in rng.permutation(len(said))]
    queried = [keys[place] for place in rng.permutation(asked.keys)[: asked.queries]]
    single = asked.queries * asked.values == 1
    kind, verb = (asked.value[:-1], "is") if single else (asked.value, "are")
    before = (
        f"{'A' if single else 'Some'} special magic {kind} {verb} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n"
    )
    query = ", ".join(queried[:-1]) + (", and " if len(queried) > 1 else "") + queried[-1]
    after = f"\n{ruler_question(kind, verb, query)}"
    context, filler = _haystack(asked, needles, draw_key, draw_value, request)

    def make(n: int) -> Prompt:
        answers = tuple(value for key in queried for value in of_key[key])
        return Prompt(before=before, context=context(n), after=after, references=answers)

    # Needles between lines stand at different places.
    least = 0 if asked.haystack == "essay" else len(needles)
    return fill(make, filler.fitting, task=task, length=request.length, room=request.room, count=count, least=least)


def _haystack(
    asked: Needles, needles: Sequence[str], draw_key: _Draw, draw_value: _Draw, request: _Request
) -> tuple[Callable[[int], str], Units]:
    """The text with n units of filling as a function of n, and the units."""
    rng = request.rng
    if asked.haystack == "essay" and request.text is not None:
        text = request.text
        words = Units(text.word, unit_cost(request.count, " "))
        depths = sorted(_DEPTHS[place] for place in rng.permutation(len(_DEPTHS))[: len(needles)])
        return (lambda n: _between_sentences(list(words.first(n)), needles, depths)), words
    places = rng.random(len(needles))
    if asked.haystack == "noise":
        lines = Units(lambda _: " ".join(NOISE), unit_cost(request.count, "\n"))
    else:

        def another(_: int) -> str:
            return ruler_fact(asked.value, draw_key(rng), draw_value(rng))

        lines = Units(another, unit_cost(request.count, "\n"))
    return (lambda n: _between_lines(list(lines.first(n)), needles, places)), lines


def ruler_question(kind: str, verb: str, query: str) -> str:
    """Up to where the answer begins."""
    of_query = f"special magic {kind} for {query} mentioned in the provided text"
    every = "" if verb == "is" else " all"
    return f"What {verb}{every} the {of_query}? The {of_query} {verb}"


def ruler_fact(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _between_sentences(words: list[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    parts: list[str] = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        place = cut_at_sentence(words, int(len(words) * depth))
        parts += [*words[done:place], needle]
        done = max(done, place)
    return " ".join(parts + words[done:])


def _between_lines(lines: list[str], needles: Sequence[str], places: np.ndarray) -> str:
    """Each needle before another line, in an order that `places` (uniform, one a needle) decides."""
    chosen = _different(places, len(lines))
    for place, needle in sorted(zip(chosen, needles, strict=True), reverse=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _different(uniform: np.ndarray, n: int) -> list[int]:
    """Different whole numbers below n, each as likely as any, one for each uniform number in [0, 1)."""
    chosen: list[int] = []
    for value in uniform.tolist():
        place = int(value * (n - len(chosen)))
        for taken in sorted(chosen):
            place += place >= taken
        chosen.append(place)
    return chosen


# -- tracing ----------------------------------------------------------------------------------------------------------


def _variables(request: _Request) -> Prompt:
    """A chain of assignments among sentences that repeat, after a worked example of the same kind."""
    rng, count = request.rng, request.count
    example_length = min(EXAMPLE_TOKENS, request.length // 4)
    names, value = distinct(partial(_name, 3), HOPS + 1, rng), _value(rng)
    shown = _chain(names, value, rng, length=example_length, room=0, count=count, introduction="", may_exceed=True)
    worked = shown.before + shown.context + shown.after + " " + " ".join(shown.references) + "\n\n"
    names, value = distinct(partial(_name, 5), HOPS + 1, rng), _value(rng)
    return _chain(names, value, rng, length=request.length, room=request.room, count=count, introduction=worked)


def _chain(
    names: Sequence[str],
    value: str,
    rng: np.random.Generator,
    *,
    length: int,
    room: int,
    count: Count,
    introduction: str,
    may_exceed: bool = False,
) -> Prompt:
    """`may_exceed`: where the length is too short, a line of filling for each assignment all the same."""
    first = f"VAR {names[0]} = {value}"
    chain = [first, *(f"VAR {name} = VAR {source}" for source, name in pairwise(names))]
    places = rng.random(len(chain))
    lines = Units(lambda _: " ".join(NOISE), unit_cost(count, "\n"))

    def make(n: int) -> Prompt:
        text = list(lines.first(n))
        chosen = sorted(_different(places, n))
        for place, assignment in reversed(list(zip(chosen, chain, strict=True))):
            text.insert(place, assignment)
        return Prompt(
            before=introduction + "Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n",
            context="\n".join(text),
            after=f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
            "According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:",
            references=tuple(names),
        )

    least = len(chain)
    if may_exceed and make(least).tokens(count, room) > length:
        return make(least)
    return fill(make, lines.fitting, task="vt", length=length, room=room, count=count, least=least)


def _value(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 99_999))


def _name(letters: int, rng: np.random.Generator) -> str:
    return "".join(string.ascii_uppercase[place] for place in rng.integers(26, size=letters))


# -- aggregation ------------------------------------------------------------------------------------------------------


def _common_words(request: _Request) -> Prompt:
    return common_words(length=request.length, room=request.room, count=request.count, rng=request.rng)


def _frequent_words(request: _Request) -> Prompt:
    return frequent_words(length=request.length, room=request.room, count=request.count, rng=request.rng)


_OTHERS: Mapping[str, _Make] = MappingProxyType({"vt": _variables, "cwe": _common_words, "fwe": _frequent_words})
