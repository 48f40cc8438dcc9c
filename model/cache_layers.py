"""The parts that caches are made of: storage, where new tokens go in it, and what attention then reads from it.

Legend: B rows, T new tokens, S keys that attention reads, G key/value heads, K head dim; storage has N places (rows or
pages) of L slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.caching import AS_STORED, CachedKeys
from longspan.kernels.attention.quantize import dequantize, quantize

from .cache_plan import CacheBytes, Storage
from .config import DecoderConfig

Index = tuple[slice | Tensor | int, slice | Tensor | int]  # of the first two dimensions
EVERYTHING: Index = (slice(None), slice(None))


# -- the tokens of one call -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """What the context of a call says of its new tokens.

    counts         how many of the T are real in each row; empty: the host does not look (fixed shapes)
    documents_BT   their ids, flags_BT: which of them are global; None: nothing said, or no layer asks
    """

    counts: tuple[int, ...]
    documents_BT: Tensor | None
    flags_BT: Tensor | None

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Whether documents and flags are given: the same in every call over the same tokens."""
        return self.documents_BT is not None, self.flags_BT is not None

    def must_continue(self, before: tuple[bool, bool] | None) -> None:
        """Raises ValueError where earlier calls (None: there were none) and this one differ in what they give."""
        for name, was, now in zip(("q_documents", "is_global"), before or self.kinds, self.kinds, strict=True):
            if was != now:
                here, there = ("with", "without") if now else ("without", "with")
                raise ValueError(
                    f"context.{name}: this call comes {here} it, but the tokens in the cache came {there}; "
                    "give it in every call or in none"
                )


class ContextReader:
    """Checks the contexts of calls over a cache and takes from them what the model's layers ask for."""

    def __init__(self, config: DecoderConfig, *, keeps_flags: bool = True) -> None:
        specs = [group.spec for layer in range(config.n_layers) for group in config.head_groups(layer)]
        self._documents = any(spec.documents for spec in specs)
        self._flags = any(spec.global_tokens for spec in specs)
        self._keeps_flags = keeps_flags

    def read(self, n_tokens: int, context: AttentionContext, batch: int, *, fixed_shapes: bool) -> Given:
        """Raises ValueError for what a cache cannot take: see `KeyValueCache.begin`."""
        if n_tokens < 1:
            raise ValueError(f"a call of {n_tokens} tokens: a cache takes at least one")
        for name in ("q_positions", "kv_positions", "page_table", "kv_documents"):
            if getattr(context, name) is not None:
                raise ValueError(
                    f"context.{name} with a cache: the cache knows where its tokens stand and what they belong to; a "
                    "context says q_documents, is_global and kv_lengths of the new tokens (and positions_BT= of the "
                    "model sets their position encoding)"
                )
        shapes = {"q_documents": (n_tokens,), "is_global": (n_tokens,), "kv_lengths": ()}
        for name, shape in shapes.items():
            tensor = getattr(context, name)
            if tensor is not None and (tensor.shape[1:] != shape or tensor.shape[0] not in (1, batch)):
                raise ValueError(
                    f"context.{name} has shape {list(tensor.shape)}; with a cache it describes the new tokens, "
                    f"{[batch, *shape]}"
                )
        if self._flags and not self._keeps_flags and context.is_global is not None:
            raise ValueError(
                "context.is_global: this cache forgets keys outside of the window, global ones too; make it with "
                "globals_possible=True (or cache='contiguous')"
            )
        documents_BT, flags_BT = (
            tensor.expand(batch, n_tokens) if asked and tensor is not None else None
            for asked, tensor in ((self._documents, context.q_documents), (self._flags, context.is_global))
        )
        if not fixed_shapes:
            return Given(_counts(context.kv_lengths, n_tokens, batch), documents_BT, flags_BT)
        if n_tokens != 1 or context.kv_lengths is not None:
            padded = " with padding" if context.kv_lengths is not None else ""
            raise ValueError(f"a step with fixed shapes takes one token in every row, not {n_tokens}{padded}")
        return Given((), documents_BT, flags_BT)


