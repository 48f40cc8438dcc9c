"""Which attention each layer has, as frozen data, and what can be wrong with it for a given model (no torch here)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, get_args

from longspan.kernels.attention.spec import AttentionSpec

FORBID_EXTRA = {"extra": "forbid"}  # read by pydantic where these stand in a config

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

    __pydantic_config__: ClassVar = FORBID_EXTRA

    heads: int
    spec: AttentionSpec


Pattern = AttentionSpec | tuple[HeadGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Which attention each layer has. `patterns` names the kinds; `layers` lists one name a layer and repeats
    cyclically when it is shorter than the stack (["local", "local", "global"] over 12 layers is that four times)."""

    __pydantic_config__: ClassVar = FORBID_EXTRA

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

    def of_layer(self, layer: int) -> tuple[str, Pattern]:
        """(pattern name, spec or head groups) of one layer."""
        name = self.layers[layer % len(self.layers)]
        return name, self.patterns[name]

    def specs(self) -> dict[str, tuple[AttentionSpec, ...]]:
        """Every pattern's specs, by name."""
        return {name: specs_of(pattern) for name, pattern in self.patterns.items()}

    def head_groups(self, layer: int, n_heads: int) -> tuple[HeadGroup, ...]:
        """The layer's `n_heads` heads by spec, in order: one group where all heads share one."""
        return _groups(self.of_layer(layer)[1], n_heads)

    def pattern_groups(self, n_layers: int, n_heads: int) -> dict[str, tuple[HeadGroup, ...]]:
        """Every pattern that one of `n_layers` layers has, as head groups."""
        used = [self.of_layer(layer) for layer in range(n_layers)]
        return {name: _groups(pattern, n_heads) for name, pattern in used}

    def with_alibi(self) -> AttentionPlan:
        """The plan with alibi=True on every spec."""

        def biased(pattern: Pattern) -> Pattern:
            if isinstance(pattern, AttentionSpec):
                return replace(pattern, alibi=True)
            return tuple(replace(group, spec=replace(group.spec, alibi=True)) for group in pattern)

        return replace(self, patterns={name: biased(pattern) for name, pattern in self.patterns.items()})


def specs_of(pattern: Pattern) -> tuple[AttentionSpec, ...]:
    return (pattern,) if isinstance(pattern, AttentionSpec) else tuple(group.spec for group in pattern)


def _groups(pattern: Pattern, n_heads: int) -> tuple[HeadGroup, ...]:
    return (HeadGroup(heads=n_heads, spec=pattern),) if isinstance(pattern, AttentionSpec) else tuple(pattern)


# -- what can be wrong with any config --------------------------------------------------------------------------------


class StackOfLayers(Protocol):
    """What every config says about its layers; the checks below ask no more."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int | None: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int | None: ...
    @property
    def dim_per_head(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def positions(self) -> str: ...
    @property
    def attention(self) -> AttentionPlan: ...


def count_problems(config: object, names: Iterable[str]) -> list[str]:
    """Fields that are whole numbers from 1 on, or None."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name}={value}: it is at least 1" for name, value in values.items() if value is not None and value < 1]


def choice_problems(config: object, choices: Mapping[str, object]) -> list[str]:
    """Fields that are one of a Literal's values."""
    return [
        f"{name}={value!r}: it is one of {', '.join(get_args(choice))}"
        for name, choice in choices.items()
        if (value := getattr(config, name)) not in get_args(choice)
    ]


def positive_problems(config: object, names: Iterable[str]) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [f"{name}={value}: it is a positive number" for name, value in values.items() if not value > 0]


def probability_problems(config: object, names: Iterable[str]) -> list[str]:
    """Fields that are probabilities below 1, or None."""
    return [
        f"{name}={value}: a probability in [0, 1)"
        for name in names
        if (value := getattr(config, name)) is not None and not 0.0 <= value < 1.0
    ]


def head_problems(config: StackOfLayers) -> list[str]:
    """Heads against the width and against each other; the counts are known to be positive."""
    found: list[str] = []
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
    return found


def pattern_problems(config: StackOfLayers, where: str, pattern: Pattern) -> list[str]:
    """One attention pattern against the model's heads and positions."""
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
    for spec in specs_of(pattern):
        if spec.block_sparse is not None:
            layout = spec.block_sparse
            covered = min(len(layout.pattern) * layout.q_block, len(layout.pattern[0]) * layout.kv_block)
            if covered < config.max_positions:
                found.append(
                    f"{where}: block_sparse covers {covered} positions, but max_positions={config.max_positions}"
                )
    return found
