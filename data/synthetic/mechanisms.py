"""Small tests of what attention or memory must be able to do, as text: words, and the answer at the end.

    copying             a sequence again (Jelassi et al. 2024, arXiv 2402.01032)
    induction           what followed the marked word when it stood there before (Olsson et al. 2022, arXiv 2209.11895;
                        in this form: Fu et al. 2022, arXiv 2212.14052, §3.1)
    associative_recall  values of keys that were listed with them, several asked for of one list (multi-query
                        associative recall: Arora et al. 2023, arXiv 2312.04927)
    selective_copying   the letters among blanks, in order (Gu & Dao 2023, arXiv 2312.00752, §4.1)

`length` counts what `count` counts, by default words; a prompt and its answer have as many as fit, never more. Every
question depends on (seed, length, index) and its settings alone.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence

import numpy as np

from ..questions import Question
from .fill import Count, Prompt, TooSmallError, Units, fill, generator, unit_cost

LENGTHS = (64, 128, 256, 512)
SAMPLES = 100

LETTERS = tuple(string.ascii_lowercase)
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
KEYS = tuple(a + b + c for a in _CONSONANTS for b in _VOWELS for c in _CONSONANTS)
MARK, BLANK, AGAIN = "#", ".", "="


def words(text: str) -> int:
    """Words of a text: what has white space around it."""
    return len(text.split())


def copying(
    *, lengths: Sequence[int] = LENGTHS, samples: int = SAMPLES, seed: int = 0, count: Count = words
) -> Iterator[Question]:
    """`h q c … =` is followed by `h q c …`: random letters. About half of the length is the answer.

    Raises TooShortError (a ValueError) for a length that takes no letter.
    """

    def prompt_of(length: int, rng: np.random.Generator) -> Prompt:
        letters = Units(lambda _: _letter(rng), unit_cost(count, " "))

        def make(n: int) -> Prompt:
            text = " ".join(letters.first(n))
            return Prompt(before="", context=text, after=f" {AGAIN}", references=(text,))

        return fill(
            make,
            lambda n, left: letters.fitting(n, left // 2),
            task="copying",
            length=length,
            room=0,
            count=count,
            least=1,
        )

    for length in lengths:
        for index in range(samples):
            prompt = prompt_of(length, generator(seed, "copying", length, index))
            yield _question("copying", prompt, length, index)


def induction(
    *, lengths: Sequence[int] = LENGTHS, samples: int = SAMPLES, seed: int = 0, count: Count = words
) -> Iterator[Question]:
    """Random letters with one `#` anywhere among them, and `#` at the end: the letter after the first is asked for.

    Raises TooShortError for a length that takes not even the mark, its letter and the mark again.
    """

    def prompt_of(length: int, rng: np.random.Generator) -> Prompt:
        answer, place = _letter(rng), float(rng.random())
        letters = Units(lambda _: _letter(rng), unit_cost(count, " "))

        def make(n: int) -> Prompt:
            around, at = list(letters.first(n)), int(place * (n + 1))
            text = " ".join([*around[:at], MARK, answer, *around[at:]])
            return Prompt(before="", context=text, after=f" {MARK}", references=(answer,))

        return fill(make, letters.fitting, task="induction", length=length, room=0, count=count)

    for length in lengths:
        for index in range(samples):
            prompt = prompt_of(length, generator(seed, "induction", length, index))
            yield _question("induction", prompt, length, index)


def associative_recall(
    *,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    count: Count = words,
    queries: int = 4,
) -> Iterator[Question]:
    """Pairs of a key (three letters, each key once) and a value (a letter): `bav q tig c … = tig` is followed by `c`.

    queries  questions about the same pairs, of different keys as far as there are as many; `samples` counts lists

    Raises TooShortError for a length that takes no pair, and ValueError for one that takes all 2,205 different keys.
    """

    def prompts_of(length: int, rng: np.random.Generator) -> list[Prompt]:
        start = float(rng.random())
        order = rng.permutation(len(KEYS)).tolist()
        values = rng.integers(len(LETTERS), size=len(KEYS)).tolist()
        pairs = Units(lambda n: f"{KEYS[order[n % len(KEYS)]]} {LETTERS[values[n % len(KEYS)]]}", unit_cost(count, " "))

        def asked(n: int) -> list[Prompt]:
            # Evenly apart from a random place on, so that the keys differ where there are as many.
            places = [int((start + number / queries) % 1.0 * n) for number in range(queries)]
            context = " ".join(pairs.first(n))
            return [
                Prompt(
                    before="",
                    context=context,
                    after=f" {AGAIN} {KEYS[order[place]]}",
                    references=(LETTERS[values[place]],),
                )
                for place in places
            ]

        def longest(n: int) -> Prompt:  # of one list of pairs; with it the others fit too
            return max(asked(n), key=lambda prompt: count(prompt.after + prompt.joint + prompt.references[0]))

        fitted = fill(
            longest,
            pairs.fitting,
            task="associative_recall",
            length=length,
            room=0,
            count=count,
            least=1,
            most=len(KEYS),
        )
        n_pairs = words(fitted.context) // 2
        if n_pairs == len(KEYS):
            raise TooSmallError(f"length={length}: takes all {n_pairs:,} different keys and more; use a smaller one")
        return asked(n_pairs)

    if queries < 1:
        raise ValueError(f"queries={queries}: at least 1")
    for length in lengths:
        for index in range(samples):
            prompts = prompts_of(length, generator(seed, "associative_recall", length, index))
            for number, prompt in enumerate(prompts):
                yield _question("associative_recall", prompt, length, index, number)


def selective_copying(
    *,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    count: Count = words,
    letters: int = 16,
) -> Iterator[Question]:
    """`letters` random letters at random places among blanks (`.`), then `=`: the letters are asked for in their order.

    Raises TooShortError for a length that takes not even the letters twice.
    """

    def prompt_of(length: int, rng: np.random.Generator) -> Prompt:
        chosen = [_letter(rng) for _ in range(letters)]
        places = np.sort(rng.random(letters))
        blanks = Units(lambda _: BLANK, unit_cost(count, " "))

        def make(n: int) -> Prompt:
            text = [BLANK] * n
            for place, letter in zip(reversed(places.tolist()), reversed(chosen), strict=True):
                text.insert(int(place * (n + 1)), letter)
            return Prompt(before="", context=" ".join(text), after=f" {AGAIN}", references=(" ".join(chosen),))

        return fill(make, blanks.fitting, task="selective_copying", length=length, room=0, count=count)

    for length in lengths:
        for index in range(samples):
            prompt = prompt_of(length, generator(seed, "selective_copying", length, index))
            yield _question("selective_copying", prompt, length, index)


def _letter(rng: np.random.Generator) -> str:
    return LETTERS[int(rng.integers(len(LETTERS)))]


def _question(task: str, prompt: Prompt, length: int, index: int, number: int | None = None) -> Question:
    document = f"{task}-{length}-{index}"
    return Question(
        id=document if number is None else f"{document}-{number}",
        document=document,
        before=prompt.before,
        context=prompt.context,
        after=prompt.after,
        joint=prompt.joint,
        references=prompt.references,
        groups={"length": length},
    )