def _counts(kv_lengths: Tensor | None, n_tokens: int, batch: int) -> tuple[int, ...]:
    if kv_lengths is None:
        return (n_tokens,) * batch
    counts = tuple(int(count) for count in kv_lengths.expand(batch).tolist())
    if min(counts) < 0 or max(counts) > n_tokens:
        raise ValueError(f"context.kv_lengths={list(counts)}: of {n_tokens} new tokens, each row has 0 … {n_tokens}")
    return counts


class NewTokens:
    """T new tokens in each of B rows; row b has `counts[b]` real ones, at positions `starts[b]` and on.

    lengths_B      tokens of each row before the call, on the device; ends_B: after it
    positions_BT   [B or 1, T]; padding repeats the position of its row's last token
    fixed          the host's numbers play no part (there are none), T is 1
    uniform        rows stand at one place, known on the host, and have no padding
    """

    def __init__(self, n_tokens: int, starts: tuple[int, ...], given: Given, lengths_B: Tensor) -> None:
        self.n_tokens, self.starts, self.given, self.lengths_B = n_tokens, starts, given, lengths_B
        self.counts = given.counts
        self.fixed = not starts
        self.uniform = len(set(starts)) == 1 and set(self.counts) == {n_tokens}
        self.ends = tuple(start + count for start, count in zip(starts, self.counts))
        device = lengths_B.device
        if self.uniform:
            self.ends_B = lengths_B + n_tokens
            self.positions_BT = torch.arange(starts[0], starts[0] + n_tokens, device=device)[None]
        elif n_tokens == 1 and all(self.counts):
            self.ends_B = lengths_B + 1
            self.positions_BT = lengths_B[:, None].clone()  # `finish` moves the lengths themselves
        else:
            self.ends_B = torch.tensor(self.ends, device=device)
            last_B1 = (self.ends_B[:, None] - 1).clamp(min=0)
            self.positions_BT = torch.minimum(lengths_B[:, None] + torch.arange(n_tokens, device=device), last_B1)

    @property
    def reach(self) -> int:
        return max(self.ends)

    def real(self) -> Tensor:
        """[B, T] bool: no padding."""
        counts_B1 = (self.ends_B - self.lengths_B)[:, None]
        return torch.arange(self.n_tokens, device=counts_B1.device)[None] < counts_B1

    def context(self, *, kv_positions: Tensor | None = None, kv_lengths: Tensor | None = None) -> AttentionContext:
        return AttentionContext(q_positions=self.positions_BT, kv_positions=kv_positions, kv_lengths=kv_lengths)


# -- storage ----------------------------------------------------------------------------------------------------------


class Read(Enum):
    """What attention reads after the new tokens are written."""

    STORED = "the slots up to a limit, the new tokens among them"
    JOINED = "the slots up to a limit as they were before, then the new tokens"
    NEW = "the new tokens alone"
    PAGES = "the pages of a table, one after the other, up to a limit"


@dataclass(frozen=True, slots=True)
class Exchange:
    """How tokens [B, T, …] enter storage [N, L, …], and what comes back: the same for keys, scales, ids and flags.

    source, target   which tokens go to which slots
    limit            of the slots that are read; None: all
    table_BP         of `Read.PAGES`
    """

    source: Index
    target: Index
    read: Read = Read.STORED
    limit: int | None = None
    table_BP: Tensor | None = None

    # Not __call__: torch 2.11's tracer loses the fields of a frozen dataclass there.
    def swap(self, held_NL: Tensor, new_BT: Tensor) -> Tensor:
        before = self._joined(held_NL, new_BT)
        held_NL[self.target] = new_BT[self.source]
        return self._read(held_NL, new_BT) if before is None else before

    def swap_heads(self, held_NGL: Tensor, new_BTG: Tensor) -> Tensor:
        """`swap` for storage with heads before slots. Written without a transposed view: torch.compile would copy the
        whole storage where it cannot see that a write may happen in place."""
        held_NLG = held_NGL.transpose(1, 2)
        before = self._joined(held_NLG, new_BTG)
        (place, slot), new = self.target, new_BTG[self.source]
        if isinstance(slot, slice):
            held_NLG[place, slot] = new
        else:
            held_NGL[place, :, slot] = new
        return self._read(held_NLG, new_BTG) if before is None else before

    def _joined(self, held_NL: Tensor, new_BT: Tensor) -> Tensor | None:
        return torch.cat([held_NL[:, : self.limit], new_BT], dim=1) if self.read is Read.JOINED else None

    def _read(self, held_NL: Tensor, new_BT: Tensor) -> Tensor:
        if self.read is Read.NEW:
            return new_BT
        if self.table_BP is not None:
            held_NL = held_NL[self.table_BP].flatten(1, 2)
        return held_NL if self.limit is None else held_NL[:, : self.limit]


