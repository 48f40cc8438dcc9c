"""What a layer's attention means, as frozen data: no tensors, no torch.

`AttentionSpec` is the static half of the definition; the per-batch tensors live in `context.AttentionContext`,
whose `allowed` turns both into THE mask. Every backend is held to that one definition by the conformance suite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

_FORBID_EXTRA = {
    "extra": "forbid"
}  # read by pydantic when a spec stands in a config; pydantic itself is not needed here


@dataclass(frozen=True, slots=True)
class Window:
    """Which neighbours a query sees, counted in keys *other than itself*; `None` means unlimited.

    With `dilation` d the attended keys are d positions apart, so the window reaches `left * d` positions back and
    `right * d` forward (Beltagy et al. 2020, arXiv 2004.05150, §3.1: the dilated window counts keys, not span).

    left      keys before the query; None: all
    right     keys after the query; None: all (under `causal` there are none)
    dilation  distance between attended keys; 1: adjacent
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    left: int | None = None
    right: int | None = None
    dilation: int = 1

    def __post_init__(self) -> None:
        for side, count in (("left", self.left), ("right", self.right)):
            if count is not None and count < 0:
                raise ValueError(f"window.{side}={count}: a count of neighbours is 0 or more, or null for unlimited")
        if self.dilation < 1:
            raise ValueError(f"window.dilation={self.dilation}: 1 means adjacent keys; it is at least 1")

    @classmethod
    def causal_keys(cls, n_keys: int) -> Window:
        """The query and the `n_keys - 1` keys before it (Mistral's and Hugging Face's causal `sliding_window`)."""
        if n_keys < 1:
            raise ValueError(f"Window.causal_keys({n_keys}): a causal window holds at least the query's own key")
        return cls(left=n_keys - 1, right=0)

    @classmethod
    def symmetric(cls, each_side: int, dilation: int = 1) -> Window:
        """`each_side` keys on either side (allenai Longformer's `attention_window`, half of Hugging Face's)."""
        return cls(left=each_side, right=each_side, dilation=dilation)

    @property
    def span(self) -> tuple[int | None, int | None]:
        """How many positions the window reaches to the left and to the right."""
        return (
            None if self.left is None else self.left * self.dilation,
            None if self.right is None else self.right * self.dilation,
        )

    @property
    def unlimited(self) -> bool:
        return self.left is None and self.right is None and self.dilation == 1


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block-sparse pattern: query block i may look into key block j iff `pattern[i][j]`.

    Block numbers come from absolute positions (`position // block`), so the pattern means the same in training and in
    decoding. A position past the pattern is an error, not an empty row.
    Source: block-sparse FlashAttention (Dao et al. 2022, arXiv 2205.14135, §3.3).

    pattern   rows are query blocks, columns key blocks
    q_block   positions in a query block
    kv_block  positions in a key block
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    pattern: tuple[tuple[bool, ...], ...]
    q_block: int = 128
    kv_block: int = 128

    def __post_init__(self) -> None:
        if not self.pattern or not self.pattern[0]:
            raise ValueError("block_sparse.pattern is empty: it needs at least one query block and one key block")
        if len({len(row) for row in self.pattern}) != 1:
            raise ValueError("block_sparse.pattern: every row needs the same number of key blocks")
        if self.q_block < 1 or self.kv_block < 1:
            raise ValueError(f"block_sparse: block sizes are at least 1, not {self.q_block} and {self.kv_block}")

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[bool | int]], *, q_block: int = 128, kv_block: int = 128) -> BlockLayout:
        return cls(tuple(tuple(bool(cell) for cell in row) for row in rows), q_block, kv_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The meaning of one kind of attention layer: hashable, YAML-able, without tensors.

    causal         a query sees no key at a later position
    window         which neighbours an ordinary query sees
    global_tokens  keys flagged by the context are seen by all and, as queries, see all (still causal if `causal`)
    documents      never attend across document ids
    alibi          add `-slope[h] * |q_position - k_position|` to the scores (Press et al. 2022, arXiv 2108.12409)
    softcap        c: scaled scores become `c * tanh(score / c)` before biases (Gemma 2)
    sink_tokens    the first n keys of each document (of the sequence without documents) are always visible
                   (Xiao et al. 2024, arXiv 2309.17453)
    learned_sink   one logit a head joins the softmax denominator and carries no value (gpt-oss)
    scale          multiplies q·k; None: `head_dim ** -0.5`
    dropout        probability of dropping an attention weight after the softmax (counter-based, replayable)
    block_sparse   a block pattern that thins the window; global and sink keys stay visible
    """

    __pydantic_config__: ClassVar = _FORBID_EXTRA

    causal: bool
    window: Window = Window()
    global_tokens: bool = False
    documents: bool = False
    alibi: bool = False
    softcap: float | None = None
    sink_tokens: int = 0
    learned_sink: bool = False
    scale: float | None = None
    dropout: float = 0.0
    block_sparse: BlockLayout | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}: it is a positive number, or null for none")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens={self.sink_tokens}: a count of keys is 0 or more")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale}: it is a positive number, or null for head_dim ** -0.5")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: a probability in [0, 1)")

    def softmax_scale(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale
