"""BART (Lewis et al. 2019) as transformers spells it, and what LED has in common with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from longspan.kernels.attention.spec import AttentionSpec
from longspan.model.config import AttentionPlan, Seq2SeqConfig, StackConfig

from .decoders import refuse
from .encoders import ACTIVATIONS
from .hf import ConversionError
from .repeat import REMEDY
from .translate import CONFIG, Family, Field, Tensors, irrelevant, only, translated

NORM_EPS = 1e-5  # transformers builds every LayerNorm of both models with torch's default

FIELDS: tuple[Field, ...] = (
    translated("vocab_size", int, 50265, "`vocab_size`"),
    translated("d_model", int, 1024, "`d_model`"),
    translated("encoder_layers", int, 12, "`encoder.n_layers`"),
    translated("encoder_attention_heads", int, 16, "`encoder.n_heads`"),
    translated("encoder_ffn_dim", int, 4096, "`encoder.d_ff`"),
    translated("decoder_layers", int, 12, "`decoder.n_layers`"),
    translated("decoder_attention_heads", int, 16, "`decoder.n_heads`"),
    translated("decoder_ffn_dim", int, 4096, "`decoder.d_ff`"),
    translated("num_hidden_layers", int, None, "nothing: it repeats `encoder_layers`; another number is refused"),
    translated("hidden_size", int, None, "nothing: it repeats `d_model`; another number is refused"),
    translated("activation_function", str, "gelu", f"`mlp`; known: {', '.join(ACTIVATIONS)}"),
    translated("dropout", float, 0.1, "`dropout`"),
    translated("attention_dropout", float, 0.0, "`dropout` of every attention"),
    translated("init_std", float, 0.02, "`init_std`"),
    translated("decoder_start_token_id", int, 2, "`decoder_start_token`"),
    translated("forced_bos_token_id", int, None, "`forced_bos_token`"),
    translated("forced_eos_token_id", int, None, "`forced_eos_token`"),
    translated(
        "force_bos_token_to_be_generated",
        bool,
        False,
        "nothing: `forced_bos_token_id` has to say it, too",
    ),
    *irrelevant("of training alone: dropout inside the MLP, which has none here", "activation_dropout"),
    *irrelevant("of training alone: layers left out, which never are here", "encoder_layerdrop", "decoder_layerdrop"),
    *irrelevant("of a head for classification", "classifier_dropout", "classif_dropout", "_num_labels"),
    *irrelevant("what a call returns, not what it computes", "output_past"),
    only("is_encoder_decoder", True, meaning="a stack alone"),
    only("tie_word_embeddings", True, meaning="source, target and head have one embedding"),
    only("normalize_before", False, meaning="pre-norm, as mBART's"),
    only("normalize_embedding", True, meaning="embeddings without their norm"),
    only("add_final_layer_norm", False, meaning="a norm after the stacks, as mBART's"),
    only("add_bias_logits", False, meaning="final_logits_bias is read whatever this says, and only false is known"),
    only("static_position_embeddings", False, meaning="sinusoidal positions"),
    only("extra_pos_embeddings", 2, meaning="the row of position 0"),
)

# generation_config.json is heard instead of config.json where it has any of these.
GENERATION_FIELDS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")

PADDING = {"pad_token_id": 1}  # any will do: padding is masked


def to_ours(values: Mapping[str, Any], encoder: AttentionPlan, max_positions: tuple[int, int]) -> dict[str, Any]:
    """Everything that BART's and LED's fields say alike; `max_positions` of source and target."""
    activation, problems = values["activation_function"], []
    if activation not in ACTIVATIONS:
        problems.append(
            f"{CONFIG}: activation_function={activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    for copy, original in (("num_hidden_layers", "encoder_layers"), ("hidden_size", "d_model")):
        if values[copy] not in (None, values[original]):
            problems.append(f"{CONFIG}: {copy}={values[copy]} contradicts {original}={values[original]}")
    if values["force_bos_token_to_be_generated"] and values["forced_bos_token_id"] is None:
        problems.append(
            f"{CONFIG}: force_bos_token_to_be_generated=true without forced_bos_token_id: transformers 4 and 5 "
            "disagree; say forced_bos_token_id, or take the field out"
        )
    if problems:
        raise ConversionError(problems)
    dropout = values["attention_dropout"]
    source, target = max_positions
    return {
        "architecture": "seq2seq",
        "vocab_size": values["vocab_size"],
        "d_model": values["d_model"],
        "encoder": {
            "n_layers": values["encoder_layers"],
            "n_heads": values["encoder_attention_heads"],
            "d_ff": values["encoder_ffn_dim"],
            "max_positions": source,
            "attention": encoder,
        },
        "decoder": {
            "n_layers": values["decoder_layers"],
            "n_heads": values["decoder_attention_heads"],
            "d_ff": values["decoder_ffn_dim"],
            "max_positions": target,
            "attention": plan(AttentionSpec(causal=True, dropout=dropout)),
        },
        "norm_eps": NORM_EPS,
        "mlp": ACTIVATIONS[activation],
        "dropout": values["dropout"],
        "init_std": values["init_std"],
        "cross_attention": AttentionSpec(causal=False, dropout=dropout),
        "decoder_start_token": values["decoder_start_token_id"],
        "forced_bos_token": values["forced_bos_token_id"],
        "forced_eos_token": values["forced_eos_token_id"],
    }


def plan(spec: AttentionSpec) -> AttentionPlan:
    return AttentionPlan(patterns={"full": spec}, layers=("full",))


def to_theirs(config: Seq2SeqConfig) -> tuple[dict[str, Any], list[str]]:
    """config.json without the encoder's attention and the positions, and what it cannot say."""
    problems: list[str] = []
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if config.mlp not in activations:
        problems.append(f"mlp={config.mlp}")
    if config.norm_eps != NORM_EPS:
        problems.append(f"norm_eps={config.norm_eps}")
    stacks: dict[str, StackConfig] = {"encoder": config.encoder, "decoder": config.decoder}
    for name, stack in stacks.items():
        if stack.n_kv_heads not in (None, stack.n_heads):
            problems.append(f"{name}.n_kv_heads={stack.n_kv_heads} of {name}.n_heads={stack.n_heads} ({REMEDY})")
        if stack.head_dim not in (None, config.d_model // stack.n_heads):
            problems.append(f"{name}.head_dim={stack.head_dim}, which is not d_model / {name}.n_heads")
    if config.cross_kv_heads not in (None, config.decoder.n_heads):
        problems.append(
            f"cross_kv_heads={config.cross_kv_heads} of decoder.n_heads={config.decoder.n_heads} ({REMEDY})"
        )
    dropout, half = config.cross_attention.dropout, config.decoder_half
    if not _is(config.cross_attention, AttentionSpec(causal=False, dropout=dropout), half.dim_per_head):
        problems.append("cross_attention with a scale or a softcap of its own")
    for name, groups in half.pattern_groups().items():
        if not all(_is(group.spec, AttentionSpec(causal=True, dropout=dropout), half.dim_per_head) for group in groups):
            problems.append(f"decoder.attention.patterns.{name}, which is not full attention with dropout={dropout}")
    fields = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "activation_function": activations.get(config.mlp),
        "dropout": config.dropout,
        "attention_dropout": dropout,
        "activation_dropout": 0.0,
        "init_std": config.init_std,
        "decoder_start_token_id": config.decoder_start_token,
        "forced_bos_token_id": config.forced_bos_token,
        "forced_eos_token_id": config.forced_eos_token,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
    for name, stack in stacks.items():
        fields[f"{name}_layers"] = stack.n_layers
        fields[f"{name}_attention_heads"] = stack.n_heads
        fields[f"{name}_ffn_dim"] = stack.d_ff
    return fields, problems


def encoder_problems(config: Seq2SeqConfig, specs: Mapping[str, AttentionSpec]) -> list[str]:
    """Patterns of the encoder, by name, that are not what a family says of them."""
    half = config.encoder_half
    return [
        f"encoder.attention.patterns.{name}, which is not {specs[name]}"
        for name, groups in half.pattern_groups().items()
        if not all(_is(group.spec, specs[name], half.dim_per_head) for group in groups)
    ]


def _is(spec: AttentionSpec, wanted: AttentionSpec, head_dim: int) -> bool:
    """`documents` goes unsaid on purpose: a row that is one document is the same with and without it."""
    scale = None if spec.scale == head_dim**-0.5 else spec.scale
    return replace(spec, scale=scale, documents=False) == wanted


# -- tensors ----------------------------------------------------------------------------------------------------------

_BRANCHES = {
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "mlp_norm",
    "self_attn_layer_norm": "attention_norm",
}
_PROJECTIONS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
FULL_ATTENTION = {f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in _PROJECTIONS.items()}
_DECODER = {
    **FULL_ATTENTION,
    **{f"encoder_attn.{theirs}": f"cross_attention.{ours}" for theirs, ours in _PROJECTIONS.items()},
    "encoder_attn_layer_norm": "cross_attention_norm",
    **_BRANCHES,
}
BIAS = "final_logits_bias"


def tensors(config: Seq2SeqConfig, prefix: str, encoder_attention: Mapping[str, str]) -> tuple[Tensors, ...]:
    """Every tensor; `encoder_attention` has the encoder's self-attention: their module -> ours."""
    return tuple(_rules(config, prefix, encoder_attention))


def _rules(config: Seq2SeqConfig, prefix: str, encoder_attention: Mapping[str, str]) -> Iterator[Tensors]:
    yield Tensors(f"{prefix}shared.weight", ("encoder.embedding.weight",))
    yield Tensors(BIAS, ("head.bias",))
    stacks = (
        ("encoder", "encoder.", config.encoder.n_layers, {**encoder_attention, **_BRANCHES}),
        ("decoder", "", config.decoder.n_layers, _DECODER),
    )
    for stack, ours, n_layers, in_layer in stacks:
        yield Tensors(f"{prefix}{stack}.embed_positions.weight", (f"{ours}position_embedding.weight",))
        for part in ("weight", "bias"):
            yield Tensors(f"{prefix}{stack}.layernorm_embedding.{part}", (f"{ours}embedding_norm.{part}",))
            for layer in range(n_layers):
                for their_module, our_module in in_layer.items():
                    yield Tensors(
                        f"{prefix}{stack}.layers.{layer}.{their_module}.{part}",
                        (f"{ours}blocks.{layer}.{our_module}.{part}",),
                    )


def copies(prefix: str) -> dict[str, str]:
    """The one embedding, under every name that a file may have it."""
    names = ("lm_head.weight", f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight")
    return dict.fromkeys(names, f"{prefix}shared.weight")


# -- BART itself ------------------------------------------------------------------------------------------------------

_OFFSET = 2


def _bart(values: Mapping[str, Any]) -> dict[str, Any]:
    longest, dropout = values["max_position_embeddings"], values["attention_dropout"]
    ours = to_ours(values, plan(AttentionSpec(causal=False, dropout=dropout)), (longest, longest))
    return {**ours, "position_offset": _OFFSET, "scale_embedding": values["scale_embedding"]}


def _to_bart(config: Seq2SeqConfig) -> dict[str, Any]:
    fields, problems = to_theirs(config)
    full = AttentionSpec(causal=False, dropout=config.cross_attention.dropout)
    problems += encoder_problems(config, dict.fromkeys(config.encoder_half.pattern_groups(), full))
    if config.position_offset != _OFFSET:
        problems.append(f"position_offset={config.position_offset}")
    if config.encoder.max_positions != config.decoder.max_positions:
        problems.append(
            f"encoder.max_positions={config.encoder.max_positions} with decoder.max_positions="
            f"{config.decoder.max_positions}"
        )
    refuse("bart", problems)
    return {
        **fields,
        "architectures": ["BartForConditionalGeneration"],
        "max_position_embeddings": config.encoder.max_positions,
        "scale_embedding": config.scale_embedding,
    }


BART = Family(
    model_type="bart",
    config=Seq2SeqConfig,
    fields=(
        *FIELDS,
        translated("max_position_embeddings", int, 1024, "`max_positions` of both stacks"),
        translated("scale_embedding", bool, False, "`scale_embedding`"),
    ),
    to_ours=_bart,
    to_theirs=_to_bart,
    tensors=lambda config: tensors(config, "model.", FULL_ATTENTION),
    prefix="model.",
    copies=lambda _config: copies("model."),
    zero=(BIAS,),
    generation=GENERATION_FIELDS,
    buffers=(r".*\.version",),
    tokens=PADDING,
)