class Store:
    """Keys and values of some layers, head-major in memory, so that one head's keys are contiguous: a tensor
    [N, G, L, K] for each layer (one for all could not be written in place by torch.compile); with 8-bit storage plain
    bytes (not every device can move float8 by index) and fp32 scales [N, G, L]."""

    def __init__(
        self,
        layers: int,
        places: int,
        slots: int,
        heads: int,
        dim: int,
        *,
        dtype: torch.dtype,
        storage: Storage | None,
        device: torch.device | str,
    ) -> None:
        self.eight_bit = storage is not None
        self.dtype = dtype if storage is None else getattr(torch, storage)
        kept = torch.int8 if self.eight_bit else dtype
        shape = (places, heads, slots)

        def keep() -> tuple[Tensor, ...]:
            return tuple(torch.zeros(*shape, dim, dtype=kept, device=device) for _ in range(layers))

        def scales() -> tuple[Tensor, ...]:
            return tuple(torch.ones(shape, device=device) for _ in range(layers if self.eight_bit else 0))

        self.keys, self.values, self.k_scales, self.v_scales = keep(), keep(), scales(), scales()

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys, *self.values, *self.k_scales, *self.v_scales)

    def nbytes(self, *others: Tensor) -> CacheBytes:
        """Of this and of tensors that keep the books."""
        return CacheBytes(
            keys_values=sum(x.nbytes for x in (*self.keys, *self.values)),
            scales=sum(x.nbytes for x in (*self.k_scales, *self.v_scales)),
            bookkeeping=sum(x.nbytes for x in others),
        )

    def append(
        self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, exchange: Exchange, context: AttentionContext
    ) -> CachedKeys:
        """Attention always reads what was stored, rounding included, so that every split of a prompt gives the same."""
        if not self.eight_bit:
            k_BSGK = exchange.swap_heads(self.keys[layer], k_BTGK.to(self.dtype))
            v_BSGK = exchange.swap_heads(self.values[layer], v_BTGK.to(self.dtype))
            return CachedKeys(k_BSGK, v_BSGK, context)
        k_BSGK, k_scale_BSG = self._rounded(self.keys[layer], self.k_scales[layer], k_BTGK, exchange)
        v_BSGK, v_scale_BSG = self._rounded(self.values[layer], self.v_scales[layer], v_BTGK, exchange)
        if k_BTGK.shape[1] <= AS_STORED:
            return CachedKeys(k_BSGK, v_BSGK, context, k_scale_BSG, v_scale_BSG)
        k_BSGK = dequantize(k_BSGK, k_scale_BSG, k_BTGK.dtype)
        return CachedKeys(k_BSGK, dequantize(v_BSGK, v_scale_BSG, v_BTGK.dtype), context)

    def _rounded(
        self, held_NGLK: Tensor, scales_NGL: Tensor, new_BTGK: Tensor, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        new_BTGK, scale_BTG = quantize(new_BTGK, self.dtype)
        read = exchange.swap_heads(held_NGLK, new_BTGK.view(torch.int8)).view(self.dtype)
        return read, exchange.swap_heads(scales_NGL, scale_BTG)


class Marks:
    """What a cache remembers of past tokens beside keys and values: document ids and global flags [N, L], where some
    layer needs them."""

    def __init__(
        self, places: int, slots: int, *, documents: bool, global_tokens: bool, device: torch.device | str
    ) -> None:
        self.documents_NL = torch.zeros(places, slots, dtype=torch.int64, device=device) if documents else None
        self.flags_NL = torch.zeros(places, slots, dtype=torch.bool, device=device) if global_tokens else None

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.documents_NL, self.flags_NL) if x is not None]

    def write(self, new: NewTokens, exchange: Exchange, context: AttentionContext) -> AttentionContext:
        """Stores the marks of the new tokens and completes `context` with those of all that attention reads."""
        if self.documents_NL is not None and new.given.documents_BT is not None:
            context.q_documents = new.given.documents_BT
            context.kv_documents = exchange.swap(self.documents_NL, new.given.documents_BT)
        if self.flags_NL is not None and new.given.flags_BT is not None:
            context.is_global = exchange.swap(self.flags_NL, new.given.flags_BT)
        return context


