"""The names of what `longspan evaluate` measures: here, and not where tasks are defined, so that the schema of configs
knows them without loading anything. Tests hold the registry to this list."""

from __future__ import annotations

from typing import Literal

TaskName = Literal[
    "perplexity",
    "effective_context",
    "passkey",
    "needle",
    "key_value",
    "ruler",
    "ruler_synthetic",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
    "listops",
    "copying",
    "induction",
    "associative_recall",
    "selective_copying",
    "squad",
    "squad_v2",
    "quality",
    "qmsum",
    "squality",
    "scisummnet",
    "lambada",
    "imdb",
    "hyperpartisan",
]

LongTextRule = Literal[
    "refuse",
    "keep_head",
    "keep_tail",
    "cut_middle",
    "bm25",
    "word_overlap",
    "best_chunk",
    "map_reduce",
    "fused",
]
"""What becomes of a text that a model cannot read whole: `tasks.task.Truncation`, or a strategy."""

ProtocolName = Literal[
    "token_strided",
    "disjoint",
    "yarn",
    "yarn_truncate",
    "longlora",
    "hf_docs",
    "lm_eval_rolling",
    "fla",
    "longformer",
]
