"""What a model is made of, as frozen data that every layer of the framework can read (no torch here).

Configs never enter modules: `decoder.from_config` turns them into constructor arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from longspan.kernels.attention.spec import AttentionSpec, BlockLayout, Window

_FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic where these stand in a config

Positions = Literal["learned", "rope", "alibi", "none"]
Norm = Literal["layernorm", "rmsnorm"]
MLP = Literal["gelu", "gelu_tanh", "swiglu"]


class ModelConfigError(ValueError):
    """A model that cannot be built; `.problems` lists everything that is wrong with it, in plain words."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadGroup:
    """A run of query heads that share one spec, for layers whose heads differ (Longformer dilates two heads).

    heads  how many query heads, in order
    spec   what they attend to
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    heads: int
    spec: AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Which attention each layer has. `patterns` names the kinds; `layers` lists one name a layer and repeats
    cyclically when it is shorter than the stack (["local", "local", "global"] over 12 layers is that four times)."""

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    patterns: Mapping[str, AttentionSpec | tuple[HeadGroup, ...]] = field(
        default_factory=lambda: {"full": AttentionSpec(causal=True)}
    )
    layers: tuple[str, ...] = ("full",)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("attention.layers is empty: it names at least one pattern")
        for name in self.layers:
            if name not in self.patterns:
                raise ValueError(
                    f"attention.layers names the pattern '{name}', but attention.patterns has "
                    f"{', '.join(self.patterns)}"
                )

    def of_layer(self, layer: int) -> tuple[str, AttentionSpec | tuple[HeadGroup, ...]]:
        """(pattern name, spec or head groups) of one layer."""
        name = self.layers[layer % len(self.layers)]
        return name, self.patterns[name]

    def specs(self) -> dict[str, tuple[AttentionSpec, ...]]:
        """Every pattern's specs, by name."""
        return {
            name: (pattern,) if isinstance(pattern, AttentionSpec) else tuple(group.spec for group in pattern)
            for name, pattern in self.patterns.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model: the GPT-2 and the Llama families by configuration.

    vocab_size       rows of the embedding (and of the head)
    n_layers         blocks
    d_model          width of the residual stream
    n_heads          query heads in a layer
    n_kv_heads       key/value heads; None: n_heads (multi-head), 1: multi-query
    head_dim         None: d_model // n_heads
    d_ff             hidden width of the MLP
    max_positions    longest context the model is built for; with learned positions, the table's rows
    positions        learned | rope | alibi | none. `alibi` sets alibi=True on every spec of the attention plan, so that
                     the stored config says what happens; single layers may ask for it under any other choice
    rope_theta       base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)
    norm             pre-normalisation in each block and before the head
    norm_eps         added to the variance (the mean square) under its root
    mlp              gelu (exact), gelu_tanh (GPT-2), swiglu (Llama)
    bias             biases in projections, MLP and LayerNorm (RMSNorm and the head never have one)
    tied_head        the output head is the embedding
    qk_norm          RMSNorm on each head's q and k before rotation
    dropout          on embeddings and residual branches (attention's own dropout is in its spec)
    init_std         standard deviation of normal initialisation; residual projections use init_std / sqrt(2 n_layers)
    attention        per-layer attention

    Raises ModelConfigError with every problem at once.
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    architecture: Literal["decoder"] = "decoder"
    vocab_size: int = 50257
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 3072
    max_positions: int = 1024
    positions: Positions = "learned"
    rope_theta: float = 10_000.0
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    mlp: MLP = "gelu_tanh"
    bias: bool = True
    tied_head: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionPlan = field(default_factory=AttentionPlan)

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ModelConfigError(problems)
        if self.positions == "alibi":
            object.__setattr__(self, "attention", _with_alibi(self.attention))

    @property
    def kv_heads(self) -> int:
        """`n_kv_heads`, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def dim_per_head(self) -> int:
        """`head_dim`, resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    def head_groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """The layer's heads by spec, in order: one group where all heads share one."""
        return self._groups(self.attention.of_layer(layer)[1])

    def pattern_groups(self) -> dict[str, tuple[HeadGroup, ...]]:
        """Every pattern that some layer has, as head groups."""
        used = [self.attention.of_layer(layer) for layer in range(self.n_layers)]
        return {name: self._groups(pattern) for name, pattern in used}

    def _groups(self, pattern: AttentionSpec | tuple[HeadGroup, ...]) -> tuple[HeadGroup, ...]:
        return (HeadGroup(heads=self.n_heads, spec=pattern),) if isinstance(pattern, AttentionSpec) else tuple(pattern)


# -- what can be wrong with a config ----------------------------------------------------------------------------------


def _problems(config: DecoderConfig) -> list[str]:
    found: list[str] = []
    for name in ("vocab_size", "n_layers", "d_model", "n_heads", "d_ff", "max_positions", "n_kv_heads", "head_dim"):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append(f"{name}={value}: it is at least 1")
    countable = not found  # the checks at the end divide by these numbers
    for name, choices in (("positions", Positions), ("norm", Norm), ("mlp", MLP)):
        value = getattr(config, name)
        if value not in get_args(choices):
            found.append(f"{name}={value!r}: it is one of {', '.join(get_args(choices))}")
    for name in ("rope_theta", "norm_eps", "init_std"):
        value = getattr(config, name)
        if not value > 0:
            found.append(f"{name}={value}: it is a positive number")
    if not 0.0 <= config.dropout < 1.0:
        found.append(f"dropout={config.dropout}: a probability in [0, 1)")
    if not countable:
        return found

    if config.head_dim is None and config.d_model % config.n_heads:
        found.append(
            f"d_model={config.d_model} is not a multiple of n_heads={config.n_heads}: "
            "choose a number of heads that divides it, or set head_dim"
        )
    elif config.positions == "rope" and config.dim_per_head % 2:
        found.append(f"head_dim={config.dim_per_head} with positions=rope: rotation pairs dimensions, so it is even")
    if config.n_heads % config.kv_heads:
        found.append(
            f"n_heads={config.n_heads} is not a multiple of n_kv_heads={config.n_kv_heads}: "
            "each key/value head serves the same number of query heads"
        )
    for name, pattern in config.attention.patterns.items():
        found.extend(_pattern_problems(config, f"attention.patterns.{name}", pattern))
    return found


def _pattern_problems(config: DecoderConfig, where: str, pattern: AttentionSpec | tuple[HeadGroup, ...]) -> list[str]:
    found: list[str] = []
    if not isinstance(pattern, AttentionSpec):
        heads = [group.heads for group in pattern]
        if not heads or min(heads) < 1:
            found.append(f"{where}: its groups have {heads} heads; each group has at least 1")
        elif sum(heads) != config.n_heads:
            found.append(f"{where}: its groups have {heads} heads, {sum(heads)} together, but n_heads={config.n_heads}")
        elif config.n_heads % config.kv_heads == 0:
            shared = config.n_heads // config.kv_heads
            if any(count % shared for count in heads):
                found.append(
                    f"{where}: groups of {heads} heads split a key/value head; "
                    f"with n_heads={config.n_heads} and n_kv_heads={config.kv_heads} each is a multiple of {shared}"
                )
    specs = (pattern,) if isinstance(pattern, AttentionSpec) else tuple(group.spec for group in pattern)
    for spec in specs:
        if not spec.causal:
            found.append(f"{where}: causal=false, but a decoder predicts the next token; set causal: true")
        if spec.block_sparse is not None:
            layout = spec.block_sparse
            covered = min(len(layout.pattern) * layout.q_block, len(layout.pattern[0]) * layout.kv_block)
            if covered < config.max_positions:
                found.append(
                    f"{where}: block_sparse covers {covered} positions, but max_positions={config.max_positions}"
                )
    return found


def _with_alibi(plan: AttentionPlan) -> AttentionPlan:
    def biased(pattern: AttentionSpec | tuple[HeadGroup, ...]) -> AttentionSpec | tuple[HeadGroup, ...]:
        if isinstance(pattern, AttentionSpec):
            return replace(pattern, alibi=True)
        return tuple(replace(group, spec=replace(group.spec, alibi=True)) for group in pattern)

    return replace(plan, patterns={name: biased(pattern) for name, pattern in plan.patterns.items()})


# -- plain dicts and back ---------------------------------------------------------------------------------------------


def to_dict(config: DecoderConfig) -> dict[str, Any]:
    """The config as JSON-able dicts, lists and scalars; `from_dict` is its inverse."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def from_dict(raw: Mapping[str, Any]) -> DecoderConfig:
    """A config from plain dicts (a checkpoint's config.json, overrides). Missing keys take their defaults.

    Raises ModelConfigError naming every unknown key (with the nearest known one) and every value of a wrong type.
    """
    problems: list[str] = []
    config = _read(DecoderConfig, raw, "", problems)
    if problems or not isinstance(config, DecoderConfig):
        raise ModelConfigError(problems)
    return config


def plan_from_dict(raw: Mapping[str, Any]) -> AttentionPlan:
    """The `attention` part of a config alone; raises like `from_dict`."""
    problems: list[str] = []
    plan = _read(AttentionPlan, raw, "attention", problems)
    if problems or not isinstance(plan, AttentionPlan):
        raise ModelConfigError(problems)
    return plan


_DATA = (DecoderConfig, AttentionPlan, HeadGroup, AttentionSpec, Window, BlockLayout)


def _plain(value: object) -> object:
    if isinstance(value, _DATA):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _read(kind: type, raw: object, where: str, problems: list[str]) -> object:
    """`raw` as `kind`, one of the dataclasses of a config; problems are collected, and then the result is None."""
    if isinstance(raw, kind):
        return raw
    if not isinstance(raw, Mapping):
        problems.append(f"{where or 'config'}: a mapping of keys, not {raw!r}")
        return None
    before = len(problems)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values: dict[str, object] = {}
    for key, value in raw.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            problems.append(f"{path}: unknown key{near(str(key), known)}")
        else:
            values[key] = _value(hints[key], value, path, problems)
    required = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    problems.extend(f"{where or 'config'}: '{name}' is missing" for name in required if name not in raw)
    if len(problems) > before:
        return None
    try:
        return kind(**values)
    except ModelConfigError as error:
        problems.extend(error.problems)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where and not str(error).startswith(where) else str(error))
    return None


def _value(hint: Any, value: object, where: str, problems: list[str]) -> object:
    """One value as its annotated type; lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not NoneType]
        if isinstance(value, (Mapping, *_DATA)):
            kinds = [kind for kind in kinds if kind in _DATA] or kinds
        elif isinstance(value, list | tuple):
            kinds = [kind for kind in kinds if get_origin(kind) is tuple] or kinds
        return _value(kinds[0], value, where, problems)
    if hint in _DATA:
        return _read(hint, value, where, problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where}: a list, not {value!r}")
            return ()
        return tuple(_value(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{where}: a mapping of names, not {value!r}")
            return {}
        return {str(key): _value(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            problems.append(f"{where}={value!r}: it is one of {', '.join(map(str, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        problems.append(f"{where}={value!r}: it is {words.get(hint, hint.__name__)}")
    return value


def near(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'n_heads'?`, or the known names when nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
