"""GPT-2 (Radford et al. 2019) as transformers spells it: Conv1D weights are [in, out]; q, k, v stand side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from longspan.kernels.attention.spec import AttentionSpec
from longspan.model.config import DecoderConfig

from .decoders import attention_of, refuse, same
from .hf import ConversionError
from .repeat import REMEDY
from .translate import Family, Tensors, irrelevant, only, translated

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}

_FIELDS = (
    translated("vocab_size", int, 50257, "`vocab_size`"),
    translated("n_positions", int, 1024, "`max_positions`"),
    translated("n_ctx", int, None, "nothing: older configs repeat `n_positions`, and another number is refused"),
    translated("n_embd", int, 768, "`d_model`"),
    translated("n_layer", int, 12, "`n_layers`"),
    translated("n_head", int, 12, "`n_heads`"),
    translated("n_inner", int, None, "`d_ff`; null: four times `n_embd`"),
    translated("activation_function", str, "gelu_new", f"`mlp`; known: {', '.join(_ACTIVATIONS)}"),
    translated("resid_pdrop", float, 0.1, "`dropout`"),
    translated("embd_pdrop", float, 0.1, "`dropout`: one number for both, so another than `resid_pdrop` is refused"),
    translated("attn_pdrop", float, 0.1, "`dropout` of the attention pattern"),
    translated("layer_norm_epsilon", float, 1e-5, "`norm_eps`"),
    translated("initializer_range", float, 0.02, "`init_std`"),
    translated("scale_attn_weights", bool, True, "`scale` of the attention pattern: false is 1"),
    translated("tie_word_embeddings", bool, True, "`tied_head`"),
    *irrelevant(
        "of a head for classification, which a language model does not have",
        "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout",
    ),
    *irrelevant("order of rounding in half precision; scores and softmax are fp32 here", "reorder_and_upcast_attn"),
    only("scale_attn_by_inverse_layer_idx", False, meaning="a scale of its own in every layer"),
)


def _to_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    activation, positions = values["activation_function"], values["n_positions"]
    problems = []
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        problems.append(f"config.json: activation_function='{activation}' is not known; known are {known}")
    if values["n_ctx"] not in (None, positions):
        problems.append(f"config.json: n_ctx={values['n_ctx']} contradicts n_positions={positions}")
    if values["embd_pdrop"] != values["resid_pdrop"]:
        problems.append(
            f"config.json: embd_pdrop={values['embd_pdrop']} and resid_pdrop={values['resid_pdrop']} are one setting "
            "here; make them equal (it matters in training only)"
        )
    if problems:
        raise ConversionError(problems)
    return {
        "architecture": "decoder",
        "vocab_size": values["vocab_size"],
        "n_layers": values["n_layer"],
        "d_model": values["n_embd"],
        "n_heads": values["n_head"],
        "d_ff": 4 * values["n_embd"] if values["n_inner"] is None else values["n_inner"],
        "max_positions": positions,
        "norm_eps": values["layer_norm_epsilon"],
        "mlp": _ACTIVATIONS[activation],
        "tied_head": values["tie_word_embeddings"],
        "dropout": values["resid_pdrop"],
        "init_std": values["initializer_range"],
        "attention": {
            "patterns": {
                "full": AttentionSpec(
                    causal=True,
                    dropout=values["attn_pdrop"],
                    scale=None if values["scale_attn_weights"] else 1.0,
                )
            }
        },
    }


def _to_theirs(config: DecoderConfig) -> dict[str, Any]:
    attention, problems = attention_of(config)
    problems += same(config, {"positions": "learned", "norm": "layernorm", "bias": True, "qk_norm": False})
    if config.mlp not in ("gelu", "gelu_tanh"):
        problems.append(f"mlp={config.mlp}")
    if config.kv_heads != config.n_heads:
        problems.append(f"n_kv_heads={config.kv_heads} of n_heads={config.n_heads} ({REMEDY})")
    if config.n_heads * config.dim_per_head != config.d_model:
        problems.append(f"head_dim={config.head_dim}, which is not d_model / n_heads")
    if any(window is not None for window in attention.windows):
        problems.append("windows")
    if attention.scale not in (None, 1.0):
        problems.append(f"scale={attention.scale}")
    refuse("gpt2", problems)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff,
        "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": attention.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "scale_attn_weights": attention.scale is None,
        "tie_word_embeddings": config.tied_head,
    }


def _tensors(config: DecoderConfig) -> tuple[Tensors, ...]:
    return tuple(_rules(config))


def _rules(config: DecoderConfig) -> Iterator[Tensors]:
    yield Tensors("transformer.wte.weight", ("embedding.weight",))
    yield Tensors("transformer.wpe.weight", ("position_embedding.weight",))
    for layer in range(config.n_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        for part in ("weight", "bias"):
            matrix = part == "weight"
            qkv = tuple(f"{ours}.attention.{name}.{part}" for name in ("q_proj", "k_proj", "v_proj"))
            yield Tensors(f"{theirs}.ln_1.{part}", (f"{ours}.attention_norm.{part}",))
            yield Tensors(f"{theirs}.attn.c_attn.{part}", qkv, transposed=matrix)
            yield Tensors(f"{theirs}.attn.c_proj.{part}", (f"{ours}.attention.o_proj.{part}",), transposed=matrix)
            yield Tensors(f"{theirs}.ln_2.{part}", (f"{ours}.mlp_norm.{part}",))
            yield Tensors(f"{theirs}.mlp.c_fc.{part}", (f"{ours}.mlp.up_proj.{part}",), transposed=matrix)
            yield Tensors(f"{theirs}.mlp.c_proj.{part}", (f"{ours}.mlp.down_proj.{part}",), transposed=matrix)
    yield Tensors("transformer.ln_f.weight", ("norm.weight",))
    yield Tensors("transformer.ln_f.bias", ("norm.bias",))
    if not config.tied_head:
        yield Tensors("lm_head.weight", ("head.weight",))


GPT2 = Family(
    model_type="gpt2",
    config=DecoderConfig,
    fields=_FIELDS,
    to_ours=_to_ours,
    to_theirs=_to_theirs,
    tensors=_tensors,
    prefix="transformer.",
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),  # the causal mask, in files from before 2023
    copies=lambda config: {"lm_head.weight": "transformer.wte.weight"} if config.tied_head else {},
)
