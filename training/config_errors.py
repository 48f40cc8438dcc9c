"""What is wrong with a config, one plain line a problem: which key, what it was, what is allowed, where it was set."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config_keys import children, find, keys, section
from .errors import UserError

# What other frameworks call our keys. The right side need not exist in every verb; only known keys are offered.
_ELSEWHERE = {
    "accumulate_grad_batches": "trainer.micro_batch",
    "batch_size": "trainer.global_batch",
    "block_size": "data.context",
    "checkpoint_every": "trainer.save_every",
    "ckpt_path": "resume",
    "context_length": "data.context",
    "dataset": "data.path",
    "epochs": "trainer.steps",
    "eval_interval": "trainer.val_every",
    "gpus": "trainer.devices",
    "grad_clip": "trainer.clip",
    "gradient_accumulation_steps": "trainer.micro_batch",
    "gradient_clip_val": "trainer.clip",
    "hidden_size": "model.d_model",
    "learning_rate": "optimizer.lr",
    "max_epochs": "trainer.steps",
    "max_steps": "trainer.steps",
    "max_tokens": "max_new_tokens",
    "model_path": "checkpoint",
    "n_embd": "model.d_model",
    "n_head": "model.n_heads",
    "n_layer": "model.n_layers",
    "num_attention_heads": "model.n_heads",
    "num_hidden_layers": "model.n_layers",
    "num_key_value_heads": "model.n_kv_heads",
    "num_workers": "data.workers",
    "output_dir": "output",
    "seq_len": "data.context",
    "seq_length": "data.context",
    "sequence_length": "data.context",
    "out_dir": "output",
    "val_check_interval": "trainer.val_every",
    "warmup_steps": "schedule.warmup",
}
COMMAND_LINE = "on the command line"  # the origin, in `where`, of what a user typed
_CLOSE = 0.65  # difflib ratio from which a name counts as a misspelling


@dataclass(frozen=True, slots=True)
class Problem:
    """`text` without the place where it was set; `keys` are the paths it is about, the first one the culprit."""

    keys: tuple[str, ...]
    text: str


class ConfigError(UserError):
    """A config is wrong. `problems` holds one line for each thing that is."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def lines(problems: Iterable[Problem], where: Mapping[str, str]) -> list[str]:
    """One line a problem, each ending with where its key was set, when that is known."""
    return list(dict.fromkeys(problem.text + _origin(problem.keys, where) for problem in problems))


