"""A question about a text: what generators and files of questions give, and what evaluation asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GroupValue = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing to ask about one text. The prompt is `before + context + after`.

    id          tells it from the others of its task, and is the same each time
    document    names `before + context`: questions that share it are about the same text, which a model needs to read
                once; they are also resampled together
    before      what stands ahead of the text: instructions, examples
    context     the text; a truncation rule shortens this and nothing else
    after       what follows the text, up to where the answer begins; no white space at its end
    joint       what stands between `after` and an answer; a model is asked for it with the answer
    references  the answers that count as right, as they would be written; a multiple choice has its right choices here
    choices     what there is to choose from; (): anything can be answered
    groups      what results are broken down by: length, depth, source, …
    query       the question alone, where `after` words it for a model that writes on: what an encoder is asked, and
                what parts of the text are compared with; "": there is none
    """

    id: str
    document: str
    before: str = ""
    context: str
    after: str = ""
    joint: str = " "
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    groups: Mapping[str, GroupValue] = field(default_factory=dict)
    query: str = ""

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError(f"question {self.id} has no answer that counts as right")
        if self.after != self.after.rstrip():
            raise ValueError(f"question {self.id}: the prompt ends with white space, which belongs to `joint`")
        foreign = [each for each in self.references if self.choices and each not in self.choices]
        if foreign:
            raise ValueError(f"question {self.id}: the answer {foreign[0]!r} is none of the choices {self.choices}")
