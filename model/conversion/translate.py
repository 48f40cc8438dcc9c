"""How a model of another library is translated: as data, a `Family` for each of its model types.

Every field of a foreign config.json is one of three things, and `Field` says which: translated into our config, proven
irrelevant to what the model computes, or read only with the values whose meaning we have. A field that no table lists
is refused by name: a config that means more than we read would give a model that is almost right.

Tensors are renamed, transposed and split by rules that name every tensor of a config, so that a missing or a foreign
one cannot pass. The same rules, backwards, export.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from longspan.model.lazy import WEIGHT_TYPES, LazyTensor

from .hf import ConversionError, first_ten

C = TypeVar("C")

logger = logging.getLogger("longspan.model")

CONFIG = "config.json"

# -- fields -----------------------------------------------------------------------------------------------------------

Fate = Literal["translated", "irrelevant", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a foreign config.

    fate     translated: what it becomes is in `meaning`; irrelevant: `meaning` says why; refused: any value but those
             of `values`, and `meaning` says what it would need
    kinds    types of a translated value
    default  what its absence means
    values   what a refused field may be; the first is its default
    """

    name: str
    fate: Fate
    meaning: str
    kinds: tuple[type, ...] = ()
    default: object = None
    values: tuple[object, ...] = ()


def translated(name: str, kinds: type | tuple[type, ...], default: object, meaning: str) -> Field:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return Field(name=name, fate="translated", kinds=kinds, default=default, meaning=meaning)


def irrelevant(meaning: str, *names: str) -> tuple[Field, ...]:
    """Fields that do not matter for one reason; a text may hold several names with blanks between them."""
    return tuple(Field(name=name, fate="irrelevant", meaning=meaning) for text in names for name in text.split())


def only(name: str, *values: object, meaning: str) -> Field:
    return Field(name=name, fate="refused", values=values, default=values[0], meaning=meaning)


# What any config may hold, whatever its model type. A family's own entry of the same name goes first.
METADATA: tuple[Field, ...] = (
    *irrelevant("chooses the family", "model_type"),
    *irrelevant("names the class that wrote it; the tensors tell what is there", "architectures"),
    *irrelevant("provenance", "transformers_version _name_or_path _model_name_or_path _commit_hash _from_model_config"),
    *irrelevant("weights keep the type that their file has", "dtype torch_dtype"),
    *irrelevant(
        "what a call returns, not what it computes",
        "use_cache output_attentions output_hidden_states return_dict return_dict_in_generate output_scores",
    ),
    *irrelevant(
        "the tokenizer's: carried along in its files and in generation_config.json",
        "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class",
    ),
    *irrelevant(
        "which of its own implementations transformers takes",
        "attn_implementation _attn_implementation _attn_implementation_autoset torchscript",
    ),
    *irrelevant("what training recomputes", "gradient_checkpointing"),
    *irrelevant(
        "names of labels and tasks",
        "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix",
    ),
    *irrelevant("TensorFlow's and the TPUs'", "tf_legacy_loss use_bfloat16"),
    *irrelevant("does the MLP's work in pieces, with the same result", "chunk_size_feed_forward"),
    *irrelevant("code that is never run: fields and tensors alone make the model", "auto_map"),
    *irrelevant(
        "settings of generate(), from before generation_config.json",
        "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
        "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values "
        "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
    ),
    only("is_encoder_decoder", False, None, meaning="this model type has no encoder here"),
    only("is_decoder", False, None, True, meaning="whether to be causal is the family's own matter"),
    only("add_cross_attention", False, None, meaning="cross-attention belongs to encoder–decoders"),
    only("cross_attention_hidden_size", None, meaning="cross-attention belongs to encoder–decoders"),
    only("tie_encoder_decoder", False, None, meaning="this model type has no encoder here"),
    only("pruned_heads", None, {}, meaning="layers whose heads were cut out have other shapes"),
    only("quantization_config", None, meaning="the weights are codes, not numbers: dequantise them first"),
    only("per_layer_config", None, meaning="layers of different shapes"),
    only("tie_last_hidden_states", None, meaning="changes which hidden state is the last"),
)


