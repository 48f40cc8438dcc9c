"""What `longspan evaluate` scores: the documents that a run held out, or a text of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data.sources import SourceSpec, from_path, read
from longspan.data.store import Documents, TokenStore
from longspan.data.tokenizer import Tokenizer
from longspan.training.errors import UserError
from longspan.training.schema import EvaluationDataConfig


@dataclass(frozen=True, slots=True)
class TextDocuments:
    """Tokenised documents in memory, in the form of a store's: each ends with the separator."""

    ids: list[np.ndarray]
    sizes: list[int]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[i]

    def n_bytes(self, i: int) -> int:
        return self.sizes[i]

    def source(self, i: int) -> str:
        return self.sources[i]


def of_path(data: EvaluationDataConfig, tokenizer: Tokenizer) -> TextDocuments:
    """The documents of `data.path`. Raises SourceError for a path that holds none."""
    assert data.path is not None
    spec = from_path(data.path)
    documents = list(
        read(SourceSpec(kind=spec.kind, path=spec.path, text_field=data.text_field, limit=data.limit))
    )  # fmt: skip
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return TextDocuments(
        [np.array([*ids, tokenizer.eos_id]) for ids in encoded],
        [len(document.text.encode()) for document in documents],
        [document.source for document in documents],
    )


def held_out(checkpoint: Path, tokenizer: Tokenizer) -> Documents:
    """The validation documents of the store that the checkpoint was trained on, as its lineage tells.

    Raises UserError where the lineage names none, StoreError where the store is gone or another one now.
    """
    facts = _lineage(checkpoint).get("data")
    store = facts.get("store") if isinstance(facts, dict) else None
    if not isinstance(store, str):
        raise UserError(
            f"data.path: is needed, because {checkpoint} does not say which documents were held out when it was trained"
        )
    return TokenStore.open(store, tokenizer_sha256=tokenizer.sha256).documents("validation")


def training_context(checkpoint: Path) -> int | None:
    """The context of the run that the checkpoint lies in; None where it lies in no run."""
    config = checkpoint.parent.parent / "config.yaml"
    if checkpoint.parent.name != "checkpoints" or not config.is_file():
        return None
    context = _json(config).get("data", {}).get("context")
    return context if isinstance(context, int) else None


def _lineage(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "lineage.json"
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from error
    return content if isinstance(content, dict) else {}