def translate(schema: type, raw: Mapping[str, Any], errors: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """The errors of a pydantic ValidationError (as dictionaries) in our words."""
    problems: list[Problem] = []
    missing: list[Problem] = []
    errors = list(errors)
    for error in errors:
        if error["type"] == "too_short" and any(_within(other["loc"], error["loc"]) for other in errors):
            continue  # pydantic does not count items that are wrong themselves
        location = [part for part in error["loc"] if not str(part).startswith("<")]
        path = ".".join(map(str, location))
        kind = error["type"]
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            problems += [unknown(schema, leaf, value, head=path) for leaf, value in leaves(error["input"], path)]
        elif kind.startswith("missing") and isinstance(location[-1], int):  # a list of fixed length is too short
            problems.append(wrong(schema, ".".join(map(str, location[:-1])), _at(raw, location[:-1])))
        elif kind.startswith("missing"):
            key = find(schema, path)
            meaning = f": {key.meaning}" if key is not None and key.meaning else ""
            missing.append(Problem((path,), f"{path}: is required{meaning}"))
        elif kind == "value_error":
            # A sentence of our own that a __post_init__ raised; it may begin with the key already.
            problems.append(Problem((path,), joined(path, str(error["ctx"]["error"]))))
        else:
            problems.append(wrong(schema, path, error["input"]))
    # A required key that was merely misspelled is one problem, not two.
    return problems + [lack for lack in missing if not any(f"mean {lack.keys[0]}?" in each.text for each in problems)]


def wrong(schema: type, path: str, value: object) -> Problem:
    """A known key holds something it may not."""
    key = find(schema, path)
    owner, _, item = path.rpartition(".")
    if key is None and item.isdecimal():  # an item of a list: its key says what items may be
        key, path = find(schema, owner), owner
    if key is None:
        inside = children(schema, section(schema, path) or path)
        expected = f"a section with {', '.join(inside)}" if inside else "nothing here"
        return Problem((path,), f"{assignment(path, value)}: expected {expected}")
    near = difflib.get_close_matches(value, key.choices, 1, _CLOSE) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return Problem((path,), f"{assignment(path, value)}: expected {key.allowed}{hint}")


def unknown(schema: type, path: str, value: object, *, head: str = "") -> Problem:
    """A key that the schema does not have, with the nearest one that it has. `head` is the first part of the path that
    is unknown, where that is a section."""
    near = _nearest_section(schema, path, head) if head and head != path else None
    near = near or nearest(schema, path)
    hint = f"did you mean {near}?" if near else _siblings(schema, head or path)
    return Problem((path,), f"{assignment(path, value)}: unknown key; {hint}")


def nearest(schema: type, path: str) -> str | None:
    """The known key that `path` most likely meant: the same section first, then the same name in any section."""
    parent, _, leaf = path.rpartition(".")
    known = [key for key in keys(schema) if "<" not in key.path.rpartition(".")[2]]
    pattern = (section(schema, parent) or parent) if parent else ""
    elsewhere = _ELSEWHERE.get(leaf.lower(), "")
    name = elsewhere.rpartition(".")[2]
    for there, candidate in ((f"{pattern}.{name}", f"{parent}.{name}"), (elsewhere, elsewhere)):
        if any(key.path == there for key in known):
            return candidate
    best, best_score = None, _CLOSE
    for key in known:
        home = key.path.rpartition(".")[0]
        score = difflib.SequenceMatcher(None, leaf.lower(), key.leaf).ratio()
        if home == pattern:
            score += 0.15
        elif parent and "<" in home:
            continue  # keys of another list's items are never what a misplaced key meant
        else:
            # `trainr.steps`: the leaf is right and the section is not
            score += 0.1 * difflib.SequenceMatcher(None, parent, home).ratio()
        if score > best_score:
            best, best_score = key, score
    if best is None:
        return None
    return f"{parent}.{best.leaf}" if best.path.rpartition(".")[0] == pattern and parent else best.path


def leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """(path, value) of everything below `path` that is not itself a non-empty mapping."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def assignment(path: str, value: object) -> str:
    """`trainer.steps=5`, the way it is typed, cut short when long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return f"{path}={text if len(text) <= 60 else text[:57] + '...'}"


def joined(path: str, sentence: str) -> str:
    """`path: sentence`, or the sentence alone where it names the key itself."""
    sentence = " ".join(sentence.split())
    leaf = path.rpartition(".")[2]
    if sentence.startswith(path):
        return sentence
    if path and sentence.startswith((f"{leaf}=", f"{leaf}.", f"{leaf}:", f"{leaf} ")):
        return path[: len(path) - len(leaf)] + sentence
    return f"{path}: {sentence}" if path else sentence


def _origin(paths: Sequence[str], where: Mapping[str, str]) -> str:
    """Where the keys were set: what was typed is the likelier mistake, then the first of them."""
    origins = [
        origin
        for path in paths
        for name, origin in where.items()
        if name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.")
    ]
    if not origins:
        return ""
    return f" (set {COMMAND_LINE if COMMAND_LINE in origins else origins[0]})"


def _nearest_section(schema: type, path: str, head: str) -> str | None:
    """`attention.patterns.a.windw.left` -> `…a.window.left`: the section is misspelled, not the key."""
    parent, _, name = head.rpartition(".")
    for near in difflib.get_close_matches(name, children(schema, section(schema, parent) or parent), 3, _CLOSE):
        candidate = f"{parent}.{near}{path[len(head) :]}" if parent else near + path[len(head) :]
        if find(schema, candidate) is not None:
            return candidate
    return None


def _siblings(schema: type, path: str) -> str:
    parent = path.rpartition(".")[0]
    inside = children(schema, section(schema, parent) or parent)
    return f"{parent or 'known are'}{' has' if parent else ''} {', '.join(inside)}"


def _within(location: Sequence[Any], of: Sequence[Any]) -> bool:
    return len(location) > len(of) and tuple(location[: len(of)]) == tuple(of)


def _at(raw: Any, location: Sequence[Any]) -> object:
    for part in location:
        raw = raw[part]
    return raw