# -- rings ------------------------------------------------------------------------------------------------------------


def ring_slot(positions: Tensor, slots: int, sinks: int) -> Tensor:
    """Where a ring keeps each position: the first `sinks` for good, the others in turn."""
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % (slots - sinks))


def ring_positions(lengths_B: Tensor, slots: int, sinks: int) -> Tensor:
    """[B, slots] the position that each slot of a ring holds in a row of that length; -1: none yet.

    A function of the length alone, so there is no record of positions that could go stale.
    """
    slot = torch.arange(slots, device=lengths_B.device)[None]
    turn = slots - sinks
    last = lengths_B[:, None] - sinks - 1  # of the positions that take turns, counted from the first of them
    newest = last - (last - (slot - sinks)) % turn  # the newest of those that lie in this slot
    position = torch.where(slot < sinks, slot, sinks + newest)
    held = torch.where(slot < sinks, slot < lengths_B[:, None], newest >= 0)
    return torch.where(held, position, -1)


def ring_writes(new: NewTokens, slots: int, sinks: int = 0) -> tuple[Index, tuple[Tensor, Tensor]]:
    """(source, target) of the tokens that `slots` slots keep: the real ones and, of more than fit, the last. Without
    sinks and overflow, slot = position."""
    device = new.positions_BT.device
    if new.n_tokens == 1 and all(new.counts):
        rows_B = torch.arange(new.lengths_B.shape[0], device=device)
        return (slice(None), 0), (rows_B, ring_slot(new.lengths_B, slots, sinks))
    starts_B1, counts_B1 = torch.tensor(new.starts)[:, None], torch.tensor(new.counts)[:, None]
    column = torch.arange(new.n_tokens)[None]
    position_BT = starts_B1 + column
    newest = position_BT >= starts_B1 + counts_B1 - (slots - sinks)
    row, column = ((column < counts_B1) & ((position_BT < sinks) | newest)).nonzero(as_tuple=True)
    slot = ring_slot(position_BT[row, column], slots, sinks).to(device)
    row, column = row.to(device), column.to(device)
    return (row, column), (row, slot)


# -- memory -----------------------------------------------------------------------------------------------------------


def check_memory(n_bytes: int, device: torch.device, what: str) -> None:
    """Raises ValueError when a device has less than `n_bytes` free; devices that do not tell are believed."""
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise ValueError(
            f"{what} takes {n_bytes / 2**30:.2f} GiB, but {device} has {free / 2**30:.2f} GiB free; ask for fewer or "
            "shorter sequences, storage='int8', or a model with fewer key/value heads"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has left; None where it does not tell. On a CPU, what the machine has and what the control
    groups of this process (a container's) leave it, whichever is less."""
    if device.type == "cuda":
        # What torch keeps for itself is free for us, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    machine = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
    told = [free for free in (machine, *_left_by_groups()) if free is not None]
    return min(told, default=None)


def _left_by_groups() -> Iterator[int]:
    """What each control group that this process is in has left: of version 2, memory.max - memory.current of its own
    and every one above; of version 1, of the memory controller's. File pages that can be dropped count as free."""
    if not _GROUPS.exists():
        return
    for line in _GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUP_ROOT if not controllers else _GROUP_ROOT / "memory"
        limit, used, droppable = _GROUP_FILES[bool(controllers)]
        own = root / path.lstrip("/")
        # A container sees its own group at the root, under whatever path the host knows it by.
        for group in (own, *own.parents):
            if group.is_relative_to(root) and (free := _left(group, limit, used, droppable)) is not None:
                yield free


def _left(group: Path, limit: str, used: str, droppable: str) -> int | None:
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or no limit
        return None
    return None if not most.isdigit() else max(0, int(most) - now + int(stat.get(droppable, 0)))


# Linux
_MEMINFO = Path("/proc/meminfo")
_GROUPS, _GROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
