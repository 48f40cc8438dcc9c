"""Llama and the model types that differ from it by a flag: Mistral (a window), Qwen2 (biases on q, k, v, windows on
chosen layers), Qwen3 (norms on q and k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from longspan.model.config import DecoderConfig

from .decoders import attention_of, refuse, same, windowed
from .hf import ConversionError
from .rope import FIELDS as ROPE_FIELDS
from .rope import read_rope, write_rope
from .translate import Family, Field, Tensors, irrelevant, only, translated

_ACTIVATIONS = ("silu", "swish")

_SHARED = (
    translated("vocab_size", int, 32000, "`vocab_size`"),
    translated("hidden_size", int, 4096, "`d_model`"),
    translated("intermediate_size", int, 11008, "`d_ff`"),
    translated("num_hidden_layers", int, 32, "`n_layers`"),
    translated("num_attention_heads", int, 32, "`n_heads`"),
    translated("num_key_value_heads", int, None, "`n_kv_heads`; null: as many as heads"),
    translated("head_dim", int, None, "`head_dim`; null: hidden_size / num_attention_heads"),
    translated("max_position_embeddings", int, 2048, "`max_positions`"),
    translated("rms_norm_eps", float, 1e-6, "`norm_eps`"),
    translated("initializer_range", float, 0.02, "`init_std`"),
    translated("tie_word_embeddings", bool, False, "`tied_head`"),
    translated("attention_dropout", float, 0.0, "`dropout` of the attention pattern"),
    only("hidden_act", *_ACTIVATIONS, meaning="the MLP is SwiGLU"),
    *ROPE_FIELDS,
)

_LAYERS = (
    translated("use_sliding_window", bool, False, "whether `sliding_window` counts"),
    translated(
        "sliding_window", (int, type(None)), 4096, "`window` of the layers that slide, in keys with the query's own"
    ),
    translated("max_window_layers", int, 28, "the first layer that slides, where `layer_types` does not say"),
    translated("layer_types", list, None, "`attention.layers`: full_attention or sliding_attention"),
)


def _with(changes: tuple[Field, ...]) -> tuple[Field, ...]:
    """The shared fields with some replaced and some added."""
    new = {field.name for field in changes}
    return (*(field for field in _SHARED if field.name not in new), *changes)


# -- from config.json -------------------------------------------------------------------------------------------------


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = read_rope(values, values["max_position_embeddings"])
    even = (
        values["head_dim"] is not None and values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]
    )
    return {
        "architecture": "decoder",
        "vocab_size": values["vocab_size"],
        "n_layers": values["num_hidden_layers"],
        "d_model": values["hidden_size"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values["num_key_value_heads"],
        "head_dim": None if even else values["head_dim"],
        "d_ff": values["intermediate_size"],
        "max_positions": values["max_position_embeddings"],
        "positions": "rope",
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "norm": "rmsnorm",
        "norm_eps": values["rms_norm_eps"],
        "mlp": "swiglu",
        **_biases(False, False, False),
        "tied_head": values["tie_word_embeddings"],
        "init_std": values["initializer_range"],
    }


def _biases(everywhere: bool, qkv: bool, out: bool) -> dict[str, Any]:
    """Attention's own settings only where they differ from the rest."""
    return {
        "bias": everywhere,
        "qkv_bias": None if qkv == everywhere else qkv,
        "out_bias": None if out == everywhere else out,
    }


def _llama(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_common(values),
        **_biases(values["mlp_bias"], values["attention_bias"], values["attention_bias"]),
        "attention": {"patterns": {"full": windowed(None, dropout=values["attention_dropout"])}},
    }


def _mistral(values: Mapping[str, Any]) -> dict[str, Any]:
    window = values["sliding_window"]
    name = "full" if window is None else "local"
    patterns = {name: windowed(window, dropout=values["attention_dropout"])}
    return {**_common(values), "attention": {"patterns": patterns, "layers": (name,)}}


def _qwen2(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**_common(values), **_biases(False, True, False), "attention": _hybrid(values)}


