"""What a task is: where its questions come from, how they are asked, and what counts as right.

A definition is data and imports no torch, so that the names of tasks can be checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from longspan.data.questions import Question

Ask = Literal["generate", "choose", "force", "classify", "extract"]
"""generate  the model writes on after the prompt, greedily
choose    the choice that is likeliest after the prompt
force     is every token of the reference the likeliest one, given those before it?
classify  an encoder's classification head reads the text
extract   an encoder's head for answers points at a part of the text
"""

Truncation = Literal["refuse", "keep_head", "keep_tail", "cut_middle"]
"""What becomes of a text that is longer than the model can take: nothing is asked (an error that says so), or its
beginning, its end, or both ends are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What questions are made of.

    lengths  tokens of a prompt with its answer, for tasks that are made to length
    depths   where in the text the answer is hidden, for tasks that hide it: 0 its beginning, 1 its end
    samples  questions of each length (and depth); of a file, questions in all; None: all
    seed     of everything that is drawn
    files    directory with the local files of tasks that read some
    hub      what is not among them may be read from the hub
    count    tokens that a text has
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int | None
    seed: int
    files: Path | None
    count: Callable[[str], int]
    hub: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The questions of a task, and what they were made of.

    lengths, depths, samples, seed   of the material, as far as the task goes by them
    files                            name → sha256 of the files that they were read from
    n_refused                        rows of those that could not be used
    """

    questions: tuple[Question, ...]
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    samples: int | None = None
    seed: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    n_refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said to one question.

    text       what it wrote, or the choice it took
    logprob    of the reference (force) or of each choice; None: not asked for
    right      force: whether each token of the reference was the likeliest
    """

    text: str
    logprobs: tuple[float, ...] | None = None
    right: tuple[bool, ...] | None = None


Score = Callable[[Question, Answer], Mapping[str, float]]
Combine = Callable[[Mapping[str, float]], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A named, versioned measurement. A change of data, prompt or scoring that moves its numbers raises `version`.

    summary         one line: what is asked, and the source of the definition
    asks            how it can be asked, the preferred way first; a model takes the first that it can do
    questions       its questions, the same for the same material
    score           numbers of one answer; a result is their mean over questions
    combine         further numbers made of those means (a geometric mean of ROUGE)
    headline        the number that stands for the task
    truncation      of a text that is too long
    max_new_tokens  that an answer may have
    stop            generation ends before the first of these strings
    samples         what `Material.samples` is unless a user says otherwise
    unanswerable    whether there may be no answer, which an encoder then may find
    made_to_length  whether `lengths` is what its questions are made to
    has_depths      whether they are also made at each depth
    bounded         whether a length can be more than there is to fill it with
    files           what must lie in the directory of local files, in words; None: it needs none
    """

    name: str
    version: int
    summary: str
    asks: tuple[Ask, ...]
    questions: Callable[[Material], Iterable[Question]]
    score: Score
    headline: str
    combine: Combine | None = None
    truncation: Truncation = "refuse"
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()
    samples: int | None = None
    unanswerable: bool = False
    made_to_length: bool = False
    has_depths: bool = False
    bounded: bool = False
    files: str | None = None