def read_fields(raw: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """The values of translated fields, defaults filled in.

    Raises ConversionError with a line for each field that is unknown, of a wrong type, or refused.
    """
    table = {field.name: field for field in (*METADATA, *fields)}
    problems: list[str] = []
    for name, value in raw.items():
        field = table.get(name)
        if field is None:
            problems.append(f"{CONFIG}: {name}={shown(value)} is no field that this version knows, and may matter")
        elif field.fate == "refused" and not any(_same(value, allowed) for allowed in field.values):
            allowed = " or ".join(shown(allowed) for allowed in field.values)
            problems.append(
                f"{CONFIG}: {name}={shown(value)} cannot be translated ({field.meaning}); it has to be {allowed}"
            )
        elif field.fate == "translated" and not _fits(value, field):
            words = " or ".join(_KINDS[kind] for kind in field.kinds)
            problems.append(f"{CONFIG}: {name}={shown(value)}: it is {words}")
    if problems:
        raise ConversionError(problems)
    return {name: raw.get(name, field.default) for name, field in table.items() if field.fate == "translated"}


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _same(value: object, allowed: object) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _fits(value: object, field: Field) -> bool:
    if value is None or isinstance(value, bool):
        return type(value) in field.kinds or (value is None and field.default is None)
    return isinstance(value, field.kinds) or (isinstance(value, int) and float in field.kinds)


def shown(value: object) -> str:
    """A value as JSON spells it, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}.get(value, repr(value)) if _scalar(value) else repr(value)
    return words if len(words) <= 80 else words[:77] + "…"


def _scalar(value: object) -> bool:
    return value is None or isinstance(value, bool)


# -- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensors:
    """One tensor of a foreign file and what it is here.

    theirs      its name there
    ours        our name, or several that stand one after the other along the output dimension (fused q, k, v)
    transposed  stored as [in, out]: the Conv1D of GPT-2
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family(Generic[C]):
    """One model type of Hugging Face.

    model_type  as config.json spells it
    config      our config class of such models
    fields      every field of its config, beside METADATA
    to_ours     translated fields -> our config as plain dicts (`model.config.from_dict` checks it);
                raises ConversionError
    to_theirs   our config -> config.json without METADATA, but with `architectures`;
                raises ConversionError with every reason why this family cannot say it
    tensors     every tensor of a config
    prefix      stands before all names but the head's in files of the model with its head, and is missing in files of
                the bare model; the rules have it
    buffers     names, as regular expressions, of tensors that old files hold and that are no parameters
    copies      tied tensors that a file may hold a second time: name -> what it has to be equal to
    settle      what only the names of the tensors in a file tell about a config (whether there is a pooler)
    spellings   names of tensors that old files spell differently: regular expression -> replacement
    zero        names of tensors that files of the bare model lack, and that are zero then
    generation  fields of config.json that generation_config.json says instead, where it says any of them
    tokens      ids of special tokens in an export of which nobody knows them: transformers cannot do without
    unread      names, as regular expressions, of tensors that we have no place for and nobody misses -> why; an import
                says so
    """

    model_type: str
    config: type[C]
    fields: tuple[Field, ...]
    to_ours: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    to_theirs: Callable[[C], Mapping[str, Any]]
    tensors: Callable[[C], tuple[Tensors, ...]]
    prefix: str = ""
    buffers: tuple[str, ...] = ()
    copies: Callable[[C], Mapping[str, str]] = lambda _config: {}
    settle: Callable[[C, Collection[str]], C] = lambda config, _names: config
    spellings: tuple[tuple[str, str], ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)


def import_tensors(
    family: Family[C], config: C, found: Mapping[str, LazyTensor], shapes: Mapping[str, torch.Size]
) -> dict[str, LazyTensor]:
    """Our tensors from theirs, in the order of `shapes`, which are those of the model that the config builds. Nothing
    is read yet but tied tensors that are there twice.

    Raises ConversionError naming missing and unexpected tensors (the first ten), shapes that contradict the config,
    numbers that are codes, and second copies of tied tensors that differ.
    """
    rules, copies = family.tensors(config), family.copies(config)
    known = {*(rule.theirs for rule in rules), *copies}
    found = _with_prefix(family, {_spelled(family, name): tensor for name, tensor in found.items()}, known)
    for pattern, why in family.unread.items():
        if left := [name for name in found if name not in known and re.fullmatch(pattern, name)]:
            logger.warning("not imported: %s (%s)", first_ten(left), why)
            found = {name: tensor for name, tensor in found.items() if name not in left}
    problems = [
        f"{copy} differs from {original}, but {CONFIG} says that they are tied"
        for copy, original in copies.items()
        if copy in found and original in found and not torch.equal(found[copy].read(), found[original].read())
    ]
    absent = [rule for rule in rules if rule.theirs in family.zero and rule.theirs not in found]
    found |= {rule.theirs: LazyTensor.of(torch.zeros(shapes[rule.ours[0]])) for rule in absent}
    # Tied tensors are stored once, under either name.
    found |= {original: found[copy] for copy, original in copies.items() if copy in found and original not in found}
    if missing := [rule.theirs for rule in rules if rule.theirs not in found]:
        problems.append(f"the weights lack {_count(missing)} that {CONFIG} asks for: {first_ten(missing)}")
    if extra := [name for name in found if name not in known and not _is_buffer(family, name)]:
        problems.append(f"the weights hold {_count(extra)} that {CONFIG} has no place for: {first_ten(extra)}")
    weights: dict[str, LazyTensor] = {}
    misshapen: list[str] = []
    codes: list[str] = []
    for rule in rules:
        if rule.theirs in found:
            tensor, sizes = found[rule.theirs], [shapes[name][0] for name in rule.ours]
            expected = [sum(sizes), *shapes[rule.ours[0]][1:]]
            wanted = expected[::-1] if rule.transposed else expected
            if tensor.stored_as not in WEIGHT_TYPES:
                codes.append(f"{rule.theirs} ({tensor.stored_as})")
            if list(tensor.shape) != wanted:
                misshapen.append(f"{rule.theirs} is {list(tensor.shape)}, not {wanted}")
            weights |= _parts(rule, tensor, shapes)
    if misshapen:
        problems.append(f"{_count(misshapen)} contradict {CONFIG} in shape: {first_ten(misshapen)}")
    if codes:
        known_types = ", ".join(WEIGHT_TYPES)
        problems.append(f"{_count(codes)} hold codes, not weights: {first_ten(codes)}; weights are {known_types}")
    if problems:
        raise ConversionError(problems)
    return {name: weights[name] for name in shapes if name in weights}


def _parts(rule: Tensors, tensor: LazyTensor, shapes: Mapping[str, torch.Size]) -> dict[str, LazyTensor]:
    """Ours of one of theirs; of several each is cut out of it anew."""
    made: dict[str, LazyTensor] = {}
    first = 0
    for name in rule.ours:
        size = shapes[name][0]
        cut = partial(_cut, first=first, size=size, transposed=rule.transposed)
        made[name] = tensor.then(cut, shape=tuple(shapes[name]))
        first += size
    return made


def _cut(tensor: Tensor, *, first: int, size: int, transposed: bool) -> Tensor:
    return (tensor.T if transposed else tensor).narrow(0, first, size)


def export_tensors(family: Family[C], config: C, weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Their tensors from ours, not read yet: `import_tensors` backwards."""
    tensors: dict[str, LazyTensor] = {}
    for rule in family.tensors(config):
        parts = tuple(weights[name] for name in rule.ours)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        shape = shape[::-1] if rule.transposed else shape
        joined = reduce(torch.promote_types, (part.dtype for part in parts))
        tensors[rule.theirs] = LazyTensor(shape, joined, partial(_joined, parts, rule.transposed))
    return tensors


def _joined(parts: tuple[LazyTensor, ...], transposed: bool) -> Tensor:
    whole = parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])
    return whole.T if transposed else whole


def _with_prefix(family: Family[C], found: Mapping[str, LazyTensor], known: set[str]) -> dict[str, LazyTensor]:
    """Names as the rules have them: files of a bare model lack the prefix."""
    if not family.prefix or any(name.startswith(family.prefix) for name in found):
        return dict(found)
    return {name if name in known else family.prefix + name: tensor for name, tensor in found.items()}


def _spelled(family: Family[C], name: str) -> str:
    for pattern, replacement in family.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def _is_buffer(family: Family[C], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.buffers)


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
