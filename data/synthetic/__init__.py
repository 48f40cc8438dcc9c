"""Questions made of a seed: retrieval by length and depth, RULER, ListOps, and small tests of mechanisms.

Every generator is a pure function of its arguments. A question depends on (seed, task, length, depth, index) and its
settings, never on which other questions are asked for; the same ones come out in any process. They are drawn with
NumPy's PCG64, whose streams do not change with the version of Python; natural text where none is given does.
"""

from .fill import Count, TooShortError, TooSmallError
from .haystack import key_value, needle, passkey
from .listops import ListOpsSettings, listops, listops_expression
from .mechanisms import associative_recall, copying, induction, selective_copying, words
from .recall import recall_text
from .retrieval import Document, pair_records, write_pairs
from .ruler import MADE_TASKS, NEEDLES, ROOM, TASKS, ruler
from .ruler_qa import ruler_qa

__all__ = [
    "MADE_TASKS",
    "NEEDLES",
    "ROOM",
    "TASKS",
    "Count",
    "Document",
    "ListOpsSettings",
    "TooShortError",
    "TooSmallError",
    "associative_recall",
    "copying",
    "induction",
    "key_value",
    "listops",
    "listops_expression",
    "needle",
    "pair_records",
    "passkey",
    "recall_text",
    "ruler",
    "ruler_qa",
    "selective_copying",
    "words",
    "write_pairs",
]
