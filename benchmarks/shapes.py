"""What the attention suites measure: shapes, masks, their FLOPs, and the targets that they answer. No torch.

FLOPs: forward 4 · B · H · pairs · D and backward 2.5 times that, where `pairs` are the (query, key) pairs that a head
may see: counted exactly for every mask, and S² or S² / 2 for dense and causal attention, as everybody quotes those.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from longspan.kernels.attention.spec import AttentionSpec, BlockLayout, Window

from .patterns import Pattern, bigbird, butterfly, document_lengths, random_blocks

SuiteName = Literal["attention", "window", "documents", "sparse", "dilation"]
Shapes = Literal["tiny", "quick", "full"]
Quantity = Literal["forward", "backward", "both", "memory"]

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
TIMES: tuple[Quantity, ...] = ("forward", "backward", "both")
FLOPS_OF_FORWARD = {"forward": 1.0, "backward": 2.5, "both": 3.5}

FLASH, CUDNN, FLEX, LONGFORMER, FLASH_4 = "sdpa-flash", "sdpa-cudnn", "flex", "longformer-hf", "flash-attn-4"
PORTABLE = "longspan-triton"  # ours, where another backend of ours is measured
PEERS = (FLASH, CUDNN, FLEX, LONGFORMER, FLASH_4, PORTABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on a ratio.

    quantity  what is compared
    peer      the ratio is this peer's value over ours
    baseline  or ours in this case over ours in the case of that name, and that over `expected`
    """

    text: str
    quantity: Quantity
    peer: str | None = None
    baseline: str | None = None
    expected: float = 1.0
    at_least: float = 0.0
    at_most: float = math.inf

    def met(self, ratio: float) -> bool:
        return self.at_least <= ratio <= self.at_most


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One attention call.

    documents  lengths of the packed documents, summing to `length`; empty: none
    global_at  positions of the global tokens
    peers      which contenders are worth comparing with
    series     belongs to the curve over length
    """

    name: str
    spec: AttentionSpec
    batch: int = 1
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    documents: tuple[int, ...] = ()
    global_at: tuple[int, ...] = ()
    peers: tuple[str, ...] = PEERS
    targets: tuple[Target, ...] = ()
    series: bool = False

    @property
    def dense(self) -> bool:
        """Causal or full attention and nothing else."""
        return self.spec == AttentionSpec(causal=self.spec.causal)

    @property
    def pairs(self) -> float:
        """Pairs of query and key that a head of a sequence sees, as FLOPs count them."""
        if self.dense:
            return self.length**2 / (2 if self.spec.causal else 1)
        return allowed_pairs(self)

    def flops(self, quantity: Quantity) -> float:
        forward = 4 * self.batch * self.heads * self.pairs * self.head_dim
        return forward * FLOPS_OF_FORWARD[quantity]


def allowed_pairs(case: Case) -> int:
    """How many (query, key) pairs `AttentionContext.allowed` grants in one sequence, without materialising them.

    Raises ValueError for combinations that no suite has (a layout or dilation together with other masks).
    """
    spec, window = case.spec, case.spec.window
    others = bool(spec.causal or spec.documents or spec.global_tokens or not window.unlimited)
    if spec.block_sparse is not None:
        layout = spec.block_sparse
        if others or (layout.q_block * len(layout.pattern), layout.kv_block * len(layout.pattern[0])) != (
            case.length,
            case.length,
        ):
            raise ValueError(f"{case.name}: pairs of a layout are counted only where it stands alone and fits exactly")
        return sum(map(sum, layout.pattern)) * layout.q_block * layout.kv_block
    if window.dilation > 1 and case.global_at:
        raise ValueError(f"{case.name}: pairs of a dilated window are counted only without global tokens")

    at = np.arange(case.length)
    lengths = np.array(case.documents if spec.documents else (case.length,))
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    last = np.repeat(np.cumsum(lengths) - 1, lengths)
    if spec.causal:
        last = np.minimum(last, at)
    left, right = window.span
    low = first if left is None else np.maximum(first, at - left)
    high = last if right is None else np.minimum(last, at + right)
    seen = (at - low) // window.dilation + (high - at) // window.dilation + 1
    if spec.global_tokens:
        flagged = np.array(sorted(case.global_at), dtype=np.int64)

        def between(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
            return np.searchsorted(flagged, end, "right") - np.searchsorted(flagged, begin, "left")

        seen = seen + between(first, last) - between(low, high)
        seen[flagged] = (last - first + 1)[flagged]
    return int(seen.sum())


# -- dense -------------------------------------------------------------------------------------------------------------


def _dense(causal: bool, batch: int, heads: int, kv_heads: int, length: int, head_dim: int) -> Case:
    kind = "causal" if causal else "full"
    shared = "" if heads == kv_heads else f"/{kv_heads}"
    targets = [_no_slower_than_flex(quantity) for quantity in ("forward", "backward")]
    if causal and length >= 4096:
        bound = 1.25 if head_dim >= 128 else 1.15
        text = f"forward ≥ {bound}× SDPA-flash at d{head_dim}, causal, S ≥ 4K"
        targets.append(Target(text=text, quantity="forward", peer=FLASH, at_least=bound))
    targets.append(Target(text="backward ≥ 1.0× SDPA-flash", quantity="backward", peer=FLASH, at_least=1.0))
    return Case(
        name=f"{kind} b{batch} h{heads}{shared} s{length} d{head_dim}",
        spec=AttentionSpec(causal=causal),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=head_dim,
        peers=(FLASH, CUDNN, FLEX, FLASH_4, PORTABLE),
        targets=tuple(targets),
    )


def _no_slower_than_flex(quantity: Quantity) -> Target:
    return Target(text="never below 0.95× FlexAttention", quantity=quantity, peer=FLEX, at_least=0.95)


def _attention(shapes: Shapes) -> tuple[Case, ...]:
    if shapes == "tiny":
        return (_dense(True, 2, 4, 2, 128, 16), _dense(False, 1, 2, 2, 96, 16))
    decisive = (
        _dense(True, 4, 16, 16, 4096, 128),
        _dense(True, 1, 16, 4, 16384, 128),
        _dense(True, 1, 32, 32, 16384, 64),
        _dense(False, 4, 16, 16, 4096, 128),
    )
    if shapes == "quick":
        return decisive
    return (
        *decisive,
        _dense(True, 16, 16, 16, 1024, 128),
        _dense(True, 1, 16, 16, 16384, 128),
        _dense(True, 4, 32, 32, 4096, 64),
        _dense(False, 16, 16, 16, 1024, 128),
        _dense(False, 1, 16, 16, 16384, 128),
        _dense(False, 1, 32, 32, 16384, 64),
        _dense(True, 1, 8, 8, 65536, 128),
    )


# -- windows -----------------------------------------------------------------------------------------------------------

_SERIES_START = 16384
_AGAINST_LONGFORMER: tuple[tuple[Quantity, float, str], ...] = (
    ("both", 20.0, "≥ 20× HF Longformer at 16K"),
    ("memory", 10.0, "≤ a tenth of HF Longformer's memory at 16K"),
)


def _longformer(length: int, n_globals: int, *, each_side: int = 256, heads: int = 12, head_dim: int = 64) -> Case:
    """A window on either side, and no global token, the first one (BERT's [CLS]), or some scattered at random."""
    at = (0,) if n_globals == 1 else tuple(sorted(random.Random(0).sample(range(length), n_globals)))
    with_globals = "" if not n_globals else f" + {n_globals} global"
    targets = [_no_slower_than_flex(quantity) for quantity in ("forward", "backward")]
    if n_globals:
        targets.append(Target(text="window + global ≥ 1.5× FlexAttention's", quantity="both", peer=FLEX, at_least=1.5))
    if n_globals and length == _SERIES_START:
        for quantity, bound, text in _AGAINST_LONGFORMER:
            targets.append(Target(text=text, quantity=quantity, peer=LONGFORMER, at_least=bound))
    return Case(
        name=f"window {each_side}+{each_side}{with_globals} h{heads} s{length} d{head_dim}",
        spec=AttentionSpec(causal=False, window=Window.symmetric(each_side), global_tokens=n_globals > 0),
        heads=heads,
        kv_heads=heads,
        length=length,
        head_dim=head_dim,
        global_at=at,
        peers=(FLEX, LONGFORMER) if n_globals else (FLEX, LONGFORMER, FLASH_4, PORTABLE),
        targets=tuple(targets),
    )


def _causal_window(n_keys: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    return Case(
        name=f"causal window {n_keys} h{heads}/{kv_heads} s{length} d{head_dim}",
        spec=AttentionSpec(causal=True, window=Window.causal_keys(n_keys)),
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=head_dim,
        peers=(FLEX, FLASH_4, PORTABLE),
        targets=tuple(_no_slower_than_flex(quantity) for quantity in ("forward", "backward")),
    )


def _series(lengths: Sequence[int], *, each_side: int = 256, heads: int = 12, head_dim: int = 64) -> tuple[Case, ...]:
    """Ours alone over length, with one global token: the first length is what the others are held to."""

    def name(length: int) -> str:
        return f"linearity: window {each_side}+{each_side} + 1 global h{heads} s{length} d{head_dim}"

    cases = []
    for length in lengths:
        targets: list[Target] = []
        if length > lengths[0] and length <= 262144:
            factor = length / lengths[0]
            for quantity in ("forward", "backward", "both", "memory"):
                text = f"{'memory' if quantity == 'memory' else 'time'} linear ±5 % from {lengths[0]:,} to 262,144"
                targets.append(
                    Target(
                        text=text,
                        quantity=quantity,
                        baseline=name(lengths[0]),
                        expected=factor,
                        at_least=0.95,
                        at_most=1.05,
                    )
                )
        cases.append(
            Case(
                name=name(length),
                spec=AttentionSpec(causal=False, window=Window.symmetric(each_side), global_tokens=True),
                heads=heads,
                kv_heads=heads,
                length=length,
                head_dim=head_dim,
                global_at=(0,),
                peers=(),
                targets=tuple(targets),
                series=True,
            )
        )
    return tuple(cases)


def _window(shapes: Shapes) -> tuple[Case, ...]:
    if shapes == "tiny":
        small = {"each_side": 16, "heads": 2, "head_dim": 16}
        return (
            _longformer(128, 0, **small),
            _longformer(128, 1, **small),
            _longformer(128, 5, **small),
            _causal_window(24, 96, 4, 2, 16),
            *_series((128, 256), **small),
        )
    million = 1_048_576
    decisive = (
        _longformer(16384, 1),
        _longformer(16384, 64),
        _longformer(16384, 0),
        _causal_window(1024, 16384, 16, 4, 128),
    )
    if shapes == "quick":
        return (*decisive, *_series((16384, 65536, 262144, million)))
    return (
        *decisive,
        *_series((16384, 32768, 65536, 131072, 262144, million)),
        *(_longformer(length, count) for length in (4096, 65536) for count in (0, 1, 64)),
        _causal_window(1024, 65536, 16, 4, 128),
        _causal_window(4096, 65536, 16, 4, 128),
        _causal_window(1024, 65536, 32, 8, 64),
    )


# -- packed documents --------------------------------------------------------------------------------------------------


def _packed(length: int, mean: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    shared = "" if heads == kv_heads else f"/{kv_heads}"
    if length >= 65536:
        targets = tuple(
            Target(text="documents (mean 2K in 64K) ≥ 1.2× FlexAttention's", quantity=quantity, peer=FLEX, at_least=1.2)
            for quantity in TIMES
        )
    else:
        targets = tuple(_no_slower_than_flex(quantity) for quantity in ("forward", "backward"))
    return Case(
        name=f"documents of {mean} h{heads}{shared} s{length} d{head_dim}",
        spec=AttentionSpec(causal=True, documents=True),
        heads=heads,
        kv_heads=kv_heads,
        length=length,
        head_dim=head_dim,
        documents=document_lengths(length, mean),
        peers=(FLEX, FLASH_4, PORTABLE),
        targets=targets,
    )


def _documents(shapes: Shapes) -> tuple[Case, ...]:
    if shapes == "tiny":
        return (_packed(160, 40, 4, 2, 16),)
    decisive = (_packed(65536, 2048, 16, 16, 128), _packed(16384, 512, 12, 12, 64))
    if shapes == "quick":
        return decisive
    return (
        *decisive,
        _packed(65536, 2048, 16, 4, 128),
        _packed(65536, 2048, 12, 12, 64),
        _packed(16384, 512, 16, 16, 128),
    )


# -- block-sparse layouts ----------------------------------------------------------------------------------------------


def _sparse(shapes: Shapes) -> tuple[Case, ...]:
    tiny = shapes == "tiny"
    batch, heads, length, head_dim, block = (1, 2, 128, 16, 16) if tiny else (2, 16, 8192, 128, 128)
    n_blocks = length // block
    dense = f"dense b{batch} h{heads} s{length} d{head_dim}"
    patterns = {"butterfly": butterfly(n_blocks), "bigbird": bigbird(n_blocks)}
    for share in (1, 2, 4, 8):
        patterns[f"random 1/{share}"] = random_blocks(n_blocks, n_blocks // share)

    def case(label: str, pattern: Pattern) -> Case:
        density = sum(map(sum, pattern)) / n_blocks**2
        bound = density + 0.05
        text = f"time(s) / time(dense) ≤ s + 0.05 at {length // 1024}K, s = {density:.3f}"
        targets = [Target(text=text, quantity=each, baseline=dense, at_most=bound) for each in TIMES]
        return Case(
            name=f"{label} b{batch} h{heads} s{length} d{head_dim}",
            spec=AttentionSpec(causal=False, block_sparse=BlockLayout(pattern, block, block)),
            batch=batch,
            heads=heads,
            kv_heads=heads,
            length=length,
            head_dim=head_dim,
            peers=(FLEX,),
            targets=(*targets, *(_no_slower_than_flex(quantity) for quantity in ("forward", "backward"))),
        )

    first = Case(
        name=dense,
        spec=AttentionSpec(causal=False),
        batch=batch,
        heads=heads,
        kv_heads=heads,
        length=length,
        head_dim=head_dim,
        peers=(FLASH,),
    )
    kept = patterns if shapes == "full" else {label: patterns[label] for label in ("butterfly", "random 1/4")}
    if shapes == "quick":
        kept = {label: patterns[label] for label in ("butterfly", "bigbird", "random 1/2", "random 1/8")}
    return (first, *(case(label, pattern) for label, pattern in kept.items()))


# -- dilation ----------------------------------------------------------------------------------------------------------


def _dilation(shapes: Shapes) -> tuple[Case, ...]:
    each_side, heads, length, head_dim = (8, 2, 128, 16) if shapes == "tiny" else (256, 12, 16384, 64)
    return tuple(
        Case(
            name=f"window {each_side}+{each_side} dilation {dilation} h{heads} s{length} d{head_dim}",
            spec=AttentionSpec(causal=False, window=Window.symmetric(each_side, dilation)),
            heads=heads,
            kv_heads=heads,
            length=length,
            head_dim=head_dim,
            peers=(FLEX,),
            targets=tuple(_no_slower_than_flex(quantity) for quantity in ("forward", "backward")),
        )
        for dilation in ((1, 4) if shapes == "tiny" else (1, 2, 4))
    )


_MAKERS: dict[SuiteName, Callable[[Shapes], tuple[Case, ...]]] = {
    "attention": _attention,
    "window": _window,
    "documents": _documents,
    "sparse": _sparse,
    "dilation": _dilation,
}


def suite(name: SuiteName, shapes: Shapes) -> tuple[Case, ...]:
    """The cases of a suite; a smoke test (`tiny`) answers no target."""
    cases = _MAKERS[name](shapes)
    return tuple(replace(case, targets=()) for case in cases) if shapes == "tiny" else cases
