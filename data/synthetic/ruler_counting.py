"""RULER's two counting tasks: the ten most common words of a list (cwe), the three most frequent coded words (fwe)."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import numpy as np

from .fill import Count, Prompt, TooShortError, Units, fill, unit_cost
from .words import COMPOUNDS, PLAIN_WORDS, distinct

COMMON = 10  # words of cwe that are asked for
SHORT = 4096  # below so many tokens, cwe repeats its words less often
# (words of the example, repeats of its common ones, of its others; repeats of the question's common words, of others)
_REPEATS_SHORT, _REPEATS = (20, 3, 1, 6, 1), (40, 10, 3, 30, 3)

CODED_LETTERS = 6
NOISE_WORD = "..."  # of rank 1 in fwe, and not asked for
_FREQUENT = 3


def common_words(*, length: int, room: int, count: Count, rng: np.random.Generator) -> Prompt:
    """A numbered list in which ten words stand 30 times (6 times below 4,096 tokens) and all others 3 times (once),
    after a worked example of 40 words (20). The unit of filling is one of the other words."""
    n_example, example_common, example_other, common, other = _REPEATS_SHORT if length < SHORT else _REPEATS
    shown = _sample(n_example, rng)
    worked = _list(shown, example_common, example_other, int(rng.integers(2**32)))
    words, order = _sample(len(PLAIN_WORDS), rng), int(rng.integers(2**32))
    compounds = rng.permutation(len(COMPOUNDS))
    introduction = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    question = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )
    answered = " ".join(f"{place}. {word}" for place, word in enumerate(shown[:COMMON], 1))
    # Where plain words do not suffice, all are pairs: a list of both would set the common ones apart.
    cost = unit_cost(count, " 1000. ")

    def fill_with(vocabulary: Sequence[str]) -> Prompt:
        def make(n: int) -> Prompt:
            return Prompt(
                before=introduction + worked + question + " " + answered + "\n" + introduction,
                context=_list(vocabulary[: COMMON + n], common, other, order),
                after=question,
                references=tuple(vocabulary[:COMMON]),
            )

        units = Units(lambda n: vocabulary[COMMON + n % (len(vocabulary) - COMMON)], lambda word: other * cost(word))
        most = len(vocabulary) - COMMON
        return fill(make, units.fitting, task="cwe", length=length, room=room, count=count, least=1, most=most)

    prompt = fill_with(words)
    used = len(set(prompt.context.split()[1::2]))
    return prompt if used < len(words) else fill_with([COMPOUNDS[place] for place in compounds])


def _sample(n: int, rng: np.random.Generator) -> list[str]:
    return [PLAIN_WORDS[place] for place in rng.permutation(len(PLAIN_WORDS))[:n]]


def _list(words: Sequence[str], common: int, other: int, order: int) -> str:
    """The words so many times each in random order, numbered."""
    all_words = [*words[:COMMON]] * common + [*words[COMMON:]] * other
    shuffled = (all_words[place] for place in np.random.default_rng(order).permutation(len(all_words)))
    return " ".join(f"{place}. {word}" for place, word in enumerate(shuffled, 1))


def frequent_words(*, length: int, room: int, count: Count, rng: np.random.Generator) -> Prompt:
    """Coded words with the frequencies of a zeta distribution, p(k) = 6/(π²k²) by rank k, the first rank being dots;
    the next three are asked for. There is a coded word for each fifty tokens of the text."""
    n_coded = max((length - room) // 50, _FREQUENT + 2)
    coded = [NOISE_WORD, *distinct(_coded_word, n_coded - 1, rng)]
    order = int(rng.integers(2**32))
    shares = 6 / (math.pi * np.arange(1, n_coded + 1)) ** 2

    def make(n: int) -> Prompt:
        times = (n * shares).astype(int).tolist()
        words = [word for word, repeats in zip(coded, times, strict=True) for _ in range(repeats)]
        shuffled = (words[place] for place in np.random.default_rng(order).permutation(len(words)))
        return Prompt(
            before="Read the following coded text and track the frequency of each coded word. Find the three most "
            "frequently appeared coded words. ",
            context=" ".join(shuffled),
            after="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
            "most frequently appeared words are:",
            references=tuple(coded[1 : 1 + _FREQUENT]),
        )

    # The third of the three must be more frequent than what comes after it: so at this many words, and above.
    least = math.ceil(2 / float(shares[_FREQUENT] - shares[_FREQUENT + 1]))
    n_words = sum((least * shares).astype(int).tolist())
    empty = make(0).tokens(count, room)
    full = make(least).tokens(count, room)
    if full > length:
        raise TooShortError("fwe", length, full)
    per_word = max(1.0, (full - empty) / n_words)
    return fill(
        make, lambda _, left: int(left / per_word), task="fwe", length=length, room=room, count=count, least=least
    )


def _coded_word(rng: np.random.Generator) -> str:
    return "".join(string.ascii_lowercase[place] for place in rng.integers(26, size=CODED_LETTERS))
