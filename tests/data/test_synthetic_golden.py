"""Generated questions do not change unnoticed: what changes here changes numbers that were measured, and takes a new
version of its task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from longspan.data import synthetic
from longspan.data.questions import Question

TEXTS = ["The cat sat. It was warm."]
DIGESTS = {
    "passkey": "62374f31c9ad9819",
    "needle": "09dac2a2a2d11425",
    "key_value": "a7bd8b3efc956ec6",
    "niah_single_1": "512904fa5b626c80",
    "niah_single_2": "0b4fd0854ff81901",
    "niah_single_3": "3185f0bc27cd455c",
    "niah_multikey_1": "f33cda590b2e2e58",
    "niah_multikey_2": "09de737a4517a014",
    "niah_multikey_3": "c183f58d82671bab",
    "niah_multivalue": "070bb55617f7c70c",
    "niah_multiquery": "0ff31044dd7ee2e3",
    "vt": "38c2970043c0f78f",
    "cwe": "dc02e2c6ea36f0e8",
    "fwe": "b664fcf7901e2d41",
    "listops": "5c335662a71ce687",
    "copying": "f0dbee893ba63024",
    "induction": "c2e019501e3e236d",
    "associative_recall": "63057b8a1df5c60d",
    "selective_copying": "3abf1ba304367a8a",
}


def digest(questions: Iterable[Question]) -> str:
    whole = (each.before + each.context + each.after + each.joint + "|".join(each.references) for each in questions)
    return hashlib.sha256("\0".join(whole).encode()).hexdigest()[:16]


def test_questions_are_what_they_were():
    count = synthetic.words
    made = {
        "passkey": synthetic.passkey(count=count, lengths=(300,), samples=2),
        "needle": synthetic.needle(count=count, lengths=(300,), samples=2, texts=TEXTS, distractors=2),
        "key_value": synthetic.key_value(count=count, lengths=(300,), samples=2),
        **{
            task: synthetic.ruler(task, count=count, lengths=(2000,), samples=2, texts=TEXTS)
            for task in synthetic.MADE_TASKS
        },
        "listops": synthetic.listops(samples=3),
        "copying": synthetic.copying(samples=2),
        "induction": synthetic.induction(samples=2),
        "associative_recall": synthetic.associative_recall(samples=2),
        "selective_copying": synthetic.selective_copying(samples=2),
    }
    assert {task: digest(questions) for task, questions in made.items()} == DIGESTS
