"""What BERT, RoBERTa and Longformer have in common in transformers: fields, the names of tensors, and heads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longspan.model.config import EncoderConfig

from .hf import ConversionError
from .repeat import REMEDY
from .translate import CONFIG, Field, Tensors, irrelevant, only, translated

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}

FIELDS: tuple[Field, ...] = (
    translated("architectures", list, None, "`head`: which of the model's classes wrote the file"),
    translated("hidden_size", int, 768, "`d_model`"),
    translated("num_hidden_layers", int, 12, "`n_layers`"),
    translated("num_attention_heads", int, 12, "`n_heads`"),
    translated("intermediate_size", int, 3072, "`d_ff`"),
    translated("hidden_act", str, "gelu", f"`mlp`; known: {', '.join(ACTIVATIONS)}"),
    translated("hidden_dropout_prob", float, 0.1, "`dropout`"),
    translated("attention_probs_dropout_prob", float, 0.1, "`dropout` of the attention pattern"),
    translated("max_position_embeddings", int, 512, "`max_positions`, together with `position_offset`"),
    translated("type_vocab_size", int, 2, "`n_types`"),
    translated("initializer_range", float, 0.02, "`init_std`"),
    translated("layer_norm_eps", float, 1e-12, "`norm_eps`"),
    translated("tie_word_embeddings", bool, True, "`tied_head`; false is refused where there is a masked-LM head"),
    translated("id2label", dict, None, "`labels` of a head for classification"),
    translated("num_labels", int, None, "the number of `labels` where id2label does not name them"),
    *irrelevant("id2label backwards", "label2id"),
    *irrelevant("which loss fine-tuning takes", "problem_type"),
    *irrelevant(
        "of the TensorFlow original, whose pooler it describes",
        *[
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ],
        "directionality",
    ),
    *irrelevant("how a model was exported", "onnx_export", "output_past"),
    only("position_embedding_type", "absolute", None, meaning="relative positions change the scores"),
    only("is_decoder", False, None, meaning="causal attention"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What differs between the three in the names of classes and tensors.

    classes      the model's name in class names: `Bert` of BertForMaskedLM
    prefix       of the tensors of the bare model
    lm_head      the masked-LM head's dense layer, its norm and the bias of its logits
    pooled_head  classification: where the pooled token's dense layer lies, and the last layer
    """

    classes: str
    prefix: str
    lm_head: tuple[str, str, str]
    pooled_head: tuple[str, str]

    @property
    def heads(self) -> dict[str, str]:
        """Our head by class name."""
        return {
            f"{self.classes}Model": "none",
            f"{self.classes}ForMaskedLM": "mlm",
            f"{self.classes}ForPreTraining": "mlm",
            f"{self.classes}ForSequenceClassification": "classification",
            f"{self.classes}ForQuestionAnswering": "qa",
        }


ROBERTA_LIKE = (
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ("classifier.dense", "classifier.out_proj"),
)


# -- configs ----------------------------------------------------------------------------------------------------------


def to_ours(values: Mapping[str, Any], names: Names, *, padding_offset: bool) -> dict[str, Any]:
    """Everything but the attention. Raises ConversionError.

    padding_offset  position 0 lies at row pad_token_id + 1 of the table, as in RoBERTa
    """
    activation, problems = values["hidden_act"], []
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        problems.append(f"{CONFIG}: hidden_act={activation!r} is not known; known are {known}")
    architectures = values["architectures"] or [f"{names.classes}Model"]
    head = names.heads.get(architectures[0])
    if head is None:
        known = ", ".join(names.heads)
        problems.append(f"{CONFIG}: architectures={architectures}: there is no such head here; known are {known}")
    if head == "mlm" and not values["tie_word_embeddings"]:
        problems.append(
            f"{CONFIG}: tie_word_embeddings=false with a masked-LM head: transformers 4 and 5 disagree about its bias"
        )
    if padding_offset and head == "mlm" and ACTIVATIONS.get(activation) == "gelu_tanh":
        problems.append(f"{CONFIG}: hidden_act={activation!r}: the masked-LM head has the exact GELU, the blocks not")
    if problems:
        raise ConversionError(problems)
    offset = values["pad_token_id"] + 1 if padding_offset else 0
    return {
        "architecture": "encoder",
        "vocab_size": values["vocab_size"],
        "n_layers": values["num_hidden_layers"],
        "d_model": values["hidden_size"],
        "n_heads": values["num_attention_heads"],
        "d_ff": values["intermediate_size"],
        "max_positions": values["max_position_embeddings"] - offset,
        "position_offset": offset,
        "n_types": values["type_vocab_size"],
        "norm_eps": values["layer_norm_eps"],
        "mlp": ACTIVATIONS[activation],
        "pooler": head == "classification",  # otherwise the tensors tell
        "head": head,
        "labels": _labels(values) if head == "classification" else (),
        "dropout": values["hidden_dropout_prob"],
        "head_dropout": values.get("classifier_dropout") if head == "classification" else None,
        "init_std": values["initializer_range"],
    }


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    named = values["id2label"]
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(2 if values["num_labels"] is None else values["num_labels"]))
    by_index = {str(index): str(label) for index, label in named.items()}
    if set(by_index) != {str(i) for i in range(len(by_index))}:
        raise ConversionError(f"{CONFIG}: id2label={named} does not number its labels from 0 on")
    return tuple(by_index[str(i)] for i in range(len(by_index)))


