"""Something said once in a long text, and asked for at its end: a pass key, a fact in natural text, one pair of many.

    passkey    a number among sentences that repeat (Mohtashami & Jaggi 2023, arXiv 2305.16300, appendix; keys from 1 to
               50,000 as in LongLoRA: Chen et al. 2023, arXiv 2309.12307)
    needle     a made-up fact among natural sentences (Kamradt 2023), with other facts of its kind as distractors
    key_value  one pair of a JSON object of random identifiers (Liu et al. 2023, arXiv 2307.03172, §3)

A prompt and the room for its answer fill `length` tokens as closely as the next unit of filling allows, never more.
Each question depends on (seed, length, depth, index) and its own settings alone. Depth 0 is the beginning of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

from ..questions import Question
from .fill import Count, Prompt, Units, fill, generator, unit_cost
from .words import CITIES, NaturalText, cut_at_sentence, distinct, library_texts, number, random_uuid

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 10
PASSKEY_ROOM, NEEDLE_ROOM, KEY_VALUE_ROOM = 16, 32, 64

ASKED_FOR_KEY = "What is the pass key? The pass key is"
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


def passkey(
    *,
    count: Count,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    room: int = PASSKEY_ROOM,
) -> Iterator[Question]:
    """A number from 1 to 50,000 in a text of five sentences that repeat; the unit of filling is a sentence.

    count    tokens of a text
    lengths  tokens of a prompt and its answer
    depths   where the key stands, from 0 to 1
    samples  questions of each length and depth
    room     tokens kept for an answer; at least the answer's own

    Raises TooShortError (a ValueError) for a length that the prompt alone fills.
    """
    filler = Units(lambda n: NOISE[n % len(NOISE)], unit_cost(count, " "))

    def prompt_of(length: int, depth: float, rng: np.random.Generator) -> Prompt:
        key = str(rng.integers(1, 50_001))
        said = pass_key(key)

        def make(n: int) -> Prompt:
            sentences = filler.first(n)
            place = round(depth * n)
            parts = (" ".join(sentences[:place]), said, " ".join(sentences[place:]))
            return Prompt(
                before="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I "
                "will quiz you about the important information there.\n",
                context="\n".join(part for part in parts if part),
                after=f"\n{ASKED_FOR_KEY}",
                references=(key,),
            )

        return fill(make, filler.fitting, task="passkey", length=length, room=room, count=count)

    return _grid("passkey", prompt_of, lengths, depths, samples, seed)


def needle(
    *,
    count: Count,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    room: int = NEEDLE_ROOM,
    texts: Sequence[str] | None = None,
    distractors: int = 0,
) -> Iterator[Question]:
    """The seven-digit number of a city, between two sentences of natural text; the unit of filling is a word.

    texts        what the text around is made of, from another sentence on in each question, beginning again where it
                 ends; None: pydoc's help topics, which change with the version of Python
    distractors  other cities with their numbers, anywhere in the text

    The others as for `passkey`. Raises TooShortError for a length that the prompt alone fills, and ValueError for texts
    without words and for more distractors than there are cities.
    """
    if not 0 <= distractors < len(CITIES):
        raise ValueError(f"distractors={distractors}: from 0 to {len(CITIES) - 1}, a city each")
    text = natural_text() if texts is None else NaturalText(texts)
    cost = unit_cost(count, " ")

    def prompt_of(length: int, depth: float, rng: np.random.Generator) -> Prompt:
        cities = rng.permutation(len(CITIES))[: distractors + 1]
        city, *others = (CITIES[place] for place in cities)
        value, *values = distinct(number, distractors + 1, rng)
        places = rng.random(distractors).tolist()
        start = text.beginnings[int(rng.integers(len(text.beginnings)))]
        filler = Units(lambda n: text.word(start + n), cost)

        def make(n: int) -> Prompt:
            words = list(filler.first(n))
            facts = [(depth, city, value), *zip(places, others, values, strict=True)]
            return Prompt(
                before="",
                context=" ".join(hidden(words, [(where, city_fact(name, answer)) for where, name, answer in facts])),
                after=f"\n\n{city_question(city)}",
                references=(value,),
            )

        return fill(make, filler.fitting, task="needle", length=length, room=room, count=count)

    settings = f"needle {distractors}" if distractors else "needle"
    return _grid("needle", prompt_of, lengths, depths, samples, seed, settings)


def key_value(
    *,
    count: Count,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    room: int = KEY_VALUE_ROOM,
) -> Iterator[Question]:
    """The value of one key of a JSON object whose keys and values are random UUIDs; the unit of filling is a pair.

    Arguments as for `passkey`. Raises TooShortError for a length into which no pair fits.
    """

    def prompt_of(length: int, depth: float, rng: np.random.Generator) -> Prompt:
        pairs: list[tuple[str, str]] = []

        def pair(n: int) -> str:
            while len(pairs) <= n:
                pairs.append((random_uuid(rng), random_uuid(rng)))
            return f'"{pairs[n][0]}": "{pairs[n][1]}"'

        filler = Units(pair, unit_cost(count, ",\n "))

        def make(n: int) -> Prompt:
            lines = ",\n ".join(filler.first(n))
            key, value = pairs[round(depth * (n - 1))]
            return Prompt(
                before="Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n",
                context="{" + lines + "}",
                after=f'\n\nKey: "{key}"\nCorresponding value:',
                references=(value,),
            )

        return fill(make, filler.fitting, task="key_value", length=length, room=room, count=count, least=1)

    return _grid("key_value", prompt_of, lengths, depths, samples, seed)


@cache
def natural_text() -> NaturalText:
    """The text of every machine: `words.library_texts`."""
    return NaturalText(library_texts())


def _grid(
    task: str,
    prompt_of: Callable[[int, float, np.random.Generator], Prompt],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    settings: str | None = None,
) -> Iterator[Question]:
    """Questions of each length and depth. `settings` tells those of other settings apart in what is drawn."""
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    if outside:
        raise ValueError(f"depth={outside[0]}: from 0, the beginning of the text, to 1, its end")
    return (
        _question(task, prompt_of, length, float(depth), index, seed, settings or task)
        for length in lengths
        for depth in depths
        for index in range(samples)
    )


def _question(
    task: str,
    prompt_of: Callable[[int, float, np.random.Generator], Prompt],
    length: int,
    depth: float,
    index: int,
    seed: int,
    settings: str,
) -> Question:
    prompt = prompt_of(length, depth, generator(seed, settings, length, depth, index))
    name = f"{task}-{length}-{depth:g}-{index}"
    return Question(
        id=name,
        document=name,
        before=prompt.before,
        context=prompt.context,
        after=prompt.after,
        joint=prompt.joint,
        references=prompt.references,
        groups={"length": length, "depth": depth},
    )


def pass_key(key: str) -> str:
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def city_fact(city: str, value: str) -> str:
    return f"The special magic {city} number is: {value}."


def city_question(city: str) -> str:
    """Up to where the answer begins."""
    return f"Question: What is the special magic {city} number?\nAnswer: The special magic {city} number is:"


def hidden(words: list[str], facts: list[tuple[float, str]]) -> list[str]:
    """The words with each fact, in the order of their depths, before the sentence at its depth, or at the end."""
    places = sorted(
        (cut_at_sentence(words, round(depth * len(words))), number) for number, (depth, _) in enumerate(facts)
    )
    parts: list[str] = []
    done = 0
    for place, fact in places:
        parts += words[done:place]
        parts.append(facts[fact][1])
        done = place
    return parts + words[done:]