def _qwen3(values: Mapping[str, Any]) -> dict[str, Any]:
    bias = values["attention_bias"]
    return {**_common(values), **_biases(False, bias, bias), "qk_norm": True, "attention": _hybrid(values)}


_TYPES = {"full_attention": "full", "sliding_attention": "local"}


def _hybrid(values: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that see everything and layers that see a window."""
    n_layers, window = values["num_hidden_layers"], values["sliding_window"]
    slides = values["use_sliding_window"] and window is not None
    types = values["layer_types"]
    if types is None:
        first = values["max_window_layers"]
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(n_layers)]
    if strange := [kind for kind in types if kind not in _TYPES]:
        known = " or ".join(_TYPES)
        raise ConversionError(f"config.json: layer_types has {strange[0]!r}; a layer is {known}")
    if len(types) != n_layers:
        raise ConversionError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {n_layers}")
    if "sliding_attention" in types and not slides:
        raise ConversionError(
            "config.json: layer_types has sliding_attention, but "
            + ("sliding_window is null" if values["use_sliding_window"] else "use_sliding_window is false")
        )
    names = tuple(_TYPES[kind] for kind in types)
    dropout = values["attention_dropout"]
    patterns = {"full": windowed(None, dropout=dropout), "local": windowed(window, dropout=dropout)}
    layers = names[:1] if len(set(names)) == 1 else names
    return {"patterns": {name: patterns[name] for name in dict.fromkeys(names)}, "layers": layers}


# -- to config.json ---------------------------------------------------------------------------------------------------


def _write(
    model_type: str,
    architecture: str,
    own: Callable[[DecoderConfig, tuple[int | None, ...], list[str]], dict[str, Any]],
) -> Callable[[DecoderConfig], dict[str, Any]]:
    """What all have in common; `own` adds the family's fields, and to the problems."""

    def to_theirs(config: DecoderConfig) -> dict[str, Any]:
        attention, problems = attention_of(config)
        problems += same(config, {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu"})
        if attention.scale is not None:
            problems.append(f"scale={attention.scale}")
        fields = own(config, attention.windows, problems)
        refuse(model_type, problems)
        rope = write_rope(
            config.rope_theta, config.rope_scaling, head_dim=config.dim_per_head, max_positions=config.max_positions
        )
        return {
            "architectures": [architecture],
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.dim_per_head,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_head,
            "attention_dropout": attention.dropout,
            **rope,
            **fields,
        }

    return to_theirs


Windows = tuple[int | None, ...]


def _own_llama(config: DecoderConfig, windows: Windows, problems: list[str]) -> dict[str, Any]:
    problems += same(config, {"qk_norm": False})
    problems += _no_windows(windows)
    if config.has_qkv_bias != config.has_out_bias:
        problems.append(f"qkv_bias={config.has_qkv_bias} beside out_bias={config.has_out_bias}")
    return {"attention_bias": config.has_qkv_bias, "mlp_bias": config.bias}


def _own_mistral(config: DecoderConfig, windows: Windows, problems: list[str]) -> dict[str, Any]:
    problems += same(config, {"qk_norm": False, "bias": False, "has_qkv_bias": False, "has_out_bias": False})
    if len(set(windows)) > 1:
        problems.append("windows that differ between layers")
    return {"sliding_window": windows[0]}


def _own_qwen2(config: DecoderConfig, windows: Windows, problems: list[str]) -> dict[str, Any]:
    problems += same(config, {"qk_norm": False, "bias": False, "has_qkv_bias": True, "has_out_bias": False})
    return _write_hybrid(windows, problems)


def _own_qwen3(config: DecoderConfig, windows: Windows, problems: list[str]) -> dict[str, Any]:
    problems += same(config, {"qk_norm": True, "bias": False})
    if config.has_qkv_bias != config.has_out_bias:
        problems.append(f"qkv_bias={config.has_qkv_bias} beside out_bias={config.has_out_bias}")
    return {"attention_bias": config.has_qkv_bias, **_write_hybrid(windows, problems)}


def _no_windows(windows: Windows) -> list[str]:
    return ["windows"] if any(window is not None for window in windows) else []


def _write_hybrid(windows: Windows, problems: list[str]) -> dict[str, Any]:
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        problems.append(f"windows of different sizes ({', '.join(map(str, sorted(sizes)))})")
    slides = bool(sizes)
    first = next((layer for layer, window in enumerate(windows) if window is not None), len(windows))
    return {
        "use_sliding_window": slides,
        "sliding_window": min(sizes) if slides else None,
        "max_window_layers": first,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


# -- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(config: DecoderConfig) -> tuple[Tensors, ...]:
    return tuple(Tensors(theirs, (ours,)) for theirs, ours in _names(config))


def _names(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    yield "model.embed_tokens.weight", "embedding.weight"
    biased = {"q_proj": config.has_qkv_bias, "k_proj": config.has_qkv_bias, "v_proj": config.has_qkv_bias}
    biased["o_proj"] = config.has_out_bias
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"
        for name, has_bias in biased.items():
            for part in ("weight", "bias") if has_bias else ("weight",):
                yield f"{theirs}.self_attn.{name}.{part}", f"{ours}.attention.{name}.{part}"
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight"
        yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight"
        for name in ("gate_proj", "up_proj", "down_proj"):
            for part in ("weight", "bias") if config.bias else ("weight",):
                yield f"{theirs}.mlp.{name}.{part}", f"{ours}.mlp.{name}.{part}"
    yield "model.norm.weight", "norm.weight"
    if not config.tied_head:
        yield "lm_head.weight", "head.weight"


def _family(
    model_type: str,
    fields: tuple[Field, ...],
    to_ours: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    to_theirs: Callable[[DecoderConfig], Mapping[str, Any]],
) -> Family[DecoderConfig]:
    return Family(
        model_type=model_type,
        config=DecoderConfig,
        fields=fields,
        to_ours=to_ours,
        to_theirs=to_theirs,
        tensors=_tensors,
        prefix="model.",
        buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # in files from before 2023
        copies=lambda config: {"lm_head.weight": "model.embed_tokens.weight"} if config.tied_head else {},
    )


LLAMA = _family(
    "llama",
    _with(
        (
            translated("attention_bias", bool, False, "`qkv_bias` and `out_bias`"),
            translated("mlp_bias", bool, False, "`bias`"),
            *irrelevant("splits matrix products, with the same result but for rounding", "pretraining_tp"),
        )
    ),
    _llama,
    _write("llama", "LlamaForCausalLM", _own_llama),
)
MISTRAL = _family(
    "mistral",
    _with(
        (
            translated("intermediate_size", int, 14336, "`d_ff`"),
            translated("num_key_value_heads", int, 8, "`n_kv_heads`; null: as many as heads"),
            translated("max_position_embeddings", int, 131072, "`max_positions`"),
            translated(
                "sliding_window",
                (int, type(None)),
                4096,
                "`window` of every layer, in keys with the query's own; null: none",
            ),
            only(
                "layer_types", None, meaning="transformers ignores it for this type, and who wrote it meant something"
            ),
        )
    ),
    _mistral,
    _write("mistral", "MistralForCausalLM", _own_mistral),
)
_QWEN = (
    translated("vocab_size", int, 151936, "`vocab_size`"),
    translated("intermediate_size", int, 22016, "`d_ff`"),
    translated("num_key_value_heads", (int, type(None)), 32, "`n_kv_heads`; null: as many as heads"),
    translated("max_position_embeddings", int, 32768, "`max_positions`"),
    *_LAYERS,
)
QWEN2 = _family("qwen2", _with(_QWEN), _qwen2, _write("qwen2", "Qwen2ForCausalLM", _own_qwen2))
QWEN3 = _family(
    "qwen3",
    _with(
        (
            *_QWEN,
            translated("head_dim", int, 128, "`head_dim`"),
            translated("attention_bias", bool, False, "`qkv_bias` and `out_bias`"),
        )
    ),
    _qwen3,
    _write("qwen3", "Qwen3ForCausalLM", _own_qwen3),
)
