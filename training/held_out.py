"""What a checkpoint says about its run: the store that documents were held out from, the context, the arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from longspan.data.store import StoreError, TokenStore
from longspan.data.tokenizer import Tokenizer

from .errors import UserError
from .precision import AskedPrecision

_PRECISIONS: Mapping[str, AskedPrecision] = {name: name for name in get_args(AskedPrecision)}


@dataclass(frozen=True, slots=True)
class TrainedWith:
    """context    tokens per training sequence, in the stage that wrote the checkpoint; None where that lies in no run
    precision  `trainer.precision` of the run; auto where it lies in none
    """

    context: int | None = None
    precision: AskedPrecision = "auto"


def trained_with(checkpoint: Path) -> TrainedWith:
    """From the config.yaml of the run that the checkpoint lies in. Raises UserError where that is damaged."""
    config = checkpoint.resolve().parent.parent / "config.yaml"
    if checkpoint.resolve().parent.name != "checkpoints" or not config.is_file():
        return TrainedWith()
    content = _json(config)
    lineage = checkpoint / "lineage.json"
    stage = _section(_json(lineage), "stage") if lineage.is_file() else {}
    context = stage.get("context", _section(content, "data").get("context"))
    precision = _section(content, "trainer").get("precision")
    return TrainedWith(
        context=context if isinstance(context, int) else None,
        precision=_PRECISIONS.get(str(precision), "auto"),
    )


def imported(checkpoint: Path) -> bool:
    """Whether the weights are another library's as they came: those have read texts framed by their tokenizer's
    template, where ours have read them one after the other."""
    lineage = checkpoint / "lineage.json"
    return lineage.is_file() and "imported" in _json(lineage)


def start_token(checkpoint: Path, tokenizer: Tokenizer) -> int | None:
    """What its texts began with where they were framed by the tokenizer's template; None: the end-of-text token, as in
    our own training."""
    return next(iter(reversed(tokenizer.start_ids)), None) if imported(checkpoint) else None


def training_store(checkpoint: Path, tokenizer: Tokenizer) -> TokenStore:
    """The store that the checkpoint was trained on, as its lineage tells: the same content, or none.

    Raises UserError, in one line, where the lineage names none, or the store is gone, damaged or another one now.
    """
    lineage = checkpoint / "lineage.json"
    facts = _section(_json(lineage), "data") if lineage.is_file() else {}
    directory, manifest = facts.get("store"), facts.get("manifest_sha256")
    if not isinstance(directory, str) or not isinstance(manifest, str):
        raise UserError(
            f"data.path: is needed, because {checkpoint} does not say which documents were held out when it was trained"
        )
    advice = "prepare the data of that run again (longspan prepare), or give data.path=… to score a text"
    if not Path(directory).exists():
        raise UserError(f"{directory}: the token store that {checkpoint} was trained on is gone; {advice}")
    try:
        store = TokenStore.open(directory, tokenizer_sha256=tokenizer.sha256)
    except StoreError as error:
        raise UserError(f"the token store that {checkpoint} was trained on cannot be used: {error}") from error
    found = store.manifest["self_sha256"]
    if found != manifest:
        raise UserError(
            f"{directory}: is not the token store that {checkpoint} was trained on (manifest sha256 {found[:12]}…, "
            f"not {manifest[:12]}…); {advice}"
        )
    return store


def _section(content: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}


def _json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from error
    return content if isinstance(content, dict) else {}