def settle(config: EncoderConfig, found: Collection[str], names: Names) -> EncoderConfig:
    """What only the tensors tell: whether the bare model has a pooler."""
    pooler = "pooler.dense.weight"
    return replace(config, pooler=config.pooler or pooler in found or f"{names.prefix}{pooler}" in found)


def to_theirs(config: EncoderConfig, names: Names) -> tuple[dict[str, Any], list[str]]:
    """config.json without the attention, and what it cannot say."""
    wanted = {"positions": "learned", "norm": "layernorm", "norm_order": "post", "bias": True}
    problems = [f"{name}={getattr(config, name)}" for name, value in wanted.items() if getattr(config, name) != value]
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.mlp not in activations:
        problems.append(f"mlp={config.mlp}")
    if config.kv_heads != config.n_heads:
        problems.append(f"n_kv_heads={config.kv_heads} of n_heads={config.n_heads} ({REMEDY})")
    if config.n_heads * config.dim_per_head != config.d_model:
        problems.append(f"head_dim={config.head_dim}, which is not d_model / n_heads")
    if config.n_types == 0:
        problems.append("n_types=0")
    if config.head == "mlm" and not config.tied_head:
        problems.append("tied_head=False")
    by_head = {head: name for name, head in reversed(names.heads.items())}
    fields: dict[str, Any] = {
        "architectures": [by_head[config.head]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": activations.get(config.mlp),
        "hidden_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": config.n_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
    }
    if config.labels:
        fields["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        fields["label2id"] = {label: i for i, label in enumerate(config.labels)}
    return fields, problems


# -- tensors ----------------------------------------------------------------------------------------------------------

_LAYER = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_norm",
}
_GLOBAL = {
    "attention.self.query_global": "global_attention.q_proj",
    "attention.self.key_global": "global_attention.k_proj",
    "attention.self.value_global": "global_attention.v_proj",
}


def tensors(config: EncoderConfig, names: Names) -> tuple[Tensors, ...]:
    return tuple(
        Tensors(f"{theirs}.{part}", (f"{ours}.{part}",))
        for theirs, ours, parts in _modules(config, names)
        for part in parts
    )


def _modules(config: EncoderConfig, names: Names) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Their module, ours, and which parts of it: weight, bias."""
    matrix, both = ("weight",), ("weight", "bias")
    embeddings = f"{names.prefix}embeddings"
    yield f"{embeddings}.word_embeddings", "embedding", matrix
    yield f"{embeddings}.position_embeddings", "position_embedding", matrix
    yield f"{embeddings}.token_type_embeddings", "type_embedding", matrix
    yield f"{embeddings}.LayerNorm", "embedding_norm", both
    for layer in range(config.n_layers):
        in_layer = _LAYER | (_GLOBAL if config.has_global_projections(layer) else {})
        for theirs, ours in in_layer.items():
            yield f"{names.prefix}encoder.layer.{layer}.{theirs}", f"blocks.{layer}.{ours}", both
    dense, last = names.pooled_head
    if config.pooler:
        yield dense if config.head == "classification" else f"{names.prefix}pooler.dense", "pooler", both
    if config.head == "classification":
        yield last, "head.out_proj", both
    if config.head == "qa":
        yield "qa_outputs", "head.out_proj", both
    if config.head == "mlm":
        lm_dense, lm_norm, lm_bias = names.lm_head
        yield lm_dense, "head.dense", both
        yield lm_norm, "head.norm", both
        yield lm_bias.removesuffix(".bias"), "head", ("bias",)


def copies(config: EncoderConfig, names: Names) -> dict[str, str]:
    """The masked-LM head's matrix is the embedding, and its bias stands in a file under two names."""
    if config.head != "mlm":
        return {}
    module = names.lm_head[2].removesuffix(".bias")
    return {
        f"{module}.decoder.weight": f"{names.prefix}embeddings.word_embeddings.weight",
        f"{module}.decoder.bias": f"{module}.bias",
    }


# Names of files from before 2019, as TensorFlow had them.
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
BUFFERS = (r".*embeddings\.(position_ids|token_type_ids)",)
